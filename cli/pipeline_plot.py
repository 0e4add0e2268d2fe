"""Pipeline schedules in time, drawn: a row a rank, a box a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memsim.timeline import Timeline

__all__ = ["draw_timelines", "example_timelines"]

COLORS = {False: ("#4c78a8", "#9ecae9"), True: ("#59a14f", "#b3d9a8")}  # first and later stages of a rank


def example_timelines() -> dict[str, Timeline]:
    """Return three schedules on 4 ranks with 8 micro-batches; a step back takes twice one forward."""
    from fractions import Fraction

    from memsim.timeline import replay
    from refimpl.parallel.schedules import SCHEDULES, pipeline_schedule

    lines: dict[str, Timeline] = {}
    for name in SCHEDULES:
        chunks = 2 if name == "interleaved" else 1
        plan = pipeline_schedule(schedule=name, ranks=4, micro_batches=8, chunks=chunks)
        lines[name] = replay(plan, forward_time=Fraction(1, chunks), backward_time=Fraction(2, chunks))
    return lines


def _range(values: Sequence[int]) -> str:
    """Return the least and the largest of values.

    >>> _range([3, 2, 1]), _range([4, 4])
    ('1 to 3', '4')
    """
    return f"{min(values)} to {max(values)}" if min(values) < max(values) else str(values[0])


def draw_timelines(axes: Any, lines: Mapping[str, Timeline]) -> None:
    """Draw timelines one below the other, on one scale of time."""
    from matplotlib.patches import Patch

    ticks, labels, top = [], [], 0.0
    gap = max(1.1, 0.07 * sum(line.ranks for line in lines.values()))  # room for a title
    for name, line in lines.items():
        edge, height = (0.4, 0.92) if len(line.slots) <= 2000 else (0.0, 1.0)  # edges would hide narrow boxes
        for rank in range(0, line.ranks, -(-line.ranks // 8)):
            ticks.append(top + rank)
            labels.append(f"rank {rank}")
        boxes: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for slot in line.slots:
            start, width = float(slot.start), float(slot.end - slot.start)
            color = COLORS[slot.step.backward][slot.step.stage >= line.ranks]
            boxes.setdefault((slot.rank, color), []).append((start, width))
            if len(line.slots) <= 160:
                axes.text(
                    start + width / 2,
                    top + slot.rank,
                    str(slot.step.micro),
                    ha="center",
                    va="center",
                    fontsize=5,
                    color="black" if slot.step.stage >= line.ranks else "white",
                )
        for (rank, color), spans in boxes.items():  # one object a color: there may be many thousand boxes
            axes.broken_barh(
                spans, (top + rank - height / 2, height), facecolor=color, edgecolor="white", linewidth=edge
            )
        held = ", ".join(map(str, line.in_flight)) if line.ranks <= 8 else _range(line.in_flight)
        share = f"{100 * float(line.idle_share):.1f} % idle"
        stages = 1 + max((slot.step.stage for slot in line.slots), default=0)
        what = "stages' micro-batches" if stages > line.ranks else "micro-batches"
        text = f"{name}: {share}, ranks hold at most {held} {what}"
        axes.text(0, top - 0.62, text, fontsize=7, va="bottom")
        top += line.ranks + gap
    axes.set_yticks(ticks, labels, fontsize=6)
    axes.set_xlabel("time", fontsize=7)
    axes.set_ylim(top - gap + 0.5, -gap - 0.1)
    axes.tick_params(axis="x", labelsize=6)
    axes.set_xlim(0, max(float(line.makespan) for line in lines.values()))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    legend = [Patch(color=COLORS[False][0], label="forward"), Patch(color=COLORS[True][0], label="backward")]
    if any(slot.step.stage >= line.ranks for line in lines.values() for slot in line.slots):
        legend += [
            Patch(color=COLORS[False][1], label="forward, later stages"),
            Patch(color=COLORS[True][1], label="backward, later stages"),
        ]
    axes.legend(
        handles=legend, fontsize=6, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False
    )
