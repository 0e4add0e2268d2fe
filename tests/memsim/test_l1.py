"""Loads through the L1 of a multiprocessor: a loop over dicts as oracle, laws, and mutants."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim import data_files
from memsim.cache import l1
from memsim.cache.l1 import L1, carve_out, read_from_l2
from memsim.cache.replay import Access, Block, Kernel, Program, traced
from memsim.cache.tile_schedules import AttentionShape, portable_forward
from memsim.hardware import hardware
from memsim.measured.counted_traffic import l1_of, spared_by_l1
from refimpl.errors import OptionError
from tests.memsim.test_cache import scattered
from tests.memsim.test_replay import programs

EVERYTHING = 1 << 20


def slow(kernel: Kernel, arrays: dict[str, int], line: int, caches: L1, chart: int) -> int:
    """Return the bytes read from the L2: workers looked through for the one that comes next, dicts as L1."""
    places = {name: [0, size] for name, size in arrays.items()}
    for access in (access for block in kernel.blocks for access in block.accesses):
        places[access.array] += [access.start, access.start + access.size]
    width = {name: math.gcd(line, *numbers) for name, numbers in places.items()}
    lines = [(name, at) for name, size in arrays.items() for at in range(0, size, width[name])]
    count = caches.processors + len(lines)

    def away(place: int) -> int:
        drawn = scattered(chart * count + place) >> 32
        return (drawn * (2 * caches.spread + 1) >> 32) - caches.spread

    kept: list[OrderedDict[tuple[str, int], int]] = [OrderedDict() for _ in range(caches.processors)]
    in_l2: dict[tuple[str, int], int] = {}
    queue = list(kernel.blocks)
    times = [0] * min(kernel.workers, max(1, len(queue)))
    todo: list[list[tuple[Access, int]]] = [[] for _ in times]
    read = 0
    while True:
        ready = [worker for worker in range(len(times)) if todo[worker] or queue]
        if not ready:
            return read
        worker = min(ready, key=lambda one: (times[one], one))
        if not todo[worker]:
            todo[worker] = [
                (access, at)
                for access in queue.pop(0).accesses
                for at in range(access.start, access.start + access.size, width[access.array])
            ]
            continue
        access, at = todo[worker].pop(0)
        key, bytes_, processor = (access.array, at), width[access.array], worker % caches.processors
        if access.kind in ("write", "add"):
            in_l2.setdefault(key, times[worker])
            continue
        mine = kept[processor]
        if key in mine:
            times[worker] = max(times[worker] + bytes_ * caches.near, mine[key])
            mine.move_to_end(key)
            continue
        read += bytes_
        there = in_l2.setdefault(key, times[worker] + bytes_ * (caches.farthest - caches.far))
        distance = caches.far + away(processor) + away(caches.processors + lines.index(key))
        times[worker] = max(times[worker], there) + bytes_ * distance
        mine[key] = times[worker]
        while sum(width[name] for name, _ in mine) > caches.size:
            mine.popitem(last=False)


@st.composite
def caches(draw: st.DrawFn, largest: int = 14) -> L1:
    near, spread = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    far = near + 2 * spread + draw(st.integers(0, 6))
    size, processors = draw(st.integers(0, largest)), draw(st.integers(1, 3))
    return L1(size, processors, near, far, far + draw(st.integers(0, 9)), spread)


def crowd(seed: int) -> tuple[list[Kernel], dict[str, int], L1]:
    """Return many blocks that go through the same few arrays, some after a store, on few multiprocessors."""
    rng = np.random.default_rng(seed)
    units = {"a": 1, "b": 2, "c": 3}  # bytes of a line, if lines of 6 are asked for
    lengths = {name: int(rng.integers(4, 13)) for name in units}

    def access(name: str, at: int, kind: Any = "read") -> Access:
        return Access(name, at * units[name], units[name], kind)

    walks = [
        [access(name, at) for at in range(lengths[name])] for name in units for _ in range(rng.integers(3))
    ]
    blocks = []
    for _ in range(rng.integers(4, 16)):
        name = str(rng.choice(list(units)))
        start = access(name, int(rng.integers(lengths[name])), rng.choice(["read", "write", "update"]))
        blocks.append(Block((start, *(walks[rng.integers(len(walks))] if walks else ()))))
    arrays = {name: lengths[name] * unit for name, unit in units.items()}
    near, spread = int(rng.integers(1, 5)), int(rng.integers(0, 4))
    far = near + 2 * spread + int(rng.integers(0, 9))
    size = L1(
        int(rng.integers(1, 9)), int(rng.integers(1, 4)), near, far, far + int(rng.integers(0, 12)), spread
    )
    return [Kernel("crowd", tuple(blocks), int(rng.integers(2, 8)))], arrays, size


def asked(program: Program, number: int = 0) -> int:
    return program.kernels[number].l2_read


@given(program=programs(), size=caches(), line=st.integers(1, 3), chart=st.integers(0, 3))
@settings(max_examples=100)
def test_the_loop_is_that_of_dicts(
    program: tuple[list[Kernel], dict[str, int]], size: L1, line: int, chart: int
) -> None:
    kernels, arrays = program
    numbers = traced(kernels, arrays, line)
    for place, kernel in enumerate(kernels):
        found = read_from_l2(numbers, place, size, chart=chart)
        assert found == slow(kernel, arrays, line, size, chart)


@given(seed=st.integers(0, 2**32), line=st.sampled_from([1, 6]), chart=st.integers(0, 3))
@settings(max_examples=100)
def test_and_so_it_is_in_a_crowd(seed: int, line: int, chart: int) -> None:
    (kernel,), arrays, size = crowd(seed)
    found = read_from_l2(traced([kernel], arrays, line), 0, size, chart=chart)
    assert found == slow(kernel, arrays, line, size, chart)


@given(program=programs(), size=caches())
@settings(max_examples=80)
def test_between_what_is_asked_and_each_line_once(
    program: tuple[list[Kernel], dict[str, int]], size: L1
) -> None:
    kernels, arrays = program
    numbers = traced(kernels, arrays, 1)
    for place, kernel in enumerate(kernels):
        loads = {
            (access.array, at)
            for block in kernel.blocks
            for access in block.accesses
            if access.kind != "write"
            for at in range(access.start, access.start + access.size)
        }
        assert read_from_l2(numbers, place, size._replace(size=0)) == asked(numbers, place)
        assert len(loads) <= read_from_l2(numbers, place, size) <= asked(numbers, place)
        one = size._replace(size=EVERYTHING, processors=1)
        assert read_from_l2(numbers, place, one) == len(loads)


@given(program=programs(), size=caches(), alike=st.booleans())
@settings(max_examples=80)
def test_a_larger_l1_never_lets_more_through(
    program: tuple[list[Kernel], dict[str, int]], size: L1, alike: bool
) -> None:
    """An LRU holds what a smaller one does, if hits change no order: all is as far, or blocks are alone."""
    kernels, arrays = program
    blocks = len(kernels[0].blocks)
    size = (
        size._replace(near=1, far=1, farthest=1, spread=0) if alike else size._replace(processors=blocks + 1)
    )
    kernel = kernels[0] if alike else kernels[0]._replace(workers=blocks + 1)
    numbers = traced([kernel], arrays, 1)
    found = [read_from_l2(numbers, 0, size._replace(size=lines)) for lines in range(14)]
    assert all(more <= less for less, more in pairwise(found))


@given(program=programs(), size=caches(), copies=st.integers(2, 4), chart=st.integers(0, 3))
@settings(max_examples=80)
def test_equal_blocks_stay_in_step(
    program: tuple[list[Kernel], dict[str, int]], size: L1, copies: int, chart: int
) -> None:
    """Blocks of one multiprocessor that read the same from the start on read it once, however far it is."""
    kernels, arrays = program
    size = size._replace(size=max(1, size.size), processors=1)
    for block in kernels[0].blocks:
        alone, together = (
            read_from_l2(traced([Kernel("k", (block,) * n, n)], arrays, 1), 0, size, chart=chart)
            for n in (1, copies)
        )
        assert together == alone


@given(program=programs(), size=caches())
@settings(max_examples=60)
def test_multiprocessors_share_nothing(program: tuple[list[Kernel], dict[str, int]], size: L1) -> None:
    kernels, arrays = program
    blocks = kernels[0].blocks
    size = size._replace(processors=len(blocks) + 1)
    apart = traced([Kernel("apart", blocks, len(blocks) + 1)], arrays, 1)
    each = traced([Kernel("alone", (block,)) for block in blocks], arrays, 1)
    assert read_from_l2(apart, 0, size) == sum(read_from_l2(each, n, size) for n in range(len(blocks)))


@given(program=programs(), size=caches(), chart=st.integers(1, 5))
@settings(max_examples=40)
def test_charts_differ_in_distances_only(
    program: tuple[list[Kernel], dict[str, int]], size: L1, chart: int
) -> None:
    numbers, size = traced(*program, 1), size._replace(spread=0)
    assert read_from_l2(numbers, 0, size, chart=chart) == read_from_l2(numbers, 0, size)


def attention(heads: int, queries: int) -> Program:
    shape = AttentionShape(B=1, H=heads, N=queries, D=64)
    return traced(*portable_forward(shape, rows=64, columns=64, workers=24))


CARD = L1(size=28 << 10, processors=12, near=40, far=281, farthest=690, spread=58)


def test_one_head_falls_into_step() -> None:
    """All blocks read the same keys: two of a multiprocessor mostly read them once for both."""
    program = attention(1, 64 * 96)
    found = read_from_l2(program, 0, CARD) / asked(program)
    assert 0.5 < found < 0.6


def test_blocks_of_many_heads_seldom_meet() -> None:
    program = attention(48, 64)
    assert read_from_l2(program, 0, CARD) == asked(program)
    program = attention(48, 64 * 8)
    shares = [read_from_l2(program, 0, CARD, chart=chart) / asked(program) for chart in range(4)]
    assert len(set(shares)) > 1
    assert all(0.6 < share < 0.99 for share in shares)


def test_what_shared_memory_leaves() -> None:
    stated, card = data_files.read("l1", "validation"), hardware("h200")
    steps, reserved = stated["carve_outs"]["value"], stated["reserved"]["value"]
    assert steps == [size << 10 for size in (0, 8, 16, 32, 64, 100, 132, 164, 196, 228)]
    assert steps[-1] == card.shared_memory_per_sm.value
    for shared, blocks, kilobytes in (
        (51968, 4, 228), (100872, 2, 228), (84736, 2, 196), (166408, 1, 164), (41408, 5, 228),
        (7 << 10, 1, 8), ((7 << 10) + 1, 1, 16), (0, 0, 0),
    ):  # fmt: skip
        assert carve_out(shared, blocks, steps=steps, reserved=reserved) == kilobytes << 10
    with pytest.raises(OptionError, match="at most 233472 bytes for 2 blocks; got"):
        carve_out(200_000, 2, steps=steps, reserved=reserved)


def test_only_kernels_that_say_so_load_through_it() -> None:
    case = {
        "schedule": "portable_forward", "shape": {"B": 1, "H": 2, "N": 64 * 200, "D": 64},
        "tiles": {"rows": 64, "columns": 64, "workers": 264},
    }  # fmt: skip
    assert spared_by_l1(case, l1_of(case, "h200")) == (0,)
    l1 = l1_of({**case, "shared": 100872}, "h200")
    assert l1 == (28 << 10, 132, 40, 281, 690, 58)
    (spared,) = spared_by_l1(case, l1)
    tile = 64 * 64 * 2
    assert 0 < spared < 2 * 200 * 200 * 2 * tile / 2


MUTANTS = {
    "stores are loads": ("if not needs[at] & LOAD", "if needs[at] < 0"),
    "stores do not reach the L2": ("                in_l2[x] = now\n", "                pass\n"),
    "one L1 for all": ("here = worker % processors", "here = 0"),
    "blocks dealt in pairs": ("here = worker % processors", "here = worker // 2 % processors"),
    "first in, first out": ("in range(slot, 0, -1):", "in range(0 if hit else slot, 0, -1):"),
    "what did not fit comes back": ("held[here, slot + 1] = -1", "pass"),
    "one byte too many": ("if kept > size", "if kept > size + 1"),
    "no waiting for what is on its way": ("now = max(now + width * near, arrival)", "now += width * near"),
    "a hit takes no time": ("now + width * near", "now"),
    "HBM is as near": ("width * (farthest - far)", "0"),
    "HBM each time": ("    if in_l2[x] < 0:\n                in_l2[x] = now +", "    in_l2[x] = now +"),
    "multiprocessors are alike": ("far + away[here]", "far"),
    "lines are alike": ("+ beyond[x]", ""),
    "a line takes as long as a byte": ("width * (far +", "1 * (far +"),
}  # fmt: skip


def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some of the random programs each mutant reads other bytes than the dicts do; the loop on none."""
    source = inspect.getsource(l1._run)
    assert {old: source.count(old) for old, _ in MUTANTS.values()} == {old: 1 for old, _ in MUTANTS.values()}
    whole = _function(source)  # without numba, and del left["the loop"] is an error
    left = {name: _function(source.replace(*change)) for name, change in MUTANTS.items()}

    for seed in range(200):
        (kernel,), arrays, size = crowd(seed)
        line, chart = (1, 6)[seed % 2], seed % 4
        numbers, right = traced([kernel], arrays, line), slow(kernel, arrays, line, size, chart)
        for name, function in (*left.items(), ("the loop", whole)):
            monkeypatch.setattr(l1, "_compiled", lambda function=function: function)
            try:
                found = read_from_l2(numbers, 0, size, chart=chart)
            except IndexError:
                found = -1
            if found != right:
                del left[name]
    assert list(left) == []


def _function(source: str) -> Callable[..., Any]:
    names = dict(vars(l1))
    exec(source, names)
    found: Callable[..., Any] = names["_run"]
    return found


def test_refusals() -> None:
    program = traced([Kernel("k", (Block((Access("x", 0, 8),)),))], {"x": 8})
    for wrong, words in (
        (L1(-1, 1), "size"), (L1(8, 0), "processors"), (L1(8, 1, near=-1), "near"),
        (L1(8, 1, spread=-1), "spread"), (L1(8, 1, near=2), "expected near <= far"),
        (L1(8, 1, far=2), "far <= farthest"), (L1(8, 1, 1, 4, 9, 2), "2 spread"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            read_from_l2(program, 0, wrong)
    assert read_from_l2(traced([Kernel("empty", ())], {"x": 8}), 0, L1(8, 1)) == 0
