"""Which functions ``frugal verify`` holds to which techniques."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli.foreign import import_function

if TYPE_CHECKING:
    from refimpl.registry import Implementation, Technique

__all__ = ["Job", "jobs_of"]


@dataclass(frozen=True, slots=True)
class Job:
    """One function to hold to one technique; without a function, the reference itself."""

    technique: Technique
    target: str
    load: Callable[[], Callable[..., Any] | None]
    with_: str | None = None
    item: Implementation | None = None

    @property
    def tier(self) -> str:
        """The kind of GPU that a kernel is made for, as ``--tier`` names it."""
        return self.item.tier.partition(" ")[0] if self.item else ""


def jobs_of(technique: Technique, backend: str, with_: str | None) -> Iterator[Job]:
    """Yield what a backend has, the reference first where that runs; or a user's function alone."""
    from refimpl import registry

    if with_ is not None:
        function = import_function(with_)
        yield Job(technique, with_, lambda: function, with_)
        return
    if technique.sample is None:
        return
    if backend == "numpy":
        yield Job(technique, technique.home, lambda: None)
    for item in registry.implementations_of(technique.name):
        if backend in item.backends:
            yield Job(technique, item.label, item.load, item=item)
