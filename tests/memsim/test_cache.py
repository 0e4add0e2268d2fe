"""An L2 of two halves with sets: dicts as oracle, and laws that say what is left of a plain LRU."""

from __future__ import annotations

import builtins
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.cache import lru
from memsim.cache.lru import Cache
from memsim.cache.replay import Access, Block, Kernel, play, replay, total, traced
from memsim.cache.tile_schedules import AttentionShape, flash2_forward, int8_gemm
from refimpl.errors import OptionError
from tests.memsim.test_replay import programs

EVERYTHING = 1 << 40
MASK = (1 << 64) - 1


def scattered(number: int) -> int:
    """Return SplitMix64's output of that number, in Python's integers."""
    x = (number + 1) * 0x9E3779B97F4A7C15 & MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor & MASK
    return x ^ x >> 31


def slow(kernels: list[Kernel], arrays: dict[str, int], cache: Cache) -> list[tuple[int, int]]:
    """Count bytes of HBM in lines of one byte: a dict of dirty lines for each set of each half."""
    assert cache.ways is not None
    half = cache.size // cache.halves
    sets = max(1, half // cache.ways)
    kept: list[list[OrderedDict[int, bool]]] = [
        [OrderedDict() for _ in range(sets)] for _ in range(cache.halves)
    ]
    bases, base = {}, 0
    for name, size in arrays.items():
        bases[name], base = base, base + size
    results = []
    for kernel in kernels:
        queue = [list(block.accesses) for block in kernel.blocks if block.accesses]
        at_work: list[list[Access]] = [[] for _ in range(min(kernel.workers, max(1, len(kernel.blocks))))]
        read = written = 0
        while queue or any(at_work):
            for worker, mine in enumerate(at_work):
                if not mine and queue:
                    mine.extend(queue.pop(0))
                if not mine:
                    continue
                access = mine.pop(0)
                for line in range(
                    bases[access.array] + access.start, bases[access.array] + access.start + access.size
                ):
                    home, place = scattered(line) % cache.halves, (scattered(line) >> 1) % sets
                    stores = access.kind != "read"
                    for part in (home,) if stores else dict.fromkeys((worker % cache.halves, home)):
                        there = kept[part][place]
                        found = line in there
                        there[line] = there.pop(line, False) or (stores and part == home)
                        while len(there) > half // sets:
                            written += there.popitem(last=False)[1]
                        if found:
                            break
                        if part == home and access.kind != "write":
                            read += 1
        results.append((read, written))
    return results


@given(
    program=programs(), size=st.integers(0, 26), halves=st.sampled_from([1, 2]), ways=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=150)
def test_halves_and_sets_are_dicts(
    program: tuple[list[Kernel], dict[str, int]], size: int, halves: Any, ways: int
) -> None:
    kernels, arrays = program
    cache = Cache(size, halves, ways)
    found = replay(kernels, arrays, cache=cache, line=1)
    assert [(one.dram_read, one.dram_write) for one in found] == slow(kernels, arrays, cache)


@given(program=programs(), size=st.integers(0, 13))
@settings(max_examples=60)
def test_one_set_of_all_ways_is_the_plain_cache(
    program: tuple[list[Kernel], dict[str, int]], size: int
) -> None:
    kernels, arrays = program
    plain = replay(kernels, arrays, cache=size, line=1)
    assert replay(kernels, arrays, cache=Cache(size, 1, max(1, size)), line=1) == plain


@given(program=programs(), halves=st.sampled_from([1, 2]), ways=st.one_of(st.none(), st.integers(1, 4)))
@settings(max_examples=60)
def test_what_is_asked_and_what_is_compulsory_are_any_caches(
    program: tuple[list[Kernel], dict[str, int]], halves: Any, ways: int | None
) -> None:
    kernels, arrays = program
    found, plain = (
        replay(kernels, arrays, cache=cache, line=1)
        for cache in (Cache(1 << 20, halves, ways), Cache(EVERYTHING))
    )
    assert [one[1:3] for one in found] == [one[1:3] for one in plain]
    # With so much room a line comes from HBM once, though both halves read it, and none is dropped.
    assert found == plain
    without = replay(kernels, arrays, cache=Cache(0, halves, ways), line=1)
    assert [one[3:] for one in without] == [
        (*one[3:5], 0) for one in replay(kernels, arrays, cache=0, line=1)
    ]


def test_a_copy_takes_room_in_the_other_half() -> None:
    """Workers of both halves read the same lines again and again, and need twice the room for them."""
    lines, rounds = 64, 4
    whole = Block(tuple(Access("x", place, 1) for place in range(lines)) * rounds)
    both, alone, enough = (
        replay([Kernel("read", (whole,) * workers, workers)], {"x": lines}, cache=Cache(size, 2))[0].dram_read
        for workers, size in ((2, 2 * lines - 20), (1, 2 * lines - 20), (2, 2 * lines))
    )
    assert enough == lines
    assert both > 0.9 * rounds * lines
    # One worker's half does not hold them either, but those at home in the other half stay there.
    near = sum(scattered(line) % 2 == 0 for line in range(lines))
    assert alone == lines + (rounds - 1) * near


def test_what_is_written_stands_at_home_only() -> None:
    lines = 64
    write = Block(tuple(Access("x", place, 1, "write") for place in range(lines)))
    found = replay([Kernel("write", (write, write), 2)], {"x": lines}, cache=Cache(2 * lines, 2), line=1)[0]
    assert (found.dram_read, found.dram_write, found.left) == (0, 0, lines)


def test_the_cache_adds() -> None:
    add = Kernel("add", (Block((Access("x", 0, 8, "add"),)),))
    assert replay([add], {"x": 8}, cache=8)[0] == ("add", 0, 8, 8, 0, 8)


@pytest.mark.parametrize("line", [1 << 10, 1 << 12, 1 << 20])
def test_lines_matter_at_the_edges_only(line: int) -> None:
    """Tiles are used as wholes, so smaller lines move as much, but for a tile that is dropped in parts."""
    shape = AttentionShape(B=1, H=16, N=512, D=64)
    program = flash2_forward(shape, rows=64, columns=64, workers=40)
    reference = replay(*program, cache=300 << 10)[0]
    found = replay(*program, cache=300 << 10, line=line)[0]
    assert found[:3] == reference[:3]
    assert found.dram_read == pytest.approx(reference.dram_read, rel=0.02)


def test_kernels_are_played_in_any_order() -> None:
    kernels, arrays = int8_gemm(M=300, N=520, K=200, workers=4)
    other = Kernel("read", (Block((Access("A", 0, 200),)),))
    program = traced([*kernels, other], arrays)
    cache = Cache(1 << 17, 2, 4)
    assert play(program, [0, 1, 0], cache) == replay([*kernels, other, *kernels], arrays, cache=cache)
    assert play(program, [1], cache) == replay([other], arrays, cache=cache)
    assert total(play(program, [], cache)) == ("all", 0, 0, 0, 0, 0)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, arrays = flash2_forward(AttentionShape(B=1, H=2, N=20, D=4), rows=8, columns=8, workers=2)
    caches = (300, Cache(600, 2, 2))
    compiled = [replay(kernels, arrays, cache=cache) for cache in caches]
    real = builtins.__import__

    def absent(name: str, *args: Any, **options: Any) -> Any:
        if name == "numba":
            raise ImportError(name)
        return real(name, *args, **options)

    lru.compiled_loop.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    assert [replay(kernels, arrays, cache=cache) for cache in caches] == compiled
    monkeypatch.undo()
    lru.compiled_loop.cache_clear()


def test_refusals() -> None:
    kernel = Kernel("k", (Block((Access("x", 0, 8),)),))
    wrong: Any = 3
    with pytest.raises(OptionError, match="1 or 2 halves; got 3"):
        replay([kernel], {"x": 8}, cache=Cache(8, wrong))
    with pytest.raises(OptionError, match="ways"):
        replay([kernel], {"x": 8}, cache=Cache(8, 1, 0))
    with pytest.raises(OptionError, match="line"):
        replay([kernel], {"x": 8}, cache=8, line=0)
    with pytest.raises(OptionError, match="cache"):
        replay([kernel], {"x": 8}, cache=Cache(-1))
