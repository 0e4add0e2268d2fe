"""Mutants: implementations that are wrong in one way, which the laws of their record must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.testing import check

Function = Callable[..., Any]


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
        failed: set[str] = set()
        for seed in range(0, 40, 4):  # stop at the first that catches it
            failed |= {outcome.check for outcome in check(technique, f, seed=seed, examples=4).failed}
            if failed - {"reference"}:
                return
        raise AssertionError(f"{name} survived the laws; failed: {failed}")
