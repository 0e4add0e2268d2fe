"""Laws of compression: what factors must be, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Factorize = Callable[..., Any]
ROUNDINGS = 16.0  # of the size of the matrix, for each of its rows and columns


def _factors(case: Case, f: Factorize) -> tuple[Array, Array, Array, float]:
    """Return the matrix scaled to norm 1, its factors accordingly, and the rounding allowed."""
    (x,) = case.args
    left, right = (widen(np.asarray(part)).astype(np.float64) for part in case.call(f))
    wide = widen(x).astype(np.float64)
    size = float(np.max(np.abs(wide), initial=0.0))  # before squaring: squares may overflow
    size *= float(np.linalg.norm(wide / size)) if size else 0.0
    size = size or 1.0
    eps = float(np.finfo(x.dtype).eps) if x.dtype.kind == "f" else 2.0**-7
    return wide / size, left / size**0.5, right / size**0.5, ROUNDINGS * eps * max(sum(x.shape), 1)


def _demand(error: float, allowed: float, what: str) -> None:
    if not error <= allowed:
        raise LawViolation(f"{what}: off by {error:.3g} of the matrix, more than {allowed:.3g}")


@law("compress.truncated_svd")
def error_is_what_was_left_out(f: Factorize, case: Case, close: Close) -> None:  # noqa: ARG001
    """The squared error is the sum of the squared singular values beyond the rank."""
    x, left, right, allowed = _factors(case, f)
    values = np.linalg.svd(x, compute_uv=False)
    error = np.linalg.norm(x - left @ right.T)
    _demand(abs(float(error - np.linalg.norm(values[case.kwargs["rank"] :]))), allowed, "norm of the error")


@law("compress.truncated_svd")
def no_other_factors_are_closer(f: Factorize, case: Case, close: Close) -> None:  # noqa: ARG001
    """The best factors beside random ones, one side random and the other least squares, are no closer."""
    x, left, right, allowed = _factors(case, f)
    error, rng = np.linalg.norm(x - left @ right.T), np.random.default_rng(0)
    for _ in range(4):
        basis, _ = np.linalg.qr(rng.standard_normal((x.shape[0], case.kwargs["rank"])))
        other = np.linalg.norm(x - basis @ (basis.T @ x))
        _demand(float(error - other), allowed, "random factors of that rank are closer")


@law("compress.truncated_svd")
def factors_are_balanced(f: Factorize, case: Case, close: Close) -> None:  # noqa: ARG001
    """Both factors have orthogonal columns of the same falling lengths: the roots of the singular values."""
    x, left, right, allowed = _factors(case, f)
    values = np.diag(np.linalg.svd(x, compute_uv=False)[: case.kwargs["rank"]])
    for name, part in (("left", left), ("right", right)):
        _demand(float(np.max(np.abs(part.T @ part - values), initial=0.0)), allowed, f"{name}ᵀ {name}")


@law("compress.truncated_svd")
def transposing_exchanges_the_factors(f: Factorize, case: Case, close: Close) -> None:  # noqa: ARG001
    """The product for the transposed matrix is the transposed product."""
    x, left, right, allowed = _factors(case, f)
    values = np.append(np.linalg.svd(x, compute_uv=False), 0.0)
    rank = case.kwargs["rank"]
    if 0 < rank < min(x.shape):  # a cut between close values is open to rounding
        allowed /= max(values[rank - 1] - values[rank], allowed)
    _, other_left, other_right, _ = _factors(case.replace(np.ascontiguousarray(case.args[0].T)), f)
    error = float(np.max(np.abs(other_right @ other_left.T - left @ right.T), initial=0.0))
    _demand(error, allowed, "transposed matrix")


@law("compress.truncated_svd")
def largest_entries_of_left_columns_are_positive(f: Factorize, case: Case, close: Close) -> None:  # noqa: ARG001
    """The sign that singular vectors leave open is fixed: a left column's largest entry is positive."""
    _, left, _, allowed = _factors(case, f)
    top, low = np.max(left, axis=0, initial=0.0), np.min(left, axis=0, initial=0.0)
    _demand(float(np.max(-low - top, initial=0.0)), allowed, "a column of the left factor is upside down")
