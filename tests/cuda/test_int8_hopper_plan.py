"""What a Hopper int8 call hands to the driver, and what is refused, with a driver that only remembers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuda_backend.int8 import plan_hopper, rows_hopper
from cuda_backend.int8.plan_hopper import linear_plan, product_plan, rows_plan
from cuda_backend.int8.product_hopper import After
from cuda_backend.int8.rows_hopper import sixteen_bit_limit
from cuda_backend.int8.variant_hopper import Narrow, Wide, blocks_of_narrow, choose
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from tests.cuda.int8_hopper_driver import MAPS, forget_plans, remembered

X, CODES, ABSMAX, WEIGHT, BIAS, OUT, KEPT = (i << 30 for i in range(1, 8))


def layout(*shape: int, dtype: str = "float16", size: int = 2, pitch: int | None = None) -> Any:
    """Return the layout of a matrix or vector in C order, rows `pitch` bytes apart."""
    if len(shape) == 1:
        return shape, (size,), dtype, None
    return shape, (pitch or size * shape[1], size), dtype, None


def codes_layout(K: int, N: int, pitch: int | None = None) -> Any:
    return (K, N), (1, pitch or K), "int8", None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    yield remembered(monkeypatch)
    forget_plans()


@pytest.mark.parametrize("kept", [False, True])
def test_a_large_layer_is_two_kernels(launched: list[SimpleNamespace], kept: bool) -> None:
    """And a third between them where codes are kept, of which those of outliers are to be 0."""
    T, K, N = 300, 4096, 9000
    plan = linear_plan(
        layout(T, K), codes_layout(K, N), None, layout(N, dtype="float32", size=4), layout(N),
        6.0, "released", 7, 0,
    )  # fmt: skip
    plan.run(X, CODES, ABSMAX, 0, BIAS, OUT, (KEPT, KEPT + T * K) if kept else None)
    quantize, *_, product = launched
    assert [item.name for item in launched] == ["quantize", *["outliers"] * kept, "product"]
    assert {item.stream for item in launched} == {7}
    assert [item.early for item in launched] == [False, *[True] * kept, True]
    assert product.variant.beside
    assert (quantize.blocks, quantize.variant.aside, quantize.variant.aligned) == (T, "cells", True)
    x, x_row, x_codes, pitch, absmax, marks, width, limit = quantize.values
    assert (x, x_row, pitch, width, limit) == (X, 2 * K, K, K, 0x4600)
    indices = product.values[8]
    x_aside, w_aside, counters = product.values[18:21]
    if kept:
        number = launched[1].values[2]
        assert launched[1].values == [marks, indices, number, x_codes, K, T, K]
        assert number >> 41 == 1
    assert counters - marks == 4096, "both are 0 between calls"
    assert product.values[:4] == [MAPS, MAPS + 128, MAPS + 256, MAPS + 384]
    assert product.values[4:10] == [OUT, absmax, ABSMAX, BIAS, indices, marks]
    assert product.values[10:18] == [X, 2 * K, 2, CODES, 1, K, x_codes, K]
    rows, columns = 3, -(-N // product.variant.block_n)
    assert product.values[21:] == [rows * columns, rows, columns, K // 128, T, N, 1024, K]
    assert product.blocks == rows * columns
    assert product.threads == product.variant.threads
    assert product.shared == product.variant.shared_bytes <= 232_448
    assert marks >> 40 == 1
    assert indices >> 41 == x_aside >> 41 == w_aside >> 41 == 1
    if kept:
        assert (x_codes, absmax) == (KEPT, KEPT + T * K)
    else:
        assert x_codes >> 41 == absmax >> 41 == 1


@pytest.mark.parametrize(("N", "few"), [(70, True), (9000, False)])
def test_what_lies_in_memory_does_not_overlap(launched: list[SimpleNamespace], N: int, few: bool) -> None:
    """Of few tiles, where outliers stay in shared memory, and of many, where they are set aside."""
    T, K = 133, 100
    plan = linear_plan(
        layout(T, K), codes_layout(K, N, 112), None, layout(N, dtype="float32", size=4), None,
        6.0, "released", 0, 0,
    )  # fmt: skip
    plan.run(X, CODES, ABSMAX, 0, 0, OUT)
    quantize, product = launched[0], launched[-1]
    parts = {quantize.values[2]: T * 112, quantize.values[4]: 4 * T}
    if few:
        parts[product.values[6]] = 4 * K
        assert product.values[7:11] == [quantize.values[5], quantize.values[5] + 256, quantize.values[2], 112]
    else:
        indices, (x_aside, w_aside) = product.values[8], product.values[18:20]
        parts |= {indices: 4 * K, x_aside: T * 3 * 128, w_aside: N * 3 * 128}
    places = sorted(parts)
    assert len(places) == (3 if few else 5)
    for place, following in itertools.pairwise(places):
        assert place + parts[place] <= following
        assert place % 256 == 0


def test_the_paper_reads_x_twice_and_meets_the_weight(launched: list[SimpleNamespace]) -> None:
    plan = linear_plan(
        layout(16, 64), codes_layout(64, 32), layout(64, 32), layout(32, dtype="float32", size=4), None,
        6.0, "paper", 0, 0,
    )  # fmt: skip
    plan.run(X, CODES, ABSMAX, WEIGHT, 0, OUT)
    assert [item.name for item in launched] == ["quantize", "quantize", "narrow"]
    assert [item.variant.aside for item in launched[:2]] == ["mark", "columns"]
    assert launched[0].values[-1] == 0x4601
    assert launched[2].values[11:17] == [X, 128, 2, WEIGHT, 64, 2]
    assert launched[2].variant.beside
    assert [item.sharing for item in launched] == [True, True, False]


def test_without_a_threshold_nothing_is_set_aside(launched: list[SimpleNamespace]) -> None:
    plan = linear_plan(
        layout(500, 64), codes_layout(64, 9000), None, layout(9000, dtype="float32", size=4), None,
        None, "paper", 0, 0,
    )  # fmt: skip
    plan.run(X, CODES, ABSMAX, 0, 0, OUT)
    assert [item.name for item in launched] == ["quantize", "product"]
    assert launched[0].variant.aside == ""
    assert launched[1].values[8:13] == [0] * 5


@pytest.mark.parametrize(
    ("sizes", "one"),
    [
        ((1, 4096, 4096), False), ((2, 64, 40), True), ((16, 8192, 1024), True), ((17, 8192, 1024), False),
        ((1, 8192, 8192), False), ((2, 4096, 11_008), True), ((3, 4096, 11_008), False),
        ((4, 4096, 8184), False), ((32, 4096, 4096), False), ((1, 4100, 1024), False),
    ],
)  # fmt: skip
def test_when_few_rows_are_one_kernel(
    launched: list[SimpleNamespace], sizes: tuple[int, int, int], one: bool
) -> None:
    """As measured: see `one_kernel_wins`; of 4100 features codes are read in vectors, x is not."""
    T, K, N = sizes
    plan = linear_plan(
        layout(T, K), codes_layout(K, N, -(-K // 16) * 16), None, layout(N, dtype="float32", size=4), None,
        6.0, "released", 0, 0,
    )  # fmt: skip
    plan.run(X, CODES, ABSMAX, 0, 0, OUT)
    assert [item.name for item in launched] == (["layer_few"] if one else ["quantize", "narrow"])


def test_few_rows_are_one_kernel(launched: list[SimpleNamespace]) -> None:
    T, K, N = 2, 8192, 1000
    for threshold, limit in ((6.0, 0x4600), (None, 0x8000)):
        plan = linear_plan(
            layout(T, K), codes_layout(K, N), None, layout(N, dtype="float32", size=4), layout(N),
            threshold, "released", 7, 0,
        )  # fmt: skip
        plan.run(X, CODES, ABSMAX, 0, BIAS, OUT)
        layer = launched.pop()
        assert not launched
        assert layer.name == "layer_few"
        assert layer.values[:9] == [MAPS, X, 2 * K, OUT, ABSMAX, BIAS, CODES, 1, K]
        assert layer.values[9:] == [8, 64, T, N, K, limit]
        assert (layer.cluster, layer.blocks, layer.variant.rows, layer.variant.room) == (8, 64, 2, 8)
        plan.run(X, CODES, ABSMAX, 0, BIAS, OUT, (X, X))
        names = [item.name for item in launched]
        assert names == ["quantize", *["outliers"] * (threshold is not None), "narrow"], "codes are wanted"
        del launched[:]


def test_codes_that_the_copy_engine_cannot_read_are_packed(launched: list[SimpleNamespace]) -> None:
    a, b = layout(5, 35, dtype="int8", size=1), layout(35, 9, dtype="int8", size=1)
    product_plan(a, b, "int32", 0, 0).run(CODES + 1, CODES, OUT, After())
    first, second, product = launched
    assert (first.name, first.values[:3], first.values[4:]) == ("pack", [CODES + 1, 35, 1], [5, 35, 3])
    assert (second.name, second.values[:3], second.values[4:]) == ("pack", [CODES, 1, 9], [9, 35, 3])
    assert first.values[3] != second.values[3]
    assert not product.early, "the codes of the weight are being made"
    assert (product.name, product.variant.tokens, product.values[-3:-1]) == ("narrow", 8, [5, 9])


def test_addresses_of_codes_that_are_not_packed(launched: list[SimpleNamespace]) -> None:
    a, b = layout(5, 32, dtype="int8", size=1), codes_layout(32, 9)
    with pytest.raises(UnsupportedError, match="multiple of 16 bytes"):
        product_plan(a, b, "int32", 0, 0).run(CODES + 1, CODES, OUT, After())
    assert not launched


@pytest.mark.parametrize("columns", [1, 2, 4, 8])
def test_wide_stores_need_aligned_rows(launched: list[SimpleNamespace], columns: int) -> None:
    variants = [choose(kind, "released", 9000, 8 + columns, 64, 132) for kind in ("int32", "float16")]
    assert all(isinstance(variant, Wide) for variant in variants)
    assert [variant.aligned for variant in variants] == [columns >= 4, columns >= 8]  # type: ignore[union-attr]


def test_a_tile_is_shared_by_no_more_blocks_than_it_has_steps() -> None:
    for steps in range(200):
        found = [blocks_of_narrow(tiles, steps, 132) for tiles in (1, 32, 64, 132, 224)]
        assert all(blocks in (1, 2, 4, 8) and blocks <= max(1, steps) for blocks in found)


def test_variants_fit_into_shared_memory() -> None:
    for kind in ("int32", "float16"):
        for block_n in (128, 256):
            variant = Wide(kind, "released", True, block_n)
            assert variant.stages >= 4
            assert variant.shared_bytes <= 232_448
        for tokens, blocks, beside, alone in itertools.product(
            (8, 16, 32, 64), (1, 2, 4, 8), (False, True), (False, True)
        ):
            for outliers in ("released", "paper"):
                narrow = Narrow(kind, outliers, tokens, blocks, beside, alone)
                room = 233_472 - 16_384 if alone else 233_472 // 2
                assert narrow.shared_bytes + 1024 <= room, "a quantiser's blocks, or a second, beside it"
                kept = tokens + narrow.own_rows  # the sums, and what outliers add to a block's own tokens
                assert kept * 4 * (128 + 4) <= narrow.stages * (narrow.w_bytes + narrow.x_bytes)
                assert 16 * narrow.stages + 32 <= 256 - 8, "barriers, and a word that is nobody's"


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("convention", ["released", "paper"])
@pytest.mark.parametrize("threshold", [1e-60, 1e-7, 1.0, 2.5, 6.0, 6.01, 70000.0, 1e39])
def test_the_limit_of_16_bits_divides_as_the_threshold_does(
    kind: str, convention: Any, threshold: float
) -> None:
    patterns = np.arange(1 << 15, dtype=np.uint16)
    if kind == "float16":
        numbers = patterns.view(np.float16).astype(np.float32)
    else:
        numbers = (patterns.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        limit = np.float32(threshold)
        inliers = np.isfinite(numbers) & (numbers <= limit if convention == "paper" else numbers < limit)
    assert np.array_equal(~inliers, patterns >= sixteen_bit_limit(kind, threshold, convention))


@pytest.mark.parametrize(
    ("x", "codes", "absmax", "bias", "options", "error", "said"),
    [
        (
            layout(4, 64, dtype="float32", size=4),
            (64, 8),
            8,
            None,
            {},
            UnsupportedError,
            "inputs are float32",
        ),
        (layout(4, 32), (64, 8), 8, None, {}, ShapeError, "K"),
        (layout(4, 64), (64, 8), 9, None, {}, ShapeError, "N"),
        (layout(4, 64), (64, 8), 8, layout(9), {}, ShapeError, "N"),
        (layout(4, 64), (64, 8), 8, layout(8, dtype="bfloat16"), {}, DTypeError, "bias: expected float16"),
        (layout(4, 64), (64, 8), 8, None, {"threshold": -1.0}, OptionError, "above 0"),
        (layout(4, 64), (64, 8), 8, None, {"convention": "paper"}, UnsupportedError, "keep=True"),
        (((4, 64), (2, 8), "float16", None), (64, 8), 8, None, {}, UnsupportedError, "has strides"),
        (layout(4, 133_152), (133_152, 8), 8, None, {}, OptionError, "at most 133144"),
    ],
)
def test_refusals(
    launched: list[SimpleNamespace],
    x: Any,
    codes: Any,
    absmax: int,
    bias: Any,
    options: Any,
    error: Any,
    said: str,
) -> None:
    chosen = {"threshold": 6.0, "convention": "released", **options}
    scales = layout(absmax, dtype="float32", size=4)
    with pytest.raises(error, match=said):
        linear_plan(x, codes_layout(*codes), None, scales, bias, *chosen.values(), 0, 0)
    assert not launched


def test_other_gpus_are_refused(launched: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = SimpleNamespace(compute_capability=(8, 0), MULTIPROCESSOR_COUNT=108)
    for module in (plan_hopper, rows_hopper):
        monkeypatch.setattr(module, "cuda", SimpleNamespace(get_current_device=lambda: ampere))
    with pytest.raises(UnsupportedError, match=r"compute capability 8\.0; the kernel needs 9\.0"):
        rows_plan(layout(4, 64), None, "released", 0, 0)
