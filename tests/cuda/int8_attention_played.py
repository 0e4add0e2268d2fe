"""The Hopper kernel for attention in int8 played by one block of Python threads.

Barriers, copies and products are those of the PTX ISA, done at once where the hardware takes its time; tiles
lie in shared memory as they are, not swizzled.  So what is tested is the algorithm: which tiles, which stages
in which phase, masks, scales, maxima, and where outputs go.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest

from cuda_backend._numba import cuda
from cuda_backend.attention import int8_forward_hopper
from cuda_backend.attention.int8_call import portable_codes, prepare
from cuda_backend.launch import simulation
from cuda_backend.ptx import barrier, copy, grid, parameters, registers, tma, wgmma
from cuda_backend.weight_only import machine

MAPS = 1 << 20
PATIENCE = 60  # seconds: a barrier that nobody completes


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = int(arrivals)
        self.bytes = self.phase = 0
        self.changed = threading.Condition()

    def step(self, arrivals: int, count: int) -> None:
        """Take arrivals and bytes that are announced, or with a minus sign, that have come."""
        with self.changed:
            self.pending -= arrivals
            self.bytes += count
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.phase = self.arrivals, self.phase + 1
                self.changed.notify_all()

    def meet(self) -> None:
        """Arrive, and wait until the phase that this belongs to has ended."""
        parity = self.phase % 2  # which cannot end without this arrival
        self.step(1, 0)
        self.wait(parity)

    def wait(self, parity: int) -> None:
        """Wait until the phase of this parity has ended."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise RuntimeError("nobody completes a barrier")


class Turn(Barrier):
    """A named barrier of two warpgroups: one gives, the other takes; `left` are gives that nobody took."""

    def __init__(self) -> None:
        super().__init__(256)
        self.left = 0

    def give(self) -> None:
        with self.changed:
            self.left += 1
            if self.left > 128:
                raise RuntimeError("a turn is given twice")
            self.step(1, 0)

    def take(self) -> None:
        """Wait until the turn is given; it is gone when the last of the 256 has come."""
        with self.changed:
            self.left -= 1
        self.meet()


def attention(monkeypatch: pytest.MonkeyPatch, build: Any, q: Any, k: Any, v: Any, causal: Any) -> Any:
    """Return what the kernel made by `build` writes for NumPy arrays of float16."""
    coded = functools.partial(portable_codes, width=128)
    call = prepare("played", q, k, v, causal, None, True, (64, 128), None, coded=coded)
    B, Tq, H, Dv = call.shape
    Tk, kv_heads = k.shape[1], k.shape[2]
    variant = int8_forward_hopper.choose("f16", Dv, bool(causal))
    matrices = [
        (call.queries.words.owner.view(np.uint8), variant.block_m),
        (call.keys.words.owner.view(np.uint8), variant.block_n),
        (np.ascontiguousarray(v).view(np.uint8), variant.block_n),
    ]
    turns = _play(monkeypatch, matrices)
    out = np.full((B, Tq, H, Dv), np.nan, np.float16)
    counter = np.zeros(2, np.uint32)
    per_head, all_heads = -(-Tq // variant.block_m), B * H
    section = max(1, all_heads // 2) if causal else 1
    scales = [np.ascontiguousarray(codes.scale.owner) for codes in (call.queries, call.keys)]
    kernel = cuda.jit(build(variant))
    addresses = [array.ctypes.data for array in (out, *scales, counter)]
    numbers = (per_head * all_heads, per_head, section, H, all_heads, H // kv_heads, Tq, Tk, call.offset, Dv,
               scales[0].shape[2], scales[1].shape[2])  # fmt: skip
    with simulation():
        kernel[1, variant.threads, 0, 16](
            MAPS, *map(np.uint64, addresses), np.float32(call.scale * np.log2(np.e)), *map(np.int32, numbers)
        )
    assert not counter.any(), "the counter is 0 for the next launch"
    assert sorted(turn.left for turn in turns) == [0, 0, 0, 128], "a turn is given for each time taken"
    return out


def _play(monkeypatch: pytest.MonkeyPatch, matrices: list[tuple[Any, int]]) -> list[Turn]:
    barriers: dict[int, Barrier] = {}
    turns = [Turn() for _ in range(4)]
    words: dict[int, int] = {}
    tiles: dict[int, Any] = {}
    lock = threading.Lock()

    def load_4d(target: Any, which: Any, full: Any, column: Any, row: Any, head: Any, batch: Any) -> None:
        matrix, rows = matrices[(int(which) - MAPS) // 128]
        part = matrix[int(batch), int(row) : int(row) + rows, int(head), 2 * int(column) :][:, :128]
        tile = np.zeros((rows, 128), np.uint8)
        tile[: part.shape[0], : part.shape[1]] = part
        tiles[int(target)] = tile
        barriers[int(full)].step(0, -tile.nbytes)

    def codes(address: int) -> Any:
        """Return the tile that an address lies in, from its row on."""
        start = max(place for place in tiles if place <= address)
        return tiles[start][(address - start) // 128 :].view(np.int8)

    def thread_place() -> tuple[int, int]:
        number = int(threading.current_thread().threadIdx.x)  # type: ignore[attr-defined]
        return 16 * (number // 32 % 4) + number % 32 // 4, number % 4

    def read() -> None:
        """Go on when the whole warp has read: a product is one act of it; then one lane frees the tile."""
        machine._as_warp(list, None)

    def product_codes(n: int, _offsets: Any) -> Any:
        def product(sums: Any, a: Any, b: Any) -> None:
            row, quad = thread_place()
            left, right = codes(int(a)).astype(np.int64), codes(int(b))[:n].astype(np.int64)
            for half in range(2):
                found = left[row + 8 * half] @ right.T
                sums.reshape(-1, 2, 2)[:, half] += found.reshape(-1, 4, 2)[:, quad].astype(np.int32)
            read()

        return product

    def product_codes_from_middle(n: int, offsets: Any) -> Any:
        onto = product_codes(n, offsets)

        def product(sums: Any, a: Any, b: Any) -> None:
            sums[:] = wgmma.MIDDLE_BITS
            onto(sums, a, b)

        return product

    def product_registers(n: int, kind: str, offsets: Any) -> Any:
        def product(sums: Any, pairs: Any, b: Any) -> None:
            _, quad = thread_place()
            rows = 128  # of a tile of V: a sub-tile of 64 columns follows the other
            value = np.hstack(
                [tiles[int(b) + at].view(np.float16) for at in range(0, 2 * n * rows, 128 * rows)]
            ).astype(np.float64)
            given, lane = machine._as_warp(list, machine._numbers(kind, pairs).reshape(-1, 2, 2, 2))
            quads = np.array(
                given[lane // 4 * 4 : lane // 4 * 4 + 4]
            )  # lane, step, columns + 8, row + 8, pair
            weights = quads.transpose(3, 1, 2, 0, 4).reshape(2, 16 * len(offsets)).astype(np.float64)
            found = weights @ value[: weights.shape[1]]
            for half in range(2):
                sums.reshape(-1, 2, 2)[:, half] += found[half].reshape(-1, 4, 2)[:, quad].astype(np.float32)
            read()

        return product

    def fetch(address: Any, change: Any) -> Any:
        with lock:
            place = machine._at(address, 4).view(np.uint32)
            old = int(place[0])
            place[0] = change(old)
        return np.int32(old)

    def exchange(value: Any, mask: Any) -> Any:
        given, lane = machine._as_warp(list, value)
        return given[lane ^ int(mask)]

    def uniform(value: Any) -> Any:
        given, _ = machine._as_warp(list, value)
        return given[0]

    def any_lane(value: Any) -> Any:
        given, _ = machine._as_warp(list, value)
        return np.int32(any(given))

    def store_16(address: Any, *four: Any) -> None:
        machine._at(address, 16).view(np.uint32)[:] = four

    def wait(at: Any, parity: Any) -> None:
        """Wait with the whole warp, as lanes do that meet in the next product; the producer is alone."""
        barriers[int(at)].wait(int(parity))
        if int(threading.current_thread().threadIdx.x) >= 128:  # type: ignore[attr-defined]
            machine._as_warp(list, None)

    def nothing(*_: Any) -> None:
        return None

    def exp2(x: Any) -> Any:
        return np.exp2(np.float32(x))

    modules: list[tuple[Any, dict[str, Any]]] = [
        (barrier, {
            "initialise": lambda at, count: barriers.__setitem__(int(at), Barrier(count)),
            "publish_initialisation": nothing,
            "expect_bytes": lambda at, count: barriers[int(at)].step(1, int(count)),
            "arrive": lambda at: barriers[int(at)].step(1, 0),
            "wait": wait,
            "take_turn": lambda number: turns[int(number)].take(),
            "give_turn": lambda number: turns[int(number)].give(),
        }),
        (copy, {
            "shared_address": lambda _: np.uint32(0),
            "load_shared_word": lambda at: np.int32(words[int(at)]),
            "store_shared_word": lambda at, value: words.__setitem__(int(at), int(value)),
            "load_float": machine._load_float,
            "fetch_add": lambda at, value: fetch(at, lambda old: old + int(value)),
            "fetch_increment": lambda at, bound: fetch(at, lambda old: 0 if old >= int(bound) else old + 1),
            "store_global_word": lambda at, value: machine._at(at, 4).view(np.uint32).__setitem__(0, value),
            "store_global_16": store_16,
        }),
        (registers, {
            "uniform": uniform, "any_lane": any_lane, "exchange_float": exchange, "exchange_word": exchange,
            "quotient": machine._quotient, "maximum": np.fmax, "exp2": exp2,
            "fused_multiply_add": lambda x, y, z: np.float32(np.float64(x) * np.float64(y) + np.float64(z)),
            "pack_pair": machine._simulated_pack, "pin": lambda _: nothing,
            "give_registers": lambda _: nothing, "take_registers": lambda _: nothing,
        }),
        (tma, {"prefetch_descriptor": nothing, "load_4d": load_4d}),
        (grid, {"wait_for_earlier_grids": nothing, "let_next_grid_start": nothing}),
        (parameters, {"block_address": lambda block: np.uint64(block)}),
        (wgmma, {
            "descriptor_k_major": lambda at: np.uint64(at),
            "descriptor_mn_major": lambda _: lambda at: np.uint64(at),
            "product_codes_from_middle": product_codes_from_middle,
            "product_codes_behind_fence": product_codes, "product_registers": product_registers,
            "fence": nothing, "commit": nothing, "wait": lambda *_: nothing,
        }),
    ]  # fmt: skip
    for module, functions in modules:
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
    return turns
