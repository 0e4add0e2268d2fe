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


def guarded(f: Callable[..., Any], reference: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Return `f`, refusing calls with keywords that its signature does not have.

    A keyword that says what `reference` does without it is left out instead of refused: a function without
    the option claims that very thing.

    Examples
    --------
    >>> def scale(x, *, by=2, mean="arithmetic"): ...
    >>> guarded(lambda x, *, by=2: by * x, scale)(3, by=5, mean="arithmetic")
    15
    """
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return f
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return f
    known = {parameter.name for parameter in parameters}
    usual = _defaults(reference) if reference else {}

    def call(*args: Any, **kwargs: Any) -> Any:
        unknown = set(kwargs) - known
        meant = {name for name in unknown if name in usual and _same(kwargs[name], usual[name])}
        if unknown - meant:
            raise UnsupportedError(f"takes no option {', '.join(sorted(unknown - meant))}")
        return f(*args, **{name: value for name, value in kwargs.items() if name not in meant})

    return call


def _defaults(f: Callable[..., Any]) -> dict[str, Any]:
    """Return what each option of `f` is if it is not given."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(f).parameters.items()
        if parameter.default is not parameter.empty
    }


def _same(value: Any, default: Any) -> bool:
    """Return whether an option has its default: the same word, number or None.  1 is not True."""
    plain = isinstance(value, str | int | float | None) and type(value) is type(default)
    return plain and bool(value == default)


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
