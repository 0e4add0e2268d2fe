"""Training memory, ZeRO, communication and scaling: against the arithmetic written out, and all laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import memsim
from memsim import communication, parallelism, training_memory, zero
from memsim.estimate import Estimate, Term
from memsim.hardware import Specification, hardware, hardware_names
from refimpl import registry
from refimpl.errors import LawViolation, OptionError, UnknownNameError

registry.load()
COSTS = sorted(name for name, record in registry.TECHNIQUES.items() if record.home.startswith("memsim."))


def cases(name: str, count: int = 12) -> list[registry.Case]:
    record = registry.get(name)
    assert record.sample is not None
    drawn = []
    for seed in range(count + len(record.edges)):
        rng = np.random.default_rng(seed)
        shape: dict[str, Any] = {axis: int(rng.integers(a, b + 1)) for axis, (a, b) in record.axes.items()}
        shape |= {key: values[int(rng.integers(len(values)))] for key, values in record.options.items()}
        if seed < len(record.edges):
            shape |= record.edges[seed]
        drawn.append(record.sample(rng, **shape))
    return drawn


@pytest.mark.parametrize("name", COSTS)
def test_laws_hold(name: str) -> None:
    laws = registry.laws_of(name)
    assert len(laws) >= 2
    for case in cases(name):
        for item in laws:
            item.function(registry.get(name).function, case, None)


def changed(f: Callable[..., Any], change: Callable[[Term], Any]) -> Callable[..., Any]:
    """Return `f` with the value of every term changed."""

    def mutant(**options: Any) -> Any:
        def of(result: Estimate) -> Estimate:
            return Estimate(
                result.name,
                tuple(
                    Term(t.name, change(t), t.unit, t.formula, t.substituted, t.source) for t in result.terms
                ),
            )

        result = f(**options)
        return of(result) if isinstance(result, Estimate) else tuple(map(of, result))

    return mutant


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize(
    "change", [lambda t: t.value + 1, lambda t: t.value**2 + 3, lambda t: Fraction(10, 7) * t.value + 5]
)
def test_laws_catch_mutants(name: str, change: Callable[[Term], Any]) -> None:
    mutant = changed(registry.get(name).function, change)
    caught = set()
    for case in cases(name):
        for item in registry.laws_of(name):
            try:
                item.function(mutant, case, None)
            except LawViolation:
                caught.add(item.name)
    assert caught


def test_every_cost_explains_itself() -> None:
    for name in COSTS:
        result = cases(name, 1)[-1].call(registry.get(name).function)
        for one in [result] if isinstance(result, Estimate) else result:
            assert all(item.source and item.formula for item in one.terms)
            assert all(" = " in line for line in one.explain())


def test_zero_per_component() -> None:
    two = zero.zero_memory(parameters=640, ranks=64, stage=2)
    assert (two["fp16 parameters"], two["fp16 gradients"], two["optimizer states"]) == (1280, 20, 120)
    assert zero.zero_memory(parameters=1, ranks=7, stage=3).total == Fraction(16, 7)


def test_deepspeeds_own_estimate() -> None:
    # Its estimators, for 7.5e9 parameters on 64 GPUs: 17.109 and, without the gathered layer, 2.109 GB.
    found = [
        zero.zero_memory(parameters="7.5B", ranks=64, stage=stage, convention="deepspeed").total
        for stage in (2, 3)
    ]
    assert found == [17_109_375_000, 2_109_375_000]
    with pytest.raises(OptionError, match="stages 2 and 3"):
        zero.zero_memory(parameters=1, ranks=1, stage=1, convention="deepspeed")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_largest_model_fills_the_memory(stage: Any) -> None:
    size = zero.largest_model(memory=32 * 10**9, ranks=64, stage=stage).total
    assert zero.zero_memory(parameters=size, ranks=64, stage=stage).total == 32 * 10**9


def test_the_two_activation_models_disagree() -> None:
    gpt2 = {"hidden": 1600, "batch": 32, "sequence": 1024, "layers": 48}
    ours = training_memory.zero_activations(**gpt2).total
    theirs = training_memory.block_activations(**gpt2, heads=25).total
    assert ours == 2 * 12 * 1600 * 32 * 1024 * 48
    assert theirs == 48 * 1024 * 32 * (34 * 1600 + 5 * 25 * 1024)
    assert round(theirs / ours, 2) == 4.75


def test_ring_volume_is_exact() -> None:
    assert communication.zero_communication(
        parameters=9, ranks=4, stage=3, convention="ring"
    ).total == Fraction(81, 4)


def test_amdahl() -> None:
    assert parallelism.amdahl_scaling(device_seconds=100, devices=10, serial=0.1).total == 19
    assert parallelism.amdahl_scaling(device_seconds=100, devices=10, serial=0).total == 10
    many = parallelism.amdahl_scaling(device_seconds=1, devices=10**9, serial=0.05).total
    assert Fraction(1, 20) < many < Fraction(1, 19)  # the speed-up stays below 1/s
    with pytest.raises(OptionError):
        parallelism.amdahl_scaling(device_seconds=100, devices=10, serial=1.5)


def test_crossover_batch_makes_the_two_equal() -> None:
    block = {"parameters": "7.5B", "sequence": 2048, "hidden": 4096, "layers": 36}
    batch = parallelism.crossover_batch(**block).total
    data, model = parallelism.data_vs_model_parallel(ranks=8, batch=batch, **block)
    assert data["communication"] == model["communication"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: training_memory.training_memory(parameters=0),
        lambda: training_memory.training_memory(parameters=float("nan")),
        lambda: zero.zero_memory(parameters=1, ranks=0, stage=1),
        lambda: zero.zero_memory(parameters=1, ranks=1.5, stage=1),
        lambda: zero.zero_memory(parameters=1, ranks=1, stage=4),
        lambda: zero.zero_memory(parameters=1, ranks=1, stage=1, convention="mine"),
        lambda: communication.zero_communication(parameters=1, ranks=1, stage=5),
        lambda: communication.zero_communication(parameters=1, ranks=2, stage=1, convention="tree"),
        lambda: parallelism.ideal_scaling(device_seconds=1, devices=-1),
    ],
)
def test_bad_arguments(call: Callable[[], Any]) -> None:
    with pytest.raises(OptionError):
        call()


@pytest.mark.parametrize("name", hardware_names())
def test_hardware_numbers_have_units_and_sources(name: str) -> None:
    card = hardware(name)
    numbers = [getattr(card, key.name) for key in fields(card)]
    numbers = [number for number in numbers if isinstance(number, Specification)]
    assert len(numbers) == (10 if name == "mi300x" else 11)
    for number in [*numbers, *card.peaks.values(), *card.sparse_peaks.values()]:
        assert number.value > 0
        assert number.unit in ("B", "B/s", "1", "1/s", "FLOP/s", "OP/s")
        assert "," in number.source  # a work and a place in it
    assert card.shared_memory_per_sm.value < card.sram_per_sm.value < card.l2.value < card.hbm.value
    assert card.network.value <= card.link.value < card.hbm_bandwidth.value
    assert card.host_link.value <= card.link.value


@pytest.mark.parametrize("name", hardware_names())
def test_sparse_peaks_are_twice_the_dense_ones(name: str) -> None:
    card = hardware(name)
    rates = {precision: peak.value for precision, peak in card.peaks.items()}
    for precision, peak in card.sparse_peaks.items():
        # Makers round: the L40S prints 362.05 and 733, so within two per cent.
        assert peak.value == pytest.approx(2 * rates[precision], rel=0.02)
    assert {"fp32", "fp16"} <= set(rates)
    assert ("bf16" in rates) is (name != "v100-32gb")
    assert rates["fp32"] <= rates["fp16"] <= rates.get("fp8", rates["fp16"])


def test_peaks_of_vector_units_follow_from_cores_and_clocks() -> None:
    # Cores of one SM times two operations times the boost clock, as the makers print it: independent numbers.
    for name, cores, clock in (("v100-32gb", 64, 1.53e9), ("l4", 128, 2.04e9), ("rtx-4090", 128, 2.52e9),
                               ("rtx-3090", 128, 1.695e9), ("mi300x", 128, 2.1e9)):  # fmt: skip
        card = hardware(name)
        assert 2 * cores * clock * card.sms.value == pytest.approx(card.peak("fp32").value, rel=0.005)


def test_exponentials_follow_from_multiprocessors_and_clocks() -> None:
    """16 a clock; of tensor cores 1024 operations a clock on Volta's, 2048 on Ampere's, 4096 on Hopper's."""
    for name, operations in (("v100-32gb", 1024), ("a100-40gb", 2048), ("a100-80gb", 2048), ("h200", 4096),
                             ("h100-sxm", 4096), ("h100-pcie", 4096), ("b200", 8192)):  # fmt: skip
        card = hardware(name)
        assert card.exponentials is not None
        assert card.exponentials.value == pytest.approx(16 / operations * card.peak("fp16").value, rel=0.005)
    for name, cores in (("rtx-3090", 128), ("rtx-4090", 128), ("l4", 128), ("l40s", 128)):
        card = hardware(name)
        assert card.exponentials is not None
        assert card.exponentials.value == pytest.approx(16 / (2 * cores) * card.peak("fp32").value, rel=0.005)


def test_unknown_hardware() -> None:
    with pytest.raises(UnknownNameError, match="a100-40gb"):
        hardware("a100-40")
    with pytest.raises(UnknownNameError):
        hardware("a100-40gb").peak("fp8")


def test_public_names_resolve() -> None:
    assert all(callable(getattr(memsim, name)) for name in memsim.__all__)
    with pytest.raises(AttributeError):
        _ = memsim.nothing
