"""Laws of what fine-tuning trains: how it grows, and where it meets what it stands for."""

from __future__ import annotations

from collections.abc import Callable

from memsim.estimate import Estimate
from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Estimate]


@law("cost.lora_parameters", "cost.adapter_parameters", "cost.prefix_parameters")
def layers_cost_alike(f: Model, case: Case, _close: object) -> None:
    """Every layer trains the same number, and no layers train nothing."""
    layers, one = case.kwargs["layers"], case.replace(layers=1).call(f).total
    require(case.call(f).total == layers * one, f"{layers} layers do not cost {layers} times one of {one}")
    require(case.replace(layers=0).call(f).total == 0, "no layers train something")


@law("cost.lora_parameters")
def half_of_the_width_saves_nothing(f: Model, case: Case, _close: object) -> None:
    """At a rank of half of the width the two factors have the numbers of the matrix."""
    rank, square = case.kwargs["rank"], 4 * case.kwargs["rank"] ** 2
    found = case.replace(width=2 * rank).call(f).total
    require(
        found == case.kwargs["layers"] * case.kwargs["matrices"] * square, "not as many as in the matrices"
    )


@law("cost.lora_parameters")
def twice_the_rank_is_twice_as_much(f: Model, case: Case, _close: object) -> None:
    """Parameters grow with the rank, not with the matrices that the factors stand for."""
    twice = case.replace(rank=2 * case.kwargs["rank"]).call(f).total
    require(twice == 2 * case.call(f).total, "twice the rank is not twice the parameters")


@law("cost.adapter_parameters")
def an_adapter_without_width_is_a_bias(f: Model, case: Case, _close: object) -> None:
    """Without a bottleneck two biases a layer are left, and two layer norms of a scale and a bias."""
    layers, width = case.kwargs["layers"], case.kwargs["width"]
    none = case.replace(bottleneck=0).call(f)
    require(none["adapters"] == 2 * layers * width, "not the two biases at the output")
    require(none["layer norms"] == 4 * layers * width, "not two layer norms a layer")


@law("cost.adapter_parameters")
def a_hidden_unit_has_two_vectors_and_a_bias(f: Model, case: Case, _close: object) -> None:
    """One more hidden unit is a row, a column and a number in each of the two adapters."""
    more = case.replace(bottleneck=case.kwargs["bottleneck"] + 1).call(f).total - case.call(f).total
    require(more == 2 * case.kwargs["layers"] * (2 * case.kwargs["width"] + 1), f"a unit more costs {more}")


@law("cost.prefix_parameters", "cost.prompt_parameters")
def positions_cost_alike(f: Model, case: Case, _close: object) -> None:
    """Every position has the same number of parameters, and no positions have none."""
    positions, one = case.kwargs["positions"], case.replace(positions=1).call(f).total
    require(case.call(f).total == positions * one, "positions differ in what they cost")


@law("cost.prefix_parameters")
def keys_and_values_are_as_many(f: Model, case: Case, _close: object) -> None:
    """A prefix has as many keys as values, and nothing else."""
    found = case.call(f)
    require(found["keys"] == found["values"], "keys and values differ")
    require(2 * found["keys"] == found.total, "a prefix has more than keys and values")


@law("cost.prompt_parameters")
def a_position_is_an_embedding(f: Model, case: Case, _close: object) -> None:
    """A position of a soft prompt is one vector of the width of the embeddings."""
    require(case.replace(positions=1).call(f).total == case.kwargs["width"], "a position is no embedding")
