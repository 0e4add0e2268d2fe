"""What "equal" means: how far an implementation may be from its reference.

R is the reference on exact float64 copies of the inputs, B the reference on the inputs as they are (the
low-precision baseline), C the candidate.  All three are compared in float64.

- A rewrite in float64 may differ by the rounding of its sums and by how much the reference itself moves when
  its inputs move by one unit in the last place: ``8 * (n * eps * sum|terms| + max |R(x') - R(x)|)``.  The
  summation bound alone is wrong once exp amplifies a rounding of the score.
- A kernel may err at most twice as much as the baseline does, for gradients three times (flash-attention's
  own tests allow that), on the case or next to it: in maximum, plus one ulp, and in root mean square, plus
  half an ulp; both relative to the size of a row.  A row that is small because its terms cancel keeps their
  rounding: it may err as the baseline does in that very row, or by a few float32 roundings of the terms.
  An output that stays in float32 beside inputs of fewer bits, as log-sum-exps do, is no single rounding of
  something wider but what the kernel computed in float32: it keeps the roundings of a few operations.
  Where the baseline itself is useless the case says nothing and is invalid.
- Codes, masks, indices and counts are equal.  NaN never passes where R is finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from refimpl.numerics import Array, FloatArray, is_floating, round_to, ulp, widen
from refimpl.registry import Case, Technique

__all__ = [
    "BASELINE_CAP",
    "Limit",
    "baseline_limits",
    "cast",
    "exact_copy",
    "mismatch",
    "outputs",
    "rewrite_limits",
]

# Above these the baseline's relative rms error says that the case is ill-conditioned in that format.
BASELINE_CAP = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}
REWRITE_FACTOR = 8.0
# A row smaller than this share of the whole is judged as if it had that size: it is small by cancellation.
SMALLEST_ROW = 1 / 16
# A row cancels in part, or altogether, if its terms are so many times as large as itself.
PARTLY, ALTOGETHER = 16.0, 1000.0
TERM_ROUNDINGS = 8.0  # in float32, that a row which cancels may keep
# Of half a unit in the last place of float32 each.  With scores in units of log2(e), as every fast kernel has
# them, lse = (factor * m + log2(l)) * ln(2) rounds both constants, both products and the sum, and log2 has an
# error of 2**-22, four of them (PTX ISA, lg2.approx).  With one key the baseline has none of these, by luck:
# there m is lse.
WORKING_ROUNDINGS = 9
PERTURBATIONS = 3


class Limit(NamedTuple):
    """What is allowed: the largest error, everywhere or by element, and the rms error relative to `scale`."""

    largest: FloatArray
    rms: float | None = None
    scale: FloatArray | None = None


def outputs(value: Any) -> dict[str, Array]:
    """Return what a function returned as named arrays: an array, several, a NamedTuple, or an estimate.

    Examples
    --------
    >>> list(outputs((np.zeros(1), np.ones(1))))
    ['output 0', 'output 1']
    """
    if not isinstance(value, np.ndarray) and isinstance(getattr(value, "totals", None), Mapping):
        # An estimate of memsim: exact numbers, one for each unit, kept as objects.
        return {name: np.asarray(total, dtype=object) for name, total in value.totals.items()}
    if hasattr(value, "_fields"):
        value = {name: item for name, item in zip(value._fields, value, strict=True) if item is not None}
    elif isinstance(value, tuple | list):
        value = {f"output {index}": item for index, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return {"output": np.asarray(value)}
    found: dict[str, Array] = {}
    for name, item in value.items():
        inner = outputs(item)
        found |= {name: inner["output"]} if list(inner) == ["output"] else _prefixed(name, inner)
    return found


def _prefixed(name: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {f"{name}.{key}": array for key, array in arrays.items()}


def cast(case: Case, dtype: np.dtype[Any]) -> Case:
    """Return the case with every floating array rounded to `dtype`: the inputs a candidate is given."""
    return case.map_arrays(lambda array: round_to(array, dtype) if is_floating(array.dtype) else array)


def exact_copy(case: Case) -> Case:
    """Return the case with every floating array widened, exactly, to float64."""
    return case.map_arrays(
        lambda array: widen(array).astype(np.float64) if is_floating(array.dtype) else array
    )


def rewrite_limits(technique: Technique, case: Case) -> tuple[dict[str, Array], dict[str, Limit]]:
    """Return the reference's outputs on a float64 case, and how far a float64 rewrite may be from them."""
    truth = outputs(case.call(technique.function))
    if technique.terms is not None:
        n, magnitudes = technique.terms(case)
        terms = outputs(magnitudes)
    else:
        sizes = [size for array in case.args if isinstance(array, np.ndarray) for size in array.shape]
        n, terms = max(sizes, default=1), {name: _finite_magnitude(value) for name, value in truth.items()}
    sensitivity = dict.fromkeys(truth, 0.0)
    rng = np.random.default_rng(0)
    for _ in range(PERTURBATIONS):
        moved = outputs(case.map_arrays(lambda array: _one_ulp_away(array, rng)).call(technique.function))
        for name, value in truth.items():
            sensitivity[name] = max(sensitivity[name], _largest(_difference(moved[name], value)))
    eps = np.finfo(np.float64).eps
    limits = {
        name: Limit(np.asarray(REWRITE_FACTOR * (n * eps * terms[name] + sensitivity[name])))
        for name in truth
    }
    return truth, limits


def baseline_limits(
    technique: Technique, case: Case, dtype: np.dtype[Any]
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Limit], str | None]:
    """Return truth, baseline and limits for a kernel on a case in `dtype`, and why the case is invalid.

    The baseline's error is the largest on the case and on a few neighbours, inputs one ulp away: on a case of
    few cells a single draw of roundings is luck, and a kernel that sums in another order has another draw.
    """
    truth = outputs(exact_copy(case).call(technique.function))
    baseline = outputs(case.call(technique.function))
    floats = [name for name in truth if is_floating(baseline[name].dtype)]
    spread = outputs(technique.spread(exact_copy(case))) if technique.spread else truth
    errors = {name: [_difference(widen(baseline[name]), truth[name])] for name in floats}
    rng = np.random.default_rng(0)
    for _ in range(PERTURBATIONS):
        near = case.map_arrays(lambda array: _one_ulp_away(array, rng))
        near_truth = outputs(exact_copy(near).call(technique.function))
        near_baseline = outputs(near.call(technique.function))
        for name in floats:
            errors[name].append(_difference(widen(near_baseline[name]), near_truth[name]))
    limits: dict[str, Limit] = {}
    invalid = None
    for name, value in truth.items():
        if name not in floats:  # codes beside numbers: equal to those of the raw inputs
            truth[name], limits[name] = baseline[name], Limit(np.zeros(()))
            continue
        spacing = ulp(_finite_magnitude(value), baseline[name].dtype)
        size = _row_sizes(value, spread[name])
        relative = [error / size.judged for error in errors[name]]
        worst = max(map(_largest, np.where(size.partly, 0.0, relative)))
        own = np.max([_row_max(np.abs(error)) for error in errors[name]], axis=0)
        floor = np.maximum(own, TERM_ROUNDINGS * np.finfo(np.float32).eps * size.terms)
        largest = np.maximum(worst * size.judged, np.where(size.partly, floor, 0.0))
        kept = WORKING_ROUNDINGS * 2.0**-24 if _is_wider(baseline[name], dtype) else 0.0
        largest = technique.kernel_factor * largest + np.maximum(_row_max(spacing), kept * size.terms)
        relative = [error / size.terms for error in errors[name]]
        rms = max(map(_rms, relative))
        allowed = technique.kernel_factor * rms + max(_rms(0.5 * spacing / size.terms), kept)
        limits[name] = Limit(largest, allowed, size.terms)
        cap = BASELINE_CAP.get(dtype.name, np.inf)
        if not rms <= cap:
            invalid = f"the baseline's rms error of {name} is {rms:.2e} of its size, above {cap}"
    return truth, baseline, limits, invalid


def mismatch(actual: Array, expected: Array, limit: Limit | None, *, name: str = "output") -> str | None:
    """Return how `actual` differs from `expected` beyond `limit`, in words; None if it does not.

    Parameters
    ----------
    actual, expected : ndarray
        The candidate's output and the truth.
    limit : Limit or None
        None: they must be equal.
    name : str
        For the message.

    Returns
    -------
    str or None
        Shape first, then non-finite values, then the largest excess with its coordinates.

    Examples
    --------
    >>> mismatch(np.array([1.0, np.nan]), np.array([1.0, 2.0]), Limit(np.asarray(0.1)))
    'output[1]: got nan, expected 2.0 (1 of 2 cells differ in being finite)'
    """
    if actual.shape != expected.shape:
        return f"{name}: expected shape {expected.shape}, got {actual.shape}"
    if limit is None:
        same = np.asarray(actual == expected, dtype=bool)
        both_nan = np.asarray(actual != actual, dtype=bool) & np.asarray(expected != expected, dtype=bool)
        wrong = ~(same | both_nan)
        if not wrong.any():
            return None
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        return f"{_cell(name, where)}: got {actual[where]}, expected {expected[where]}, {_share(wrong)}"
    c, r = widen(actual).astype(np.float64), widen(expected).astype(np.float64)
    odd = (np.isfinite(c) | np.isfinite(r)) & ~(np.isfinite(c) & np.isfinite(r))
    odd |= ~np.isfinite(c) & ~np.isfinite(r) & ~((c == r) | (np.isnan(c) & np.isnan(r)))
    if odd.any():
        where = tuple(int(i) for i in np.argwhere(odd)[0])
        return (
            f"{_cell(name, where)}: got {c[where]}, expected {r[where]} "
            f"({int(odd.sum())} of {odd.size} cells differ in being finite)"
        )
    error = np.abs(_difference(c, r))
    allowed = np.broadcast_to(limit.largest, error.shape)
    wrong = ~(error <= allowed)
    if wrong.any():
        excess = np.where(wrong, error - allowed, -np.inf)
        where = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
        return (
            f"{_cell(name, where)}: got {c[where]:.9g}, expected {r[where]:.9g}, "
            f"error {error[where]:.3g} > {allowed[where]:.3g}, {_share(wrong)}"
        )
    if limit.rms is not None:
        relative = _rms(error if limit.scale is None else error / limit.scale)
        if not relative <= limit.rms:
            return f"{name}: rms error {relative:.3g} > {limit.rms:.3g}, relative to the size of a row"
    return None


def _is_wider(output: Array, dtype: np.dtype[Any]) -> bool:
    """Return whether an output keeps more bits than the inputs have."""
    return output.dtype.itemsize > dtype.itemsize


def _cell(name: str, where: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, where))}]" if where else name


def _share(wrong: Array) -> str:
    return f"{int(wrong.sum())} of {wrong.size} cells are wrong"


def _difference(a: Array, b: Array) -> FloatArray:
    """Return a - b, with 0 where both are the same infinity or both are NaN."""
    same = (a == b) | ((a != a) & (b != b))
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.subtract(a, b, dtype=np.float64))


def _finite_magnitude(x: Array) -> FloatArray:
    wide = np.abs(widen(x).astype(np.float64))
    return np.where(np.isfinite(wide), wide, 0.0)


def _largest(x: FloatArray) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def _rms(x: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


class _RowSizes(NamedTuple):
    """What errors are relative to: sizes, sizes or those of the terms, and which rows cancel in part."""

    judged: FloatArray
    terms: FloatArray
    partly: Array


def _row_sizes(x: Array, spread: Array) -> _RowSizes:
    """Return the size of each row, of tiny rows a share of that of all.

    Errors are judged against it, so that a few large rows do not license errors in all the small ones, as the
    first rows of causal attention would.  A row that cancels altogether has the size of its terms, and one
    that cancels in part at most some times its own: it is judged by the baseline's errors in it besides.
    """
    rows = np.maximum(_row_rms(x), SMALLEST_ROW * _rms(_finite_magnitude(x)))
    terms = np.maximum(rows, _row_rms(spread))
    terms = np.where(terms > 0, terms, 1.0)
    altogether = terms > ALTOGETHER * rows
    judged = np.where(altogether, terms, np.minimum(terms, PARTLY * rows))
    return _RowSizes(judged, terms, (terms > PARTLY * rows) & ~altogether)


def _row_rms(x: Array) -> FloatArray:
    """Return the root mean square along the last axis, which is kept; of a scalar its size."""
    magnitude = _finite_magnitude(x)
    if x.ndim == 0 or not x.shape[-1]:
        return magnitude
    return np.asarray(np.sqrt(np.mean(np.square(magnitude), axis=-1, keepdims=True)))


def _row_max(x: FloatArray) -> FloatArray:
    return np.max(x, axis=-1, keepdims=True, initial=0.0) if x.ndim else x


def _one_ulp_away(array: Array, rng: np.random.Generator) -> Array:
    if not is_floating(array.dtype):
        return array
    wide = widen(array).astype(np.float64)
    step = np.where(rng.random(array.shape) < 0.5, -1.0, 1.0) * ulp(wide, array.dtype)
    return round_to(np.where(np.isfinite(wide), wide + step, wide), array.dtype)
