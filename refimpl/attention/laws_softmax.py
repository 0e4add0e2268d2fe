"""Laws of the softmax, online or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array
from refimpl.registry import Case, law
from refimpl.testing import Close


@law("attention.online_softmax")
def softmax_sums_to_one(f: Callable[..., Any], case: Case, close: Close) -> None:
    """A row sums to 1, or to 0 if nothing in it takes part."""
    (x,) = case.args
    total = np.sum(case.call(f), axis=-1, dtype=np.float64)
    alive = ~np.all(np.isneginf(x), axis=-1)
    close(total, alive.astype(np.float64), "sum of a row", factor=max(1, x.shape[-1]))


@law("attention.online_softmax")
def softmax_ignores_a_shift(f: Callable[..., Any], case: Case, close: Close) -> None:
    """Adding a power of two to every score of a row changes nothing."""
    (x,) = case.args
    scale = float(np.max(np.abs(_finite(x)), initial=1.0))
    shifted = Case((x + 2.0,), case.kwargs).call(f)
    close(shifted, case.call(f), "scores shifted by 2", factor=8 * (1 + scale))


@law("attention.online_softmax")
def softmax_ignores_block_borders(f: Callable[..., Any], case: Case, close: Close) -> None:
    """Any block size gives the same result."""
    close(
        case.replace(block_size=3).call(f),
        case.replace(block_size=10**6).call(f),
        "blocks of 3 and one block",
    )


@law("attention.online_softmax")
def softmax_ignores_order(f: Callable[..., Any], case: Case, close: Close) -> None:
    """Reversing the scores reverses the result, so blocks may be visited in any order."""
    (x,) = case.args
    close(Case((x[..., ::-1],), case.kwargs).call(f), np.asarray(case.call(f))[..., ::-1], "scores reversed")


def _finite(x: Array) -> Array:
    return np.where(np.isfinite(x), x, 0.0)
