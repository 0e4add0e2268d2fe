"""The layers that one rank works through: what each keeps, and how many parameters it has there.

>>> layers = layers_of_rank(model_of("gpt2"), Run(sequence=128), 0)
>>> len(layers), len(layers[0]), layers[0][1].name
(1, 14, 'block')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from memsim.formula import evaluate
from memsim.kept_tensors import kept_by
from memsim.model import Model, Part, Stack
from memsim.parameters import model_of
from memsim.parts import PARTS
from memsim.rank_model import ENDS, rank_model, stage_model
from memsim.run import Run

__all__ = ["Layer", "Tensor", "held_parameters", "layers_of_rank", "model_of"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor that a layer keeps: its bytes, and whether selective recomputation spares it."""

    name: str
    size: int
    of_scores: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, or an end of the model.

    Attributes
    ----------
    name : str
        Of its stack.
    kept : tuple of Tensor
        What its forward pass keeps.
    entering : int
        Bytes of what enters it: the checkpoint of full recomputation, and the gradient of the stream.
    parameters, expert_parameters : int
        Of this rank, those of experts apart.
    logits : int
        Numbers that its head gives, 0 for none.
    """

    name: str
    kept: tuple[Tensor, ...]
    entering: int
    parameters: int
    expert_parameters: int
    logits: int

    @property
    def is_end(self) -> bool:
        """Whether it is embeddings or output, which are never recomputed."""
        return self.name in ENDS


def layers_of_rank(model: Model, run: Run, index: int) -> list[list[Layer]]:
    """Return the layers of each chunk of a stage, from input to output.

    Raises
    ------
    OptionError
        If the run does not divide the model, or nothing is known of a part.
    """
    whole = rank_model(model, tensor=run.tensor)
    chunks = (
        stage_model(whole, pipeline=run.pipeline * run.interleave, index=chunk * run.pipeline + index)
        for chunk in range(run.interleave)
    )
    return [
        [layer for stack in chunk.stacks for layer in [_layer(chunk, stack, run)] * stack.layers]
        for chunk in chunks
    ]


def held_parameters(layers: list[list[Layer]]) -> tuple[int, int]:
    """Return the parameters of a rank, those of experts apart."""
    every = [layer for chunk in layers for layer in chunk]
    return sum(layer.parameters for layer in every), sum(layer.expert_parameters for layer in every)


def _layer(model: Model, stack: Stack, run: Run) -> Layer:
    values = {
        "b": run.batch,
        "s": run.sequence,
        "T": run.batch * run.sequence,
        "e": 2,
        "u": run.tensor if run.sequence_parallel else 1,
    }
    kept = [one for part in stack.parts for one in _tensors(part, model.width, run, values)]
    divided = values["u"] if not run.partition_checkpoints else run.tensor
    counts = [_count(part, model.width, run.expert) for part in stack.parts]
    heads = [part for part in stack.parts if part.kind == "head"]
    return Layer(
        stack.name,
        tuple(kept),
        -(-2 * values["T"] * model.width // divided),
        sum(count for part, count in zip(stack.parts, counts, strict=True) if part.kind != "experts"),
        sum(count for part, count in zip(stack.parts, counts, strict=True) if part.kind == "experts"),
        sum(values["T"] * part.sizes["rows"] for part in heads),
    )


def _tensors(part: Part, width: int, run: Run, values: Mapping[str, int]) -> list[Tensor]:
    return [
        Tensor(
            f"{part.name}: {one.name}",
            _bytes(one.formula, {**values, "d": width, **one.sizes}),
            one.of_scores,
        )
        for one in kept_by(part, width, run.keeping)
    ]


def _bytes(formula: str, values: Mapping[str, int]) -> int:
    return int(-(-evaluate(formula, values) // 1))


def _count(part: Part, width: int, expert: int) -> int:
    if part.kind == "experts":
        held = part.sizes["experts"] // expert
        sizes = {**part.sizes, "experts": held, "active": min(part.sizes["active"], held)}
        part = replace(part, sizes=sizes)
    return _bytes(*PARTS[part.kind](part, width, 1))
