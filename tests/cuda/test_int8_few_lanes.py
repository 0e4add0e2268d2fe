"""What threads of the Hopper int8 product of few rows do one by one: outliers in shared memory, sums, scales.

The quantiser, the copy engine and the tensor cores are NumPy's.  Codes of outliers are garbage, which the
kernel takes away.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from cuda_backend.int8 import (
    arithmetic,
    aside_hopper,
    epilogue_hopper,
    gemm_narrow_hopper,
    outliers_few_hopper,
    outliers_hopper,
)
from cuda_backend.int8.rows_hopper import sixteen_bit_limit
from cuda_backend.int8.variant_hopper import NEAR, Narrow
from refimpl import quant
from refimpl.registry import Case
from tests.cuda.int8_hopper_played import KINDS, quantize
from tests.cuda.int8_judge import case_of, linear_difference
from tests.cuda.lanes_played import Lanes
from tests.cuda.test_int8_lanes import mutant, placed

MODULES = (
    arithmetic, aside_hopper, epilogue_hopper, gemm_narrow_hopper, outliers_few_hopper, outliers_hopper
)  # fmt: skip
W_MAP, X_MAP = 1, 2


class Asked(NamedTuple):
    """A layer: its format, convention and sizes, a tile's tokens and blocks, columns that hold outliers.

    And whether a block has a multiprocessor for itself: more stages, more tokens at once.
    """

    dtype: str
    convention: str
    T: int
    K: int
    N: int
    tokens: int
    blocks: int
    outliers: int
    alone: bool = False


# Two rounds of x and two turns, more steps than stages; two tiles of tokens, more outliers than have room;
# two tiles of the weight, thrice as many; an idle block; blocks without tokens; eight tokens at once, half of
# them not there.
ONE_BLOCK = Asked("float16", "released", 13, 1000, 9, 16, 1, NEAR - 1)
MANY = Asked("bfloat16", "released", 11, 290, 5, 8, 2, NEAR + 5)
PAPER = Asked("float16", "paper", 7, 140, 131, 8, 1, 2 * NEAR + 3)
IDLE = Asked("float16", "released", 3, 300, 5, 8, 4, 2, True)
MORE_BLOCKS = Asked("float16", "released", 5, 1030, 5, 8, 8, 3)
EIGHT = Asked("bfloat16", "released", 37, 140, 9, 64, 1, 6, True)


def case_with(asked: Asked) -> Case:
    """Return a call with outliers in so many columns, the last one among them, and a row of zeros."""
    case = case_of(
        asked.K, asked.dtype, T=asked.T, K=asked.K, N=asked.N, convention=asked.convention, outliers="none"
    )
    x = case.args[0].copy()
    found = np.random.default_rng(asked.K).choice(asked.K - 1, asked.outliers - 1, replace=False)
    x[1] = 0
    for i, column in enumerate((asked.K - 1, *found)):
        x[i % (asked.T - 2) + 2, column] = (9.0 + i) * (-1) ** i
    return case.replace(x, case.args[1])


def copied_and_multiplied(lanes: Lanes, barrier: Any, tokens: int, w_codes: Any, x_codes: Any) -> Any:
    """Return what stands for the copy engine and for the product of tensor cores."""
    held: dict[tuple[int, int], Any] = {}
    matrices = {W_MAP: (128, w_codes), X_MAP: (tokens, x_codes)}

    def load(target: Any, matrix: Any, full: Any, column: Any, row: Any) -> None:
        rows, codes = matrices[int(matrix)]
        found = codes[row : row + rows, column : column + 128]
        held[lanes.own.block.number, int(target)] = box = np.zeros((rows, 128), np.int64)
        box[: found.shape[0], : found.shape[1]] = found
        if matrix == X_MAP:  # which comes last
            barrier.arrive(full)

    def build(_tokens: int, stages: int, stage_bytes: int, full_at: int, x_place: Any) -> Any:
        def accumulate(base: Any, thread: Any, first: Any, end: Any) -> None:
            block, total = lanes.own.block, np.zeros((tokens, 128), np.int64)
            for i in range(int(end - first) if thread % 32 == 0 else 0):
                full = base + full_at + 8 * (i % stages)
                barrier.wait(full, i // stages & 1)
                if thread == 0:
                    x = held[block.number, int(x_place(base, i % stages, i))]
                    total += x @ held[block.number, int(base + i % stages * stage_bytes)].T
                barrier.arrive(full + 8 * stages)
            if thread == 0:
                block.shared[int(base) :][: tokens * 528].view(np.int32).reshape(tokens, 132)[:, :128] = total

        return accumulate

    return SimpleNamespace(acquire=lambda _: None, load=load), build


def difference(
    monkeypatch: pytest.MonkeyPatch,
    asked: Asked,
    module: ModuleType = gemm_narrow_hopper,
    outliers: ModuleType = outliers_few_hopper,
) -> str | None:
    """Return how a layer differs from the reference."""
    dtype, convention, T, K, N, tokens, blocks, _, alone = asked
    variant, kind = Narrow(dtype, convention, tokens, blocks, True, alone), KINDS[dtype]
    tiles, steps, pitch = -(-T // tokens), -(-K // 128), -(-K // 16) * 16
    limit = sixteen_bit_limit(dtype, 6.0, convention)

    def layer(x: Any, weight: Any, *, bias: Any, **options: Any) -> Any:
        if options.pop("return_parts", False):
            return quant.llm_int8_linear_fused(x, weight, bias=bias, return_parts=True, **options)
        columns, w_absmax = quant.quantize_columns(weight)
        x, weight, w_absmax, bias = (placed(each) for each in (x, weight, w_absmax, bias))
        codes, w_codes = placed(np.zeros((T, pitch), np.int8)), placed(np.ascontiguousarray(columns.T))
        x_absmax, marks = placed(np.zeros(T, np.float32)), placed(np.zeros(pitch, np.uint8))
        counters, indices = placed(np.zeros(4, np.int32)), placed(np.full(K, -1, np.int32))
        out = placed(np.full((T, N), np.nan, kind))
        for aside in ("mark", "columns") if convention == "paper" else ("cells",):
            told = SimpleNamespace(kind=dtype, aligned=False, aside=aside)
            values = [x.ctypes.data, 2 * K, codes.ctypes.data, pitch, x_absmax.ctypes.data, marks.ctypes.data]
            quantize(SimpleNamespace(values=[*values, K, limit], blocks=T, variant=told), None)
        assert marks.sum() == asked.outliers
        lanes = Lanes(tiles * -(-N // 128) * blocks, variant.threads, blocks)
        lanes.install(monkeypatch, (*MODULES, module, outliers))
        played = copied_and_multiplied(lanes, module.barrier, tokens, w_codes, codes[:, :K])
        for name, each in zip(("matrix_copy", "build_accumulate"), played, strict=True):
            monkeypatch.setattr(module, name, each)
        monkeypatch.setattr(module, "build_outliers", outliers.build_outliers)
        kernel = module.build(variant)
        met = (weight.ctypes.data, 2 * N, 2) if convention == "paper" else (w_codes.ctypes.data, 1, K)
        arrays = (out, x_absmax, w_absmax, bias, indices, marks, counters, codes)
        addresses = (
            W_MAP,
            X_MAP,
            *(each.ctypes.data for each in arrays),
            pitch,
            x.ctypes.data,
            2 * K,
            2,
            *met,
        )
        numbers = (tiles, -(-steps // blocks), steps, T, N, K)
        lanes.run(lambda: kernel(*map(np.uint64, addresses), *map(np.int32, numbers)))
        assert not marks.any()
        assert not counters.any()
        for block in lanes.blocks:
            assert np.all(block.shared[variant.shared_bytes - 1024 :] == 0xA5), "1 KiB is for the base"
        return out

    return linear_difference(layer, "llm_int8_linear_fused", case_with(asked), dtype)


@pytest.mark.parametrize("asked", [ONE_BLOCK, MANY, PAPER, IDLE, MORE_BLOCKS, EIGHT])
def test_a_product_that_sees_to_outliers(monkeypatch: pytest.MonkeyPatch, asked: Asked) -> None:
    assert difference(monkeypatch, asked) is None


MISTAKES_IN_OUTLIERS = {
    "x of the first round only": (ONE_BLOCK, "if j < near and token", "if j < near and i < 1 and token"),
    "rounds in one place": (ONE_BLOCK, "place = int32(row * NEAR + j)\n", "place = int32(warp * NEAR + j)\n"),
    "columns off by one": (ONE_BLOCK, "min(j + 4 * warps * g + e,", "min(j + 4 * warps * g + e + 1,"),
    "codes of another outlier": (ONE_BLOCK, "codes_at + place))\n", "codes_at + (place ^ 4)))\n"),
    "what a code is worth": (ONE_BLOCK, ">> 24), factor)", ">> 24), factor * float32(2))"),
    "codes without sign": (ONE_BLOCK, "int32(int32(word << (24 - 8 * e)) >> 24)", "(word >> (8 * e)) & 255"),
    "the tile's first columns": (PAPER, "uint64(min(start + lane", "uint64(min(lane"),
    "upper halves": (PAPER, "unpack(uint32(halves[i] >> uint32(16)))", "unpack(halves[i])"),
    "tokens of another block": (MANY, "token = int32(own + (row & 1) + step * (row >> 1))", "token = row"),
    "codes stay": (IDLE, "copy.load_shared_word(at_sum) - removed[i]", "copy.load_shared_word(at_sum)"),
    "a later round forgets": (MANY, "if earlier > 0:", "if earlier < 0:"),
    "a later round in the place of tokens": (PAPER, "earlier + thread)", "thread)"),
    "no later round meets the weight": (PAPER, "int32(thread >> 5), WARPS, near", "0, WARPS, 0"),
    "each second group": (ONE_BLOCK, "j + 4 * warps * groups", "j + 8 * warps * groups"),
    "groups in one place": (EIGHT, "(j // 4 + warps * g) * COLUMNS", "(j // 4) * COLUMNS"),
    "only the first round": (PAPER, "while earlier < number:", "while earlier < min(number, 1):"),
    "x of the first tile": (MANY, "at_row = uint64(first + token)", "at_row = uint64(token)"),
    "turns of the first tokens": (ONE_BLOCK, "row, turn = int32(row + 2 * together)", "row, turn = row"),
    "marks stay": (ONE_BLOCK, "clear_marks(marks, K, lane, 32)", "pass"),
    "a counter stays": (ONE_BLOCK, "uint64(LEFT), int32(grid - 1)", "uint64(LEFT), int32(grid)"),
}
MISTAKES_IN_FINISH = {
    "sums of the first block": (MANY, "uint32(block))", "uint32(0))"),
    "the first turn again": (ONE_BLOCK, "own, row = int32(own + token_step * together)", "own, row = own"),
    "scales of the first tile": (MANY, "uint64(first + place))", "uint64(place))"),
    "outliers not added": (ONE_BLOCK, "y + far[i]", "y"),
    "outliers of other tokens": (EIGHT, "added(base, int32(row + 2 * i)", "added(base, int32(row + i)"),
    "steps of the first block": (MANY, "int32(cuda.blockIdx.x % blocks) * own_steps", "0 * own_steps"),
    "first step in a later stage": (ONE_BLOCK, "full, int32(step * STEP), row)", "full, int32(first), row)"),
    "x of another tile": (MANY, "int32((first + stage) * STEP), token)", "int32((first + stage) * STEP), 0)"),
    "no bias": (ONE_BLOCK, "shift = unpack(", "_ = unpack("),
    "memory of nobody": (MANY, "full_at + variant.other_bytes - 8", "full_at + variant.other_bytes"),
}


@pytest.mark.parametrize("wrong", MISTAKES_IN_OUTLIERS)
def test_mistakes_in_outliers_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    asked, old, new = MISTAKES_IN_OUTLIERS[wrong]
    changed = mutant(outliers_few_hopper, old, new)
    with pytest.raises(AssertionError):
        assert difference(monkeypatch, asked, outliers=changed) is None


@pytest.mark.parametrize("wrong", MISTAKES_IN_FINISH)
def test_mistakes_in_what_is_written_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    asked, old, new = MISTAKES_IN_FINISH[wrong]
    changed = mutant(gemm_narrow_hopper, old, new)
    with pytest.raises(AssertionError):
        assert difference(monkeypatch, asked, changed) is None
