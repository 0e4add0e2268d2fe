"""Laws of uniform quantisation, of its error, and of integer products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array, FloatArray, widen
from refimpl.quant.blocks import block_sizes, expand
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Quantizer = Callable[..., Any]


def _parts(case: Case, f: Quantizer) -> tuple[Array, FloatArray, Array]:
    """Return codes, and for every number its scale and zero point, the integers widened."""
    codes, scale, zero_point = (np.asarray(part) for part in case.call(f))
    block = case.kwargs.get("block")
    return (
        codes.astype(np.int64),
        expand(scale.astype(np.float64), codes.shape, block),
        expand(zero_point.astype(np.int64), codes.shape, block),
    )


def _wide(case: Case) -> FloatArray:
    return widen(case.args[0]).astype(np.float64)


def _eps(case: Case) -> float:
    return float(np.finfo(np.float64 if case.args[0].dtype == np.float64 else np.float32).eps)


def _is(case: Case, scheme: str) -> bool:
    return bool(case.kwargs.get("scheme", "symmetric") == scheme)


# Uniform quantisation (quant.uniform)


@law("quant.uniform")
def error_within_half_a_step(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """No number moves by more than half a step: the scale fits the range."""
    codes, scale, zero = _parts(case, f)
    x = _wide(case)
    rounding = 4 * _eps(case) * (np.abs(x) + scale)
    excess = np.abs(x - scale * (codes - zero)) - scale / 2 - rounding
    require(excess <= 0, f"a number moves by half a step and {np.max(excess, initial=0)} more")


@law("quant.uniform")
def zero_stays_zero(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """0 has the code of the zero point, exactly."""
    (x,) = case.args
    x = x.copy()
    x[..., ::2] = 0
    case = case.replace(x)
    codes, _, zero = _parts(case, f)
    require((codes == zero)[x == 0], "0 is not represented exactly")


@law("quant.uniform")
def codes_fit_their_bits(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Codes are 8-bit integers in the range of their bits, and the symmetric grid is its own mirror image."""
    codes, _, zero = _parts(case, f)
    half = 2 ** (case.kwargs["bits"] - 1)
    shift = 0 if case.kwargs.get("signed", True) else half
    low = shift - half + _is(case, "symmetric")
    require((codes >= low) & (codes <= shift + half - 1), f"a code outside [{low}, {shift + half - 1}]")
    dtype = np.asarray(case.call(f)[0]).dtype
    require(dtype == (np.uint8 if shift else np.int8), f"codes are {dtype}")
    if not _is(case, "affine"):
        require(zero == shift, f"a symmetric zero point that is not {shift}")


@law("quant.uniform")
def order_is_kept(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Of two numbers on one grid the larger does not get the smaller code."""
    case = case.without("block")
    codes = _parts(case, f)[0].ravel()[np.argsort(_wide(case), axis=None, kind="stable")]
    require(np.diff(codes) >= 0, "a larger number got a smaller code")


@law("quant.uniform")
def codes_are_fixed_points(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Quantising what was dequantised gives the same codes, where the scale is that of the largest code."""
    if not _is(case, "symmetric"):
        return  # other schemes leave the largest number between two codes, and its grid moves
    codes, scale, zero = _parts(case, f)
    again = _parts(case.replace((scale * (codes - zero)).astype(np.float64)), f)[0]
    require(again == codes, "codes change when quantised again")


@law("quant.uniform")
def powers_of_two_scale_through(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Numbers times a power of two have the same codes and that many times the scale."""
    (x,) = case.args
    codes, scale, zero = _parts(case, f)
    larger = _parts(case.replace((widen(x) * 4).astype(x.dtype)), f)
    require((larger[0] == codes) & (larger[2] == zero), "4 times the numbers have other codes")
    empty = expand(_largest_of_blocks(case) == 0, x.shape, case.kwargs.get("block"))
    require((larger[1] == 4 * scale) | empty, "4 times the numbers do not have 4 times the scale")


@law("quant.uniform")
def blocks_stand_alone(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every block has the codes and the scale that it has when it is quantised alone, ragged or not."""
    (x,) = case.args
    codes, scale, zero = (np.asarray(part) for part in case.call(f))
    extents = block_sizes(x.shape, case.kwargs.get("block"))
    for index in np.ndindex(scale.shape):
        where = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, extents, strict=True))
        alone = case.without("block").replace(x[where]).call(f)
        require(np.asarray(alone[0]) == codes[where], f"block {index} has other codes than alone")
        require(np.ravel(alone[1]) == scale[index], f"block {index} has another scale than alone")
        require(np.ravel(alone[2]) == zero[index], f"block {index} has another zero point than alone")


@law("quant.uniform")
def finer_blocks_have_finer_steps(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """A part of the tensor never has a larger scale than the whole, so its error bound is no larger."""
    whole = _parts(case.without("block"), f)[1]
    scale = _parts(case, f)[1]
    empty = expand(_largest_of_blocks(case) == 0, scale.shape, case.kwargs.get("block"))
    require((scale <= whole) | empty, "a block has a larger scale than the tensor")


@law("quant.uniform")
def a_bit_more_halves_the_step(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Scale times number of steps is the range, whatever the bits: 6.02 dB for each of them."""
    bits = case.kwargs["bits"]
    if bits == 8 or not _wide(case).any():
        return
    case = case.without("block")
    fewer, more = (_parts(case.replace(bits=b), f)[1] for b in (bits, bits + 1))
    steps = [2**b - (2 if _is(case, "symmetric") else 1) for b in (bits, bits + 1)]
    ranges = fewer * steps[0], more * steps[1]
    require(
        np.abs(ranges[0] - ranges[1]) <= 8 * _eps(case) * np.abs(ranges[0]), "the range depends on the bits"
    )


@law("quant.uniform")
def halves_go_where_they_are_told(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """With scale 1, halves go to the even code, or away from zero."""
    limit = 2 ** (case.kwargs["bits"] - 1) - 1
    halves = np.arange(-limit + 0.5, limit)
    x = np.concatenate([[limit, -limit], halves]).astype(np.float32)
    told = Case((x,), {**case.without("block").kwargs, "scheme": "symmetric"})
    codes, scale, zero = _parts(told, f)
    even = told.kwargs.get("rounding", "half_even") == "half_even"
    below, away = np.floor(halves), halves + np.copysign(0.5, halves)
    expected = np.where(below % 2 == 0, below, below + 1) if even else away
    require(scale == 1, "a grid of whole numbers does not have scale 1")
    require((codes - zero)[2:] == expected, "a half went the wrong way")


def _largest_of_blocks(case: Case) -> FloatArray:
    """Return the largest magnitude of each block, in plain loops."""
    x = np.abs(_wide(case))
    extents = block_sizes(x.shape, case.kwargs.get("block"))
    counts = [-(-size // extent) for size, extent in zip(x.shape, extents, strict=True)]
    largest = np.zeros(counts)
    for index in np.ndindex(*counts):
        where = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, extents, strict=True))
        largest[index] = x[where].max()
    return largest


# Quantisation error (quant.error)


@law("quant.error")
def error_is_the_difference(f: Quantizer, case: Case, close: Close) -> None:
    """What was quantised and its error add up to the numbers."""
    y = case.args[1]
    close(np.asarray(case.call(f)[0]) + widen(y).astype(np.float64), _wide(case), "Q(x) + e", of="error")


@law("quant.error")
def mean_square_scales_squared(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Twice the numbers have 4 times the mean square error and the same signal-to-noise ratio."""
    x, y = case.args
    one, two = case.call(f), case.replace(*((2 * widen(a)).astype(a.dtype) for a in (x, y))).call(f)
    require(float(two[1]) == 4 * float(one[1]), f"mean square {one[1]} becomes {two[1]}")
    require(float(two[2]) == float(one[2]), f"ratio {one[2]} becomes {two[2]}")


@law("quant.error")
def nothing_lost_is_no_error(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Numbers that are on the grid have error 0 and an infinite ratio."""
    x = case.args[0]
    e, mse, sqnr = case.replace(x, x).call(f)
    require(not np.any(e) and float(mse) == 0 and float(sqnr) == np.inf, f"mse {mse}, ratio {sqnr}")


@law("quant.error")
def uniform_numbers_err_by_a_twelfth(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Numbers spread evenly over whole steps have a mean square error of S²/12 and a mean error of 0."""
    n, step = 64, 0.25
    x = step * (np.arange(8 * n) + 0.5) / n  # cell centres: they fall short of S²/12 by 1 / (n cells)²
    e, mse, _ = f(x, step * np.rint(x / step))
    require(abs(float(mse) - step**2 / 12 * (1 - n**-2)) <= 1e-12, f"mse {mse}, expected S²/12")
    require(abs(float(np.mean(e))) <= 1e-12, f"mean error {np.mean(e)}")


# Integer products (quant.int8_matmul, quant.integer_matmul)

PRODUCTS = ("quant.int8_matmul", "quant.integer_matmul")


@law(*PRODUCTS)
def product_of_transposes(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Transposed operands in the other order give the transposed product."""
    a, b = case.args
    zeros = {"a_zero_point": "b_zero_point", "b_zero_point": "a_zero_point"}
    options = {zeros[key]: value.T for key, value in case.kwargs.items() if key in zeros}
    swapped = Case((np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)), options)
    require(np.asarray(case.call(f)) == np.asarray(swapped.call(f)).T, "(Bᵀ Aᵀ)ᵀ is not A B")


@law(*PRODUCTS)
def halves_of_the_sum_add_up(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """The products over two parts of K add up to the whole, exactly."""
    a, b = case.args
    cut = a.shape[1] // 3
    parts = [case.replace(a[:, s].copy(), b[s].copy()).call(f) for s in (slice(0, cut), slice(cut, None))]
    total = np.add(*parts, dtype=np.int64)
    require(total == np.asarray(case.call(f)), "parts of K do not add up to the whole")


@law(*PRODUCTS)
def product_does_not_wrap(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """The product is the one over the integers, worked out with Python's own."""
    a, b = case.args
    zero_a = np.broadcast_to(case.kwargs.get("a_zero_point", 0), (a.shape[0], 1)).astype(object)
    zero_b = np.broadcast_to(case.kwargs.get("b_zero_point", 0), (1, b.shape[1])).astype(object)
    got = np.asarray(case.call(f))
    for i, j in {(0, 0), (a.shape[0] - 1, b.shape[1] - 1)}:
        if i >= 0 and j >= 0 and a.shape[0] and b.shape[1]:
            left, right = a[i].astype(object) - zero_a[i, 0], b[:, j].astype(object) - zero_b[0, j]
            expected = sum(int(p) * int(q) for p, q in zip(left, right, strict=True))
            require(int(got[i, j]) == expected, f"[{i}, {j}]: got {got[i, j]}, expected {expected}")


@law("quant.integer_matmul")
def a_shift_of_codes_and_zero_point_cancels(f: Quantizer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Codes and zero points moved together mean the same numbers."""
    a, b = case.args
    if a.dtype != np.int8:
        return
    zero = np.asarray(case.kwargs.get("a_zero_point", 0))
    moved = case.replace((a.astype(np.int16) + 128).astype(np.uint8), b, a_zero_point=zero + 128)
    require(np.asarray(moved.call(f)) == np.asarray(case.call(f)), "uint8 codes around 128 differ from int8")
