"""How laws compare numbers that must be equal."""

from __future__ import annotations

from typing import Any

from refimpl.testing import require

__all__ = ["same"]


def same(got: Any, expected: Any, what: str) -> None:
    """Raise LawViolation unless `got` equals `expected`."""
    require(bool(got == expected), f"{what}: expected {expected}, got {got}")
