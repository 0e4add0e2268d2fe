"""The layers that one rank works through: what each keeps, and how many parameters it has there.

>>> layers = layers_of_rank(model_of("gpt2"), Run(sequence=128), 0)
>>> len(layers), len(layers[0]), layers[0][1].name
(1, 14, 'block')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from memsim.formula import evaluate
from memsim.memory.kept_tensors import kept_by
from memsim.memory.rank_model import ENDS, rank_model, stage_model
from memsim.memory.run import Run
from memsim.model import Model, Part, Stack
from memsim.parameters import model_of
from memsim.parts import PARTS

__all__ = ["Layer", "Piece", "Tensor", "held_parameters", "layers_of_rank", "model_of"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor that a layer keeps: its bytes, and whether selective recomputation spares it."""

    name: str
    size: int
    of_scores: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a layer on a rank.

    Attributes
    ----------
    kind : str
        As in `memsim.model.Part`.
    kept : tuple of Tensor
        What its forward pass keeps.
    parameters, expert_parameters : int
        Of this rank, those of experts apart.
    last : int
        Of them, those of its last matrix, whose gradient comes first.
    """

    kind: str
    kept: tuple[Tensor, ...]
    parameters: int
    expert_parameters: int
    last: int


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, or an end of the model.

    Attributes
    ----------
    name : str
        Of its stack.
    pieces : tuple of Piece
        Its parts, from input to output.
    entering, checkpoint : int
        Bytes of what enters it, and of what full recomputation keeps of that.
    logits : int
        Numbers that its head gives, 0 for none.
    """

    name: str
    pieces: tuple[Piece, ...]
    entering: int
    checkpoint: int
    logits: int

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """What its forward pass keeps."""
        return tuple(tensor for piece in self.pieces for tensor in piece.kept)

    @property
    def parameters(self) -> int:
        """Parameters of this rank, without experts."""
        return sum(piece.parameters for piece in self.pieces)

    @property
    def expert_parameters(self) -> int:
        """Parameters of the experts of this rank."""
        return sum(piece.expert_parameters for piece in self.pieces)

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
    entering = 2 * values["T"] * model.width
    kept_of_it = {
        "replicated": -(-entering // values["u"]),
        "partitioned": 2 * -(-entering // (2 * run.tensor)),
        "offloaded": 0,
    }
    heads = [part for part in stack.parts if part.kind == "head"]
    return Layer(
        stack.name,
        tuple(_piece(part, model.width, run, values) for part in stack.parts),
        -(-entering // values["u"]),
        kept_of_it[run.checkpoints],
        sum(values["T"] * part.sizes["rows"] for part in heads),
    )


def _piece(part: Part, width: int, run: Run, values: Mapping[str, int]) -> Piece:
    count = _count(part, width, run.expert)
    kept = tuple(_tensors(part, width, run, values))
    of_experts = part.kind == "experts"
    if part.kind == "attention":
        heads = part.sizes["heads"]
        last = width * heads * part.sizes.get("head_width", width // heads)
    elif of_experts or part.kind == "ffn":
        last = count // (3 if part.choices.get("gated") else 2)
    else:
        last = count
    return Piece(part.kind, kept, 0 if of_experts else count, count if of_experts else 0, last)


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
