"""Counts of trained parameters that are wrong in one way: the laws must catch each."""

from __future__ import annotations

from typing import Any

import pytest

from memsim.estimate import estimate, term
from memsim.fine_tuning import adapter_parameters, lora_parameters, prefix_parameters, prompt_parameters
from refimpl import registry
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


def _count(**parts: int) -> Any:
    return estimate(
        "trained", [term(k.replace("_", " "), str(v), {}, "parameters", "") for k, v in parts.items()]
    )


@mutant("cost.lora_parameters")
def one_factor_only(*, layers: int, width: int, rank: int, matrices: int) -> Any:
    return _count(factors=matrices * layers * width * rank)


@mutant("cost.lora_parameters")
def a_layer_more(*, layers: int, **sizes: int) -> Any:
    return lora_parameters(layers=layers + 1, **sizes)


@mutant("cost.lora_parameters")
def the_whole_update(*, layers: int, width: int, rank: int, matrices: int) -> Any:
    return _count(factors=matrices * layers * width**2)


@mutant("cost.lora_parameters")
def the_core_too(*, layers: int, width: int, rank: int, matrices: int) -> Any:
    return _count(factors=matrices * layers * (2 * width + rank) * rank)


@mutant("cost.adapter_parameters")
def one_adapter_a_layer(*, layers: int, width: int, bottleneck: int) -> Any:
    adapters = layers * (2 * width * bottleneck + bottleneck + width)
    return _count(adapters=adapters, layer_norms=4 * layers * width)


@mutant("cost.adapter_parameters")
def no_biases(*, layers: int, width: int, bottleneck: int) -> Any:
    return _count(adapters=4 * layers * width * bottleneck, layer_norms=4 * layers * width)


@mutant("cost.adapter_parameters")
def no_bias_inside(*, layers: int, width: int, bottleneck: int) -> Any:
    adapters = 2 * layers * (2 * width * bottleneck + width)
    return _count(adapters=adapters, layer_norms=4 * layers * width)


@mutant("cost.adapter_parameters")
def layer_norms_without_bias(*, layers: int, width: int, bottleneck: int) -> Any:
    found = adapter_parameters(layers=layers, width=width, bottleneck=bottleneck)
    return _count(adapters=int(found["adapters"]), layer_norms=2 * layers * width)


@mutant("cost.prefix_parameters")
def keys_only(*, layers: int, width: int, positions: int) -> Any:
    return _count(keys=layers * width * positions, values=0)


@mutant("cost.prefix_parameters")
def a_position_before_it(*, positions: int, **sizes: int) -> Any:
    return prefix_parameters(positions=positions + 1, **sizes)


@mutant("cost.prompt_parameters")
def keys_and_values_of_it(*, width: int, positions: int) -> Any:
    return prompt_parameters(width=2 * width, positions=positions)


@mutant("cost.prompt_parameters")
def positions_squared(*, width: int, positions: int) -> Any:
    return prompt_parameters(width=width, positions=positions**2)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
