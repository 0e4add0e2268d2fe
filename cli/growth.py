"""How time and memory grow with the length: measured, and held to the power of N that theory gives.

Time is the process's own processor time in user mode, the least of a few rounds: other work on the machine
does not lengthen it, and neither does the kernel while it finds pages for arrays of gigabytes, which on a
virtual machine takes longer than the arithmetic.  The wall clock's time stands beside it.  Memory is the peak
of what Python and NumPy allocate for inputs, outputs and all between: exact, and taken in a run of its own.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from cli.growth_methods import METHODS, Method
from cli.output import progress
from cli.quantities import bytes_text, flop_text, time_text
from cli.result import Column, Result, View
from refimpl.errors import OptionError

__all__ = ["SIZES", "growth_result", "least_squares_slope", "measured", "processor_seconds"]

# Full attention stops where its scores take a gigabyte; the others start where constant costs are small.
SIZES = {2: (1024, 2048, 4096, 8192, 16_384), 1: (4096, 8192, 16_384, 32_768, 65_536)}
FITTED = 4  # sizes at the top that make a slope
TOLERANCE = 0.15
SHORTEST_S = 0.05  # of a measurement: calls are repeated until they take so long together

Clock = Callable[[], float]
Measurement = dict[str, Any]

MEASURED = (
    Column("method"),
    Column("n", "N", right=True),
    Column("time_s", "processor time", right=True, text=time_text),
    Column("wall_s", "wall time", right=True, text=time_text),
    Column("peak_bytes", "peak memory", right=True, text=bytes_text),
    Column("flops", "FLOPs", right=True, text=flop_text),
)


def _exponent(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"


SLOPES = (
    Column("method"),
    Column("function"),
    Column("theory", right=True),
    Column("time_slope", "time", right=True, text=_exponent),
    Column("memory_slope", "memory", right=True, text=_exponent),
    Column("flops_slope", "FLOPs", right=True, text=_exponent),
    Column("within", f"within {TOLERANCE}"),
)


def processor_seconds() -> float:
    """Return the seconds that this process has computed, in user mode."""
    try:
        import resource
    except ImportError:  # Windows
        import os

        return os.times().user
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def growth_result(
    names: Sequence[str], sizes: Sequence[int] | None, rounds: int, clock: Clock = processor_seconds
) -> Result:
    """Measure the named methods and return their times, peaks, operations and slopes.

    Parameters
    ----------
    names : sequence of str
        Of `METHODS`.
    sizes : sequence of int or None
        Lengths; None: those of `SIZES`.
    rounds : int
        Measurements of each time, of which the least counts.
    clock : callable
        Returns seconds.

    Raises
    ------
    OptionError
        If none of the methods has room for any of the lengths.
    """
    chosen = [method for method in METHODS if method.name in names]
    longest = [method.longest for method in chosen]
    if sizes and all(most is not None and min(sizes) > most for most in longest):
        raise OptionError(
            f"sizes: {', '.join(names)}: at most {max(filter(None, longest))}; got {min(sizes)}"
        )
    rows: list[Measurement] = []
    slopes: list[Measurement] = []
    left_out: list[str] = []
    for method in progress(chosen, "growth", lambda method: method.name):
        lengths = sorted(set(sizes or SIZES[method.theory]))
        fitting = [n for n in lengths if method.longest is None or n <= method.longest]
        if len(fitting) < len(lengths):
            left_out.append(f"{method.name}: no lengths above {method.longest}, whose scores do not fit.")
        found = list(measured(method, fitting, rounds, clock)) if fitting else []
        slope = _slopes(method, found[-FITTED:])
        slopes.append(slope)
        rows += [{**row, **slope} for row in found]
    judged = [slope for slope in slopes if slope["within"] is not None]
    outside = [slope["method"] for slope in judged if not slope["within"]]
    problem = f"slopes off by more than {TOLERANCE}: {', '.join(outside)}" if outside else ""
    unjudged = [slope["method"] for slope in slopes if slope["within"] is None]
    details = [*left_out, *_explanations(unjudged)]
    return Result(
        rows,
        (*MEASURED, *SLOPES[1:]),
        totals={
            "methods": len(slopes),
            "within": len(judged) - len(outside),
            "outside": len(outside),
            "not_judged": len(unjudged),
        },
        views=[View("", MEASURED, rows), View(f"Powers of N, over the top {FITTED} sizes", SLOPES, slopes)],
        details=details,
        problem=problem,
        exit_code=1 if problem else 0,
        draw=(lambda axes: _draw(axes, rows)) if rows else None,
    )


def measured(method: Method, sizes: Sequence[int], rounds: int, clock: Clock) -> Iterator[Measurement]:
    """Yield what a method takes at each size; a round goes over all sizes: a slow spell hits them all."""
    function = method.load()
    method.case(sizes[0]).call(function)  # what is imported and cached at first use is nobody's cost
    peaks = [_peak(method, function, n) for n in sizes]
    cases = [method.case(n) for n in sizes]
    times: list[list[tuple[float, float]]] = [[] for _ in sizes]
    for _ in range(rounds):
        for case, taken in zip(cases, times, strict=True):
            taken.append(_timed(partial(case.call, function), clock))
    for n, case, peak, taken in zip(sizes, cases, peaks, times, strict=True):
        yield {
            "method": method.name,
            "n": n,
            "time_s": min(processor for processor, _ in taken),
            "wall_s": min(wall for _, wall in taken),
            "peak_bytes": peak,
            "flops": method.flops(case),
        }


def _peak(method: Method, function: Callable[..., Any], n: int) -> int:
    """Return the peak of bytes allocated for the inputs and the call."""
    tracemalloc.start()
    try:
        case = method.case(n)
        tracemalloc.reset_peak()
        case.call(function)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _timed(call: Callable[[], Any], clock: Clock) -> tuple[float, float]:
    """Return processor and wall seconds of a call, of enough calls for the clock's resolution."""
    count = 1
    while True:
        start, wall = clock(), time.perf_counter()
        for _ in range(count):
            call()
        taken, passed = clock() - start, time.perf_counter() - wall
        if taken >= SHORTEST_S:
            return taken / count, passed / count
        count = max(2 * count, math.ceil(count * 1.2 * SHORTEST_S / max(taken, SHORTEST_S / 100)))


def least_squares_slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the power of N that fits best: the slope of a line through logarithms.

    >>> round(least_squares_slope([10, 20, 40], [3.0, 12.0, 48.0]), 12)
    2.0
    """
    x, y = [math.log(n) for n in sizes], [math.log(value) for value in values]
    center, height = math.fsum(x) / len(x), math.fsum(y) / len(y)
    above = math.fsum((a - center) * (b - height) for a, b in zip(x, y, strict=True))
    return above / math.fsum((a - center) ** 2 for a in x)


def _slopes(method: Method, top: Sequence[Measurement]) -> Measurement:
    """Return the slopes over the top sizes; of fewer than `FITTED` none, and no verdict."""
    found: Measurement = {"method": method.name, "function": method.function, "theory": method.theory}
    kinds = {"time_slope": "time_s", "memory_slope": "peak_bytes", "flops_slope": "flops"}
    if len(top) < FITTED:
        return {**found, **dict.fromkeys(kinds), "within": None}
    sizes = [row["n"] for row in top]
    slopes = {kind: least_squares_slope(sizes, [row[key] for row in top]) for kind, key in kinds.items()}
    off = (abs(slopes[kind] - method.theory) for kind in ("time_slope", "memory_slope"))
    return {**found, **slopes, "within": max(off) <= TOLERANCE}


def _explanations(unjudged: Sequence[str]) -> list[str]:
    import platform

    import numpy as np

    lines = [
        "Processor time: of this process, in user mode, the least of the rounds.  Peak memory: all that",
        "Python and NumPy allocate, inputs included.  FLOPs: of the products, as priced.",
        f"One sequence, one head, float32; {platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}.",
    ]
    if unjudged:
        names = ", ".join(unjudged)
        lines.append(f"No verdict on {names}: a slope needs {FITTED} sizes; give more with --n.")
    return lines


def _draw(axes: Any, rows: Sequence[Measurement]) -> None:
    """Draw time and peak memory over N, both logarithmic, a line for each method."""
    figure = axes.figure
    axes.remove()
    kinds = (
        ("time_s", "time_slope", "processor time / s"),
        ("peak_bytes", "memory_slope", "peak memory / B"),
    )
    for panel, (key, slope, label) in zip(figure.subplots(1, 2), kinds, strict=True):
        for method, marker in zip(dict.fromkeys(row["method"] for row in rows), "osD^v", strict=False):
            mine = [row for row in rows if row["method"] == method]
            power = _exponent(mine[0][slope])
            name = f"{method}, N^{power}" if power else method
            style = {"marker": marker, "ms": 4.5, "mfc": "none", "lw": 1.2}
            panel.plot([row["n"] for row in mine], [row[key] for row in mine], label=name, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("N")
        panel.set_ylabel(label)
        panel.grid(visible=True, alpha=0.3)
        panel.legend(fontsize=7)
