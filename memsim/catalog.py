"""Every module of memsim that registers techniques, laws or prices (entry point ``frugal.techniques``)."""

from __future__ import annotations

import importlib

__all__ = ["MODULES"]

MODULES = (
    "attention_io",
    "attention_prices",
    "collective_prices",
    "collectives",
    "communication",
    "laws",
    "laws_collectives",
    "linear_io",
    "parallelism",
    "training_memory",
    "zero",
)

for _module in MODULES:
    importlib.import_module(f"memsim.{_module}")
