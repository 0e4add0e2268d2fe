"""A JSON object of settings that somebody else wrote: values are asked for by name, type and range.

>>> config = Settings("config.json", {"hidden_size": 64, "tie_word_embeddings": None})
>>> config.whole("n_embd", "hidden_size"), config.flag("tie_word_embeddings", default=True)
(64, True)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refimpl.errors import OptionError

__all__ = ["LARGEST", "Settings"]

# Far above any size that exists, and low enough that products of a few stay printable.
LARGEST = 10**12


@dataclass(frozen=True, slots=True)
class Settings:
    """One JSON object; `where` is what errors call it, `silent` what holds where it says nothing.

    A value of null is as good as none, but says so: what is silent does not replace it.
    """

    where: str
    values: Mapping[str, Any]
    silent: Mapping[str, Any] = field(default_factory=dict)

    def get(self, *names: str) -> Any:
        """Return the value under the first of `names` that has one, or None."""
        found = next((self.values[name] for name in names if self.values.get(name) is not None), None)
        if found is not None or any(name in self.values for name in names):
            return found
        return next((self.silent[name] for name in names if name in self.silent), None)

    def whole(self, *names: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """Return a whole number; ``5e8``, which JSON reads as a float, is one.

        Raises
        ------
        OptionError
            If it is none from `least` to `most`, or if there is none and no default.
        """
        value = self.get(*names)
        if value is None:
            if default is None:
                raise OptionError(f"{self.where}: there is no {names[0]}")
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise OptionError(
                f"{self.where}: {self._given(names)}: expected a whole number from {least} to {most}; "
                f"got {shown(value)}"
            )
        return value

    def flag(self, *names: str, default: bool) -> bool:
        """Return true or false.

        Raises
        ------
        OptionError
            If it is neither.
        """
        value = self.get(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise OptionError(
                f"{self.where}: {self._given(names)}: expected true or false; got {shown(value)}"
            )
        return value

    def choice(self, name: str, known: Sequence[str], *, default: str | None = None) -> str:
        """Return one of the words `known`.

        Raises
        ------
        OptionError
            If it is none of them, or if there is none and no default.
        """
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in known:
            raise OptionError(f"{self.where}: {name}: expected one of {', '.join(known)}; got {shown(value)}")
        return value

    def wholes(self, name: str, *, least: int = 0, most: int = LARGEST) -> tuple[int, ...]:
        """Return a list of whole numbers, empty if there is none.

        Raises
        ------
        OptionError
            If it is no such list.
        """
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or any(type(x) is not int or not least <= x <= most for x in value):
            raise OptionError(
                f"{self.where}: {name}: expected a list of whole numbers from {least} to {most}; "
                f"got {shown(value)}"
            )
        return tuple(value)

    def section(self, name: str) -> Settings:
        """Return the object under `name`, an empty one if there is none.

        Raises
        ------
        OptionError
            If it is no object.
        """
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise OptionError(f"{self.where}: {name}: expected an object; got {shown(value)}")
        return Settings(f"{self.where}: {name}", value or {})

    def refuse(self, name: str, usual: Any, reason: str) -> None:
        """Refuse a setting that is not the usual one.

        Raises
        ------
        OptionError
            If it is given and different.
        """
        value = self.get(name)
        if value is not None and (type(value) is not type(usual) or value != usual):
            raise OptionError(f"{self.where}: {name}: {reason}; got {shown(value)}")

    def _given(self, names: Sequence[str]) -> str:
        return next((name for name in names if self.values.get(name) is not None), names[0])


def shown(value: Any, most: int = 60) -> str:
    """Return a value as an error message shows it: in one line, and not all of a long one.

    >>> shown({"a": "b" * 100}), shown(10**200, most=5)
    ('an object of 1', '10000...')
    """
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
