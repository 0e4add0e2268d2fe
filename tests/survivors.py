"""Mutants, functions that are wrong in one way, and which laws catch them: cases are drawn until one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.testing import check

__all__ = ["Mutants", "laws_that_catch"]

Function = Callable[..., Any]


def laws_that_catch(technique: str, f: Function, *, seeds: int = 60) -> set[str]:
    """Return the laws of `technique` that `f` breaks, on the first cases that one of them finds; or nothing.

    Comparison with the reference does not count: it catches everything, and a stranger's function may be
    given to the laws where there is no reference.  A crash does not count either, for it is no wrong number.
    """
    for seed in range(0, seeds, 4):
        # The edge cases are the same for every seed.
        report = check(technique, f, seed=seed, examples=4, edges=seed == 0)
        failed = {outcome.check for outcome in report.failed if not outcome.detail.startswith("raised ")}
        if failed - {"reference", "coverage"}:
            return failed - {"reference", "coverage"}
    return set()


class Mutants(dict[str, tuple[str, Function]]):
    """Mutants by name, each with the technique that it gets wrong."""

    def of(self, *techniques: str) -> Callable[[Function], Function]:
        """Register the decorated function as a mutant of each of `techniques`."""

        def register(f: Function) -> Function:
            for technique in techniques:
                self[f"{technique}-{f.__name__}"] = (technique, f)
            return f

        return register

    def assert_caught(self, name: str) -> None:
        """Fail unless a law, not only the comparison with the reference, sees what is wrong."""
        technique, f = self[name]
        assert laws_that_catch(technique, f), f"{name} survived the laws of {technique}"
