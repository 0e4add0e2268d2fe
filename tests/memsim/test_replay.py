"""Replayed schedules: an LRU of dicts as oracle, closed forms at both ends, inclusion in between."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.attention_io import attention_traffic
from memsim.cache.backward_schedules import flash2_backward, portable_backward, standard_backward
from memsim.cache.pytorch_schedules import (
    pytorch_flash2_backward,
    pytorch_flash2_split,
    pytorch_standard_backward,
)
from memsim.cache.replay import Access, Block, Kernel, replay, total
from memsim.cache.tile_schedules import (
    AttentionShape,
    flash1_forward,
    flash2_forward,
    hopper_forward,
    int8_gemm,
    portable_forward,
    standard_forward,
)
from refimpl.errors import OptionError

EVERYTHING = 1 << 40


def slow(kernels: list[Kernel], arrays: dict[str, int], lines: int) -> list[tuple[int, ...]]:
    """Count in lines of one byte, a list of turns first, then a dict in the order of use."""
    kept: OrderedDict[tuple[str, int], bool] = OrderedDict()
    results = []
    for kernel in kernels:
        queue = [list(block.accesses) for block in kernel.blocks if block.accesses]
        at_work: list[list[Access]] = [[] for _ in range(kernel.workers)]
        order: list[Access] = []
        while queue or any(at_work):
            for worker in range(kernel.workers):
                if not at_work[worker] and queue:
                    at_work[worker] = queue.pop(0)
                if at_work[worker]:
                    order.append(at_work[worker].pop(0))
        counts = np.zeros(4, int)
        for access in order:
            reads, writes = access.kind != "write", access.kind != "read"
            for place in range(access.start, access.start + access.size):
                line = (access.array, place)
                counts += [reads, writes, 0, 0]
                if lines == 0:
                    counts += [0, 0, reads, writes]
                    continue
                dirty = kept.pop(line, None)
                if dirty is None:
                    counts += [0, 0, reads, 0]
                    if len(kept) == lines:
                        counts += [0, 0, 0, kept.popitem(last=False)[1]]
                kept[line] = bool(dirty) or writes
        results.append((*map(int, counts), sum(kept.values())))
    return results


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Kernel], dict[str, int]]:
    arrays = {"a": draw(st.integers(1, 6)), "b": draw(st.integers(1, 6))}

    def access() -> Access:
        array = draw(st.sampled_from("ab"))
        start = draw(st.integers(0, arrays[array] - 1))
        size = draw(st.integers(0, arrays[array] - start))
        return Access(array, start, size, draw(st.sampled_from(["read", "write", "update"])))

    kernels = []
    for number in range(draw(st.integers(1, 2))):
        blocks = [
            Block(tuple(access() for _ in range(draw(st.integers(0, 5)))))
            for _ in range(draw(st.integers(0, 4)))
        ]
        kernels.append(Kernel(f"kernel {number}", tuple(blocks), draw(st.integers(1, 3))))
    return kernels, arrays


@given(program=programs(), lines=st.integers(0, 13))
@settings(max_examples=120)
def test_the_loop_is_an_lru(program: tuple[list[Kernel], dict[str, int]], lines: int) -> None:
    kernels, arrays = program
    found = replay(kernels, arrays, cache=lines, line=1)
    assert [tuple(one[1:]) for one in found] == slow(kernels, arrays, lines)


@given(program=programs())
@settings(max_examples=60)
def test_more_cache_never_moves_more(program: tuple[list[Kernel], dict[str, int]]) -> None:
    kernels, arrays = program
    sizes = [total(replay(kernels, arrays, cache=lines, line=1)) for lines in range(14)]
    for less, more in pairwise(sizes):
        assert more.dram_read <= less.dram_read
        # Written bytes reach HBM sooner or later.
        assert more.dram_write + more.left <= less.dram_write + less.left
    assert sizes[0].dram_read == sizes[0].l2_read
    assert sizes[0].dram_write == sizes[0].l2_write


shapes = {
    "B": st.integers(1, 2), "H": st.integers(1, 3), "N": st.integers(1, 40), "D": st.integers(1, 9),
    "Tk": st.integers(1, 40), "e": st.sampled_from([2, 4]),
}  # fmt: skip
tiles = {"rows": st.integers(1, 20), "columns": st.integers(1, 20), "workers": st.integers(1, 5)}


@given(
    way=st.sampled_from(["flash1", "flash2"]), shape=st.fixed_dictionaries(shapes),
    cut=st.fixed_dictionaries(tiles), initialize=st.booleans(),
)  # fmt: skip
@settings(max_examples=100)
def test_without_a_cache_it_is_the_algorithms_count(
    way: str, shape: dict[str, int], cut: dict[str, int], initialize: bool
) -> None:
    sizes = AttentionShape(**shape)
    if way == "flash1":
        kernels, arrays = flash1_forward(sizes, **cut, initialize=initialize)
    else:
        kernels, arrays = flash2_forward(sizes, **cut)  # type: ignore[arg-type]
    options: dict[str, Any] = {"count_initialization": initialize} if way == "flash1" else {}
    expected = attention_traffic(
        algorithm=way, Tq=sizes.N, Tk=sizes.keys, D=sizes.D, H=sizes.H, B=sizes.B, itemsize=sizes.e,
        block_sizes=(cut["rows"], cut["columns"]), **options,
    )  # fmt: skip
    found = total(replay(kernels, arrays, cache=0))
    assert (found.dram_read, found.dram_write) == (expected["bytes_read"], expected["bytes_written"])
    # With room for everything: inputs once, and outputs once, sooner or later.
    enough = total(replay(kernels, arrays, cache=EVERYTHING))
    assert enough.dram_read <= found.dram_read
    inputs = ["Q", "K", "V"] + (["O", "l", "m"] if way == "flash1" and not initialize else [])
    assert enough.dram_read == sum(arrays[name] for name in inputs)
    outputs = ["O", "l", "m"] if way == "flash1" else ["O", "lse"]
    assert enough.dram_write + enough.left == sum(arrays[name] for name in outputs)


@given(shape=st.fixed_dictionaries(shapes), cut=st.fixed_dictionaries(tiles))
@settings(max_examples=60)
def test_the_backward_loop_without_a_cache(shape: dict[str, int], cut: dict[str, int]) -> None:
    sizes = AttentionShape(**shape)
    kernels, arrays = flash2_backward(sizes, **cut)
    found = total(replay(kernels[:2], arrays, cache=0))
    expected = attention_traffic(
        algorithm="flash2", direction="backward", Tq=sizes.N, Tk=sizes.keys, D=sizes.D, H=sizes.H, B=sizes.B,
        itemsize=sizes.e, accumulator_itemsize=4, block_sizes=(cut["rows"], cut["columns"]),
        count_initialization=False,
    )  # fmt: skip
    zeroed = arrays["dQ sum"]
    assert (found.dram_read, found.dram_write - zeroed) == (
        expected["bytes_read"], expected["bytes_written"],
    )  # fmt: skip


@given(shape=st.fixed_dictionaries(shapes), workers=st.integers(1, 4))
@settings(max_examples=40)
def test_standard_attention_in_one_tile_a_head(shape: dict[str, int], workers: int) -> None:
    sizes = AttentionShape(**shape)
    kernels, arrays = standard_forward(sizes, rows=sizes.N, workers=workers)
    expected = attention_traffic(
        algorithm="standard", Tq=sizes.N, Tk=sizes.keys, D=sizes.D, H=sizes.H, B=sizes.B, itemsize=sizes.e
    )
    found = total(replay(kernels, arrays, cache=0))
    assert (found.dram_read, found.dram_write) == (expected["bytes_read"], expected["bytes_written"])
    enough = total(replay(kernels, arrays, cache=EVERYTHING))
    assert enough.dram_read == arrays["Q"] + arrays["K"] + arrays["V"]


@given(shape=st.fixed_dictionaries(shapes), workers=st.integers(1, 4))
@settings(max_examples=40)
def test_the_standard_backward_pass_in_one_tile_a_head(shape: dict[str, int], workers: int) -> None:
    sizes = AttentionShape(**shape)
    kernels, arrays = standard_backward(sizes, rows=max(sizes.N, sizes.keys), workers=workers)
    expected = attention_traffic(
        algorithm="standard", direction="backward", Tq=sizes.N, Tk=sizes.keys, D=sizes.D, H=sizes.H,
        B=sizes.B, itemsize=sizes.e,
    )  # fmt: skip
    found = total(replay(kernels, arrays, cache=0))
    assert (found.dram_read, found.dram_write) == (expected["bytes_read"], expected["bytes_written"])
    enough = total(replay(kernels, arrays, cache=EVERYTHING))
    assert enough.dram_read == sum(arrays[name] for name in ("Q", "K", "V", "dO", "P"))


@given(shape=st.fixed_dictionaries(shapes), cut=st.fixed_dictionaries(tiles), splits=st.integers(1, 4))
@settings(max_examples=60)
def test_what_pytorch_adds(shape: dict[str, int], cut: dict[str, int], splits: int) -> None:
    """Copies of dO and O; a product as large as the scores; O in fp32 of each part of the keys."""
    sizes = AttentionShape(**shape)
    scores = sizes.heads * sizes.N * sizes.keys * sizes.e

    def moved(schedule: Any) -> list[int]:
        return list(total(replay(*schedule, cache=0))[3:5])

    flash, copied = flash2_backward(sizes, **cut), pytorch_flash2_backward(sizes, **cut)
    assert [more - less for more, less in zip(moved(copied), moved(flash), strict=True)] == [
        2 * flash[1]["O"], 2 * flash[1]["O"],
    ]  # fmt: skip
    plain, multiplied = (
        build(sizes, rows=cut["rows"]) for build in (standard_backward, pytorch_standard_backward)
    )
    assert [more - less for more, less in zip(moved(multiplied), moved(plain), strict=True)] == [
        2 * scores, scores,
    ]  # fmt: skip
    # In parts: Q once for each, K and V as without, and the parts written and read.
    whole = flash2_forward(sizes, **cut)  # type: ignore[arg-type]
    parted = pytorch_flash2_split(sizes, **cut, splits=splits)
    parts = splits * sizes.heads * sizes.N * 4 * (sizes.D + 1)
    first, second = replay(*parted, cache=0)
    read, written = moved(whole)
    assert first.dram_read == read + (splits - 1) * whole[1]["Q"]
    assert (first.dram_write, second.dram_read, second.dram_write) == (parts, parts, written)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (16, 32), (64, 64)])
def test_the_portable_backward_pass_by_hand(rows: int, columns: int, causal: bool) -> None:
    """Four query heads on two key heads; under a mask, tiles that have no pair to compute are left out."""
    N, D, H, G = 70, 8, 4, 2
    kernels, arrays = portable_backward(
        AttentionShape(B=1, H=H, N=N, D=D, G=G), rows=rows, columns=columns, causal=causal
    )
    tile, keys = D * 2 * N, range(0, N, columns)
    seen = 0  # rows of K (and of V) that the tiles of queries ask for
    for start in range(0, N, rows):
        seen += sum(min(columns, N - key) for key in keys if not causal or key < start + rows)
    asked = 0  # rows of Q that the tiles of keys ask for
    for key in keys:
        asked += N - (key // rows * rows if causal else 0)
    first, second = replay(kernels, arrays, cache=0)
    assert first[3:5] == (H * (3 * tile + 4 * N + 2 * seen * D * 2), H * (4 * N + tile))
    assert second[3:5] == (G * 2 * tile + H * asked * (2 * D * 2 + 8), G * 2 * tile)
    enough = replay(kernels, arrays, cache=EVERYTHING)
    assert total(enough).dram_read == sum(arrays[name] for name in ("Q", "K", "V", "O", "dO", "lse"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("schedule", [flash2_forward, portable_forward, hopper_forward])
def test_every_order_moves_the_same_without_a_cache(schedule: Any, causal: bool) -> None:
    shape = AttentionShape(B=2, H=4, N=70, D=16, G=2)
    kernels, arrays = schedule(shape, rows=32, columns=16, causal=causal)
    found = total(replay(kernels, arrays, cache=0))
    pairs = 0  # key tiles over all query tiles
    for start in range(0, 70, 32):
        end = min(start + 32, 70)
        pairs += min(-(-end // 16) * 16, 70) if causal else 70
    lse = arrays.get("lse", 0)
    assert found.dram_read == 8 * (70 + 2 * pairs) * 16 * 2
    assert found.dram_write == 8 * 70 * 16 * 2 + lse
    assert arrays["K"] * 2 == arrays["Q"]
    assert total(replay(kernels, arrays, cache=EVERYTHING)).dram_read == 2 * arrays["Q"]


def test_sections_bring_heads_together() -> None:
    # Two heads' K and V fit: one at a time they are read once, all eight row by row they are read again.
    shape = AttentionShape(B=1, H=8, N=128, D=8)
    cache = 2 * 2 * 128 * 8 * 2 + 6 * 16 * 8 * 2
    reads = [
        replay(*hopper_forward(shape, rows=16, columns=16, section=section, causal=True), cache=cache)[0]
        for section in (2, 8)
    ]
    assert reads[0].dram_read == 3 * 8 * 128 * 8 * 2
    assert reads[1].dram_read > 2 * reads[0].dram_read
    assert reads[0].l2_read == reads[1].l2_read


def test_places_of_the_hopper_schedule() -> None:
    """The order that ``place`` of cuda_backend's schedule gives, written out."""
    kernels, _ = hopper_forward(AttentionShape(B=1, H=3, N=4, D=1), rows=2, columns=2, section=2, causal=True)
    starts = [block.accesses[0].start // 2 for block in kernels[0].blocks]
    assert starts == [2, 6, 0, 4, 10, 8]  # heads 0 and 1, last rows first; then head 2
    assert [access.start // 2 for access in kernels[0].blocks[0].accesses[1::2]][:2] == [2, 0]


def test_int8_product() -> None:
    sizes = {"M": 300, "N": 520, "K": 200, "rows": 128, "columns": 256, "depth": 128}
    kernels, arrays = int8_gemm(**sizes, workers=4)
    none, enough = (replay(kernels, arrays, cache=size)[0] for size in (0, EVERYTHING))
    assert none.dram_read == 3 * 300 * 200 + 3 * 520 * 200  # A once a column of tiles, B once a row of them
    assert none.dram_write == enough.left == 300 * 520 * 2
    assert enough.dram_read == 300 * 200 + 520 * 200
    # Eight rows of tiles together read B once for them.
    large = {"M": 1024, "N": 1024, "K": 256, "rows": 64, "columns": 64, "depth": 64, "workers": 4}
    grouped, alone = (
        replay(*int8_gemm(**large, group=group), cache=256 << 10)[0].dram_read for group in (8, 1)
    )
    assert grouped == 3 * (256 << 10)
    assert alone == 17 * (256 << 10)


def test_a_kernel_finds_what_the_one_before_left() -> None:
    write = Kernel("write", (Block((Access("x", 0, 64, "write"),)),))
    read = Kernel("read", (Block((Access("x", 0, 64),)),))
    first, second = replay([write, read], {"x": 64}, cache=64)
    assert first == ("write", 0, 64, 0, 0, 64)
    assert second == ("read", 64, 0, 0, 0, 64)
    assert total([]) == ("all", 0, 0, 0, 0, 0)


def test_refusals() -> None:
    kernel = Kernel("k", (Block((Access("x", 0, 8),)),))
    with pytest.raises(OptionError, match=r"k: x has 4 bytes"):
        replay([kernel], {"x": 4}, cache=8)
    with pytest.raises(OptionError, match=r"x has 4 bytes; got .*start=-1"):
        replay([Kernel("k", (Block((Access("x", 0, 4), Access("x", -1, 2))),))], {"x": 4}, cache=8)
    with pytest.raises(OptionError, match="expected bytes of"):
        replay([kernel], {"y": 8}, cache=8)
    with pytest.raises(OptionError, match="cache"):
        replay([kernel], {"x": 8}, cache=-1)
    with pytest.raises(OptionError, match="workers"):
        replay([kernel._replace(workers=0)], {"x": 8}, cache=1)
