"""Measurements and what is predicted of them: the data, the fit, the waves, and the bars."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim import data_files
from memsim.derivation import derive
from memsim.formula import evaluate
from memsim.hardware import hardware
from memsim.measured import measurements
from memsim.measured.checked import Checked
from memsim.measured.counted_traffic import traffic_ids, traffic_rows
from memsim.measured.measurements import Measurement, measurement, predict, rows_of
from memsim.measured.validation import HBM, PEAKS, bars, summaries, validate
from memsim.planning import efficiency
from memsim.planning.division_memory import MEMORY
from memsim.planning.division_time import TIME
from memsim.planning.efficiency import LETTERS, fit, stacks
from memsim.planning.training_step import training_step
from memsim.waves import PRODUCTS, extra, in_waves
from refimpl.errors import OptionError, UnknownNameError
from tests.oracles.validation import layer_by_hand


@pytest.fixture(scope="module")
def rows() -> list[Checked]:
    return validate()


def test_the_bars_that_are_met(rows: list[Checked]) -> None:
    found = {bar.name: bar for bar in bars(rows)}
    sets = Counter(traffic_ids().values())
    own, pytorch, l2, several, few = (
        sets[name]
        for name in (
            "own kernels", "PyTorch's kernels", "own kernels, L2", "own kernels, L2, several blocks",
            "less than 1 MB counted",
        )
    )  # fmt: skip
    assert [(bar.rows, bar.mean_limit, bar.worst_limit) for bar in found.values()] == [
        (8, 0.0365, 0.089), (10, 0.079, None), (12, 0.12, None),
        (own, None, 0.05), (pytorch, None, 0.1), (l2, None, 0.15), (several, None, 0.15), (few, None, 1),
        (20, None, 0.05),
    ]  # fmt: skip
    assert own > 50
    assert pytorch > 200
    # Blocks of one multiprocessor read the same tiles, and find some in an L1 that the replay has not.
    assert [bar.name for bar in found.values() if not bar.met] == [
        "L2, own kernels, several blocks a multiprocessor"
    ]
    assert min(row.error for row in rows if row.belongs.endswith("several blocks")) > -1e-3
    assert l2 > 20
    assert found["L2, own kernels, one block a multiprocessor"].worst < 0.02
    assert not any(bar.infeasible for bar in found.values())


def test_nothing_that_ran_is_called_infeasible(rows: list[Checked]) -> None:
    steps = [row for row in rows if row.fits is not None]
    assert len(steps) == 19 + 219
    assert all(row.fits for row in steps)
    # Nor does it call everything feasible: without recomputation, or without FSDP, these do not fit.
    row = measurement("foundry.a100-80gb.30b.2048.g8")
    for changed in ({"recompute": "none"}, {"zero": 1}, {"micro_batch": 21}):
        other = replace(row, division=replace(row.division, **changed))
        assert not predict([other], {})["fits"][0]


def test_a_bar_needs_all_its_rows_and_can_be_missed(rows: list[Checked]) -> None:
    table = [row for row in rows if row.belongs == "table 5"]
    assert [bar.name for bar in bars(table)] == ["Korthikanti, Table 5"]
    assert bars(table[1:]) == []
    worse = [replace(row, error=row.error + 0.05) for row in table]
    assert [bar.met for bar in bars(worse)] == [False]
    twelve = [row for row in rows if row.belongs == "twelve"]
    assert [bar.met for bar in bars(twelve)] == [True]
    full = [replace(twelve[0], fits=False), *twelve[1:]]
    (bar,) = bars(full)
    assert (bar.met, bar.infeasible) == (False, (twelve[0].id,))


def test_few_rows_calibrate_and_few_parameters_are_fitted(rows: list[Checked]) -> None:
    for stack in stacks():
        fitted = efficiency.efficiency(stack)
        assert len(fitted) <= 6
        assert len(fitted) < len(rows_of(stack, "calibration")) < len(rows_of(stack, "held out"))
        assert all(value == round(value, 2) for value in fitted.values())
    # Of the rows with a bar, none calibrates.
    for name in (*measurements.SOURCES, HBM, PEAKS):
        sets = {bar["rows"] for bar in data_files.read(name, "validation")["bar"]}
        assert {row.use for row in rows if row.belongs in sets} == {"held out"}
    assert len(rows) == len({row.id for row in rows}) == 26 + 219 + 16 + len(traffic_ids()) + 36


@pytest.mark.parametrize("stack", stacks())
def test_the_fit_finds_the_parameters_again(stack: str) -> None:
    assert fit(stack) == efficiency.efficiency(stack)


def test_the_fit_sees_only_rows_that_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = "llm-foundry on A100"
    known = rows_of(stack)
    held = tuple(replace(row, printed="1") if row.use == "held out" else row for row in known)
    monkeypatch.setattr(measurements, "measurements", lambda: held)
    assert fit(stack) == efficiency.efficiency(stack)
    twice = tuple(replace(row, printed=str(2 * row.measured)) for row in known)
    monkeypatch.setattr(measurements, "measurements", lambda: twice)
    assert fit(stack) != efficiency.efficiency(stack)
    monkeypatch.setattr(measurements, "measurements", lambda: known[:2])
    with pytest.raises(OptionError, match="rows that calibrate"):
        fit(stack)


def test_the_fit_finds_what_made_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that the model itself makes, of the rows that calibrate, give its efficiencies back."""
    stack = "Megatron-LM on A100"
    made = {"compute": 0.61, "attention": 0.33, "memory": 0.78, "network": 0.52}
    rows = rows_of(stack, "calibration")
    values = predict(rows, {LETTERS[name]: value for name, value in made.items()})["value"]
    times = tuple(replace(row, printed=repr(float(value))) for row, value in zip(rows, values, strict=True))
    monkeypatch.setattr(measurements, "measurements", lambda: times)
    assert fit(stack) == made


@pytest.mark.parametrize("stack", stacks())
def test_nothing_that_was_measured_beats_the_hardware(stack: str) -> None:
    """With every efficiency 1 and everything hidden that can be, the model is a lower bound of the times."""
    rows = rows_of(stack)
    ideal = predict(rows, {"ω": 1.0, "τ": 1.0} if stack.startswith("Megatron") else {})["value"]
    for row, value in zip(rows, ideal, strict=True):
        assert (value > row.measured) == (row.unit in ("TFLOP/s", "tokens/s/GPU")), row.id


def test_no_row_has_anything_of_its_own() -> None:
    """A row names shapes, sizes and how it was divided; facts of the software stand with its group."""
    allowed = {
        "id", "printed", "use", "set", "shape", "sequence", "gpus", "batch", "micro_batch", "recompute",
        "zero", "parameters", "quantity", "tensor", "pipeline", "interleave", "sequence_parallel",
    }  # fmt: skip
    for name in measurements.SOURCES:
        for group in data_files.read(name, "validation")["group"]:
            assert all(set(row) <= allowed for row in group["rows"])


@pytest.mark.parametrize("name", ["megatron.table5.175B.present", "foundry.h100.7b.2048.g8"])
def test_arrays_are_the_exact_formulas(name: str) -> None:
    row = measurement(name)
    letters = row.setting.letters() | row.division.letters(row.setting)
    letters["S"] = hardware(row.setting.hardware).sms.value
    exact = derive((*MEMORY, *in_waves(TIME)), letters)
    value = evaluate(
        measurements.QUANTITIES[row.quantity], letters | {key: item.value for key, item in exact.items()}
    )
    found = predict([row], {})
    assert math.isclose(found["value"][0], value, rel_tol=1e-12)
    # Waves only add: the step without them is faster, and has the same memory.
    plain = training_step(row.setting, row.division)
    assert plain.time.total < exact["step"].value
    assert plain.value("memory") == exact["memory"].value


def test_the_hardware_rate_is_megatrons() -> None:
    """F = 96 B s L h² (1 + s/6h + V/16Lh): arXiv:2104.04473, equation 3."""
    row = measurement("megatron.table1.145.6B")
    step = replace(row, quantity="step", unit="s")
    B, s, L, h, V = 2304, 2048, 80, 12288, 51200
    flop = 96 * B * s * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h))
    for efficiencies in ({}, {"η_c": 0.5}):
        rate, time = (predict([one], efficiencies)["value"][0] for one in (row, step))
        assert math.isclose(rate, flop / time / 1536 / 1e12, rel_tol=1e-12)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_layer_by_hand(sequence_parallel: bool) -> None:
    kind = "sequence." if sequence_parallel else ""
    both = [measurement(f"megatron.layer.{kind}{way}") for way in ("forward", "backward")]
    letters = efficiency.efficiency_letters("Megatron-LM on A100")
    assert predict(both, letters)["value"].tolist() == pytest.approx(
        layer_by_hand(sequence_parallel, letters), rel=1e-9
    )


@given(rows=st.integers(1, 3000), columns=st.integers(1, 3000), processors=st.integers(1, 150))
def test_waves_by_counting(rows: int, columns: int, processors: int) -> None:
    computed = []
    for height, width in ((256, 128), (128, 256)):
        tiles = len(range(0, rows, height)) * len(range(0, columns, width))
        waves = len(range(0, tiles, processors))
        computed.append(waves * processors * height * width)
    found = evaluate(extra(str(rows), str(columns)), {"S": processors})
    assert found == Fraction(min(computed), rows * columns) >= 1


def test_waves_reach_every_product() -> None:
    names = {definition.name for definition in in_waves(TIME)}
    assert {f"waves_{way}_{product.name}" for product in PRODUCTS for way in "fg"} <= names
    broken = [item._replace(formula="1") if item.name == "f_qkv" else item for item in TIME]
    with pytest.raises(ValueError, match="f_qkv"):
        list(in_waves(broken))


def test_traffic_is_near_what_is_compulsory() -> None:
    found = {row.id: row for row in traffic_rows()}
    start = "traffic.h200."
    unit = 64 * 16 * 1024 * 64 * 2 / 1e6
    hopper = f"{start}hopper_forward.64x16x1024x64.cold"
    assert found[f"{hopper}.dram_read"].predicted == pytest.approx(3 * unit, rel=1e-3)
    assert 0.9 * unit < found[f"{hopper}.dram_write"].predicted < unit
    assert found[f"{start}flash2_backward.64x16x1024x64.cold.2.dram_read"].predicted == pytest.approx(
        6 * unit + unit / 16, rel=1e-3
    )


def test_summaries_keep_calibration_apart() -> None:
    def row(error: float, use: str) -> Checked:
        return Checked("", "", "1", "s", 1 + error, error, use, "x", "y", "")

    found = summaries([row(0.1, "held out"), row(-0.3, "held out"), row(0.5, "calibration")])
    assert [(one.use, one.rows) for one in found] == [("held out", 2), ("calibration", 1)]
    assert found[0][4:] == pytest.approx((0.2, 0.3, -0.1))
    assert found[1][4:] == (0.5, 0.5, 0.5)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="table 5"):
        validate("table 6")
    with pytest.raises(UnknownNameError):
        validate("")
    with pytest.raises(UnknownNameError, match="measurement"):
        measurement("megatron.table6")
    with pytest.raises(UnknownNameError, match="stack"):
        efficiency.efficiency("Megatron-LM on V100")
    assert set(LETTERS.values()) <= set(_letters(measurement("foundry.h100.7b.2048.g8")))
    data: dict[str, Any] = data_files.read("llm_foundry", "validation")
    wrong = {**data["settings"], **data["group"][0], **data["group"][0]["rows"][0], "parameters": 1}
    with pytest.raises(ValueError, match="1 parameters are printed"):
        measurements._measurement(data, wrong)


def _letters(row: Measurement) -> dict[str, Any]:
    return dict(row.setting.letters())
