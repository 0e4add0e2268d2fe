"""What tells a user's functions apart without calling them: a kernel compiled for one serves its equals."""

from __future__ import annotations

from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

__all__ = ["function_key"]

# What is known by its name: nobody changes what these compute.
_NAMED = (BuiltinFunctionType, np.ufunc, type(np.where))


def function_key(function: Any) -> Any:
    """Return a hashable value that is equal for functions that compute the same.

    Where a function was written does not count; what it closes over and what it reads do: globals, and of
    modules and other objects the attributes that its code names, as they are now.  A compiled kernel holds
    the values that it was compiled with, so another value is another function.

    Parameters
    ----------
    function : function
        A plain Python function.

    Returns
    -------
    tuple
        Values that are neither numbers, strings, arrays, containers, modules nor functions count by identity
        beside such attributes.

    Examples
    --------
    >>> def within(n):
    ...     return lambda b, h, i, j: i - j <= n
    >>> function_key(within(3)) == function_key(within(3)), function_key(within(3)) == function_key(within(4))
    (True, False)
    """
    return _Reader().function(function)


class _Reader:
    """Makes keys; what it meets again, a function that calls itself, say, it names by its number."""

    def __init__(self) -> None:
        self.met: dict[int, tuple[int, Any]] = {}  # by identity, and kept alive

    def function(self, function: Any) -> Any:
        """Return the key of a function."""
        if id(function) in self.met:
            return "again", self.met[id(function)][0]
        self.met[id(function)] = len(self.met), function
        code = function.__code__
        names = _names(code)
        closure = tuple(cell.cell_contents for cell in function.__closure__ or ())
        read = tuple(function.__globals__[name] for name in names if name in function.__globals__)
        values = (*closure, *(function.__defaults__ or ()), *read)
        return _code_key(code), tuple(self.value(value, names) for value in values)

    def value(self, value: Any, names: tuple[str, ...]) -> Any:
        """Return the key of a value that a function reads, whose code has `names`."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
            return type(value).__name__, repr(value)
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, FunctionType):
            return self.function(value)
        if isinstance(value, _NAMED):
            return "named", getattr(value, "__module__", None), value.__name__
        if id(value) in self.met:
            return "again", self.met[id(value)][0]
        self.met[id(value)] = len(self.met), value
        if isinstance(value, tuple | list):
            return (type(value).__name__, *(self.value(item, names) for item in value))
        if isinstance(value, dict):
            return (
                "dict",
                *((self.value(key, names), self.value(item, names)) for key, item in value.items()),
            )
        if isinstance(value, set | frozenset):
            return ("set", *sorted((self.value(item, names) for item in value), key=repr))
        attributes = tuple(
            (name, self.value(getattr(value, name), names))
            for name in dict.fromkeys(names)
            if hasattr(value, name)
        )
        if isinstance(value, ModuleType):
            return "module", value.__name__, attributes
        return _Same(value), attributes


def _names(code: CodeType) -> tuple[str, ...]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return (*code.co_names, *(name for const in inner for name in _names(const)))


def _code_key(code: CodeType) -> Any:
    constants = tuple(
        _code_key(const) if isinstance(const, CodeType) else (type(const).__name__, repr(const))
        for const in code.co_consts
    )
    return code.co_code, code.co_names, code.co_argcount, constants


class _Same:
    """A value that is equal to itself alone; it is kept alive, so that no other gets its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
