"""The exact semantics of every technique, in NumPy; nothing else decides what is right.

Families load on first use: ``import refimpl`` costs little more than ``import numpy``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

__all__ = [
    "__version__",
    "attention",
    "compress",
    "decoding",
    "distill",
    "moe",
    "objectives",
    "parallel",
    "peft",
    "prune",
    "quant",
    "ssm",
    "tokenization",
    "transformer",
]

try:
    __version__ = version("frugal-lm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"refimpl.{name}")
    raise AttributeError(f"module 'refimpl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
