"""What the decoding kernel asks of the machine: PTX on a GPU, the same in plain Python in the simulator.

In the simulator an address of global memory is one of the host, one of shared memory counts from the start of
the block's, and the 32 Python threads of a warp meet where an instruction belongs to the whole warp.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from cuda_backend._numba import SIMULATOR
from cuda_backend.ptx import barrier, bulk, copy, grid, mma, registers, turns

__all__ = [
    "bulk_load",
    "exchange_float",
    "expect_bytes",
    "fetch_increment",
    "from_lane",
    "initialise",
    "largest_pair",
    "largest_word",
    "least_pair",
    "let_next_grid_start",
    "load_8",
    "load_16",
    "load_float",
    "load_half",
    "load_shared_16",
    "load_shared_float",
    "load_shared_word",
    "load_word",
    "look_up",
    "low_bytes",
    "meet",
    "pack_pair",
    "permute",
    "product",
    "publish_initialisation",
    "quotient",
    "shared_address",
    "store_8",
    "store_float",
    "store_half",
    "store_shared_8",
    "store_shared_float",
    "store_shared_word",
    "subtract_pair",
    "take_number",
    "uniform",
    "unpack_high",
    "unpack_low",
    "wait",
    "wait_for_earlier_grids",
    "wait_for_turn",
]

WARP = 32
Pair = Callable[..., Any]


class _Warp:
    """Where the threads of a warp exchange what they hold."""

    def __init__(self) -> None:
        self.given: list[Any] = [None] * WARP
        self.found: Any = None
        self.function: Callable[[list[Any]], Any] = lambda given: given
        self.met = threading.Barrier(WARP, action=self._act, timeout=60)
        self.read = threading.Barrier(WARP, timeout=60)

    def _act(self) -> None:
        self.found = self.function(self.given)

    def together(self, function: Callable[[list[Any]], Any], lane: int, value: Any) -> Any:
        """Return what `function` makes of the values of all lanes."""
        self.given[lane], self.function = value, function
        self.met.wait()
        found = self.found
        self.read.wait()
        return found


_lock = threading.Lock()
_warps: WeakKeyDictionary[Any, dict[int, _Warp]] = WeakKeyDictionary()
_memories: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _block() -> Any:
    return threading.current_thread()._manager  # type: ignore[attr-defined]


def _as_warp(function: Callable[[list[Any]], Any], value: Any) -> Any:
    """Return what `function` makes of the values of the lanes, and this thread's lane."""
    number = int(threading.current_thread().threadIdx.x)  # type: ignore[attr-defined]
    with _lock:
        warp = _warps.setdefault(_block(), {}).setdefault(number // WARP, _Warp())
    return warp.together(function, number % WARP, value), number % WARP


def _at(address: Any, size: int) -> Any:
    """Return memory of the host as bytes."""
    memory: Any = (ctypes.c_char * size).from_address(int(address))
    return np.frombuffer(memory, np.uint8)


def _shared(address: Any, size: int) -> Any:
    memory = _memories[_block()]
    start = int(address)
    if start % size or not 0 <= start <= memory.size - size:
        raise IndexError(f"shared memory: {size} bytes at {start} of {memory.size}")
    return memory[start : start + size]


def _shared_address(shared: Any) -> Any:
    with _lock:
        _memories[_block()] = np.asarray(shared).view(np.uint8)
    return np.uint32(0)


def _loader(count: int, memory: Callable[[Any, int], Any]) -> Callable[..., None]:
    def load(words: Any, first: Any, address: Any) -> None:
        if int(address) % (4 * count):
            raise IndexError(f"a load of {4 * count} bytes at {int(address)}")
        words[int(first) : int(first) + count] = memory(address, 4 * count).view(words.dtype)

    return load


def _load_word(address: Any) -> Any:
    return _at(address, 4).view(np.int32)[0]


def _load_float(address: Any) -> Any:
    return _at(address, 4).view(np.float32)[0]


def _load_half(address: Any) -> Any:
    return np.uint32(_at(address, 2).view(np.uint16)[0])


def _store_half(address: Any, bits: Any) -> None:
    _at(address, 2).view(np.uint16)[0] = np.uint16(int(bits) & 0xFFFF)


def _load_shared_float(address: Any) -> Any:
    return _shared(address, 4).view(np.float32)[0]


def _store_shared_float(address: Any, value: Any) -> None:
    _shared(address, 4).view(np.float32)[0] = value


def _store_shared_word(address: Any, value: Any) -> None:
    _shared(address, 4).view(np.uint32)[0] = np.uint32(int(value) & 0xFFFFFFFF)


def _store_shared_8(address: Any, a: Any, b: Any) -> None:
    _shared(address, 8).view(np.uint32)[:] = a, b


def _permute(low: Any, high: Any, selector: Any) -> Any:
    sources = int(low) | int(high) << 32
    found = 0
    for i in range(4):
        chosen = int(selector) >> 4 * i & 0xF
        byte = sources >> 8 * (chosen & 7) & 0xFF
        if chosen & 8:  # its sign in all bits
            byte = 0xFF * (byte >> 7)
        found |= byte << 8 * i
    return np.uint32(found)


def _look_up(base: Any, place: Any, word: Any, selector: Any) -> Any:
    return _shared(int(_permute(place, word, selector)) + int(base), 4).view(np.uint32)[0]


def _numbers(kind: str, words: Any) -> Any:
    """Return the pairs of narrow numbers in words as float32."""
    halves = np.asarray(words, np.uint32)[..., None] >> np.array([0, 16], np.uint32) & np.uint32(0xFFFF)
    if kind == "f16":
        return halves.astype(np.uint16).view(np.float16).astype(np.float32)
    return (halves << np.uint32(16)).view(np.float32)


def _float_to_brain(x: Any) -> int:
    """Return the bits of bfloat16 nearest to a finite float32, to even."""
    bits = int(x.view(np.uint32))
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def _packed(kind: str, low: Any, high: Any) -> Any:
    if kind == "f16":
        with np.errstate(over="ignore"):
            low, high = (int(np.float16(x).view(np.uint16)) for x in (low, high))
    else:
        low, high = (int(_float_to_brain(np.float32(x))) for x in (low, high))
    return np.uint32(low | high << 16)


def _simulated_pack(kind: str) -> Pair:
    return lambda low, high: _packed(kind, low, high)


def _simulated_unpack(kind: str) -> Pair:
    return lambda word: _numbers(kind, word)[0]


def _simulated_subtract(kind: str) -> Pair:
    def subtract(x: Any, y: Any) -> Any:
        return _packed(kind, *(_numbers(kind, x) - _numbers(kind, y)))

    return subtract


def _simulated_choice(choose: Any) -> Callable[[str], Pair]:
    def of(kind: str) -> Pair:
        return lambda x, y: _packed(kind, *choose(_numbers(kind, x), _numbers(kind, y)))

    return of


def _simulated_product(kind: str) -> Pair:
    """Return D = A B + C for one warp, from the layouts that the PTX ISA draws."""

    def whole(given: list[Any]) -> Any:
        a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
        for lane, (words, sums) in enumerate(given):
            g, t = lane // 4, lane % 4
            pairs = _numbers(kind, words)
            for i in range(4):
                a[g + 8 * (i % 2), 2 * t + 8 * (i // 2) :][:2] = pairs[i]
            for i in range(2):
                b[2 * t + 8 * i :, g][:2] = pairs[4 + i]
                c[g + 8 * i, 2 * t :][:2] = sums[2 * i : 2 * i + 2]
        return (a @ b + c).astype(np.float32)

    def product(sums: Any, first: Any, *words: Any) -> None:
        mine = sums[int(first) : int(first) + 4]
        found, lane = _as_warp(whole, (words, mine.copy()))
        g, t = lane // 4, lane % 4
        mine[:] = *found[g, 2 * t : 2 * t + 2], *found[g + 8, 2 * t : 2 * t + 2]

    return product


def _from_lane(value: Any, lane: Any) -> Any:
    """Exchange once for the lanes that are asked for in turn, from 0 on: a meeting takes milliseconds."""
    thread: Any = threading.current_thread()
    if int(lane) == 0:
        thread.given, _ = _as_warp(list, value)
    if thread.given[int(thread.threadIdx.x) % WARP] != value:
        raise ValueError("from_lane: the value has changed since lane 0 was asked for")
    return thread.given[int(lane)]


def _exchange_float(value: Any, lane_mask: Any) -> Any:
    given, lane = _as_warp(list, value)
    return given[lane ^ int(lane_mask)]


def _load_shared_word(address: Any) -> Any:
    return _shared(address, 4).view(np.int32)[0]


def _bulk_load(target: Any, source: Any, size: Any, _barrier: Any) -> None:
    if int(target) % 16 or int(source) % 16 or int(size) % 16:
        raise IndexError(f"a copy of {size} bytes from {source} to {target}")
    for place in range(0, int(size), 16):
        _shared(int(target) + place, 16)[:] = _at(int(source) + place, 16)


def _meet() -> None:
    _as_warp(list, 0)


def _nothing(*_: Any) -> None:
    """What is done before it is asked for has not to be waited for."""


def _largest_word(word: Any) -> Any:
    return np.uint32(max(map(int, _as_warp(list, word)[0])))


def _low_bytes(*words: Any) -> Any:
    return np.uint32(sum((int(word) & 0xFF) << 8 * i for i, word in enumerate(words)))


def _store_float(address: Any, value: Any) -> None:
    _at(address, 4).view(np.float32)[0] = value


def _store_8(address: Any, a: Any, b: Any) -> None:
    _at(address, 8).view(np.uint32)[:] = a, b


def _simulated_unpack_high(kind: str) -> Pair:
    return lambda word: _numbers(kind, word)[1]


def _take_number(address: Any, bound: Any) -> Any:
    with _lock:
        word = _at(address, 4).view(np.uint32)
        old = int(word[0])
        word[0] = 0 if old >= int(bound) else old + 1
    return np.int32(old)


def _wait_for_turn(address: Any, least: Any) -> None:
    """Blocks of the simulator come one after the other: what has not been done before is never done."""
    found = _at(address, 4).view(np.int32)[0]
    if found < least:
        raise RuntimeError(f"a block waits for turn {least}, and it is that of {found}")


def _quotient(x: Any, y: Any) -> Any:
    return np.int32(int(x) // int(y))


def _uniform(value: Any) -> Any:
    return value


shared_address: Any = _shared_address if SIMULATOR else copy.shared_address
load_8: Any = _loader(2, _at) if SIMULATOR else copy.load_8
load_16: Any = _loader(4, _at) if SIMULATOR else copy.load_16
load_shared_16: Any = _loader(4, _shared) if SIMULATOR else copy.load_shared_16
load_word: Any = _load_word if SIMULATOR else copy.load_word
load_float: Any = _load_float if SIMULATOR else copy.load_float
load_half: Any = _load_half if SIMULATOR else copy.load_half
store_half: Any = _store_half if SIMULATOR else copy.store_global_half
load_shared_float: Any = _load_shared_float if SIMULATOR else copy.load_shared_float
store_shared_float: Any = _store_shared_float if SIMULATOR else copy.store_shared_float
store_shared_word: Any = _store_shared_word if SIMULATOR else copy.store_shared_word
store_shared_8: Any = _store_shared_8 if SIMULATOR else copy.store_shared_8
permute: Any = _permute if SIMULATOR else mma.permute
look_up: Any = _look_up if SIMULATOR else mma.look_up
uniform: Any = _uniform if SIMULATOR else registers.uniform
product: Any = _simulated_product if SIMULATOR else mma.product
subtract_pair: Any = _simulated_subtract if SIMULATOR else mma.subtract_pair
pack_pair: Any = _simulated_pack if SIMULATOR else registers.pack_pair
unpack_low: Any = _simulated_unpack if SIMULATOR else registers.unpack_low
from_lane: Any = _from_lane if SIMULATOR else registers.from_lane
quotient: Any = _quotient if SIMULATOR else registers.quotient
exchange_float: Any = _exchange_float if SIMULATOR else registers.exchange_float
load_shared_word: Any = _load_shared_word if SIMULATOR else copy.load_shared_word
bulk_load: Any = _bulk_load if SIMULATOR else bulk.load
initialise: Any = _nothing if SIMULATOR else barrier.initialise
publish_initialisation: Any = _nothing if SIMULATOR else barrier.publish_initialisation
expect_bytes: Any = _nothing if SIMULATOR else barrier.expect_bytes
wait: Any = _nothing if SIMULATOR else barrier.wait
meet: Any = _meet if SIMULATOR else barrier.meet_warp
let_next_grid_start: Any = _nothing if SIMULATOR else grid.let_next_grid_start
wait_for_earlier_grids: Any = _nothing if SIMULATOR else grid.wait_for_earlier_grids
largest_word: Any = _largest_word if SIMULATOR else registers.largest_word
low_bytes: Any = _low_bytes if SIMULATOR else registers.low_bytes
store_float: Any = _store_float if SIMULATOR else copy.store_global_float
store_8: Any = _store_8 if SIMULATOR else copy.store_global_8
unpack_high: Any = _simulated_unpack_high if SIMULATOR else registers.unpack_high
fetch_increment: Any = _take_number if SIMULATOR else copy.fetch_increment
largest_pair: Any = _simulated_choice(np.maximum) if SIMULATOR else registers.largest_pair
least_pair: Any = _simulated_choice(np.minimum) if SIMULATOR else registers.least_pair
take_number: Any = _take_number if SIMULATOR else turns.take_number
wait_for_turn: Any = _wait_for_turn if SIMULATOR else turns.wait_for_turn
