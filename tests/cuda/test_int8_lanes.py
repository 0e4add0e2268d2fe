"""What threads of the Hopper int8 kernels do one by one: setting aside, layers of few rows."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cuda_backend.int8 import (
    arithmetic,
    aside_hopper,
    epilogue_hopper,
    layer_few_hopper,
    outliers_hopper,
    quantize_hopper,
)
from cuda_backend.int8.rows_hopper import sixteen_bit_limit
from cuda_backend.int8.variant_hopper import Few
from refimpl import quant
from tests.cuda.int8_hopper_played import KINDS, aligned
from tests.cuda.int8_judge import case_of, linear_difference
from tests.cuda.lanes_played import Lanes

MODULES = (arithmetic, aside_hopper, epilogue_hopper, layer_few_hopper, outliers_hopper, quantize_hopper)
LISTED_AT, NUMBER_AT, READY_AT, COUNTED_AT = 0, 8192, 8200, 8208


def placed(array: Any) -> Any:
    """Return a copy that begins at a multiple of 256 bytes."""
    owner = aligned(array.shape, array.dtype)
    owner[...] = array
    return owner


def judge_set_aside(
    monkeypatch: pytest.MonkeyPatch, count: int, outliers: str, module: Any = aside_hopper
) -> None:
    """Let three blocks set aside `count` outliers, with room for 64: some where two lists meet."""
    M, N, K, room, blocks, half = 70, 45, 4100, 64, 3, 2064
    rng = np.random.default_rng(count)
    edges = [K - 1, half, half - 1, 0] if count > 1 else []
    others = np.setdiff1d(np.arange(K), edges)
    found = np.sort([*edges, *rng.choice(others, count - len(edges), replace=False)]).astype(np.int64)
    marks = placed(np.isin(np.arange(4112), found).astype(np.uint8))
    counters, indices = placed(np.zeros(4, np.int32)), placed(np.full(K, -1, np.int32))
    x = placed(rng.standard_normal((M, K)).astype(np.float16))
    codes = placed(rng.integers(-128, 128, (M, K)).astype(np.int8))
    w_codes = placed(rng.integers(-127, 128, (N, K)).astype(np.int8))
    absmax = placed(rng.random(N).astype(np.float32))
    weight = placed(rng.standard_normal((K, N)).astype(np.float16))
    x_aside, w_aside = (placed(np.full((rows, 3 * room), 0x55, np.uint8)) for rows in (M, N))
    lanes = Lanes(blocks, 64)
    lanes.install(monkeypatch, (*MODULES, module))
    set_aside = module.build_set_aside("float16", outliers)
    met = (weight.ctypes.data, 2 * N, 2) if outliers == "paper" else (w_codes.ctypes.data, 1, K)
    given = tuple(
        np.uint64(each) for each in (x.ctypes.data, 2 * K, 2, codes.ctypes.data, K, *met, absmax.ctypes.data)
    )
    for block in lanes.blocks:
        block.shared[:] = 0xFF

    def kernel() -> None:
        set_aside(
            np.int32(lanes.own.thread), np.uint64(marks.ctypes.data), np.uint64(counters.ctypes.data),
            np.uint64(indices.ctypes.data), LISTED_AT, NUMBER_AT, COUNTED_AT, READY_AT, given,
            (np.uint64(x_aside.ctypes.data), np.uint64(w_aside.ctypes.data)), (M, N, room), K, blocks,
        )  # fmt: skip

    lanes.run(kernel)
    assert not marks.any()
    assert not counters.any()
    near = min(count, room)
    padded = min(room, -(-near // 32) * 32)
    for block in lanes.blocks:
        assert block.arrived == {READY_AT: 1}
        assert block.shared[NUMBER_AT:][:4].view(np.int32)[0] == count
        assert np.array_equal(block.shared[LISTED_AT:][: 4 * count].view(np.int32), found)
        assert np.all(block.shared[LISTED_AT:NUMBER_AT][4 * count :] == 0xFF)
    factors = absmax / np.float32(127)
    if outliers == "paper":
        wide = weight.T
    else:
        wide = (w_codes.astype(np.float32) * factors[:, None]).astype(np.float16)
    for aside, numbers in ((x_aside, x), (w_aside, wide)):
        expected = np.zeros((len(numbers), padded), np.float16)
        expected[:, :near] = numbers[:, found[:near]]
        side = np.ascontiguousarray(aside[:, : 2 * padded]).view(np.float16)
        assert np.array_equal(side.view(np.uint16), expected.view(np.uint16))
    if outliers == "released":
        for aside, numbers in ((x_aside, codes), (w_aside, -w_codes)):
            expected = np.zeros((len(numbers), padded), np.int8)
            expected[:, :near] = numbers[:, found[:near]]
            assert np.array_equal(aside[:, 2 * room :][:, :padded].view(np.int8), expected)


@pytest.mark.parametrize("outliers", ["released", "paper"])
@pytest.mark.parametrize("count", [0, 1, 31, 70])
def test_set_aside(monkeypatch: pytest.MonkeyPatch, count: int, outliers: str) -> None:
    judge_set_aside(monkeypatch, count, outliers)


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """Return a module with a mistake."""
    source = inspect.getsource(module)
    assert old in source
    changed = ModuleType("mutant")
    exec(source.replace(old, new), vars(changed))
    return changed


MISTAKES = {
    "sign of the codes": ("own[i] = uint32(-int32(own[i]))", "pass"),
    "order of the codes": ("codes[4], codes[5]", "codes[5], codes[4]"),
    "marks stay": ("clear_marks(marks, K, lane, 32)", "pass"),
    "a counter stays": ("copy.store_global_word(counters + uint64(DONE), uint32(0))", "pass"),
    "no padding": ("found[i], own[i] = uint32(0), uint32(0)", "pass"),
    "the last marks": ("if first + 16 * v < end:", "if first + 16 * v < end - 16:"),
    "marks beyond a half": ("if first + 16 * v < end:", "if first + 16 * v < end + 16:"),
    "both halves are one warp's": ("int32(half if warp == 0 else K)", "K"),
    "a gap between the halves": ("int32(half * warp)", "int32((half + 16) * warp)"),
    "halves overlap": ("int32(half if warp == 0 else K)", "int32(half + 16 if warp == 0 else K)"),
    "halves are not whole vectors": ("int32(16 * ((K + 31) >> 5))", "int32((K + 1) >> 1)"),
    "the second half is listed from the start": ("int32(before * warp)", "int32(0)"),
    "both halves are listed behind the first": ("int32(before * warp)", "before"),
    "the first half counts twice": ("uint32(counted + 16))", "uint32(counted))"),
    "marks are only counted": ("if own > 0:", "if own < 0:"),
    "marks of lanes below": ("upto += lower", "upto += int32(0)"),
    "the ready word": ("barrier.arrive(ready)", "barrier.arrive(number_at)"),
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_in_setting_aside_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    with pytest.raises((AssertionError, IndexError)):
        judge_set_aside(monkeypatch, 31, "released", mutant(aside_hopper, *MISTAKES[wrong]))


def multiplied(lanes: Lanes, w_codes: Any, variant: Few) -> Any:
    """Return what stands for the product of tensor cores: it reads codes as they do, swizzled."""

    def build(tokens: int, _stages: int, _bytes: int, _full_at: int, x_place: Any) -> Any:
        def accumulate(base: Any, thread: Any, first: Any, end: Any) -> None:
            block = lanes.own.block
            if thread == 0:
                total = np.zeros((tokens, 128), np.int64)
                start = block.number // variant.blocks * 128
                for step in range(int(first), int(end)):
                    at = int(x_place(base, 0, np.int32(step - first)))
                    assert at % 1024 == 0
                    place = np.arange(tokens * 128)
                    place ^= ((place >> 7) & 7) << 4
                    x = block.shared[at + place].view(np.int8).reshape(tokens, 128).astype(np.int64)
                    w = np.zeros((128, 128), np.int64)
                    part = w_codes[start : start + 128, 128 * step : 128 * step + 128]
                    w[: part.shape[0], : part.shape[1]] = part
                    total += x @ w.T
            block.barriers[1].wait()
            if thread == 0:
                block.shared[int(base) :][: tokens * 528].view(np.int32).reshape(tokens, 132)[:, :128] = total
            block.barriers[1].wait()

        return accumulate

    return build


@pytest.mark.parametrize(
    "asked",
    [
        ("float16", 3, 488, 140, 2, 4, 2, "some", 6.0),
        ("bfloat16", 1, 136, 9, 1, 1, 2, "some", None),
        ("float16", 9, 264, 20, 1, 16, 4, "all", 6.0),
        ("bfloat16", 2, 600, 5, 2, 2, 4, "zero_row", 1e-60),
    ],
)
def test_a_layer_of_few_rows(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    assert difference_of_few(monkeypatch, *asked) is None


MISTAKES_IN_FEW = {
    "not swizzled": ("^ (row & 7)", "^ 0"),
    "codes of outliers": ("words[4 * i + e // 2] &= ~", "_ = "),
    "outliers in the maximum": ("if bits < limit:", "if bits <= 0x7FFF:"),
    "other rows of x": ("place % row_vectors)", "place % 32)"),
    "outliers once": ("done = int32(done + LISTED)", "done = number"),
    "no bias": ("shift = unpack(", "_ = unpack("),
}


@pytest.mark.parametrize("wrong", MISTAKES_IN_FEW)
def test_mistakes_in_layers_of_few_rows_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    module = mutant(layer_few_hopper, *MISTAKES_IN_FEW[wrong])
    assert difference_of_few(monkeypatch, "float16", 3, 512, 9, 1, 4, 4, "some", 2.0, module)


def difference_of_few(
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    T: int,
    K: int,
    N: int,
    blocks: int,
    rows: int,
    room: int,
    outliers: str,
    threshold: Any,
    module: Any = layer_few_hopper,
) -> str | None:
    """Return how a layer differs from the reference."""
    variant = Few(dtype, rows, blocks, room, True)
    case = case_of(T, dtype, T=T, K=K, N=N, outliers=outliers, threshold=threshold)
    kind, steps = KINDS[dtype], -(-K // 128)

    def layer(x: Any, weight: Any, *, bias: Any, **options: Any) -> Any:
        if options.pop("return_parts", False):
            return quant.llm_int8_linear_fused(x, weight, bias=bias, return_parts=True, **options)
        codes, absmax = quant.quantize_columns(weight)
        x, absmax, bias = placed(x), placed(absmax), placed(bias)
        w_codes, out = placed(np.ascontiguousarray(codes.T)), placed(np.full((T, N), np.nan, kind))
        tiles = -(-N // 128)
        lanes = Lanes(tiles * blocks, variant.threads, blocks)
        lanes.install(monkeypatch, (*MODULES, module))
        monkeypatch.setattr(module, "build_accumulate", multiplied(lanes, w_codes, variant))
        monkeypatch.setattr(module, "LISTED", 16)
        kernel = module.build(variant)
        limit = 1 << 15 if threshold is None else sixteen_bit_limit(dtype, threshold, "released")
        addresses = (0, x.ctypes.data, 2 * K, out.ctypes.data, absmax.ctypes.data, bias.ctypes.data,
                     w_codes.ctypes.data, 1, K)  # fmt: skip
        numbers = (-(-steps // blocks), steps, T, N, K, limit)
        lanes.run(lambda: kernel(*map(np.uint64, addresses), *map(np.int32, numbers)))
        return out

    return linear_difference(layer, "llm_int8_linear_fused", case, dtype)
