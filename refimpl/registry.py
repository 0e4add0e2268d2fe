"""The one idea of frugal: a technique is a record.

A record ties a technique's name to the function that defines it, to other implementations (formulations,
kernels, ranks), to the models that price it, and to the laws, oracles and mistakes that hold all of them to
each other.  `frugal list`, `show`, `verify`, README and the contract tests are made from these records alone.

The decorators return the function unchanged.  This module imports nothing of the project but its errors and
`refimpl.implementation`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

import numpy as np

from refimpl.errors import UnknownNameError
from refimpl.implementation import Backend, Implementation, resolve

__all__ = [
    "ERRATA",
    "IMPLEMENTATIONS",
    "LAWS",
    "ORACLES",
    "PRICES",
    "TECHNIQUES",
    "Backend",
    "Case",
    "Erratum",
    "Implementation",
    "Kind",
    "Law",
    "Price",
    "Source",
    "Technique",
    "erratum",
    "get",
    "implementations_of",
    "implements",
    "laws_of",
    "load",
    "oracle",
    "prices",
    "resolve",
    "technique",
]

Kind = Literal["function", "cost", "identity", "data"]
Function = TypeVar("Function", bound=Callable[..., Any])
Option = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a definition comes from: the work, an identifier that finds it, and the place inside it."""

    work: str
    identifier: str
    locator: str

    def __str__(self) -> str:
        return f"{self.work}, {self.identifier}, {self.locator}"


@dataclass(frozen=True, slots=True)
class Case:
    """One call, ``f(*args, **kwargs)``: arrays positional-only, options keyword-only."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, f: Callable[..., Any]) -> Any:
        """Return ``f(*args, **kwargs)``."""
        return f(*self.args, **self.kwargs)

    def replace(self, *args: Any, **kwargs: Any) -> Case:
        """Return the case with other arrays (all of them, if any is given) and with these options set."""
        return Case(args or self.args, {**self.kwargs, **kwargs})

    def without(self, *names: str) -> Case:
        """Return the case with these options left at their defaults."""
        return Case(self.args, {key: value for key, value in self.kwargs.items() if key not in names})

    def map_arrays(self, function: Callable[[np.ndarray[Any, Any]], Any]) -> Case:
        """Return the case with `function` applied to every array among arguments and options."""

        def visit(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                return function(value)
            if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
                return type(value)(visit(item) for item in value)
            if isinstance(value, Mapping):
                return {key: visit(item) for key, item in value.items()}
            if isinstance(value, tuple):  # a NamedTuple
                return type(value)(*(visit(item) for item in value))
            return value

        return Case(
            tuple(visit(a) for a in self.args), {key: visit(value) for key, value in self.kwargs.items()}
        )


@dataclass(frozen=True, slots=True)
class Technique:
    """The record of one technique.

    Attributes
    ----------
    name : str
        Registered name, ``family.last_words``.
    function : callable
        The reference: it alone defines what is right.
    entries : tuple of int
        Numbers of the lecture's techniques that this record covers.
    kind : {"function", "cost", "identity", "data"}
        What the record holds.
    source : Source
        The defining work with a locator.
    axes : mapping of str to (int, int)
        Inclusive ranges of the integers that give a case its shape.
    options : mapping of str to tuple
        Finite choices drawn for a case beside its axes.
    sample : callable
        ``sample(rng, **axes, **options) -> Case``; arrays in float64, from `rng` alone.
    edges : tuple of mapping
        Axes and options of cases that must always run: size 0 and 1, ragged blocks, ...
    terms : callable or None
        ``terms(case) -> (n, magnitudes)``: length of the reductions and, shaped like the outputs, the sums of
        absolute values of the terms, for the rounding bound of `refimpl.tolerances`.
    spread : callable or None
        ``spread(case) -> magnitudes``, shaped like the outputs: the root of the sum of squared terms, for
        outputs that cancel by design and whose rounding is therefore not measured by their own size.
    vjp : str or None
        ``module:function`` of the vector-Jacobian product: ``vjp(*args, cotangent, **kwargs)`` returns one
        gradient for each positional array; a function of several outputs has a cotangent for each.
    exact : bool
        Whether outputs are codes, masks, indices or counts, which compare equal or not at all.
    kernel_factor : float
        How many times the error of the low-precision baseline a kernel may have: 2, and 3 for gradients.
    """

    name: str
    function: Callable[..., Any]
    entries: tuple[int, ...]
    kind: Kind
    source: Source
    axes: Mapping[str, tuple[int, int]]
    options: Mapping[str, tuple[Option, ...]]
    sample: Callable[..., Case] | None
    edges: tuple[Mapping[str, Option], ...]
    terms: Callable[[Case], tuple[int, Any]] | None
    spread: Callable[[Case], Any] | None
    vjp: str | None
    exact: bool
    kernel_factor: float

    @property
    def family(self) -> str:
        """The part of the name before the first dot."""
        return self.name.partition(".")[0]

    @property
    def home(self) -> str:
        """``module:function`` of the reference."""
        return f"{self.function.__module__}:{self.function.__qualname__}"


@dataclass(frozen=True, slots=True)
class Law:
    """A property that every implementation of its techniques must have."""

    name: str
    techniques: tuple[str, ...]
    function: Callable[..., None]

    @property
    def statement(self) -> str:
        """The law in one line, from the docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]


@dataclass(frozen=True, slots=True)
class Price:
    """A cost model of a technique or its implementation `of`: ``function(case) -> {counter: exact int}``."""

    technique: str
    counts: str
    function: Callable[[Case], Mapping[str, int]]
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Erratum:
    """A mistake of the lecture, runnable: `mutant` computes what the slide says."""

    technique: str
    name: str
    slide: str
    says: str
    should_say: str
    breaks: str
    mutant: Callable[..., Any] | None


TECHNIQUES: dict[str, Technique] = {}
LAWS: dict[str, Law] = {}
IMPLEMENTATIONS: list[Implementation] = []
PRICES: list[Price] = []
ERRATA: list[Erratum] = []
ORACLES: dict[str, list[Callable[..., Any]]] = {}


def technique(
    name: str,
    *,
    entries: tuple[int, ...],
    kind: Kind,
    source: Source,
    axes: Mapping[str, tuple[int, int]] | None = None,
    options: Mapping[str, Sequence[Option]] | None = None,
    sample: Callable[..., Case] | None = None,
    edges: Iterable[Mapping[str, Option]] = (),
    terms: Callable[[Case], tuple[int, Any]] | None = None,
    spread: Callable[[Case], Any] | None = None,
    vjp: str | None = None,
    exact: bool = False,
    kernel_factor: float = 2.0,
) -> Callable[[Function], Function]:
    """Register the decorated function as the definition of technique `name` (see `Technique`)."""

    def register(function: Function) -> Function:
        known = TECHNIQUES.get(name)
        if known is not None and known.home != f"{function.__module__}:{function.__qualname__}":
            raise ValueError(f"technique {name!r} is defined twice: {known.home} and {function.__module__}")
        TECHNIQUES[name] = Technique(
            name=name,
            function=function,
            entries=entries,
            kind=kind,
            source=source,
            axes=dict(axes or {}),
            options={key: tuple(choices) for key, choices in (options or {}).items()},
            sample=sample,
            edges=tuple(edges),
            terms=terms,
            spread=spread,
            vjp=vjp,
            exact=exact,
            kernel_factor=kernel_factor,
        )
        return function

    return register


def law(*techniques: str) -> Callable[[Function], Function]:
    """Register the decorated ``law(f, case, close)`` for each of `techniques`; it raises `LawViolation`."""

    def register(function: Function) -> Function:
        name = f"{function.__module__.replace('.laws.', '.').rsplit('.', 2)[-2]}.{function.__name__}"
        LAWS[name] = Law(name, techniques, function)
        return function

    return register


def implements(
    name: str, *, backend: Backend | tuple[Backend, ...], tier: str = ""
) -> Callable[[Function], Function]:
    """Register the decorated function as an implementation of technique `name`."""

    def register(function: Function) -> Function:
        add_implementation(name, f"{function.__module__}:{function.__qualname__}", backend=backend, tier=tier)
        return function

    return register


def add_implementation(
    name: str,
    target: str,
    *,
    backend: Backend | tuple[Backend, ...],
    tier: str = "",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Register ``module:attribute`` as an implementation without importing it (see `Implementation`)."""
    backends = (backend,) if isinstance(backend, str) else backend
    record = Implementation(name, target, backends, tier, dict(options or {}))
    if record not in IMPLEMENTATIONS:
        IMPLEMENTATIONS.append(record)


def prices(name: str, *, counts: str, of: str | None = None) -> Callable[[Function], Function]:
    """Register ``model(case) -> {counter: int}`` as a price of technique `name` or implementation `of`."""

    def register(function: Function) -> Function:
        PRICES.append(Price(name, counts, function, of))
        return function

    return register


def erratum(
    name: str, *, slide: str, says: str, should_say: str, breaks: str
) -> Callable[[Function], Function]:
    """Register the decorated function as what the lecture's slide computes; law `breaks` must fail on it."""

    def register(function: Function) -> Function:
        ERRATA.append(Erratum(name, function.__name__, slide, says, should_say, breaks, function))
        return function

    return register


def oracle(*names: str) -> Callable[[Function], Function]:
    """Register the decorated ``oracle(*args, **kwargs)`` as an independent judge of techniques `names`."""

    def register(function: Function) -> Function:
        for name in names:
            ORACLES.setdefault(name, []).append(function)
        return function

    return register


def get(name: str) -> Technique:
    """Return the record of technique `name`.

    Raises
    ------
    UnknownNameError
        If nothing is registered under `name`; the message offers the nearest names.
    """
    load()
    try:
        return TECHNIQUES[name]
    except KeyError:
        raise UnknownNameError("technique", name, TECHNIQUES) from None


def laws_of(name: str) -> list[Law]:
    """Return the laws of technique `name`, by name."""
    return sorted((item for item in LAWS.values() if name in item.techniques), key=lambda item: item.name)


def implementations_of(name: str) -> list[Implementation]:
    """Return the registered implementations of technique `name`, in order of target."""
    return sorted((item for item in IMPLEMENTATIONS if item.technique == name), key=lambda item: item.target)


_loaded = False


def load() -> None:
    """Import every installed module that registers techniques (entry points ``frugal.techniques``)."""
    global _loaded
    if _loaded:
        return
    _loaded = True  # before the imports: what they import may ask for records itself
    try:
        for point in sorted(entry_points(group="frugal.techniques"), key=lambda point: point.name):
            importlib.import_module(point.value)
    except BaseException:
        _loaded = False
        raise
