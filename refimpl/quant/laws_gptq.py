"""Laws of GPTQ, of ternary experts and of their dictionary code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import FrugalError, LawViolation
from refimpl.numerics import in_float64
from refimpl.quant.qmoe import qmoe_decode
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
ROUNDERS = ("quant.gptq", "quant.qmoe.ternary")


def _plain(case: Case) -> Any:
    """Return the codes of plain rounding."""
    weight = in_float64(case.args[0])
    if "bits" in case.kwargs:
        top = 2 ** (case.kwargs["bits"] - 1) - 1
        largest = np.max(np.abs(weight), axis=0, initial=0.0)
        return np.rint(weight / np.where(largest > 0, largest / top, 1.0))
    low, high = np.min(weight, axis=0, initial=0.0), np.max(weight, axis=0, initial=0.0)
    return ((high > 0) & (weight > high / 2)) * 1 - ((low < 0) & (weight < low / 2)) * 1


@law(*ROUNDERS)
def without_data_it_is_plain_rounding(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Without calibration inputs, or with orthogonal features of one size, every weight is just rounded."""
    weight, x = case.args
    plain = _plain(case)
    require(case.replace(weight, x[:0]).call(f)[0] == plain, "no inputs: a code differs from plain rounding")
    square = np.eye(weight.shape[0], dtype=np.float64).astype(x.dtype) * x.dtype.type(2)
    require(case.replace(weight, square).call(f)[0] == plain, "orthogonal features: a code differs")


@law(*ROUNDERS)
def the_first_feature_is_rounded(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Nothing comes before the first feature: its codes are those of plain rounding."""
    if case.args[0].size:
        require(np.asarray(case.call(f)[0])[0] == _plain(case)[0], "the first feature moved before rounding")


@law(*ROUNDERS)
def outputs_are_independent(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Outputs in another order have their codes and scales in that order."""
    weight, x = case.args
    turned = case.replace(weight[:, ::-1].copy(), x).call(f)
    for part, other in zip(case.call(f), turned, strict=True):
        require(np.asarray(part)[..., ::-1] == other, "an output depends on another")


@law(*ROUNDERS)
def inputs_only_count_by_their_products(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Inputs twice as large, in reverse order and of other signs, give the same codes."""
    weight, x = case.args
    if not x.size or not np.any(x):
        return
    other = case.replace(weight, (x[::-1] * x.dtype.type(-2)).copy()).call(f)
    same = np.asarray(other[0]) == case.call(f)[0]
    # Sums in another order may decide a tie otherwise; more than a code in twenty is no tie.
    require(
        np.mean(same) > 0.95 if same.size else True, "the codes depend on the order or size of the inputs"
    )


@law("quant.gptq")
def a_twin_makes_good_the_error(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Of two features that always agree the second takes up the error of the first."""
    weight = np.array([[0.4, 1.3], [2.4, 2.4], [7.0, -7.0]], case.args[0].dtype)
    x = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]], case.args[1].dtype)
    codes, scale = case.replace(weight, x, bits=4, damping=1e-6).call(f)
    require(np.asarray(codes) == [[0, 1], [3, 3], [7, -7]], f"codes {np.asarray(codes).tolist()}")
    require(in_float64(scale) == 1.0, "the step is not the absmax over the greatest code")


@law("quant.gptq")
def steps_are_fixed_ahead(f: Function, case: Case, close: Close) -> None:
    """The step of an output is its largest weight over the greatest code, before any weight moves."""
    codes, scale = case.call(f)
    top = 2 ** (case.kwargs["bits"] - 1) - 1
    largest = np.max(np.abs(in_float64(case.args[0])), axis=0, initial=0.0)
    close(in_float64(scale), np.where(largest > 0, largest / top, 1.0), "the steps", of="scale")
    require(np.abs(np.asarray(codes).astype(int)) <= top, f"a code beyond {top}")


@law("quant.qmoe.ternary")
def extremes_and_halves(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The least and greatest numbers are the levels; a number at half a level is 0."""
    weight, x = case.args
    codes, low, high = case.call(f)
    require(in_float64(low) == np.min(in_float64(weight), axis=0, initial=0.0), "low is not the least number")
    require(
        in_float64(high) == np.max(in_float64(weight), axis=0, initial=0.0), "high is not the greatest number"
    )
    require(np.isin(np.asarray(codes), (-1, 0, 1)), "a code that is not ternary")
    halves = np.array([[1.0], [0.5], [-0.25], [-0.5]], weight.dtype)
    found = case.replace(halves, np.zeros((0, 4), x.dtype)).call(f)[0]
    require(np.asarray(found)[:, 0] == [1, 0, 0, -1], "a half is rounded away from 0")


@law("quant.qmoe")
def decoding_restores_the_weights(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Any ternary rows come back."""
    (weights,) = case.args
    coded = case.call(f)
    try:
        back = qmoe_decode(*coded, n=weights.shape[1], **case.kwargs)
    except FrugalError as error:  # the decoder's words on codes that stand for other rows
        raise LawViolation(f"what was coded: {error}") from None
    require(back == weights, "a weight changed")


@law("quant.qmoe")
def rows_are_coded_by_themselves(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The codewords of a row are those it has alone, and stand between its starts."""
    (weights,) = case.args
    codewords, starts = (np.asarray(part) for part in case.call(f))
    require(len(starts) == len(weights) + 1 and starts[-1] == len(codewords), "starts do not frame the rows")
    for row in range(len(weights)):
        alone = case.replace(weights[row : row + 1]).call(f)[0]
        require(np.array_equal(alone, codewords[starts[row] : starts[row + 1]]), f"row {row} differs alone")


@law("quant.qmoe")
def no_more_than_a_codeword_a_pair(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A row of n weights takes at most ceil(n / 2) codewords, and zeros take the fewest of all rows."""
    (weights,) = case.args
    lengths = np.diff(np.asarray(case.call(f)[1]))
    require(lengths <= -(-weights.shape[1] // 2), "more codewords than pairs")
    zeros = np.diff(np.asarray(case.replace(weights * 0).call(f)[1]))
    if case.kwargs["bits"] == 8 and weights.size:  # the longest run of zeros is in the dictionary
        require(zeros <= lengths, "zeros take more codewords than other weights")
        pairs = -(-weights.shape[1] // 2)
        require(zeros == -(-pairs // case.kwargs["max_pairs"]), "zeros in short runs")
