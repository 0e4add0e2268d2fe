"""The int8 kernels against refimpl.quant: codes and exact products equal, outputs under the policy."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_backend.arrays import poisoned_outputs
from refimpl import quant
from refimpl.numerics import Array, ulp, widen
from refimpl.quant.samples import sample_linear
from refimpl.registry import Case
from refimpl.tolerances import Limit, cast, mismatch
from tests.cuda.judge import DTYPES

SPECIAL = (0.0, -0.0, 1e-44, -3e-39, 1e-5, 6.0, -6.0, 2.5, 5.99, 6.01, 3e4, np.inf, -np.inf, np.nan)
NAMES = ("llm_int8_linear", "llm_int8_linear_fused")


def matrix(seed: int, shape: tuple[int, int], dtype: str, special: float = 0.0) -> Any:
    """Return normal numbers in rows of different scale, a part of them special ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-3, 4, (shape[0], 1)))
    x = np.where(rng.random(shape) < special, rng.choice(SPECIAL, shape), x)
    with np.errstate(all="ignore"):
        return x.astype(DTYPES[dtype])


def differing(found: Any, expected: Any) -> str | None:
    """Return the name of the first array that is not the expected one: shape, dtype, bits but for NaN's."""
    for name, wanted, actual in zip(expected._fields, expected, found, strict=True):
        if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
            return f"{name}: {actual.shape} {actual.dtype}, expected {wanted.shape} {wanted.dtype}"
        if not np.array_equal(numbers(actual), numbers(wanted), equal_nan=True):
            return f"{name} differs"
    return None


def numbers(array: Array) -> Array:
    """Return an array that NumPy can compare."""
    with np.errstate(invalid="ignore"):  # signalling NaNs, among all numbers of a format
        return widen(np.asarray(array)).astype(np.float64)


def case_of(seed: int, dtype: str, **axes: Any) -> Case:
    """Return a call of the linear layer with arrays of `dtype`."""
    options = {"outliers": "some", "threshold": 6.0, "convention": "released", "bias": True, **axes}
    return cast(sample_linear(np.random.default_rng(seed), **options), DTYPES[dtype])


def linear_difference(f: Any, name: str, case: Case, dtype: str) -> str | None:
    """Return how `f` differs from the reference `name`: codes must be equal, outputs within the policy.

    A call that does not return its parts may go another way, and is judged too.
    """
    reference = getattr(quant, name)
    with poisoned_outputs():
        found = case.replace(return_parts=True).call(f)
        alone = case.call(f)
    expected = case.replace(return_parts=True).call(reference)
    problem = differing(found._replace(out=expected.out), expected)
    if problem:
        return problem
    for each in (found, found._replace(out=alone)):
        if not expected.outliers.size:  # the same roundings in the same order
            problem = differing(each, expected)
        else:
            problem = beyond_rounding(each, expected, case, 1 if name.endswith("fused") else 2)
        if problem:
            return problem
    return None


def beyond_rounding(found: Any, expected: Any, case: Case, roundings: int) -> str | None:
    """Return where outputs made of equal codes differ by more than sums in another order may.

    Each sum errs by at most n float32 roundings of its absolute terms, and is then rounded to the dtype.
    """
    x, weight = (np.abs(numbers(array)) for array in case.args)
    scales = numbers(expected.x_absmax)[:, None] * numbers(expected.weight_absmax) / 127**2
    whole = np.abs(expected.x_codes.astype(np.float64) @ expected.weight_codes.astype(np.float64))
    terms = whole * scales + x[:, expected.outliers] @ weight[expected.outliers] * 1.01
    terms += np.abs(numbers(case.kwargs.get("bias", np.zeros(weight.shape[1]))))
    sums = 2 * (expected.outliers.size + 4) * 2.0**-24 * terms
    limit = Limit(sums + roundings * ulp(terms, found.out.dtype))
    if found.out.dtype != expected.out.dtype:
        return f"out: {found.out.dtype}, expected {expected.out.dtype}"
    return mismatch(found.out, expected.out, limit, name="out")
