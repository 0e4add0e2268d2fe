"""Every module of refimpl that registers techniques, laws or mistakes (entry point ``frugal.techniques``)."""

from __future__ import annotations

import importlib
import pkgutil

import refimpl

__all__ = ["FAMILIES"]

# A family is a folder of refimpl: a new one is found without an edit here.
FAMILIES = tuple(module.name for module in pkgutil.iter_modules(refimpl.__path__) if module.ispkg)

for _family in FAMILIES:
    _package = importlib.import_module(f"refimpl.{_family}")
    for _module in pkgutil.iter_modules(_package.__path__, f"refimpl.{_family}."):
        importlib.import_module(_module.name)
