"""Cases of which every run compiles half: a run of everything is to end within 20 minutes on two cores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["every_other"]


def every_other(cases: Iterable[Any]) -> list[Any]:
    """Return `cases` of one argument for ``parametrize``; every second one waits for ``-m aot_full``."""
    later = pytest.mark.aot_full
    return [pytest.param(case, marks=later) if i % 2 else case for i, case in enumerate(cases)]
