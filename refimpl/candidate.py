"""What surrounds the call of a candidate: a guard on its signature, and memory filled with NaN."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from refimpl.errors import UnsupportedError

__all__ = ["guarded", "label_of", "poisoned"]


def guarded(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f`, refusing calls with keywords that its signature does not have."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return f
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return f
    known = {parameter.name for parameter in parameters}

    def call(*args: Any, **kwargs: Any) -> Any:
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise UnsupportedError(f"takes no option {', '.join(unknown)}")
        return f(*args, **kwargs)

    return call


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what ``empty`` and ``empty_like`` allocate with NaN, in NumPy and in the GPU libraries in use.

    Integers and booleans become 1.

    Examples
    --------
    >>> import numpy as np
    >>> with poisoned():
    ...     np.empty(2)
    array([nan, nan])
    """
    modules = [sys.modules[name] for name in ("numpy", "torch", "cupy") if name in sys.modules]
    saved = [(module, name, getattr(module, name)) for module in modules for name in ("empty", "empty_like")]

    def poisoning(original: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            array = original(*args, **kwargs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    array[...] = float("nan")
                except (ValueError, TypeError, RuntimeError, OverflowError):
                    array[...] = 1
            return array

        return allocate

    try:
        for module, name, original in saved:
            setattr(module, name, poisoning(original))
        yield
    finally:
        for module, name, original in saved:
            setattr(module, name, original)


def label_of(f: Callable[..., Any]) -> str:
    """Return ``module:function``.

    Examples
    --------
    >>> label_of(label_of)
    'refimpl.candidate:label_of'
    """
    return f"{getattr(f, '__module__', '?')}:{getattr(f, '__qualname__', repr(f))}"
