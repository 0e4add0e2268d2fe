"""Another way to compute a technique: where its function is, and how it is called."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Backend", "Implementation", "resolve"]

Backend = Literal["numpy", "cudasim", "cuda", "mpi"]


@dataclass(frozen=True, slots=True)
class Implementation:
    """A formulation, a kernel, a program of ranks.

    Attributes
    ----------
    technique : str
        Name of its record.
    target : str
        ``module:function``, called as the reference.
    backends : tuple of str
        Where it runs.
    tier : str
        Which GPUs it is made for, or what sets it apart.
    options : mapping
        Keywords that make the function this one, as ``tier="hopper"`` does.
    """

    technique: str
    target: str
    backends: tuple[Backend, ...]
    tier: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The target, with the options that it is called with.

        >>> Implementation("attention.paged", "m:f", ("cuda",), "ampere", {"tier": "ampere"}).label
        "m:f(tier='ampere')"
        """
        said = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.target}({said})" if said else self.target

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        function = resolve(self.target)
        return functools.partial(function, **self.options) if self.options else function


def resolve(target: str) -> Callable[..., Any]:
    """Import ``package.module:attribute`` and return the attribute.

    Raises
    ------
    ValueError
        If `target` is not of that form.
    ImportError, AttributeError
        If the module does not import or has no such attribute.
    """
    module, colon, attribute = target.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"expected MODULE:FUNCTION, got {target!r}")
    value: Any = importlib.import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    if not callable(value):
        raise TypeError(f"{target} is not callable")
    function: Callable[..., Any] = value
    return function
