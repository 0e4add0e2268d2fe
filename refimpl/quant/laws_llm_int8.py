"""Laws of LLM.int8(): what holds for every implementation, whatever its convention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Linear = Callable[..., Any]

LINEAR = ("quant.llm_int8", "quant.llm_int8_fused")


def _out(case: Case, f: Linear) -> Array:
    """Return the output widened, so that NumPy can compute with bfloat16."""
    return widen(np.asarray(case.call(f))).astype(np.float64)


def _arrays(case: Case) -> tuple[Array, Array, Array]:
    """Return x, weight and bias in float64."""
    x, weight = (widen(array).astype(np.float64) for array in case.args)
    bias = case.kwargs.get("bias")
    return x, weight, np.zeros(weight.shape[1]) if bias is None else widen(bias).astype(np.float64)


def _case(case: Case, x: Array, weight: Array, **options: Any) -> Case:
    """Return a call with other arrays in the dtype of the case."""
    dtype = case.args[0].dtype
    return case.replace(*(round_to(np.asarray(a, np.float64), dtype) for a in (x, weight)), **options)


@law(*LINEAR)
def without_outliers_all_is_int8(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """A threshold above every number gives what no threshold gives, bit for bit."""
    x = _arrays(case)[0]
    beyond = 4 * float(np.max(np.abs(x), initial=0)) + 1
    require(
        _out(case.replace(threshold=beyond), f) == _out(case.replace(threshold=None), f),
        "a threshold above every number changes the output",
    )


@law(*LINEAR)
def all_outliers_is_a_matrix_product(f: Linear, case: Case, close: Close) -> None:
    """If every column holds an outlier, the output is the product with the (de)quantised weight."""
    x, weight, bias = _arrays(case)
    case = case.replace(threshold=1e-6)
    if case.kwargs.get("convention", "released") == "released":
        absmax = np.max(np.abs(weight), axis=0, initial=0)
        steps = np.rint(weight * (127 / np.where(absmax > 0, absmax, 1)))
        weight = widen(round_to(steps * (absmax / 127), case.args[0].dtype)).astype(np.float64)
    close.on(case)(_out(case, f), x @ weight + bias, "every column an outlier", factor=2.0)


@law(*LINEAR)
def integers_come_out_exact(f: Linear, case: Case, close: Close) -> None:
    """Integers whose rows and columns reach 127, times powers of two, lose nothing."""
    x, weight, bias = _arrays(case)
    if not x.shape[1]:
        return
    rng = np.random.default_rng(0)
    x, weight = (rng.integers(-127, 128, array.shape).astype(np.float64) for array in (x, weight))
    x[:, :1], weight[:1] = 127.0, -127.0
    weight = weight / 1024  # a power of two changes no code, and float16 does not overflow
    whole = _case(case, x, weight, threshold=None)
    close.on(whole)(_out(whole, f), x @ weight + bias, "integers of absmax 127")


@law(*LINEAR)
def error_stays_within_its_bound(f: Linear, case: Case, close: Close) -> None:
    """Without outliers an output is within s_x s_w (|x_q|_1 / 2 + |w_q|_1 / 2 + K / 4) of the product."""
    case = case.replace(threshold=None)
    x, weight, bias = _arrays(case)
    steps_x = np.max(np.abs(x), axis=1, initial=0, keepdims=True) / 127
    steps_w = np.max(np.abs(weight), axis=0, initial=0, keepdims=True) / 127
    codes_x = np.rint(x / np.where(steps_x > 0, steps_x, 1))
    codes_w = np.rint(weight / np.where(steps_w > 0, steps_w, 1))
    sums = np.abs(codes_x).sum(1, keepdims=True) / 2 + np.abs(codes_w).sum(0, keepdims=True) / 2
    bound = steps_x * steps_w * (sums + x.shape[1] / 4) * (1 + 1e-5) + 2 * close.on(case).tolerance
    error = np.abs(_out(case, f) - (x @ weight + bias))
    require(error <= bound, f"error beyond its bound by {np.max(error - bound, initial=0)}")


@law(*LINEAR)
def an_outlier_column_leaves_the_others_alone(f: Linear, case: Case, close: Close) -> None:
    """A column of outliers that meets zero weights changes no output: the other codes stay as they are."""
    x, weight, _ = _arrays(case)
    threshold = case.kwargs.get("threshold", 6.0)
    if threshold is None:
        return
    # Larger than every number, not only than the threshold, so that the row absmax would notice.
    loud = np.full((x.shape[0], 1), 2 * max(threshold, float(np.max(np.abs(x), initial=0))))
    more = _case(case, np.hstack([x, loud]), np.vstack([weight, np.zeros((1, weight.shape[1]))]))
    close.on(more)(_out(more, f), _out(case, f), "an outlier column that meets zero weights")


@law(*LINEAR)
def threshold_itself(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """A number equal to the threshold is an outlier in the released code and none in the paper."""
    # Beside 6 on one int8 grid, 0.02 is less than half a step: it survives only if 6 is set aside.
    tie = _case(case.without("bias"), np.array([[6.0, 0.02]]), np.eye(2), threshold=6.0)
    survives = _out(tie, f)[0, 1] != 0
    inclusive = case.kwargs.get("convention", "released") == "released"
    require(survives == inclusive, f"|x| = threshold is {'an' if survives else 'no'} outlier")


@law(*LINEAR)
def scale_of_a_row(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """The absmax skips outlier cells only (released), or whole outlier columns (paper)."""
    # Column 0 holds an outlier in row 0.  In row 1 its 5.0 counts for the absmax or not: if it does, 0.01 is
    # less than half a step and vanishes.
    x = np.array([[9.0, 0.5], [5.0, 0.01], [0.0, 0.5]])
    out = _out(_case(case.without("bias"), x, np.eye(2), threshold=6.0), f)
    cells = case.kwargs.get("convention", "released") == "released"
    require((out[1, 1] == 0) == cells, f"0.01 beside 5.0 in an outlier column becomes {out[1, 1]}")


@law(*LINEAR)
def halves_round_to_even(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """A number half way between two codes gets the even one."""
    x = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    ties = _case(case.without("bias"), x, np.eye(6), threshold=None)
    expected = np.array([[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]])
    require(np.abs(_out(ties, f) - expected) < 0.1, f"halves became {_out(ties, f)[0].tolist()}")


@law(*LINEAR)
def rows_of_zeros_give_the_bias(f: Linear, case: Case, close: Close) -> None:
    """A row of zeros divides by nothing: its output is the bias."""
    x, weight, bias = _arrays(case)
    x[::2] = 0
    silent = _case(case, x, weight)
    expected = np.broadcast_to(bias, (len(x), len(bias)))[::2]
    close.on(silent)(_out(silent, f)[::2], expected, "rows of zeros")


@law(*LINEAR)
def tokens_and_features_permute(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """Permuted tokens and output features give the permuted output, bit for bit."""
    case = case.without("bias")
    x, weight = case.args
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(x.shape[0]), rng.permutation(weight.shape[1])
    moved = case.replace(x[rows], weight[:, columns]).replace(threshold=None)
    whole = _out(case.replace(threshold=None), f)
    require(_out(moved, f) == whole[rows][:, columns], "permuting tokens or features changes outputs")


@law(*LINEAR)
def powers_of_two_scale_the_output(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """Without outliers, 2x and W/4 give half the output, bit for bit."""
    x, weight, _ = _arrays(case)
    case = _case(case.without("bias"), x, weight, threshold=None)
    scaled = _case(case, 2 * x, weight / 4)
    if scaled.args[0].dtype.itemsize == 2:
        return  # halves may be subnormal there
    require(2 * _out(scaled, f) == _out(case, f), "the output does not scale with its operands")


@law(*LINEAR)
def nan_stays_in_its_row(f: Linear, case: Case, close: Close) -> None:  # noqa: ARG001
    """NaN makes its own row NaN, never a finite number, and leaves the other rows finite."""
    x, weight, _ = _arrays(case)
    if not x.size or not weight.shape[1]:
        return
    x[0, -1] = np.nan
    out = _out(_case(case, x, weight), f)
    require(np.isnan(out[0]), "NaN in a row gives finite outputs")
    require(np.isfinite(out[1:]), "NaN in one row spoils another")
