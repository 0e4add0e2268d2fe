"""Laws of the cost of collectives."""

from __future__ import annotations

from collections.abc import Callable

from memsim.collectives import FORMULAS
from memsim.estimate import Estimate
from memsim.laws.comparison import same
from refimpl.errors import LawViolation
from refimpl.registry import Case, law

Model = Callable[..., Estimate]


@law("cost.collectives")
def alone_nothing_takes_time(f: Model, case: Case, _close: object) -> None:
    """On one rank a collective takes no time."""
    same(case.replace(ranks=1).call(f).total, 0, "time on one rank")


@law("cost.collectives")
def both_halves_make_an_all_reduce(f: Model, case: Case, _close: object) -> None:
    """A ring all-reduce takes a reduce-scatter and an all-gather, a tree a reduction and a broadcast."""
    halves = {"ring": ("reduce_scatter", "all_gather"), "tree": ("reduce", "broadcast")}
    algorithm = case.kwargs["algorithm"]
    if algorithm in halves:
        parts = sum(case.replace(operation=half).call(f).total for half in halves[algorithm])
        same(case.replace(operation="all_reduce").call(f).total, parts, "time of the all-reduce")


@law("cost.collectives")
def bytes_cost_in_proportion(f: Model, case: Case, _close: object) -> None:
    """Without latency, elements of three times the size take three times as long."""
    free = case.replace(latency=0)
    thrice = free.replace(itemsize=3 * case.kwargs["itemsize"]).call(f).total
    same(thrice, 3 * free.call(f).total, "time of elements three times as large")


@law("cost.collectives")
def no_all_reduce_beats_the_bandwidth_bound(f: Model, case: Case, _close: object) -> None:
    """An all-reduce sends at least 2(p-1)/p of the vector; the ring sends exactly that if p divides it."""
    p = case.kwargs["ranks"]
    n = -(-case.kwargs["elements"] // p) * p
    transfer_only = case.replace(
        operation="all_reduce", elements=n, itemsize=1, latency=0, byte_time=1, reduce_time=0
    )
    for operation, algorithm in FORMULAS:
        if operation != "all_reduce":
            continue
        time = transfer_only.replace(algorithm=algorithm).call(f).total
        bound = 2 * (p - 1) * (n // p)
        if time < bound or (algorithm == "ring" and time != bound):
            raise LawViolation(f"all-reduce by {algorithm}: {time} bytes against a bound of {bound}")
