"""Masks and scores that a user writes as plain Python functions, read here and nowhere compiled.

A function speaks of one score: ``mask_mod(b, h, i, j)`` says whether query i of head h of sequence b may
attend to key j; ``score_mod(score, b, h, i, j)`` returns another score.  Either may take one argument more,
`aux`, the tuple of arrays that the caller passes beside it.  Kernels compile the very function; here it is
called on whole arrays of indices where it can be, and entry by entry where it cannot (``if``, ``and``,
`math`), which is slow and gives the same.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from refimpl.attention.function_keys import function_key
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray

__all__ = [
    "INDICES",
    "Aux",
    "Mod",
    "as_mod",
    "check_reads",
    "modified_scores",
    "where_allowed",
]

Aux: TypeAlias = tuple[Array, ...]
INDICES = ("b", "h", "i", "j")


class Mod(NamedTuple):
    """A user's function and what is known of it without calling it.

    Attributes
    ----------
    key
        Equal for functions that compute the same: bytecode, constants, closure, globals that it reads.
    takes_aux
        Whether it has a parameter for the tuple of arrays.
    by_sequence, by_head
        Whether it reads `b` and `h` at all: a mask that does not is the same for all of them.  A function
        with an attribute ``parts`` reads what these functions read, to which it hands all it gets.
    """

    function: Callable[..., Any]
    key: Any
    takes_aux: bool
    by_sequence: bool
    by_head: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mod) and self.key == other.key

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple has one of its own

    def __hash__(self) -> int:
        return hash(self.key)

    def call(self, leading: tuple[Any, ...], indices: tuple[Any, ...], aux: Aux) -> Any:
        """Return the function of leading arguments, b, h, i, j, and `aux` if it takes that."""
        return self.function(*leading, *indices, *((aux,) if self.takes_aux else ()))


def as_mod(name: str, function: Any, leading: tuple[str, ...] = ()) -> Mod:
    """Return what is known of `function`, whose arguments are `leading`, b, h, i, j and perhaps aux.

    Raises
    ------
    DTypeError
        If it is no plain Python function.
    OptionError
        If it takes another number of arguments.

    Examples
    --------
    >>> mod = as_mod("mask_mod", lambda b, h, i, j: j <= i)
    >>> mod.takes_aux, mod.by_sequence, mod == as_mod("mask_mod", lambda b, h, i, j: j <= i)
    (False, False, True)
    """
    if not isinstance(function, FunctionType):
        raise DTypeError(f"{name}: expected a plain Python function, got {type(function).__name__}")
    return Mod(function, function_key(function), *_signature(name, function, leading))


@functools.lru_cache(maxsize=256)
def _signature(name: str, function: FunctionType, leading: tuple[str, ...]) -> tuple[bool, bool, bool]:
    """Return whether a function takes arrays, and whether it reads `b` and `h`: once for each function."""
    wanted = (*leading, *INDICES)
    parameters = list(inspect.signature(function).parameters.values())
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    known = all(parameter.kind in positional for parameter in parameters)
    if not known or len(parameters) - len(wanted) not in (0, 1):
        raise OptionError(
            f"{name}: expected a function of ({', '.join(wanted)}) or ({', '.join(wanted)}, aux), "
            f"got {function.__name__}{inspect.signature(function)} in {_place(function)}"
        )
    valued = [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]
    if valued:
        raise OptionError(
            f"{name}: {function.__name__} in {_place(function)} gives {', '.join(valued)} a default; kernels "
            "pass every argument: close over the value instead"
        )
    takes_aux = len(parameters) > len(wanted)
    parts = [as_mod(name, part, leading) for part in getattr(function, "parts", ())]
    if parts:
        return takes_aux, any(part.by_sequence for part in parts), any(part.by_head for part in parts)
    b, h = (parameters[len(leading) + index].name for index in range(2))
    return takes_aux, _reads(function.__code__, b), _reads(function.__code__, h)


def _place(function: Any) -> str:
    return f"{function.__code__.co_filename}, line {function.__code__.co_firstlineno}"


def _reads(code: CodeType, name: str) -> bool:
    """Return whether any instruction names the argument `name`."""
    for instruction in dis.get_instructions(code):
        found = instruction.argval
        if name == found or (isinstance(found, tuple) and name in found):
            return True
    return False


def where_allowed(mod: Mod, indices: tuple[IntArray, ...], aux: Aux) -> BoolArray:
    """Return a mask function at indices (b, h, i, j), arrays that broadcast together.

    Raises
    ------
    ShapeError
        If it reads an array of `aux` that is not there, or one behind its end.
    DTypeError
        If it returns anything but truth values.

    Examples
    --------
    >>> mod = as_mod("mask_mod", lambda b, h, i, j: j <= i and i < 2)
    >>> where_allowed(mod, (np.array(0), np.array(0), np.arange(3)[:, None], np.arange(2)), ()).astype(int)
    array([[1, 0],
           [1, 1],
           [0, 0]])
    """
    found = _everywhere(mod, (), indices, aux)
    if found.size and found.dtype != np.bool_:
        raise DTypeError(f"mask_mod: expected True or False, got {found.dtype} from {_place(mod.function)}")
    return found.astype(np.bool_, copy=False)


def modified_scores(
    mod: Mod, leading: tuple[FloatArray, ...], indices: tuple[IntArray, ...], aux: Aux
) -> FloatArray:
    """Return a score function at `leading` scores, or a gradient of one, in the dtype of the first.

    Raises
    ------
    ShapeError
        As `where_allowed`.
    DTypeError
        If it returns anything but real numbers.
    """
    found = _everywhere(mod, leading, indices, aux)
    if found.dtype.kind not in "fiub":
        raise DTypeError(f"score_mod: expected a number, got {found.dtype} from {_place(mod.function)}")
    return found.astype(leading[0].dtype, copy=False)


def _everywhere(mod: Mod, leading: tuple[FloatArray, ...], indices: tuple[IntArray, ...], aux: Aux) -> Array:
    """Return the function on all entries: at once if it takes arrays, else one by one.

    What refuses an array says so: a truth value is ambiguous, a number cannot be had.
    """
    arrays = np.broadcast_arrays(*leading, *indices)
    shape = arrays[0].shape
    if 0 in shape:
        return np.zeros(shape, leading[0].dtype if leading else np.bool_)
    with np.errstate(all="ignore"):
        if arrays[0].size > 1:
            try:
                at_once = np.asarray(_called(mod, leading, indices, aux))
            except (TypeError, ValueError):
                pass
            else:
                return np.broadcast_to(at_once, shape)
        count = len(leading)
        flat = [array.ravel() for array in arrays]
        values = [
            _called(mod, entry[:count], tuple(map(int, entry[count:])), aux)
            for entry in zip(*flat, strict=True)
        ]
    return np.asarray(values).reshape(shape)


def check_reads(mod: Mod, leading: int, sizes: tuple[int, ...], aux: Aux) -> None:
    """Call a function at the last indices: kernels do not notice what it reads behind the end of `aux`.

    Parameters
    ----------
    mod : Mod
        The function.
    leading : int
        How many scores it takes before the indices.
    sizes : tuple of int
        (B, Hq, Tq, Tk).
    aux : tuple of ndarray
        Arrays of the host.

    Raises
    ------
    ShapeError
        If it reads an array that is not there, or one behind its end.  Other indices may do so unnoticed.

    Examples
    --------
    >>> mod = as_mod("mask_mod", lambda b, h, i, j, aux: aux[0][i] > j)
    >>> check_reads(mod, 0, (1, 1, 3, 3), (np.arange(3),))
    """
    if not mod.takes_aux or 0 in sizes:
        return
    with np.errstate(all="ignore"):
        try:
            _called(mod, (0.0,) * leading, tuple(size - 1 for size in sizes), aux)
        except ShapeError:
            raise
        except Exception:  # what else is wrong with it, its compiler says
            return


class _Reading:
    """An array of `aux` that knows its number, for errors."""

    def __init__(self, number: int, array: Array) -> None:
        self.number, self.array = number, array

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.array[index]
        except IndexError as error:
            raise ShapeError(f"aux[{self.number}]: {error}") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)

    def __len__(self) -> int:
        return len(self.array)


def _called(mod: Mod, leading: tuple[Any, ...], indices: tuple[Any, ...], aux: Aux) -> Any:
    """Call a function; say which array of `aux` it reads behind the end, or that there are too few."""
    try:
        return mod.call(leading, indices, aux)
    except IndexError as error:
        if not mod.takes_aux:
            raise
        problem = f"aux: {error}"
    named: Any = tuple(_Reading(number, array) for number, array in enumerate(aux))
    try:
        mod.call(leading, indices, named)
    except ShapeError as error:
        problem = str(error)
    except Exception as error:
        problem = f"aux: {error}"
    shapes = ", ".join(str(array.shape) for array in aux) or "none"
    name = mod.function.__name__
    raise ShapeError(
        f"{problem}; read by {name} in {_place(mod.function)}, given {len(aux)} arrays: {shapes}"
    )
