"""Laws of linear layers whose weight alone is quantised: int8 in groups, and NF4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, round_to, widen
from refimpl.quant.double_quantization import dynamic_map
from refimpl.quant.nf4 import LEVELS
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Linear = Callable[..., Any]

BOTH = ("quant.weight_only_int8", "quant.weight_only_nf4")


def _out(case: Case, f: Linear) -> FloatArray:
    """Return the output in float64, bfloat16 too."""
    return widen(np.asarray(case.call(f))).astype(np.float64)


def _arrays(case: Case) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return x, weight and bias in float64."""
    x, weight = (widen(array).astype(np.float64) for array in case.args)
    bias = case.kwargs.get("bias")
    return x, weight, np.zeros(weight.shape[1]) if bias is None else widen(bias).astype(np.float64)


def _case(case: Case, x: FloatArray, weight: FloatArray) -> Case:
    """Return a call with other arrays in the dtype of the case."""
    dtype = case.args[0].dtype
    return case.replace(*(round_to(np.asarray(a, np.float64), dtype) for a in (x, weight)))


@law(*BOTH)
def activations_are_never_quantised(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """With a weight of ones, which loses nothing, an output is the sum of a token's features and the bias."""
    x, weight, _ = _arrays(case)
    # Small integers and one of 1/64 apart: on an int8 grid of the row the fraction would vanish.
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, x.shape).astype(np.float64)
    x[:, :1] += 1 / 64
    whole = _case(case.without("bias"), x, np.ones_like(weight))
    expected = np.broadcast_to(x.sum(axis=1, keepdims=True), (len(x), weight.shape[1]))
    # Half an ulp of bfloat16 is 2**-8 of a number; one for the weight, one for the output.
    tolerance = 2.0**-7 * np.abs(x).sum(axis=1, keepdims=True) * (whole.args[0].dtype.itemsize < 4) + 1e-5
    require(np.abs(_out(whole, f) - expected) <= tolerance, "a weight of ones changes the sum of features")


@law("quant.weight_only_int8")
def integers_of_127_are_exact(f: Linear, case: Case, close: Close) -> None:
    """Integer weights whose groups all reach 127, times a power of two for each group, lose nothing."""
    x, weight, bias = _arrays(case)
    size = case.kwargs.get("group_size", 128)
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, weight.shape).astype(np.float64)
    weight[::size] = 127.0
    powers = np.exp2(-7.0 - np.arange(len(weight)) // size % 3)
    exact = _case(case, x, weight * powers[:, None])
    close.on(exact)(_out(exact, f), x @ exact.args[1].astype(np.float64) + bias, "integers of absmax 127")


@law("quant.weight_only_int8")
def weights_within_half_a_step(f: Linear, case: Case, close: Close) -> None:
    """An output is within the sum of |x| times half a step of each group of the product."""
    x, weight, bias = _arrays(case)
    size, K = case.kwargs.get("group_size", 128), weight.shape[0]
    starts = np.arange(0, K, size)
    steps = np.maximum.reduceat(np.abs(weight), starts, axis=0) / 127 if K else np.abs(weight)
    bound = np.abs(x) @ (np.repeat(steps, size, axis=0)[:K] / 2) * (1 + 1e-5)
    error = np.abs(_out(case, f) - (x @ weight + bias))
    require(error <= bound + 2 * close.tolerance, "an output is further than half a step of each weight")


@law("quant.weight_only_nf4")
def levels_of_a_block_are_exact(f: Linear, case: Case, close: Close) -> None:
    """Weights that are levels of NF4, of blocks with one absmax, lose nothing but the dtype's rounding."""
    x, weight, bias = _arrays(case)
    size = case.kwargs.get("block_size", 64)
    rng = np.random.default_rng(0)
    flat = rng.choice(LEVELS.astype(np.float64), weight.size)
    flat[::size] = 1.0
    given = _case(case, x, flat.reshape(weight.shape[::-1]).T)
    if case.args[0].dtype.itemsize < 4:
        return  # rounded levels are no levels
    close.on(given)(_out(given, f), x @ given.args[1].astype(np.float64) + bias, "levels of NF4", factor=4.0)


@law("quant.weight_only_nf4")
def weights_within_half_a_gap(f: Linear, case: Case, close: Close) -> None:
    """An output is within |x| times half a gap of NF4 and of its scales' map, and the dtype's rounding."""
    x, weight, bias = _arrays(case)
    size, inner = case.kwargs.get("block_size", 64), case.kwargs.get("scale_block_size", 256)
    flat = weight.T.reshape(-1)
    if not flat.size:
        return
    absmax = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, size))
    spread = np.maximum.reduceat(np.abs(absmax - absmax.mean()), np.arange(0, absmax.size, inner))
    level, scale_level = (float(np.diff(levels).max()) / 2 for levels in (LEVELS, dynamic_map()))
    # The map ends at -0.993: half its widest gap covers what lies below.
    moved = np.repeat(spread, inner)[: absmax.size] * scale_level
    room = np.repeat(absmax * level + moved, size)[: flat.size].reshape(weight.shape[::-1]).T
    narrow = {2: 2.0**-8}.get(case.args[0].dtype.itemsize, 1e-6)  # the weight is rounded to the dtype
    bound = np.abs(x) @ (room + narrow * (np.abs(weight) + room))
    error = np.abs(_out(case, f) - (x @ weight + bias))
    require(error <= bound + 2 * close.tolerance, "an output is further than half a gap of each weight")


@law(*BOTH)
def the_bias_is_added_once(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """Without activations the output is the bias, bit for bit."""
    x, weight, bias = _arrays(case)
    silent = _case(case, np.zeros_like(x), weight)
    require(_out(silent, f) == np.broadcast_to(bias, (len(x), len(bias))), "zeros do not give the bias")


@law(*BOTH)
def outputs_are_linear_in_x(f: Linear, case: Case, close: Close) -> None:
    """The tokens x, 2x and -x have outputs y, 2y and -y without a bias."""
    x, weight, _ = _arrays(case)
    plain = case.without("bias")
    y = _out(plain, f)
    for factor in (2.0, -1.0):
        other = _case(plain, factor * x, weight)
        close.on(other)(_out(other, f), factor * y, f"{factor} times the activations")


@law(*BOTH)
def tokens_do_not_meet(f: Linear, case: Case, close: Close) -> None:
    """Each token alone has the output that it has among others."""
    x, weight = case.args
    whole = _out(case, f)
    for token in range(min(len(x), 3)):
        close(_out(case.replace(x[token : token + 1], weight), f), whole[token : token + 1], "one token")


@law(*BOTH)
def columns_of_zeros_give_the_bias(f: Linear, case: Case, close: Close) -> None:
    """An output feature whose weights are 0 has its bias as output."""
    x, weight, bias = _arrays(case)
    if case.kwargs.get("block_size", 1) > weight.shape[0] > 0:
        return  # NF4 blocks run on into the next feature, and absmax codes have an offset
    weight = weight.copy()
    weight[:, ::2] = 0.0
    silent = _case(case, x, weight)
    expected = np.broadcast_to(bias, (len(x), len(bias)))[:, ::2]
    close.on(silent)(_out(silent, f)[:, ::2], expected, "columns of zeros")
