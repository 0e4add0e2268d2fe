"""``frugal comm``: what each rank sends in a collective, exactly, and how long the rounds take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.parameters import HARDWARE, SIZES, Count, ListOf, Number
from cli.quantities import bytes_text, time_text
from cli.result import Column, Result

if TYPE_CHECKING:
    from memsim.estimate import Estimate
    from refimpl.parallel.comm import Sent

__all__ = ["command"]

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all")
ALGORITHMS = ("ring", "recursive", "doubling", "tree", "pairwise", "bruck")


SECONDS = Number(0.0, 1e9)
RANKS: ListOf[int] = ListOf(Count(most=1_000_000))  # each is counted


@click.command(
    "comm",
    epilog="""\b
Examples:
  frugal comm --op all_reduce --ranks 2,4,8 --bytes 4MiB
  frugal comm --op all_reduce --ranks 64 --bytes 15GB --latency 5e-6 --bandwidth 50GB --explain
  frugal comm --op all_reduce --ranks 8,64 --bytes 15GB --hardware a100-80gb""",
    short_help="Bytes, messages and time of a collective.",
)
@click.option("--op", "operation", type=click.Choice(OPERATIONS), required=True, help="What is done.")
@click.option("--ranks", type=RANKS, default="8", show_default=True, help="How many ranks.")
@click.option("--bytes", "sizes", type=SIZES, required=True, help="Size of the vector of one rank.")
@click.option("--itemsize", type=click.Choice(("1", "2", "4", "8")), default="1", help="Bytes an element.")
@click.option(
    "--algorithm", type=click.Choice(ALGORITHMS), help="How.  [default: all that exist for the operation]"
)
@click.option("--latency", type=SECONDS, default=0.0, show_default=True, help="Seconds a message (α).")
@click.option("--bandwidth", type=SIZES, help="Bytes a second that a rank can send (1/β).")
@click.option("--hardware", type=HARDWARE, help="Whose links and network; adds collectives in two levels.")
@click.option("--explain", is_flag=True, help="Print the formulas of the time, with the numbers in them.")
@output_options()
def command(
    operation: str,
    ranks: tuple[int, ...],
    sizes: tuple[int, ...],
    itemsize: str,
    algorithm: str | None,
    latency: float,
    bandwidth: tuple[int, ...] | None,
    hardware: str | None,
    explain: bool,
) -> Result:
    """Count what the busiest rank sends, as the references count it, and time the rounds.

    Vectors that do not divide are padded.  Contention and overlap with computation are not modelled.
    """
    from memsim.collectives import FORMULAS, collectives, sent_by_rank

    chosen = [how for what, how in FORMULAS if what == operation and algorithm in (None, how)]
    if not chosen:
        known = ", ".join(how for what, how in FORMULAS if what == operation)
        raise click.BadParameter(f"--algorithm: {operation} is done by {known}; got {algorithm!r}")
    if hardware and bandwidth:
        raise click.UsageError("--bandwidth or --hardware, not both")
    width = int(itemsize)
    rows: list[dict[str, Any]] = []
    estimates: list[Estimate] = []
    for size, count, how, given in itertools.product(sizes, ranks, chosen, bandwidth or (None,)):
        rate = _slowest(hardware, count) if hardware else given
        if size % width:
            raise click.BadParameter(f"--bytes: {size} bytes are no whole number of {width}-byte elements")
        elements = size // width
        sent = sent_by_rank(operation, how, elements=elements, itemsize=width, ranks=count)
        time = collectives(
            operation=operation,  # type: ignore[arg-type]
            algorithm=how,  # type: ignore[arg-type]
            elements=elements,
            ranks=count,
            itemsize=width,
            latency=latency,
            byte_time=0 if rate is None else 1 / rate,
        )
        estimates.append(time)
        seconds = float(time.total) if latency or rate else None
        rows.append(_row(operation, how, size, sent) | {"time_s": seconds})
    if hardware:
        for size, count in itertools.product(sizes, ranks):
            found = _two_levels(operation, hardware, size // width, width, count, latency)
            if found is not None:
                time, sent = found
                estimates.append(time)
                rows.append(_row(operation, "two levels", size, sent) | {"time_s": float(time.total)})
    details: list[str] = []
    for row, time in zip(rows, estimates, strict=True) if explain else ():
        details += ["", f"{row['op']} by {row['algorithm']}, {row['ranks']} ranks, {row['vector_bytes']} B"]
        details += [f"  {line}" for line in time.explain()]
    return Result(
        rows,
        (
            Column("op"),
            Column("algorithm"),
            Column("ranks", right=True),
            Column("vector_bytes", "vector", right=True, text=bytes_text),
            Column("sent_bytes_max", "sent by the busiest rank", right=True, text=bytes_text),
            Column("sent_bytes_total", "by all ranks", right=True, text=bytes_text),
            Column("messages_max", "messages", right=True),
            Column("time_s", "time", right=True, text=time_text),
        ),
        sources=list(dict.fromkeys(term.source for time in estimates for term in time.terms)),
        details=details,
    )


def _row(operation: str, algorithm: str, size: int, sent: Sequence[Sent]) -> dict[str, Any]:
    return {
        "op": operation,
        "algorithm": algorithm,
        "ranks": len(sent),
        "vector_bytes": size,
        "sent_bytes_max": max(rank.bytes for rank in sent),
        "sent_bytes_total": sum(rank.bytes for rank in sent),
        "messages_max": max(rank.messages for rank in sent),
    }


def _slowest(hardware: str, ranks: int) -> int:
    """Return the bandwidth of the slowest link of a ring: within a node, or between nodes."""
    from memsim.hardware import hardware as card_of

    card = card_of(hardware)
    return card.link.value if ranks <= card.node_size.value else min(card.link.value, card.network.value)


def _two_levels(
    operation: str, hardware: str, elements: int, itemsize: int, ranks: int, latency: float
) -> tuple[Estimate, list[Sent]] | None:
    """Return the time in two levels and what ranks send, or None where ranks fill no two nodes."""
    from memsim.hardware import hardware as card_of
    from memsim.hierarchy import Level, hierarchical, sent_in_two_levels

    card = card_of(hardware)
    size = card.node_size.value
    if ranks <= size or ranks % size:
        return None
    inside, across = (Level(latency, 1 / rate.value) for rate in (card.link, card.network))
    shape = {"elements": elements, "itemsize": itemsize, "node_size": size, "nodes": ranks // size}
    time = hierarchical(operation, **shape, inside=inside, across=across)
    return time, sent_in_two_levels(operation, **shape)
