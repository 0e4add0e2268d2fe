"""Functions of the user's as device functions, and what is said when one does not compile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CellType, FunctionType
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np

from cuda_backend._numba import SIMULATOR, device_function
from refimpl.attention.user_functions import Mod
from refimpl.errors import FrugalError, OptionError

__all__ = ["Mods", "blamed", "mask_on_device", "score_on_device"]


class Mods(NamedTuple):
    """What a kernel compiles in: functions, equal if they compute the same, and dtype and axes of `aux`."""

    mask: Mod | None = None
    score: Mod | None = None
    vjp: Mod | None = None
    aux: tuple[tuple[str, int], ...] = ()

    @property
    def arrays(self) -> tuple[tuple[str, int], ...]:
        """Return dtype and axes of the arrays that a kernel takes: one at least."""
        return self.aux or (("float32", 1),)

    def kept_as(self) -> str:
        """Return a name for these functions that is the same in every process, if they are.

        What a function closes over beside numbers, strings, arrays and functions has no such name.
        """
        keys = tuple(None if mod is None else (mod.takes_aux, mod.key) for mod in self[:3])
        return repr((keys, self.aux)) + (str(uuid4()) if " object at 0x" in repr(keys) else "")


def mask_on_device(mod: Mod | None) -> Any:
    """Return ``f(b, h, i, j, aux)`` for kernels; without a function it allows all."""
    if mod is None:
        return device_function(lambda _b, _h, _i, _j, _aux: True)
    f = _on_device(mod.function)
    if mod.takes_aux:
        return device_function(lambda b, h, i, j, aux: bool(f(b, h, i, j, aux)))
    return device_function(lambda b, h, i, j, _aux: bool(f(b, h, i, j)))


def score_on_device(mod: Mod | None, leading: int = 1) -> Any:
    """Return ``f(score, b, h, i, j, aux)`` for kernels, or with the gradient first; None changes nothing."""
    if mod is None:
        if leading == 1:
            return device_function(lambda score, _b, _h, _i, _j, _aux: score)
        return device_function(lambda gradient, _score, _b, _h, _i, _j, _aux: gradient)
    f, number = _on_device(mod.function), np.float32
    if leading == 1 and mod.takes_aux:
        return device_function(lambda s, b, h, i, j, aux: number(f(s, b, h, i, j, aux)))
    if leading == 1:
        return device_function(lambda s, b, h, i, j, _aux: number(f(s, b, h, i, j)))
    if mod.takes_aux:
        return device_function(lambda d, s, b, h, i, j, aux: number(f(d, s, b, h, i, j, aux)))
    return device_function(lambda d, s, b, h, i, j, _aux: number(f(d, s, b, h, i, j)))


def _on_device(function: FunctionType | Any) -> Any:
    """Return a copy that kernels can call: floats that it closes over are float32, functions device ones."""

    def value(item: Any) -> Any:
        if isinstance(item, float):
            return np.float32(item)
        return _on_device(item) if isinstance(item, FunctionType) and item is not function else item

    cells = tuple(CellType(value(cell.cell_contents)) for cell in function.__closure__ or ())
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    scope = {**function.__globals__, **{name: value(function.__globals__[name]) for name in names}}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    return copy if SIMULATOR else device_function(copy)


@contextmanager
def blamed(mods: Mods) -> Iterator[None]:
    """Turn an error of the compiler into one that names the line of the user's function.

    Raises
    ------
    OptionError
        In the place of any error of the compiler inside one of `mods`.
    """
    try:
        yield
    except FrugalError:
        raise
    except Exception as error:
        text = str(error)
        found = [
            (Path(name).name, int(line)) for name, line in re.findall(r'File "([^"]+)", line (\d+)', text)
        ]
        names = ("mask_mod", "score_mod", "score_mod_vjp")
        for file, line in reversed(found):
            for name, mod in zip(names, mods[:3], strict=True):
                where = _covering(mod.function, file, line) if isinstance(mod, Mod) else None
                if where is not None:
                    raise OptionError(
                        f"{name}: does not compile for the GPU; {where}, line {line}: {_cause(text)}"
                    ) from error
        raise


def _covering(function: Any, file: str, line: int) -> str | None:
    """Return the path of `file` if that line of it is of the function, or of one that it closes over."""
    code = function.__code__
    lines = [number for _, _, number in code.co_lines() if number is not None]
    if Path(code.co_filename).name == file and min(lines) <= line <= max(lines):
        return str(code.co_filename)
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    found = (_covering(item, file, line) for item in inner if isinstance(item, FunctionType))
    return next((path for path in found if path is not None), None)


def _cause(text: str) -> str:
    """Return the line of the compiler's message that says most."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
    telling = (
        "NameError",
        "Unknown attribute",
        "Untyped",
        "No implementation",
        "Use of unsupported",
        "Invalid use",
    )
    return next((line for line in lines if any(sign in line for sign in telling)), " ".join(lines)[:200])
