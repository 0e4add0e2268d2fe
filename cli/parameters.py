"""Types of option values: numbers with scales, lists of them, sizes in bytes, axes, dtypes, names.

>>> COUNTS.convert("1K,7.5B", None, None)
(1000, 7500000000)
>>> AXES.convert("Tq=65,causal=top_left,return_lse=true", None, None)
{'Tq': 65, 'causal': 'top_left', 'return_lse': True}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import click
from click.shell_completion import CompletionItem

__all__ = [
    "APPLICABLE",
    "AXES",
    "BYTES",
    "COUNT",
    "COUNTS",
    "COUNTS_FROM_0",
    "DTYPES",
    "HARDWARE",
    "MODEL",
    "PRECISIONS",
    "SIZES",
    "STACK",
    "TECHNIQUE",
    "AxisValue",
    "Count",
    "ListOf",
    "Number",
    "axis_text",
]

# click.ParamType takes a type argument in recent versions only, so nothing gives it one at run time.
T = TypeVar("T")
AxisValue = int | float | bool | str | None

# Bytes of an element, and the name under which a maker prints the peak rate.
PRECISIONS: dict[str, tuple[int, str]] = {
    "float64": (8, "fp64"),
    "float32": (4, "fp32"),
    "float16": (2, "fp16"),
    "bfloat16": (2, "bf16"),
}


# Far above anything that exists, and low enough that products of a few counts stay finite as floats.
LARGEST_COUNT = 10**30


class Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number, such as 64, 7.5e9, 7.5B or 4K (K, M, B, G, T are powers of 1000)."""

    name = "count"

    def __init__(self, least: int = 1, most: int = LARGEST_COUNT) -> None:
        self.least, self.most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        if isinstance(value, int):
            return value
        from memsim.units import parse_count
        from refimpl.errors import OptionError

        try:
            number = parse_count(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)
        if number.denominator != 1 or number < self.least:
            self.fail(f"expected a whole number of at least {self.least}; got {value!r}", param, ctx)
        if number > self.most:
            self.fail(f"expected at most {self.most:g}; got {value!r}", param, ctx)
        return int(number)


class Number(click.FloatRange):
    """A finite number in a range; click's own lets NaN pass."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a number; got {value!r}", param, ctx)
        return number

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:  # noqa: ARG002
        """Return what stands for it in the help."""
        return self.name.upper()


class _Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size of at least one byte, such as 192KiB (powers of 1024), 40GB (powers of 1000) or 512."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from memsim.units import parse_bytes
        from refimpl.errors import OptionError

        try:
            size = parse_bytes(value)
        except OptionError as error:
            self.fail(str(error), param, ctx)
        if size < 1:
            self.fail(f"expected at least one byte; got {value!r}", param, ctx)
        return size


class ListOf(click.ParamType, Generic[T]):  # type: ignore[type-arg]
    """Values of one type, with commas between them."""

    def __init__(self, item: click.ParamType[T]) -> None:
        self.item = item
        self.name = f"{item.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[T, ...]:
        """Return the values."""
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(text.strip(), param, ctx) for text in value.split(","))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        """Return what ``--help`` shows: that of one value, and dots."""
        inner = self.item.get_metavar(param, ctx) or self.item.name.upper()
        return f"{inner},..."

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Complete the last value of the list."""
        done, comma, last = incomplete.rpartition(",")
        found = self.item.shell_complete(ctx, param, last)
        return [CompletionItem(f"{done}{comma}{item.value}", help=item.help) for item in found]


class _Each(ListOf[T]):
    """Values of which one given twice counts once."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[T, ...]:
        """Return the values."""
        return tuple(dict.fromkeys(super().convert(value, param, ctx)))


class _Dtype(click.Choice[str]):
    """A number format; fp16, bf16, fp32 and fp64 are accepted too."""

    name = "dtype"
    _aliases = {short: name for name, (_, short) in PRECISIONS.items()}  # noqa: RUF012 (never changed)

    def __init__(self) -> None:
        super().__init__(tuple(PRECISIONS))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(self._aliases.get(value, value), param, ctx)


class _Axes(click.ParamType):  # type: ignore[type-arg]
    """Axes and options of a case: Tq=65,causal=top_left; values are numbers, true, false, none or words."""

    name = "axes"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:  # noqa: ARG002
        return "A=1,B=2"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, AxisValue]:
        if isinstance(value, dict):
            return value
        axes: dict[str, AxisValue] = {}
        for part in value.split(","):
            name, equals, text = (piece.strip() for piece in part.partition("="))
            if not (name.isidentifier() and equals and text):
                self.fail(f"expected NAME=VALUE,...; got {part!r} in {value!r}", param, ctx)
            if name in axes:
                self.fail(f"{name} is given twice in {value!r}", param, ctx)
            axes[name] = _axis_value(text)
        return axes


def _axis_value(text: str) -> AxisValue:
    words: dict[str, AxisValue] = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        number = float(text)
        if math.isfinite(number):
            return number
    return text


def axis_text(value: AxisValue) -> str:
    """Return a value as `AXES` reads it.

    >>> axis_text(True), axis_text(None), axis_text(65)
    ('true', 'none', '65')
    """
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


class _Named(click.ParamType):  # type: ignore[type-arg]
    """A name that is looked up later; the shell completes it from `names`."""

    def __init__(self, name: str, names: Callable[[], list[str]]) -> None:
        self.name = name
        self._names = names

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 (click's signature)
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]


def _technique_names() -> list[str]:
    from refimpl import registry

    registry.load()
    return sorted(registry.TECHNIQUES)


def _applicable_names() -> list[str]:
    from cli.applied.techniques import APPLICABLE

    return [name for one in APPLICABLE for name in (one.name, *one.aliases)]


def _hardware_names() -> list[str]:
    from memsim.hardware import hardware_names

    return hardware_names()


def _model_names() -> list[str]:
    from memsim.model import model_names

    return model_names()


def _stack_names() -> list[str]:
    from memsim.planning.efficiency import stacks

    return stacks()


COUNT = Count()
COUNTS: ListOf[int] = ListOf(COUNT)
COUNT_FROM_0 = Count(0)
COUNTS_FROM_0: ListOf[int] = ListOf(COUNT_FROM_0)
BYTES = _Bytes()
SIZES: ListOf[int] = ListOf(BYTES)
AXES = _Axes()
DTYPES: ListOf[str] = _Each(_Dtype())
TECHNIQUE = _Named("name", _technique_names)
APPLICABLE = _Named("name", _applicable_names)
HARDWARE = _Named("hardware", _hardware_names)
MODEL = _Named("model", _model_names)
STACK = _Named("stack", _stack_names)
