"""Laws of pipeline schedules: they can be executed, and hold no more than they promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from refimpl.parallel.schedules import check_schedule, steps_of
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
SCHEDULE = "parallel.pipeline.schedule"


@law(SCHEDULE)
def ranks_can_execute_it(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every step runs once, on the rank of its stage, after all that it needs."""
    check_schedule(case.call(f), micro_batches=case.kwargs["micro_batches"], chunks=case.kwargs["chunks"])


@law(SCHEDULE)
def a_rank_holds_what_the_formula_says(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """In flight: m in GPipe; p - r, up to m, in 1F1B; 2(p-r-1) + (v-1)p + 1, up to m v, interleaved."""
    p, m, v = (case.kwargs[name] for name in ("ranks", "micro_batches", "chunks"))
    expected = {
        "gpipe": [m] * p,
        "1f1b": [min(m, p - r) for r in range(p)],
        "interleaved": [min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)],
    }[case.kwargs["schedule"]]
    found = check_schedule(case.call(f), micro_batches=m, chunks=v)
    require(found == expected, f"activations in flight: expected {expected}, got {found}")


@law(SCHEDULE)
def stages_take_micro_batches_in_order(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Each stage runs forward on micro-batches 0, 1, 2, ...; backward too, or in GPipe in reverse."""
    m = case.kwargs["micro_batches"]
    for row in case.call(f):
        steps = steps_of(row)
        for stage in {step.stage for step in steps}:
            forward, backward = (
                [step.micro for step in steps if step.stage == stage and step.backward == way]
                for way in (False, True)
            )
            require(forward == list(range(m)), f"forward in stage {stage}: {forward}")
            turned = case.kwargs["schedule"] == "gpipe"
            require(backward == forward[:: -1 if turned else 1], f"backward in stage {stage}: {backward}")
