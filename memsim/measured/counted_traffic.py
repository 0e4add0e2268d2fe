"""Bytes that a profiler counted beside those of replayed tile schedules: HBM, and the L2 cache.

>>> rows = traffic_rows()
>>> rows[0].id, rows[0].published, round(rows[0].predicted, 1)
('traffic.h200.flash2_forward.64x16x1024x64.cold.dram', '538.0', 529.4)
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from statistics import mean
from typing import Any, NamedTuple

from memsim import data_files
from memsim.cache import backward_schedules, pytorch_schedules, tile_schedules
from memsim.cache.l1 import L1, carve_out, read_from_l2
from memsim.cache.lru import Cache
from memsim.cache.replay import Program, Traffic, play, total, traced
from memsim.cache.tile_schedules import AttentionShape, Schedule
from memsim.hardware import hardware
from memsim.measured.checked import Checked
from memsim.measured.measured_files import of_kind
from refimpl.errors import OptionError, UnknownNameError

__all__ = [
    "COUNTERS", "SCHEDULES", "attempts", "l1_of", "predicted_traffic", "schedule_of", "spared_by_l1",
    "traffic_ids", "traffic_rows",
]  # fmt: skip

SCHEDULES = {
    name: getattr(module, name)
    for module, names in (
        (
            tile_schedules,
            ("flash1_forward", "flash2_forward", "hopper_forward", "portable_forward", "standard_forward"),
        ),
        (backward_schedules, backward_schedules.__all__),
        (pytorch_schedules, pytorch_schedules.__all__),
        (tile_schedules, ("int8_gemm",)),
    )
    for name in names
}
# What is compared, the counters that it is the sum of, and in which set of rows it stands: bars are on the
# bytes of HBM in both directions, and on those that multiprocessors move to and from the L2.  Of PyTorch's
# kernels only what passes through the slices of the L2 was counted, which is more: that has no bar.
COUNTERS = {
    "dram": (("dram_read", "dram_write"), ""),
    "dram_read": (("dram_read",), ", read"),
    "dram_write": (("dram_write",), ", written"),
    "l2": (("l2",), ", L2"),
    "slices": (("slices",), ", slices of the L2"),
}


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


def predicted_traffic(case: Mapping[str, Any], cache: int | Cache) -> list[Traffic]:
    """Return what each kernel of a case moves through an L2.

    A cold case starts each kernel with an empty cache, as the profiler makes it; a warm one starts after the
    same kernels have run once, and each finds what the one before it left.
    """
    program = _program(_key(case))
    every = range(len(program.kernels))
    if case["cache"] == "cold":
        return [play(program, [number], cache)[0] for number in every]
    return play(program, [*every, *every], cache)[len(every) :]


def l1_of(case: Mapping[str, Any], card: str) -> L1:
    """Return the L1 that loads go through, of a case that says what memory its blocks share.

    It is what shared memory leaves of a multiprocessor's memory, and none where a case does not say.
    """
    stated, chip = data_files.read("l1", "validation"), hardware(card)
    near, far, farthest = (stated["cycles"][place] for place in ("l1", "l2", "hbm"))
    l1 = L1(0, chip.sms.value, near, far, farthest, stated["spread"]["value"])
    if "shared" not in case:
        return l1
    together = case["tiles"]["workers"] // chip.sms.value
    steps, reserved = (stated[name]["value"] for name in ("carve_outs", "reserved"))
    carved = carve_out(case["shared"], together, steps=steps, reserved=reserved)
    return l1._replace(size=chip.sram_per_sm.value - carved)


def spared_by_l1(case: Mapping[str, Any], l1: L1) -> tuple[int, ...]:
    """Return for each kernel of a case the bytes that its loads find in the L1: the mean over some charts."""
    return _spared(_key(case), l1)


@lru_cache(maxsize=64)  # cold and warm alike
def _spared(key: str, l1: L1) -> tuple[int, ...]:
    program = _program(key)
    if not l1.size:
        return (0,) * len(program.kernels)
    # A block that is alone finds what it has read itself, whenever it does.
    alone = all(kernel.workers <= l1.processors for kernel in program.kernels)
    charts = range(1 if alone else data_files.read("l1", "validation")["charts"]["value"])
    return tuple(
        round(mean(kernel.l2_read - read_from_l2(program, number, l1, chart=chart) for chart in charts))
        for number, kernel in enumerate(program.kernels)
    )


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps([case[name] for name in ("schedule", "shape", "tiles")])


@lru_cache(maxsize=1)  # cold and warm cases of one kind come one after the other
def _program(key: str) -> Program:
    return traced(*schedule_of(dict(zip(("schedule", "shape", "tiles"), json.loads(key), strict=True))))


@lru_cache(maxsize=1)
def traffic_rows() -> tuple[Checked, ...]:
    """Return all counted bytes beside the predicted ones.

    Kernels are compared one by one, or the sum of all that ran with that of all that the schedule has.  An
    error is of the bytes that were counted, or of a floor that `hbm.toml` states where fewer were.

    Raises
    ------
    OptionError
        If a case names some of its kernels only.
    """
    stated = data_files.read("hbm", "validation")
    return tuple(_rows(_predictions([stated["ways"]["value"]])[0]))


def attempts(*sets: str) -> dict[int | None, dict[str, float]]:
    """Return the worst error in some sets, for every number of ways that was tried, and for one set."""
    tried = [*data_files.read("hbm", "validation")["ways"]["tried"], None]
    wanted = {counted.key for counted in _listed() if counted.belongs in sets}
    return {
        ways: {
            name: max(abs(row.error) for row in _rows(predictions) if row.belongs == name) for name in sets
        }
        for ways, predictions in zip(tried, _predictions(tried, wanted), strict=True)
    }


Key = tuple[str, str, str]  # card, what ran, and whether the cache was cold
Predictions = dict[Key, list[Traffic]]


def _predictions(ways: Sequence[int | None], wanted: set[Key] | None = None) -> list[Predictions]:
    """Return for each number of ways what cases move, all of them or some."""
    halves = data_files.read("hbm", "validation")["halves"]["value"]
    cases = {counted.key: counted.case for counted in _listed()}
    found: list[Predictions] = [{} for _ in ways]
    for key in sorted(cases if wanted is None else wanted):
        size = hardware(key[0]).l2.value
        spared = spared_by_l1(cases[key], l1_of(cases[key], key[0]))
        for number, predictions in zip(ways, found, strict=True):
            moved = predicted_traffic(cases[key], Cache(size, halves, number))
            predictions[key] = [
                one._replace(l2_read=one.l2_read - in_l1) for one, in_l1 in zip(moved, spared, strict=True)
            ]
    return found


def _rows(predictions: Predictions) -> Iterator[Checked]:
    floor = data_files.read("hbm", "validation")["floor"]["value"]
    for counted in _listed():
        if counted.key not in predictions:
            continue
        found = predictions[counted.key]
        kernels = counted.case["kernels"]
        if len(kernels) not in (1, len(found)):
            raise OptionError(f"{counted.id}: expected 1 or {len(found)} kernels; got {len(kernels)}")
        moved = found[counted.place] if len(kernels) == len(found) else total(found)
        at_l2 = moved.l2_read + moved.l2_write
        values = moved._asdict() | {"l2": at_l2, "slices": at_l2}
        predicted = sum(values[name] for name in COUNTERS[counted.counter][0])
        yield Checked(
            id=counted.id,
            source=counted.source,
            published=f"{counted.bytes / 1e6:.1f}",
            unit="MB",
            predicted=predicted / 1e6,
            error=(predicted - counted.bytes) / max(counted.bytes, floor),
            use=counted.use,
            stack=counted.belongs,
            hardware=counted.card,
            belongs=counted.belongs,
        )


def traffic_ids() -> dict[str, str]:
    """Return the set of each row by its name, without a replay; those that calibrate are apart."""
    return {counted.id: counted.belongs for counted in _listed()}


class _Counted(NamedTuple):
    """One counted number."""

    id: str
    source: str
    card: str
    case: Mapping[str, Any]
    place: int  # of its kernel
    counter: str
    bytes: int
    belongs: str
    use: str

    @property
    def key(self) -> Key:
        """What its prediction stands under."""
        return self.card, _key(self.case), self.case["cache"]


def _listed() -> Iterator[_Counted]:
    """Yield every counted number with its name and source, its case, and which of its kernels it is of."""
    stated = data_files.read("hbm", "validation")
    seen: Counter[str] = Counter()
    for document in of_kind("traffic"):
        source = f"measured here, {document['tool']}, {document['date']}"
        processors = hardware(document["hardware"]).sms.value
        for case in document["case"]:
            calibrates = _size(case) in stated["ways"]["calibration"]
            for place, kernel in enumerate(case["kernels"]):
                for counter, (parts, suffix) in COUNTERS.items():
                    if not all(part in kernel for part in parts):
                        continue
                    if counter == "slices" and not case["set"].startswith("PyTorch"):
                        continue
                    name = _name(document["hardware"], case, place, counter)
                    seen[name] += 1
                    counted = sum(kernel[part] for part in parts)
                    belongs = f"{case['set']}{suffix}"
                    if counter == "l2" and case["tiles"].get("workers", 1) > processors:
                        belongs += ", several blocks"  # of a multiprocessor, which share an L1
                    if counted < stated["floor"]["value"]:
                        belongs = stated["floor"]["set"]
                    elif calibrates:
                        belongs += ", calibration"
                    yield _Counted(
                        id=name if seen[name] == 1 else f"{name}.{seen[name]}",
                        source=source,
                        card=document["hardware"],
                        case=case,
                        place=place,
                        counter=counter,
                        bytes=counted,
                        belongs=belongs,
                        use="calibration" if calibrates else "held out",
                    )


def _name(card: str, case: Mapping[str, Any], place: int, counter: str) -> str:
    causal = ".causal" * bool(case["tiles"].get("causal"))
    number = f".{place + 1}" * (len(case["kernels"]) > 1)
    return f"traffic.{card}.{_size(case)}{causal}.{case['cache']}{number}.{counter}"


def _size(case: Mapping[str, Any]) -> str:
    return (
        f"{case.get('function', case['schedule'])}.{'x'.join(str(value) for value in case['shape'].values())}"
    )
