"""Reading the data that ships with memsim: every number stands in a TOML file with its unit and source."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from importlib.resources import files
from typing import Any

from refimpl.errors import UnknownNameError

__all__ = ["names", "read"]


def names(folder: str = "") -> list[str]:
    """Return the names of the data files in ``memsim/data/<folder>``, without their ending, sorted."""
    return sorted(
        item.name.removesuffix(".toml")
        for item in files("memsim").joinpath("data", folder).iterdir()
        if item.name.endswith(".toml")
    )


@lru_cache(maxsize=64)
def read(name: str, folder: str = "", what: str = "data file") -> dict[str, Any]:
    """Return the parsed ``memsim/data/<folder>/<name>.toml``; do not change what is returned.

    Raises
    ------
    UnknownNameError
        If there is no such file; the message calls it `what` and offers the nearest names.
    """
    known = names(folder)
    if name not in known:
        raise UnknownNameError(what, name, known)
    text = files("memsim").joinpath("data", folder, f"{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
