"""Quantisers that are wrong in one way: the laws of the records must catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.quant import Quantized, dequantize_columns, int8_matmul, quantize_columns, uniform
from refimpl.quant.blocks import block_sizes
from refimpl.quant.llm_int8 import llm_int8_linear
from refimpl.testing import check
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("quant.uniform")
def scale_from_the_other_axis(x: Any, /, *, block: Any = None, **options: Any) -> Any:
    turned = {(1, None): (None, 1), (None, 1): (1, None)}.get(block, block)
    q = uniform(x, block=turned, **options)
    if turned == block:
        return q
    shape = tuple(-(-n // b) for n, b in zip(x.shape, block_sizes(x.shape, block), strict=True))
    return Quantized(q.codes, np.resize(q.scale, shape), np.resize(q.zero_point, shape))


@mutant("quant.uniform")
def last_group_dropped(x: Any, /, *, block: Any = None, **options: Any) -> Any:
    q = uniform(x, block=block, **options)
    size = block_sizes(x.shape, block)[-1]
    if x.shape[-1] % size:
        q.codes[..., x.shape[-1] // size * size :] = 0
    return q


@mutant("quant.uniform")
def halves_rounded_up(x: Any, /, *, rounding: Any = "half_even", **options: Any) -> Any:
    def up(x: Any, _: Any) -> Any:
        return np.floor(x + 0.5)

    import refimpl.quant.grid as grid

    kept = grid.round_half
    try:
        grid.round_half = up
        return uniform(x, rounding=rounding, **options)
    finally:
        grid.round_half = kept


@mutant("quant.uniform")
def range_without_zero(x: Any, /, *, scheme: Any = "symmetric", **options: Any) -> Any:
    if scheme != "affine" or not x.size:
        return uniform(x, scheme=scheme, **options)
    return uniform(x - x.min(), scheme=scheme, **options)


@mutant("quant.uniform")
def one_step_too_many(x: Any, /, *, bits: int = 8, **options: Any) -> Any:
    q = uniform(x, bits=bits, **options)
    return q._replace(scale=q.scale * (1 - 2.0**-bits))


@mutant("quant.uniform")
def minus_128_used(x: Any, /, **options: Any) -> Any:
    q = uniform(x, **options)
    low = q.codes == (q.codes.min() if q.codes.size else 0)
    return q._replace(codes=np.where(low & (q.codes == -127), -128, q.codes).astype(q.codes.dtype))


@mutant("quant.int8_matmul")
def product_in_int8(a: Any, b: Any, /) -> Any:
    return (a @ b).astype(np.int32)


@mutant("quant.int8_matmul")
def product_in_float32(a: Any, b: Any, /) -> Any:
    """Exact to K = 1,040 only: 2**24 / 127**2."""
    return (a.astype(np.float32) @ b.astype(np.float32)).astype(np.int32)


@mutant("quant.int8_matmul")
def last_tile_of_k_dropped(a: Any, b: Any, /) -> Any:
    whole = a.shape[1] // 16 * 16
    return int8_matmul(a[:, :whole], b[:whole])


@mutant("quant.integer_matmul")
def zero_point_product_forgotten(a: Any, b: Any, /, *, a_zero_point: Any = 0, b_zero_point: Any = 0) -> Any:
    a, b = a.astype(np.int64), b.astype(np.int64)
    return a @ b - a_zero_point * b.sum(0, keepdims=True) - a.sum(1, keepdims=True) * b_zero_point


def _linear(x: Any, weight: Any, bias: Any, threshold: Any, convention: str, wrong: str) -> Any:
    """LLM.int8() in plain NumPy, with one mistake."""
    inclusive = (convention == "released") != (wrong == "threshold")
    limit = np.inf if threshold is None else threshold
    with np.errstate(invalid="ignore", divide="ignore"):
        cells = ~((np.abs(x) < limit) if inclusive else (np.abs(x) <= limit))
        aside = cells.any(axis=0)
        by_cells = (convention == "released") != (wrong == "absmax")
        left = np.where(cells if by_cells else aside, 0, np.abs(x))
        absmax = left.max(axis=1, initial=0, keepdims=True)
        if wrong == "row axis":
            absmax = np.resize(left.max(axis=0, initial=0), absmax.shape)
        if wrong == "tensor scale":
            absmax = np.full(absmax.shape, left.max(initial=0))
        if wrong == "outliers in absmax":
            absmax = np.abs(x).max(axis=1, initial=0, keepdims=True)
        steps = np.where(aside, 0, x) * (127 / np.where(absmax > 0, absmax, 1))
        round_ = {"half up": lambda s: np.floor(s + 0.5), "truncate": np.trunc}.get(wrong, np.rint)
        codes = round_(steps)
        w = quantize_columns(weight)
        if wrong == "last tile":
            codes[:, x.shape[1] // 8 * 8 :] = 0
        out = codes @ w.codes.astype(np.float64) * absmax * w.absmax / (128**2 if wrong == "128" else 127**2)
        values = dequantize_columns(w)
        exact = values if (convention == "released") != (wrong == "outlier weights") else weight
        out = out + (0 if wrong == "outliers lost" else x[:, aside] @ exact[aside])
    return out + (0 if bias is None or wrong == "bias lost" else bias)


MISTAKES = (
    "threshold", "absmax", "row axis", "tensor scale", "outliers in absmax", "half up", "truncate",
    "last tile", "128", "outlier weights", "outliers lost", "bias lost",
)  # fmt: skip


def linear_with(wrong: str) -> Callable[..., Any]:
    def f(
        x: Any, weight: Any, /, *, bias: Any = None, threshold: Any = 6.0, convention: str = "released"
    ) -> Any:
        return _linear(x, weight, bias, threshold, convention, wrong)

    return f


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistake_is_caught_by_laws(wrong: str) -> None:
    failed = {outcome.check for outcome in check("quant.llm_int8", linear_with(wrong), examples=8).failed}
    assert failed - {"reference"}, f"{wrong} survived the laws; failed: {failed}"


def test_the_unbroken_ones_pass() -> None:
    assert check("quant.llm_int8", linear_with("nothing"), examples=8).ok
    assert check("quant.llm_int8", llm_int8_linear, examples=4).ok
    assert check("quant.uniform", uniform, examples=4).ok
