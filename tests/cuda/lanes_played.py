"""Blocks of a grid played by Python threads, one for each lane: warps that exchange, clusters, atomics.

For the parts of a kernel that work thread by thread.  Global memory is that of the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.cuda.hopper_machine import KINDS, memory

PATIENCE = 60.0
ROOM = 1 << 18


class Block:
    """Shared memory of a block, who meets whom, and arrays by the order in which threads ask for them."""

    def __init__(self, number: int, threads: int) -> None:
        self.number = number
        self.shared = np.full(ROOM, 0xA5, np.uint8)
        self.arrays: list[Any] = []
        self.starts: list[int] = []
        self.barriers = {0: threading.Barrier(threads, timeout=PATIENCE)}
        self.warps = [threading.Barrier(32, timeout=PATIENCE) for _ in range(threads // 32)]
        self.slots: list[Any] = [0] * threads
        self.arrived: dict[int, int] = {}
        self.expected: dict[int, int] = {}


class Lanes:
    """A grid of `blocks` blocks of `threads` threads, in clusters of `cluster`."""

    def __init__(self, blocks: int, threads: int, cluster: int = 1) -> None:
        self.blocks = [Block(number, threads) for number in range(blocks)]
        self.threads, self.cluster = threads, cluster
        self.own, self.lock = threading.local(), threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.arrivals = [0] * (blocks // cluster)
        self.problems: list[BaseException] = []

    def run(self, kernel: Callable[[], None]) -> None:
        """Run the kernel on all threads until all have ended."""

        def play(block: Block, thread: int) -> None:
            self.own.block, self.own.thread, self.own.asked, self.own.phase = block, thread, 0, 0
            try:
                with np.errstate(all="ignore"):
                    kernel()
            except BaseException as error:
                self.problems.append(error)
                for each in self.blocks:
                    for barrier in (*each.barriers.values(), *each.warps):
                        barrier.abort()
                with self.changed:
                    self.changed.notify_all()

        each = [
            threading.Thread(target=play, args=(block, thread), daemon=True)
            for block in self.blocks
            for thread in range(self.threads)
        ]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()
        if self.problems:
            raise next((p for p in self.problems if not isinstance(p, threading.BrokenBarrierError)),
                       self.problems[0])  # fmt: skip

    def warp(self, value: Any = 0) -> list[Any]:
        """Return what the lanes of this warp have brought."""
        block, thread = self.own.block, self.own.thread
        barrier = block.warps[thread // 32]
        block.slots[thread] = value
        barrier.wait()
        found = block.slots[thread // 32 * 32 :][:32]
        barrier.wait()
        return list(found)

    def install(self, monkeypatch: pytest.MonkeyPatch, modules: Sequence[ModuleType]) -> None:
        """Let the device functions that `modules` build run here."""
        nothing = SimpleNamespace(
            acquire=lambda *_: None, load=lambda *_: None, wait_for_earlier_grids=lambda: None,
            let_next_grid_start=lambda: None,
        )  # fmt: skip
        families = {
            "barrier": self._barrier(), "cluster": self._cluster(), "copy": self._copy(),
            "cuda": self._cuda(), "registers": self._registers(), "turns": self._turns(),
            "matrix_copy": nothing, "grid": nothing,
            "device_function": lambda function: function,
        }  # fmt: skip
        for module in modules:
            for name, family in families.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, family)
            for name, value in list(vars(module).items()):  # made when the module was imported
                if getattr(value, "fn", None) is not None:
                    monkeypatch.setattr(module, name, value.fn)

    def _cuda(self) -> Any:
        own, lock = self.own, self.lock

        def shared_array(size: int, kind: Any) -> Any:
            block, number = own.block, own.asked
            own.asked += 1
            with lock:
                if number == len(block.arrays):
                    dtype = np.dtype(str(kind))
                    start = block.starts[-1] + block.arrays[-1].nbytes if block.starts else 0
                    start = -(-start // 16) * 16
                    held = block.shared[start:][: size * dtype.itemsize or None]
                    block.starts.append(start)
                    block.arrays.append(held.view(dtype) if size else held)
                return block.arrays[number]

        class Index:
            def __init__(self, find: Callable[[], int]) -> None:
                self._find = find

            @property
            def x(self) -> Any:
                return np.int32(self._find())

        def change(array: Any, index: Any, value: Any, how: Callable[[Any, Any], Any]) -> None:
            with lock:
                array[index] = how(array[index], value)

        return SimpleNamespace(
            threadIdx=Index(lambda: own.thread),
            blockIdx=Index(lambda: own.block.number),
            gridDim=Index(lambda: len(self.blocks)),
            local=SimpleNamespace(array=lambda size, kind: np.full(size, 77, np.dtype(str(kind)))),
            shared=SimpleNamespace(array=shared_array),
            syncthreads=lambda: own.block.barriers[0].wait(),
            popc=lambda word: np.int32(int(word).bit_count()),
            ffs=lambda word: np.int32((int(word) & -int(word)).bit_length()),
            atomic=SimpleNamespace(
                or_=lambda array, index, value: change(array, index, value, np.bitwise_or),
                max=lambda array, index, value: change(array, index, value, max),
            ),
        )

    def _barrier(self) -> Any:
        def named(number: int, threads: int) -> Any:
            for block in self.blocks:
                block.barriers[number] = threading.Barrier(threads, timeout=PATIENCE)
            return lambda: self.own.block.barriers[number].wait()

        def initialise(address: Any, count: int) -> None:
            self.own.block.expected[int(address)] = count

        def arrive(address: Any) -> None:
            with self.changed:
                arrived = self.own.block.arrived
                arrived[int(address)] = arrived.get(int(address), 0) + 1
                self.changed.notify_all()

        def wait(address: Any, parity: Any) -> None:
            block, place = self.own.block, int(address)
            self._wait_for(lambda: block.arrived.get(place, 0) // block.expected[place] & 1 != int(parity))

        return SimpleNamespace(
            named=named, warp=self.warp, arrive=arrive, initialise=initialise, wait=wait,
            expect_bytes=lambda *_: None, publish_initialisation=lambda: None, publish_stores=lambda: None,
        )  # fmt: skip

    def _wait_for(self, seen: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: seen() or self.problems, PATIENCE), "a wait does not end"
        if self.problems:
            raise threading.BrokenBarrierError

    def _cluster(self) -> Any:
        def mine() -> int:
            return int(self.own.block.number // self.cluster)

        def arrive() -> None:
            with self.changed:
                self.arrivals[mine()] += 1
                if self.arrivals[mine()] % (self.threads * self.cluster) == 0:
                    self.changed.notify_all()

        def wait() -> None:
            self.own.phase += 1
            wanted = self.own.phase * self.threads * self.cluster
            self._wait_for(lambda: self.arrivals[mine()] >= wanted)

        def there(address: Any, block: Any) -> Any:
            return self.blocks[mine() * self.cluster + int(block)].shared[int(address) :][:4]

        def both() -> None:
            arrive()
            wait()

        return SimpleNamespace(
            arrive=arrive, wait=wait, synchronise=both, leave=both,
            load_word=lambda address, block: there(address, block).view(np.int32)[0],
            load_float=lambda address, block: there(address, block).view(np.float32)[0],
        )  # fmt: skip

    def _turns(self) -> Any:
        def pass_turns(address: Any, count: Any) -> None:
            with self.lock:
                memory(int(address), 4).view(np.int32)[0] += int(count)

        return SimpleNamespace(
            word_seen=self._fresh, pass_turns=pass_turns, rest=lambda: None, to_the_copy_engine=lambda: None
        )

    def _fresh(self, address: Any) -> Any:
        if self.problems:
            raise threading.BrokenBarrierError
        return memory(int(address), 4).view(np.int32)[0]

    def _copy(self) -> Any:
        def load(kind: Any) -> Any:
            size = np.dtype(kind).itemsize

            def from_global(address: Any) -> Any:
                assert int(address) % size == 0
                return memory(int(address), size).view(kind)[0]

            return from_global

        def load_words(size: int) -> Any:
            def from_global(words: Any, first: Any, address: Any) -> None:
                assert int(address) % size == 0
                words[int(first) :][: size // 4] = memory(int(address), size).view(words.dtype)

            return from_global

        def load_shared(size: int) -> Any:
            def load(words: Any, first: Any, address: Any) -> None:
                assert int(address) % size == 0
                words[int(first) :][: size // 4] = self.own.block.shared[int(address) :][:size].view(
                    words.dtype
                )

            return load

        def put(address: Any, *values: Any) -> None:
            data = np.array([int(value) & 0xFFFFFFFF for value in values], np.uint32).view(np.uint8)
            assert int(address) % data.size == 0
            memory(int(address), data.size)[...] = data

        def place(address: Any, kind: Any) -> Any:
            size = np.dtype(kind).itemsize
            assert int(address) % size == 0
            return self.own.block.shared[int(address) :][:size].view(kind)

        def store_shared(kind: Any) -> Any:
            def store(address: Any, value: Any) -> None:
                place(address, kind)[0] = value

            return store

        def store_shared_byte(address: Any, value: Any) -> None:
            self.own.block.shared[int(address)] = int(value) & 0xFF

        def store_shared_8(address: Any, low: Any, high: Any) -> None:
            assert int(address) % 8 == 0
            place(address, np.uint32)[0], place(address + 4, np.uint32)[0] = low, high

        def counted(change: Callable[[int, int], int]) -> Any:
            def atomic(address: Any, value: Any) -> Any:
                with self.lock:
                    word = memory(int(address), 4).view(np.int32)
                    old = int(word[0])
                    word[0] = change(old, int(value))
                return np.int32(old)

            return atomic

        def store(kind: Any) -> Any:
            def to_global(address: Any, value: Any) -> None:
                size = np.dtype(kind).itemsize
                assert int(address) % size == 0
                memory(int(address), size).view(kind)[0] = value

            return to_global

        def shared_address(array: Any) -> Any:
            block = self.own.block
            return np.uint32(block.starts[next(i for i, a in enumerate(block.arrays) if a is array)])

        return SimpleNamespace(
            load_8=load_words(8), load_16=load_words(16), load_word=load(np.int32),
            load_float=load(np.float32), load_word_fresh=self._fresh,
            load_half=lambda address: np.uint32(load(np.uint16)(address)),
            load_byte=lambda address: np.int32(load(np.int8)(address)),
            store_global_word=put, store_global_8=put, store_global_16=put,
            store_global_half=store(np.uint16), store_global_byte=store(np.uint8),
            store_global_float=store(np.float32),
            load_shared_word=lambda address: place(address, np.int32)[0],
            store_shared_word=store_shared(np.int32), store_shared_float=store_shared(np.float32),
            store_shared_8=store_shared_8, store_shared_byte=store_shared_byte,
            load_shared_8=load_shared(8), load_shared_16=load_shared(16),
            load_shared_float=lambda address: place(address, np.float32)[0], shared_address=shared_address,
            fetch_add=counted(lambda old, value: old + value),
            fetch_increment=counted(lambda old, bound: 0 if old >= bound else old + 1),
        )  # fmt: skip

    def _registers(self) -> Any:
        def lane() -> int:
            return int(self.own.thread % 32)

        def below(value: Any, distance: Any) -> Any:
            found = self.warp(value)
            return np.int32(found[lane() - int(distance)] if lane() >= int(distance) else value)

        def uniform(value: Any) -> Any:
            return np.int32(self.warp(value)[0])

        def pack_pair(kind: str) -> Any:
            def pack(low: Any, high: Any) -> Any:
                with np.errstate(all="ignore"):
                    return np.array([low, high], np.float32).astype(KINDS[kind]).view(np.uint32)[0]

            return pack

        def unpack_low(kind: str) -> Any:
            return lambda word: np.array([word], np.uint32).view(KINDS[kind])[0].astype(np.float32)

        def low_bytes(*values: Any) -> Any:
            return np.uint32(sum((int(value) & 0xFF) << 8 * i for i, value in enumerate(values)))

        def maximum_halves(x: Any, y: Any) -> Any:
            left, right = (np.array([word], np.uint32).view(np.uint16) for word in (x, y))
            return np.maximum(left, right).view(np.uint32)[0]

        return SimpleNamespace(
            largest_word=lambda word: np.uint32(max(int(each) for each in self.warp(word))),
            word_below=below, uniform=uniform, pack_pair=pack_pair, unpack_low=unpack_low,
            from_lane=lambda value, other: np.uint32(self.warp(value)[int(other)]),
            low_bytes=low_bytes, maximum_halves=maximum_halves,
            quotient=lambda a, b: np.int32(int(a) // int(b)),
        )  # fmt: skip
