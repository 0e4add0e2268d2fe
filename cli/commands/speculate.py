"""``frugal speculate``: what speculative decoding gains, and the draft length that gains most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.parameters import Count, ListOf, Number
from cli.result import Column, Result, Row

if TYPE_CHECKING:
    from memsim.estimate import Estimate

__all__ = ["command"]


LENGTHS: ListOf[int] = ListOf(Count(most=10_000))
ALPHAS: ListOf[float] = ListOf(Number(0.0, 1.0))
COSTS: ListOf[float] = ListOf(Number(0.0, 1e6))


def _best_text(value: Any) -> str:
    return "unbounded" if value is None else str(value)


@click.command(
    epilog="""\b
Examples:
  frugal speculate --alpha 0.6,0.7,0.8,0.9 --cost 0.05
  frugal speculate --alpha 0.75 --gamma 7 --cost 0.02 --explain
  frugal speculate --alpha 0.8 --gamma 1,2,3,4,5,6,7,8 --cost 0.01,0.1 --plot gain.svg""",
    short_help="Gain of speculative decoding.",
)
@click.option(
    "--alpha", "alphas", type=ALPHAS, required=True, help="Acceptance rate: how often a drafted token stands."
)
@click.option(
    "--gamma",
    "gammas",
    type=LENGTHS,
    default="1,2,3,4,5,7,10",
    show_default=True,
    help="Drafted tokens a pass.",
)
@click.option(
    "--cost",
    "costs",
    type=COSTS,
    default="0",
    show_default=True,
    help="Time of a pass of the draft over that of the target, measured on your hardware.",
)
@click.option(
    "--operations-cost",
    "operations_cost",
    type=Number(0.0, 1e6),
    help="The same for operations.  [default: the cost in time]",
)
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options(plot=True)
def command(
    alphas: tuple[float, ...],
    gammas: tuple[int, ...],
    costs: tuple[float, ...],
    operations_cost: float | None,
    explain: bool,
) -> Result:
    """Give the expected tokens a pass of the target, the speed-up, and what it costs in operations.

    Options take lists; every combination gives a row.  Drafts are taken to stand independently of each other,
    and a pass of the target over γ + 1 tokens to take as long as over one: true as long as memory is the
    bottleneck.  The best γ is that of the greatest speed-up; it is unbounded where the draft costs nothing.
    """
    from memsim.speculative import optimal_gamma, speculative, speculative_speedup

    rows: list[dict[str, Any]] = []
    estimates: list[tuple[Estimate, ...]] = []
    for alpha, cost, gamma in itertools.product(alphas, costs, gammas):
        gain = speculative(alpha=alpha, gamma=gamma, cost=cost, operations_cost=operations_cost)
        best = optimal_gamma(alpha=alpha, cost=cost)
        estimates.append(gain)
        rows.append(
            {
                "alpha": alpha,
                "cost": cost,
                "gamma": gamma,
                "tokens_per_pass": float(gain.tokens.total),
                "speedup": float(gain.speedup.total),
                "operations_per_token": float(gain.operations.total),
                "best_gamma": best,
                "best_speedup": None
                if best is None
                else float(speculative_speedup(alpha=alpha, gamma=best, cost=cost).total),
            }
        )
    details: list[str] = []
    for row, parts in zip(rows, estimates, strict=True) if explain else ():
        details += ["", f"α {row['alpha']:g}, γ {row['gamma']}, c {row['cost']:g}"]
        details += [f"  {line}" for part in parts for line in part.explain()]
    return Result(
        rows,
        (
            Column("alpha", "α", right=True),
            Column("cost", "c", right=True),
            Column("gamma", "γ", right=True),
            Column("tokens_per_pass", "tokens a pass", right=True, text=_gain_text),
            Column("speedup", "speed-up", right=True, text=_gain_text),
            Column("operations_per_token", "operations a token", right=True, text=_gain_text),
            Column("best_gamma", "best γ", right=True, text=_best_text),
            Column("best_speedup", "speed-up there", right=True, text=_gain_text),
        ),
        sources=list(
            dict.fromkeys(term.source for parts in estimates for part in parts for term in part.terms)
        ),
        details=details,
        draw=lambda axes: _draw(axes, rows),
    )


def _gain_text(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the improvement against γ, a line for each acceptance rate and cost."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"α = {row['alpha']:g}, c = {row['cost']:g}", []).append(row)
    for label, points in lines.items():
        points = sorted(points, key=lambda row: row["gamma"])
        axes.plot(
            [row["gamma"] for row in points], [row["speedup"] for row in points], marker="o", label=label
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="drafted tokens a pass, γ", ylabel="improvement of walltime")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
