"""Every module of refimpl that registers techniques, laws or mistakes (entry point ``frugal.techniques``)."""

from __future__ import annotations

import importlib
import pkgutil

__all__ = ["FAMILIES"]

FAMILIES = ("attention", "decoding", "objectives", "parallel", "quant", "tokenization", "transformer")

for _family in FAMILIES:
    _package = importlib.import_module(f"refimpl.{_family}")
    for _module in pkgutil.iter_modules(_package.__path__, f"refimpl.{_family}."):
        importlib.import_module(_module.name)
