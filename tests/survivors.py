"""Which laws catch a function that is wrong in one way: cases are drawn until one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.testing import check

__all__ = ["laws_that_catch"]


def laws_that_catch(technique: str, f: Callable[..., Any], *, seeds: int = 60) -> set[str]:
    """Return what failed on the first case that a law of `technique` finds `f` wrong on; empty if none does.

    Comparison with the reference does not count: it catches everything, and a stranger's function may be
    given to the laws where there is no reference.
    """
    for seed in range(0, seeds, 4):
        failed = {outcome.check for outcome in check(technique, f, seed=seed, examples=4, edges=False).failed}
        if failed - {"reference"}:
            return failed - {"reference"}
    return set()
