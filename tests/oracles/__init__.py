"""Oracles: judges that share no code with what they judge.  Importing this package registers them."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


class OracleMissing(NotImplementedError):  # noqa: N818 (it is no error: the oracle's library is optional)
    """The library that an oracle asks is not installed."""


def library(name: str) -> Any:
    """Import an optional library, or say that its oracles cannot judge."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise OracleMissing(f"{name} is not installed") from None


for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)
