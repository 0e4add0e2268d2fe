"""Files of what was measured on one machine on one day, apart from the physics: written by tools, read here.

They are named ``<kind>-<hardware>-<date>.toml`` and stand in ``memsim/data/measured``, or wherever a user
wrote one.

>>> print(toml_text({"date": "2026-11-29", "row": [{"name": "copy", "sizes": [1, 2], "at": {"bytes": 0.5}}]}))
date = "2026-11-29"
<BLANKLINE>
[[row]]
name = "copy"
sizes = [1, 2]
at = { bytes = 0.5 }
<BLANKLINE>
"""

from __future__ import annotations

import datetime
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsim import data_files
from refimpl.errors import OptionError

__all__ = ["document", "file_name", "of_kind", "read_file", "toml_text"]

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def document(kind: str, hardware: str, tool: str, **tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a file of `kind` holds: who measured on what and today, and its rows."""
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()  # noqa: UP017 (as numpy does)
    return {"kind": kind, "hardware": hardware, "date": today, "tool": tool, **tables}


def file_name(found: Mapping[str, Any]) -> str:
    """Return the name under which a document is kept.

    >>> file_name({"kind": "traffic", "hardware": "h200", "date": "2026-11-29"})
    'traffic-h200-2026-11-29.toml'
    """
    return f"{found['kind']}-{found['hardware']}-{found['date']}.toml"


def of_kind(kind: str) -> list[dict[str, Any]]:
    """Return the documents of one kind that memsim ships with, by name, which is by hardware and date."""
    names = [name for name in data_files.names("measured") if name.startswith(f"{kind}-")]
    return [_checked(data_files.read(name, "measured"), kind, name) for name in names]


def read_file(path: str | Path, kind: str) -> dict[str, Any]:
    """Return a document from a file of the user's.

    Raises
    ------
    OptionError
        If it is no TOML, or no file of that kind.
    OSError
        If it cannot be read.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path}: expected TOML; got {error}") from None
    return _checked(found, kind, str(path))


def _checked(found: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    for key in ("kind", "hardware", "date", "tool"):
        if not isinstance(found.get(key), str):
            raise OptionError(f"{name}: expected {key!r}, a text; got {found.get(key)!r}")
    if found["kind"] != kind:
        raise OptionError(f"{name}: expected a file of kind {kind!r}; got {found['kind']!r}")
    return found


def toml_text(found: Mapping[str, Any]) -> str:
    """Return a document of plain values and of lists of tables as TOML."""
    plain = {key: value for key, value in found.items() if not _is_tables(value)}
    blocks = ["".join(f"{_key(key)} = {_value(value)}\n" for key, value in plain.items())]
    for key, value in found.items():
        if _is_tables(value):
            for row in value:
                lines = (f"{_key(name)} = {_value(item)}\n" for name, item in row.items())
                blocks.append(f"[[{_key(key)}]]\n{''.join(lines)}")
    return "\n".join(blocks)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"a measured file: expected finite numbers; got {value}")
    if isinstance(value, str):
        return _text(value)
    return repr(value)


def _text(value: str) -> str:
    """Return a basic string: JSON's escapes are TOML's, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
