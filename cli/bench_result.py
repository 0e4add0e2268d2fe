"""What ``frugal bench`` says of its kernels: a line when a problem is done, a table, a picture.

>>> done = {"model": "m", "operation": "product", "dtype": "int8", "function": "f", "shape": [1, 8, 4]}
>>> apart = [{**done, "layers": ["k", "v"], "time_s": 2e-6}]
>>> [row["apart_s"] for row in with_times_apart([{**done, "layers": ["k+v"], "time_s": 3e-6}], apart)]
[4e-06]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.problems import Problem
from cli.projections import JOINT
from cli.result import Column, Result, cell_text

if TYPE_CHECKING:
    from memsim.hardware import Hardware

__all__ = ["bench_result", "finished", "with_times_apart"]

SIMULATED = "Seconds are the simulator's, on the host: no measure of speed."


def _scaled(unit: float, digits: int = 1) -> Any:
    return lambda value: "" if value is None else f"{value * unit:.{digits}f}"


def _name(value: Any) -> str:
    return "x".join(map(str, value))


IDENTITY = (
    Column("operation"),
    Column("model"),
    Column("layers"),
    Column("shape", text=_name),
    Column("dtype"),
    Column("causal"),
    Column("function"),
    Column("status"),
)
MEASURED = (
    Column("time_s", "time/us", right=True, text=_scaled(1e6)),
    Column("apart_s", "apart/us", right=True, text=_scaled(1e6)),
    Column("rate_op_per_s", "TFLOP/s or TOPS", right=True, text=_scaled(1e-12)),
    Column("peak_share", "% of peak", right=True, text=_scaled(100)),
    Column("compulsory_bytes", "MB at least", right=True, text=_scaled(1e-6)),
    Column("bandwidth_share", "% of HBM", right=True, text=_scaled(100)),
    Column("frugal_speedup", "frugal is faster by", right=True, text=_scaled(1, 2)),
    Column("host_s", "host/us", right=True, text=_scaled(1e6)),
)
ERROR = Column(
    "rms_error", "rms error", right=True, text=lambda value: "" if value is None else f"{value:.1e}"
)
SIMULATION = (Column("simulator_s", "simulator/s", right=True, text=cell_text),)


def with_times_apart(
    rows: Sequence[dict[str, Any]], earlier: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return rows; those of several projections as one get the sum of the times of these apart.

    Of each function its own times, from `earlier` rows; if one of them was not timed, None.
    """

    def key(row: Mapping[str, Any], name: str) -> tuple[Any, ...]:
        return row["model"], row["operation"], row["dtype"], row["function"], row["shape"][0], name

    times = {key(row, name): row["time_s"] for row in earlier for name in row["layers"] or ()}

    def apart(row: Mapping[str, Any]) -> float | None:
        joint = [name for name in row["layers"] or () if JOINT in name]
        found = [times.get(key(row, name)) for names in joint for name in names.split(JOINT)]
        known = [time_s for time_s in found if time_s is not None]
        return sum(known) if known and len(known) == len(found) else None

    return [row | {"apart_s": apart(row)} for row in rows]


def finished(rows: Sequence[dict[str, Any]]) -> str:
    """Return in a line what a problem gave: a run that is cut short has said what it knew."""
    first = rows[0]
    layers = f" ({', '.join(first['layers'])} of {first['model']})" if first["layers"] else ""
    mask = ", causal" if first["causal"] else ""
    texts = [
        f"{row['function']} "
        + _took(row)
        + ("" if row["rms_error"] is None else f" (error {row['rms_error']:.1e})")
        for row in rows
    ]
    return f"{first['operation']} {_name(first['shape'])}{layers} {first['dtype']}{mask}: {'; '.join(texts)}"


def _took(row: dict[str, Any]) -> str:
    if row["simulator_s"] is not None:
        return f"{row['simulator_s']:.1f} s in the simulator"
    if row["time_s"] is None:
        return str(row["status"])
    apart = "" if row["apart_s"] is None else f", apart {1e6 * row['apart_s']:.1f}"
    return f"{1e6 * row['time_s']:.1f}{apart} us"


def bench_result(
    rows: list[dict[str, Any]],
    problems: Sequence[Problem],
    backend: str,
    card: Hardware | None,
    tier: str | None,
) -> Result:
    """Return the result: exit code 1 if a function is wrong, or if none of ours was timed.

    Parameters
    ----------
    rows
        Of all functions of all `problems`.
    problems
        What was asked for.
    backend, tier
        Where ours were looked for.
    card
        Whose ceilings count, if it is known.
    """
    unregistered = {problem.technique for problem in problems} - {
        problem.technique
        for problem in problems
        if any(row["ours"] and row["operation"] == problem.operation for row in rows)
    }
    failed = [row for row in rows if row["status"] == "failed"]
    details = [f"{row['function']}, {_name(row['shape'])}: {row['detail']}" for row in rows if row["detail"]]
    sought = backend if tier is None else f"{backend} in tier {tier!r}"
    details += [f"{name}: nothing is registered for {sought}" for name in sorted(unregistered)]
    if backend == "cudasim":
        details.append(SIMULATED)
    elif card is None:
        details.append("No ceilings: the GPU is none of the known ones (--hardware).")
    problem = ""
    if failed:
        problem = f"{len(failed)} functions are wrong and were not timed"
    elif not any(row["ours"] and row["status"] == "timed" for row in rows):
        problem = "nothing of ours was timed"
    sources = []
    if card is not None:
        precisions = dict.fromkeys(problem.precision for problem in problems)
        sources = [card.peak(name).source for name in precisions if name in card.peaks]
        sources.append(card.hbm_bandwidth.source)
    timed = [row for row in rows if row["rate_op_per_s"] is not None]
    return Result(
        rows,
        (
            *_shown(IDENTITY, rows),
            *(SIMULATION if backend == "cudasim" else _shown(MEASURED, rows)),
            *((ERROR,) if any(problem.error for problem in problems) else ()),
        ),
        totals={"timed": sum(row["status"] == "timed" for row in rows), "failed": len(failed)},
        sources=sources,
        details=list(dict.fromkeys(details)),
        problem=problem,
        exit_code=1 if problem else 0,
        draw=(lambda axes: _draw(axes, timed)) if timed else None,
    )


def _shown(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return columns without those that say nothing of these rows; a form of attention has its own mask."""
    silent = {key for key in ("causal", "layers", "apart_s") if all(row[key] is None for row in rows)}
    if len({row["model"] for row in rows}) < 2:
        silent.add("model")
    return [column for column in columns if column.key not in silent]


def _draw(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw a group of bars for each problem, a colour for each function."""

    def label(row: dict[str, Any]) -> str:
        mask = "\ncausal" if row["causal"] else ""
        layers = f"\n{', '.join(row['layers'])} of {row['model']}" if row["layers"] else ""
        return f"{row['operation']}\n{_name(row['shape'])}{layers}\n{row['dtype']}{mask}"

    problems = list(dict.fromkeys(label(row) for row in rows))
    functions = list(dict.fromkeys(row["function"] for row in rows))
    width = 0.8 / len(functions)
    for index, function in enumerate(functions):
        mine = [row for row in rows if row["function"] == function]
        places = [problems.index(label(row)) + (index + 0.5) * width - 0.4 for row in mine]
        axes.bar(places, [1e-12 * row["rate_op_per_s"] for row in mine], width, label=function)
    axes.set_xticks(range(len(problems)), problems, fontsize=5)
    axes.set_ylabel("TFLOP/s or TOPS")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize=7)
