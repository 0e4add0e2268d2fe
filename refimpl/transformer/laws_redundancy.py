"""Laws of explained variance: what no change of coordinates changes, and what a pair of equals shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Curve = Callable[..., Any]
NAME = "transformer.redundancy"


def _curve(case: Case, f: Curve) -> Array:
    return widen(np.asarray(case.call(f))).astype(np.float64)


def _turn(n: int) -> Array:
    return np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]


@law(NAME)
def curves_rise_from_nothing_to_all(f: Curve, case: Case, close: Close) -> None:
    """The curve never falls, its steps never grow, and it ends at 1; it begins at 0, or is 1 throughout."""
    curve = _curve(case, f)
    steps = np.diff(curve)
    if curve[-1] != 1 or (curve[0] != 0 and np.any(curve != 1)):
        raise LawViolation(f"the curve goes from {curve[0]} to {curve[-1]}")
    if np.any(steps < -close.tolerance) or np.any(np.diff(steps) > 2 * close.tolerance):
        raise LawViolation("the curve falls, or a component holds more than the one before it")


@law(NAME)
def columns_may_be_turned(f: Curve, case: Case, close: Close) -> None:
    """Turning the coordinates of the columns by any rotation, one for each block, changes nothing."""
    if case.kwargs.get("pairing") == "rows" and len(case.args) > 1:
        turns = [_turn(case.args[0].shape[1])] * 2  # stacked blocks share their columns
    else:
        turns = [_turn(x.shape[1]) * sign for x, sign in zip(case.args, (1, -1), strict=False)]
    turned = case.replace(
        *(round_to(widen(x) @ turn, x.dtype) for x, turn in zip(case.args, turns, strict=False))
    )
    close.on(turned)(_curve(turned, f), _curve(case, f), "columns turned", factor=4.0)


@law(NAME)
def scale_does_not_matter(f: Curve, case: Case, close: Close) -> None:
    """Halving all weights changes nothing."""
    half = case.replace(*(round_to(widen(x) / 2, x.dtype) for x in case.args))
    close(_curve(half, f), _curve(case, f), "weights halved")


@law(NAME)
def a_matrix_beside_itself_is_no_more(f: Curve, case: Case, close: Close) -> None:
    """Paired with itself, either way, a matrix has the curve that it has alone."""
    x = case.args[0]
    alone = _curve(Case((x,), {"method": case.kwargs["method"]}), f)
    for pairing in ("columns", "rows"):
        pair = Case((x, np.array(x)), {**case.kwargs, "pairing": pairing})
        curve = _curve(pair, f)
        full = np.concatenate([alone, np.ones(len(curve) - len(alone))])
        close.on(pair)(curve, full, f"paired with itself along {pairing}", factor=4.0)


@law(NAME)
def pairs_have_no_first(f: Curve, case: Case, close: Close) -> None:
    """Exchanging the two of a pair changes nothing."""
    if len(case.args) > 1:
        close(_curve(case.replace(*case.args[::-1]), f), _curve(case, f), "partners exchanged", factor=2.0)


@law(NAME)
def equal_parts_make_a_straight_line(f: Curve, case: Case, close: Close) -> None:
    """Without centering, a rotation needs all of its components alike: the r first of n hold r / n."""
    n = case.args[0].shape[1]
    if not n or case.args[0].dtype != np.float64:
        return
    turn = Case((_turn(n),), {"method": "svd"})
    close.on(turn)(_curve(turn, f), np.arange(n + 1) / n, "a rotation")


@law(NAME)
def directions_explain_the_squares_of_their_lengths(f: Curve, case: Case, close: Close) -> None:
    """Without centering, columns at right angles of lengths n to 1 explain n^2 to 1 parts of the whole."""
    n = case.args[0].shape[1]
    if not n or case.args[0].dtype != np.float64:
        return
    lengths = np.arange(n, 0.0, -1.0)
    stretched = Case((_turn(n) * lengths,), {"method": "svd"})
    parts = np.concatenate([[0.0], np.cumsum(lengths**2)])
    close.on(stretched)(_curve(stretched, f), parts / parts[-1], "columns at right angles")


@law(NAME)
def one_direction_needs_one_component(f: Curve, case: Case, close: Close) -> None:
    """A matrix of rank one is explained by its first component."""
    m, n = case.args[0].shape
    if m < 2 or not n:
        return
    line = np.outer(np.arange(1.0, m + 1), np.arange(1.0, n + 1))
    one = case.replace(*(round_to(line, x.dtype) for x in case.args))
    curve = _curve(one, f)
    close.on(one)(curve[1:], np.ones(len(curve) - 1), "rank one")


@law(NAME)
def means_count_without_centering_only(f: Curve, case: Case, close: Close) -> None:
    """Adding one row to all rows changes nothing for "pca"; for "svd" it is one more direction."""
    if len(case.args) > 1 or not case.args[0].size or case.args[0].dtype != np.float64:
        return
    (x,) = case.args
    size = float(np.max(np.abs(x))) or 1.0
    shifted = Case((x / size + 1e3,), case.kwargs)
    if case.kwargs["method"] == "pca":
        plain = Case((shifted.args[0] - shifted.args[0][:1],), case.kwargs)
        if np.linalg.norm(plain.args[0] - plain.args[0].mean(axis=0)) < 1e-6:
            return  # equal rows: what is left is rounding
        close.on(shifted)(_curve(shifted, f), _curve(plain, f), "a row added to all rows", factor=1e4)
    elif not _curve(shifted, f)[1] > 0.99:
        raise LawViolation("a large mean is a direction of its own, yet the first component does not hold it")
