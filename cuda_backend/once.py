"""Things of which there is one each: made by the first caller, while others that want one wait."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar

__all__ = ["once_each"]

T = TypeVar("T")


def once_each(make: Callable[..., T]) -> Callable[..., T]:
    """Return `make`, called once for the same arguments: a cache alone lets two threads make one each.

    >>> once_each(lambda stream: [stream])(7)
    [7]
    """
    cached, making = functools.cache(make), Lock()

    @functools.wraps(make)
    def made(*given: Hashable) -> T:
        with making:
            return cached(*given)

    made.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return made
