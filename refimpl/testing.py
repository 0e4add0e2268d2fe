"""Hold any function to the record of a technique: `check` is what `frugal verify` runs.

Cases are drawn from the record's axes and options; each implementation is compared with the reference under
the policy of `refimpl.tolerances`, run through the technique's laws, and, where it is the reference itself,
checked against finite differences of its gradient and against the prices set on it.  Freshly allocated memory
is filled with NaN, so an output that nothing wrote shows.

>>> from refimpl.attention import scaled_dot_product_attention
>>> check("attention.dense", scaled_dot_product_attention, examples=2).ok
True
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from refimpl import registry
from refimpl.candidate import guarded, label_of, poisoned
from refimpl.cases import draw, plan, reproducer
from refimpl.consistency import check_price, check_vjp
from refimpl.errors import BackendUnavailableError, Inconclusive, LawViolation, UnsupportedError
from refimpl.numerics import Array, is_floating
from refimpl.registry import Case, Option, Technique
from refimpl.tolerances import (
    Limit,
    baseline_limits,
    cast,
    mismatch,
    outputs,
    rewrite_limits,
)

__all__ = ["Close", "Outcome", "Report", "check", "draw", "dtype_named", "poisoned", "require"]


def require(holds: Any, message: str) -> None:
    """Raise `LawViolation` unless it `holds`, of an array everywhere: how a law says that it is broken.

    Examples
    --------
    >>> require(np.arange(3) >= 0, "negative")
    """
    if not np.all(holds):
        raise LawViolation(message)


Status = Literal["passed", "failed", "refused", "invalid"]
LOW_PRECISION = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check of one implementation on one case."""

    technique: str
    implementation: str
    backend: str
    dtype: str
    check: str
    status: Status
    detail: str = ""
    reproducer: str = ""


@dataclass(slots=True)
class Report:
    """All outcomes of a run."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """The outcomes that failed."""
        return [outcome for outcome in self.outcomes if outcome.status == "failed"]

    @property
    def ok(self) -> bool:
        """Whether something passed and nothing failed: a run in which all was refused proves nothing."""
        counts = self.counts()
        return counts["failed"] == 0 and counts["passed"] > 0

    def counts(self) -> dict[Status, int]:
        """Return how many outcomes have each status."""
        counter = Counter(outcome.status for outcome in self.outcomes)
        return {status: counter[status] for status in ("passed", "failed", "refused", "invalid")}


@dataclass(frozen=True, slots=True)
class Close:
    """The comparison that a law is given: as strict as the policy is for the case at hand."""

    technique: Technique
    dtype: str
    limits: Mapping[str, Limit]

    def on(self, case: Case) -> Close:
        """Return the comparison for another case, which a law made from the one it was given."""
        standard = _judged(self.technique, case, self.dtype)
        if standard.invalid:
            raise Inconclusive(f"the case that the law makes says nothing: {standard.invalid}")
        return Close(self.technique, self.dtype, standard.limits)

    def __call__(
        self, actual: Any, expected: Any, what: str, *, factor: float = 1.0, of: str | None = None
    ) -> None:
        """Raise `LawViolation` unless both are equal within the error that two evaluations may have.

        Parameters
        ----------
        actual, expected : array or NamedTuple of arrays
            Outputs of the implementation, or arrays shaped like its first output.
        what : str
            The claim, for the message.
        factor : float
            How many times more terms the compared quantity sums than an output does.
        of : str, optional
            The output whose limit applies.  Default: that of the same name, or else the first.
        """
        found, wanted = outputs(actual), outputs(expected)
        first = next(iter(self.limits))
        for (name, value), other in zip(found.items(), wanted.values(), strict=True):
            limit = self.limits[of or (name if name in self.limits else first)]
            allowed = 2.0 * factor * float(np.max(limit.largest, initial=0.0))
            problem = mismatch(value, other, Limit(np.asarray(allowed)), name=name)
            if problem:
                raise LawViolation(f"{what}: {problem}")

    @property
    def tolerance(self) -> float:
        """The largest error allowed anywhere in the first output."""
        first = next(iter(self.limits.values()))
        return float(np.max(first.largest, initial=0.0))


def check(
    name: str,
    f: Callable[..., Any] | None = None,
    *,
    label: str | None = None,
    backend: str = "numpy",
    seed: int = 0,
    examples: int = 8,
    axes: Mapping[str, Option] | None = None,
    dtypes: Sequence[str] | None = None,
    edges: bool = True,
    target: str | None = None,
    tier: str = "",
) -> Report:
    """Hold `f` to the record of technique `name` on sampled cases, and say what passed.

    Parameters
    ----------
    name : str
        Registered name.
    f : callable, optional
        The candidate; its arguments are the reference's.  A keyword that it does not take is no failure:
        it is left out where it has the reference's default, other cases are counted as refused, and so is
        what it refuses itself with NotImplementedError.  Default: the reference.
    label, target, tier : str, optional
        Names for the report, and for ``--with`` and ``--tier`` in the reproducers.
    backend : str
        Where `f` runs; it chooses the default dtypes.
    seed : int
        Cases use seeds ``seed, seed + 1, ...``.
    examples : int
        Random cases beside the record's edge cases.
    axes : mapping, optional
        Axes and options to fix.  If all are fixed one case runs.
    dtypes : sequence of str, optional
        Default float64 for NumPy, and float32, float16, bfloat16 for kernels.
    edges : bool
        Run the record's edge cases too.

    Returns
    -------
    Report
        `Report.ok` is the verdict.

    Raises
    ------
    UnknownNameError
        If nothing is registered under `name`.
    BackendUnavailableError
        If `f` says so before any check failed: nobody can tell whether it is right.
    ValueError
        If `axes` names an axis that the technique has not.
    """
    technique = registry.get(name)
    candidate = technique.function if f is None else f
    context = _Context(technique, candidate, label or label_of(candidate), backend, target, tier)
    report = Report()
    if technique.sample is None:
        return report
    chosen = dtypes or (("float64",) if backend in ("numpy", "mpi") else LOW_PRECISION)
    everything = set(technique.axes) | set(technique.options)
    single = axes is not None and everything <= set(axes)
    for dtype in chosen:
        always, draws = plan(technique, seed, axes, examples, single)
        for case_seed, shape in always if edges else ():
            report.outcomes += _check_case(context, case_seed, shape, dtype)
        tried = 0
        for case_seed, shape in draws:
            found = _check_case(context, case_seed, shape, dtype)
            report.outcomes += found
            tried += any(outcome.status in ("passed", "failed") for outcome in found)
            if tried == examples:
                break
        statuses = {outcome.status for outcome in report.outcomes if outcome.dtype == dtype}
        if not context.is_reference and dtype not in context.judged and statuses & {"passed"}:
            detail = "only empty outputs were compared with the reference; everything else was refused"
            report.outcomes.append(
                Outcome(
                    name, context.label, backend, dtype, "coverage", "failed", detail, f"frugal verify {name}"
                )
            )
    return report


@dataclass(frozen=True, slots=True)
class _Context:
    technique: Technique
    f: Callable[..., Any]
    label: str
    backend: str
    target: str | None
    tier: str
    judged: set[str] = field(default_factory=set)  # dtypes in which an output that is not empty passed
    failures: list[Outcome] = field(default_factory=list)

    @property
    def is_reference(self) -> bool:
        return self.f is self.technique.function


def _check_case(context: _Context, seed: int, shape: Mapping[str, Option], dtype: str) -> list[Outcome]:
    """Return the outcomes of every check on one case."""
    technique: Technique = context.technique
    found: list[Outcome] = []

    def record(what: str, status: Status, detail: str = "") -> None:
        line = _again(context, seed, shape, dtype) if status == "failed" else ""
        found.append(
            Outcome(technique.name, context.label, context.backend, dtype, what, status, detail, line)
        )
        if status == "failed":
            context.failures.append(found[-1])

    def attempt(what: str, action: Callable[[], str | None]) -> None:
        try:
            problem = action()
        except Inconclusive as error:
            record(what, "invalid", str(error))
        except NotImplementedError as error:
            record(what, "refused", str(error))
        except BackendUnavailableError as error:
            if not context.failures:
                raise  # says nothing of the candidate, on this case and on all others
            record(what, "refused", str(error))  # but does not hide what is known to be wrong
        except LawViolation as error:
            record(what, "failed", str(error))
        except (Exception, SystemExit) as error:  # a verdict on the candidate, not a crash of ours
            record(what, "failed", f"raised {type(error).__name__}: {error}")
        else:
            record(what, "failed" if problem else "passed", problem or "")

    if technique.sample is None:
        return found
    drawn = technique.sample(np.random.default_rng(seed), **shape)
    try:
        case = cast(drawn, dtype_named(dtype))
    except UnsupportedError as error:
        record("reference", "refused", str(error))
        return found
    f = guarded(context.f, technique.function)

    standard = _judged(technique, case, dtype)
    if standard.invalid:
        record("reference", "invalid", standard.invalid)
        return found

    if not context.is_reference:
        attempt("reference", lambda: _compare(f, case, standard))
        if found[-1].status == "refused" or _unusable(found[-1].detail):
            return found  # what the laws would say of it is beside the point
        if found[-1].status == "passed" and any(array.size for array in standard.truth.values()):
            context.judged.add(dtype)
    close = Close(technique, dtype, standard.limits)
    for law in registry.laws_of(technique.name):
        attempt(law.name, partial(law.function, f, case.map_arrays(np.copy), close))
    if context.is_reference and dtype == "float64":
        if technique.vjp is not None:
            attempt("gradient", lambda: check_vjp(technique, case, seed))
        for price in (item for item in registry.PRICES if item.technique == technique.name):
            attempt(f"price {price.counts}", partial(check_price, price, technique, case))
    return found


def _unusable(problem: str) -> bool:
    """Return whether the output was no array of the right shape and dtype, or there was none."""
    return any(
        sign in problem for sign in ("expected shape", "expected dtype", "expected an array", "raised ")
    )


def _contents(case: Case) -> list[bytes]:
    """Return the bytes of every array among arguments and options."""
    found: list[bytes] = []
    case.map_arrays(lambda array: found.append(array.tobytes()))
    return found


class _Standard(NamedTuple):
    """What a candidate is held to: the truth, the dtypes it must return, and how far it may be."""

    truth: Mapping[str, Array]
    dtypes: Mapping[str, np.dtype[Any]]
    limits: Mapping[str, Limit]
    invalid: str | None


def _judged(technique: Technique, case: Case, dtype: str) -> _Standard:
    if technique.exact:
        # Codes, masks and counts are those of the reference on the inputs as they are.
        truth = outputs(case.call(technique.function))
        return _Standard(truth, _dtypes(truth), dict.fromkeys(truth, Limit(np.zeros(()))), None)
    if dtype == "float64" or not _has_floats(case):  # without a floating array no dtype was asked for
        truth, limits = rewrite_limits(technique, case)
        return _Standard(truth, _dtypes(truth), limits, None)
    truth, baseline, limits, invalid = baseline_limits(technique, case, dtype_named(dtype))
    return _Standard(truth, _dtypes(baseline), limits, invalid)


def _has_floats(case: Case) -> bool:
    found: list[bool] = []
    case.map_arrays(lambda array: found.append(is_floating(array.dtype)))
    return any(found)


def _dtypes(arrays: Mapping[str, Array]) -> dict[str, np.dtype[Any]]:
    return {name: array.dtype for name, array in arrays.items()}


def _compare(f: Callable[..., Any], case: Case, standard: _Standard) -> str | None:
    before = _contents(case)
    with poisoned():
        found = outputs(case.call(f))
    if _contents(case) != before:
        return "it changed its arguments"
    for name, array in found.items():
        if array.dtype == np.object_ and standard.dtypes.get(name, array.dtype) != np.object_:
            given = type(array.item()).__name__ if array.ndim == 0 else "an array of objects"
            return f"{name}: expected an array, got {given}"
    if len(found) != len(standard.truth):
        return f"expected {len(standard.truth)} outputs ({', '.join(standard.truth)}), got {len(found)}"
    for (name, expected), actual in zip(standard.truth.items(), found.values(), strict=True):
        if actual.dtype != standard.dtypes[name]:
            return f"{name}: expected dtype {standard.dtypes[name]}, got {actual.dtype}"
        problem = mismatch(actual, expected, standard.limits[name], name=name)
        if problem:
            return problem
    return None


def dtype_named(name: str) -> np.dtype[Any]:
    """Return a floating dtype by its name; bfloat16 is that of the package ml_dtypes.

    Raises
    ------
    UnsupportedError
        For bfloat16, if ml_dtypes is not installed.

    Examples
    --------
    >>> dtype_named("float16")
    dtype('float16')
    """
    if name == "bfloat16":
        try:
            dtype: np.dtype[Any] = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
            return dtype
        except ImportError:
            missing = "bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes"
            raise UnsupportedError(missing) from None
    return np.dtype(name)


def _again(context: _Context, seed: int, shape: Mapping[str, Option], dtype: str) -> str:
    names = context.technique.name, context.target, context.backend, context.tier
    return reproducer(*names, dtype, seed, shape)
