"""Bytes that a profiler counted beside those of replayed tile schedules: HBM, and the L2 cache.

>>> rows = traffic_rows()
>>> rows[0].id, rows[0].published, round(rows[0].predicted, 1)
('traffic.h200.flash2_forward.64x16x1024x64.cold.dram_read', '403.0', 402.7)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from memsim import data_files
from memsim.cache import backward_schedules, tile_schedules
from memsim.cache.replay import Traffic, replay, total
from memsim.cache.tile_schedules import AttentionShape, Schedule
from memsim.hardware import hardware
from memsim.measured.checked import Checked
from memsim.measured.measured_files import of_kind
from refimpl.errors import OptionError, UnknownNameError

__all__ = ["COUNTERS", "SCHEDULES", "predicted_traffic", "schedule_of", "traffic_ids", "traffic_rows"]

SCHEDULES = {
    name: getattr(module, name)
    for module, names in (
        (
            tile_schedules,
            ("flash1_forward", "flash2_forward", "hopper_forward", "portable_forward", "standard_forward"),
        ),
        (backward_schedules, backward_schedules.__all__),
        (tile_schedules, ("int8_gemm",)),
    )
    for name in names
}
# What is counted, and in which set of rows it stands: a bar on HBM says nothing of the L2.
COUNTERS = {"dram_read": "", "dram_write": "", "l2": ", L2"}


def schedule_of(case: Mapping[str, Any]) -> Schedule:
    """Return the tile schedule of what was run.

    Raises
    ------
    UnknownNameError
        If there is no such schedule.
    """
    if case["schedule"] not in SCHEDULES:
        raise UnknownNameError("tile schedule", case["schedule"], SCHEDULES)
    build = SCHEDULES[case["schedule"]]
    sizes = case["shape"]
    found: Schedule = (
        build(**sizes, **case["tiles"]) if "M" in sizes else build(AttentionShape(**sizes), **case["tiles"])
    )
    return found


def predicted_traffic(case: Mapping[str, Any], cache: int) -> list[Traffic]:
    """Return what each kernel of a case moves through an L2 of `cache` bytes.

    A cold case starts each kernel with an empty cache, as the profiler makes it; a warm one starts after the
    same kernels have run once, and each finds what the one before it left.
    """
    kernels, arrays = schedule_of(case)
    if case["cache"] == "cold":
        return [replay([kernel], arrays, cache=cache)[0] for kernel in kernels]
    return replay([*kernels, *kernels], arrays, cache=cache)[len(kernels) :]


@lru_cache(maxsize=1)
def traffic_rows() -> tuple[Checked, ...]:
    """Return all counted bytes beside the predicted ones.

    Kernels are compared one by one, or the sum of all that ran with that of all that the schedule has.

    Raises
    ------
    OptionError
        If a case names some of its kernels only.
    """
    rows = []
    for row, case, place in _listed():
        found = _predicted(case, row["hardware"])
        if row["kernels"] not in (1, len(found)):
            raise OptionError(f"{row['id']}: expected 1 or {len(found)} kernels; got {row['kernels']}")
        moved = found[place] if row["kernels"] == len(found) else total(found)
        bytes_ = moved.l2_read + moved.l2_write if row["counter"] == "l2" else getattr(moved, row["counter"])
        rows.append(
            Checked(
                id=row["id"],
                source=row["source"],
                published=f"{row['bytes'] / 1e6:.1f}",
                unit="MB",
                predicted=bytes_ / 1e6,
                error=bytes_ / row["bytes"] - 1,
                use="held out",
                stack=case["stack"],
                hardware=row["hardware"],
                belongs=case["set"] + COUNTERS[row["counter"]],
            )
        )
    return tuple(rows)


def traffic_ids() -> dict[str, str]:
    """Return the set of each row by its name, without a replay."""
    return {row["id"]: case["set"] + COUNTERS[row["counter"]] for row, case, _ in _listed()}


def _predicted(case: Mapping[str, Any], card: str) -> list[Traffic]:
    partitions = data_files.read("hbm", "validation")["partitions"]["value"]
    return predicted_traffic(case, hardware(card).l2.value // partitions)


def _listed() -> Iterator[tuple[dict[str, Any], Mapping[str, Any], int]]:
    """Yield every counted number with its name and source, its case, and which of its kernels it is of."""
    seen: Counter[str] = Counter()
    for document in of_kind("traffic"):
        source = f"measured here, {document['tool']}, {document['date']}"
        for case in document["case"]:
            for place, kernel in enumerate(case["kernels"]):
                for counter in COUNTERS:
                    if counter in kernel:
                        name = _name(document["hardware"], case, place, counter)
                        seen[name] += 1
                        row = {
                            "id": name if seen[name] == 1 else f"{name}.{seen[name]}",
                            "source": source,
                            "hardware": document["hardware"],
                            "counter": counter,
                            "bytes": kernel[counter],
                            "kernels": len(case["kernels"]),
                        }
                        yield row, case, place


def _name(card: str, case: Mapping[str, Any], place: int, counter: str) -> str:
    size = "x".join(str(value) for value in case["shape"].values())
    causal = ".causal" * bool(case["tiles"].get("causal"))
    number = f".{place + 1}" * (len(case["kernels"]) > 1)
    function = case.get("function", case["schedule"])
    return f"traffic.{card}.{function}.{size}{causal}.{case['cache']}{number}.{counter}"
