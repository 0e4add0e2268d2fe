"""The decoding kernel for tensor cores played by Python threads: the PTX ISA in plain Python.

Lanes meet where an instruction belongs to the whole warp.  A copy is done as late as it may be, when its
group is waited for, or at once (`late` False); until then its target holds NaN.  Behind the wait the lane
that started it sees it, other lanes do when the warp has met.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest

from cuda_backend._numba import cuda
from cuda_backend.arrays import View
from cuda_backend.attention import decode_ampere
from cuda_backend.attention.decode_call_ampere import KINDS, arguments
from cuda_backend.attention.decode_variant_ampere import DecodeVariant
from cuda_backend.launch import simulation
from cuda_backend.ptx import barrier, copy, copy_async, grid, matrix_load, mma, registers, turns
from cuda_backend.weight_only import machine
from refimpl.attention import AttentionOutput
from refimpl.attention.scores import AttentionShape

POISON = 0xFF  # a NaN in every format
SWITCH = 1e-4  # seconds: lanes meet less often than the simulator's own instructions would have them


def player(
    monkeypatch: pytest.MonkeyPatch, *, late: bool = True, build: Any = decode_ampere.build, **fields: Any
) -> Callable[..., Any]:
    """Return the kernel as a function with the reference's arguments; `fields` are those of its variant."""
    hints = play(monkeypatch, late=late, early=fields.get("early", False))

    def attention(
        q: Any, k: Any, v: Any, table: Any = None, /, *,
        splits: int = 1, k_lengths: Any = None, scale: Any = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        (B, Tq, Hq, D), (_, Tk, Hkv, Dv) = q.shape, v.shape
        views = {key: _view(x) for key, x in (("q", q), ("k", k), ("v", v))}
        if table is not None:
            Tk *= table.shape[1]
            views["page_table"] = _view(table)
        if k_lengths is not None:
            views["k_lengths"] = _view(np.asarray(k_lengths))
        shape = AttentionShape(B, Tq, Tk, Hq, Hkv, D, Dv)
        given = {"rows": 8, "keys": 16, "warps": 2, "blocks": 1, "stages": 3} | fields
        variant = DecodeVariant(KINDS[q.dtype.name], D, Dv, paged=table is not None, **given)
        tiles = -(-Tq * shape.group // variant.rows)
        units = B * Hkv * tiles
        out = np.full((B, Tq, Hq, Dv), np.nan, q.dtype)
        lse = np.full((B, Hq, Tq), np.nan, np.float32)
        work = np.full(max(1, units * splits * variant.rows * (Dv + 1)), np.nan, np.float32)
        counters = np.zeros(units, np.int32)
        addresses = [
            views[key].address if key in views else 0 for key in ("q", "k", "v", "page_table", "k_lengths")
        ]
        addresses += [x.ctypes.data for x in (out, lse, work, counters)]
        numbers = arguments(views, shape, tiles, splits, scale)
        kernel = cuda.jit(build(variant))
        with simulation():
            sys.setswitchinterval(SWITCH)
            kernel[units * splits, variant.threads, 0, variant.shared_bytes](
                *map(np.uint64, addresses), *map(np.int32, numbers)
            )
        assert not counters.any(), "counters are 0 for the next launch"
        rows = [x[b, t, h].ctypes.data for x in (k, v) for b, t, h in np.ndindex(x.shape[:3])]
        places = {row + step for row in rows for step in range(0, 2 * min(D, Dv), 64)}
        assert set(hints) <= places, "hints name what lies in K and V"
        assert bool(hints) == (variant.hinted > 0 and min(D, Dv) >= 64)
        hints.clear()
        return AttentionOutput(out, lse) if return_lse else out

    return attention


def _view(array: Any) -> View:
    return View(array.shape, array.strides, array.dtype.name, array.ctypes.data, array)


def _lane(value: Any) -> Any:
    """Return what all lanes of the warp give, and this thread's lane."""
    return machine._as_warp(list, value)


_hides: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _hidden() -> Any:
    """Return which bytes of the block's shared memory hold copies that not all lanes of their warp see."""
    block = machine._block()
    if block not in _hides:
        _hides[block] = np.zeros(machine._memories[block].size, bool)
    return _hides[block]


def _meet() -> None:
    """Let a warp meet: what its lanes have waited for is seen by all."""
    thread: Any = threading.current_thread()
    for target in getattr(thread, "arrived", []):
        _hidden()[target : target + 16] = False
    thread.arrived = []
    _lane(None)


class _Copies:
    """Copies that a thread has under way, in groups."""

    def __init__(self, late: bool) -> None:
        self.late = late

    @staticmethod
    def groups() -> list[list[Any]]:
        thread: Any = threading.current_thread()
        if not hasattr(thread, "groups"):
            thread.groups = [[]]
        found: list[list[Any]] = thread.groups
        return found

    def start(self, target: Any, source: Any, size: Any) -> None:
        assert int(source) % 16 == 0
        machine._shared(target, 16)[:] = POISON
        _hidden()[int(target) : int(target) + 16] = True
        self.groups()[-1].append((target, int(source), int(size)))
        if not self.late:
            self.end(self.groups()[-1])

    @staticmethod
    def end(group: list[Any]) -> None:
        for target, source, size in group:
            place = machine._shared(target, 16)
            place[:] = 0
            if size:
                place[:] = machine._at(source, size)
            thread: Any = threading.current_thread()
            thread.arrived = [*getattr(thread, "arrived", []), int(target)]
        group.clear()

    def commit(self) -> None:
        self.groups().append([])

    def wait(self, running: int) -> Callable[[], None]:
        def wait() -> None:
            groups = self.groups()
            while len(groups) - 1 > running:
                self.end(groups.pop(0))

        return wait


def _blocks(turned: bool) -> Callable[..., None]:
    def load(words: Any, first: Any, address: Any) -> None:
        given, lane = _lane(int(address))
        for i in range(4):
            rows = [machine._shared(given[8 * i + r], 16).view(np.uint16) for r in range(8)]
            for r in range(8):
                at = given[8 * i + r]
                assert not _hidden()[at : at + 16].any(), "read what other lanes may not see yet"
            block = np.array(rows).T if turned else np.array(rows)
            pair = block[lane // 4, 2 * (lane % 4) :][:2].astype(np.uint32)
            words[int(first) + i] = pair[0] | pair[1] << np.uint32(16)
        _lane(None)  # nobody overwrites what another lane still reads

    return load


def _turn(word: Any) -> Any:
    given, lane = _lane(int(word))
    block = np.array(
        [[given[4 * r + c] & 0xFFFF, given[4 * r + c] >> 16] for r in range(8) for c in range(4)]
    )
    pair = block.reshape(8, 8).T[lane // 4, 2 * (lane % 4) :][:2]
    return np.uint32(pair[0] | pair[1] << 16)


def _exchange(value: Any, mask: Any) -> Any:
    given, lane = _lane(value)
    return given[lane ^ int(mask)]


def play(monkeypatch: pytest.MonkeyPatch, *, late: bool = True, early: bool = False) -> list[Any]:
    """Put what the PTX ISA says in the place of instructions; `early` launches must wait for others.

    Return where the hints to the L2 cache will stand.
    """
    copies, lock = _Copies(late), threading.Lock()
    hints: list[int] = []

    def take_number(address: Any, bound: Any) -> Any:
        with lock:
            place = machine._at(address, 4).view(np.int32)
            old = int(place[0])
            place[0] = 0 if old >= int(bound) else old + 1
        return np.int32(old)

    def wait_for_earlier_grids() -> None:
        threading.current_thread().waited = True  # type: ignore[attr-defined]

    def behind_the_wait(function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what touches memory that an earlier launch may still write or read."""
        if not early:
            return function

        def touch(*arguments: Any) -> Any:
            assert hasattr(threading.current_thread(), "waited"), "did not wait for earlier launches"
            return function(*arguments)

        return touch

    def hint(address: Any) -> None:
        assert early
        hints.append(int(address))

    def store(count: int) -> Callable[..., None]:
        def store(address: Any, *words: Any) -> None:
            assert int(address) % (4 * count) == 0
            machine._at(address, 4 * count).view(np.uint32)[:] = words

        return store

    def store_float(address: Any, value: Any) -> None:
        machine._at(address, 4).view(np.float32)[0] = value

    def load_shared_word(address: Any) -> Any:
        return machine._shared(address, 4).view(np.int32)[0]

    modules: list[tuple[Any, dict[str, Any]]] = [
        (barrier, {"warp": _meet}),
        (copy_async, {
            "copy_16": lambda _: behind_the_wait(copies.start), "commit": copies.commit, "wait": copies.wait,
        }),
        (copy, {
            "shared_address": machine._shared_address, "load_word": behind_the_wait(machine._load_word),
            "load_word_fresh": machine._load_word, "prefetch": hint,
            "load_16": machine._loader(4, machine._at),
            "load_shared_16": machine._loader(4, machine._shared), "load_shared_word": load_shared_word,
            "load_shared_float": machine._load_shared_float,
            "store_shared_float": machine._store_shared_float,
            "store_shared_word": machine._store_shared_word, "store_global_float": store_float,
            "store_global_8": store(2), "store_global_16": store(4),
        }),
        (turns, {"take_number": take_number}),
        (grid, {"let_next_grid_start": lambda: None, "wait_for_earlier_grids": wait_for_earlier_grids}),
        (matrix_load, {
            "load_blocks": _blocks(False), "load_blocks_turned": _blocks(True), "turn_block": _turn,
        }),
        (mma, {"product": machine._simulated_product}),
        (registers, {
            "uniform": lambda value: value, "from_lane": lambda value, lane: _lane(value)[0][int(lane)],
            "quotient": machine._quotient, "exchange_float": _exchange,
            "select_int": lambda c, x, y: x if c else y, "select_float": lambda c, x, y: x if c else y,
            "maximum": np.fmax, "exp2": lambda x: np.exp2(np.float32(x)),
            "log2": lambda x: np.log2(np.float32(x)),
            "pack_pair": machine._simulated_pack,
        }),
    ]  # fmt: skip
    for module, functions in modules:
        for name, function in functions.items():
            monkeypatch.setattr(module, name, function)
    return hints
