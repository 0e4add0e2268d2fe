"""Memory over time in one training step of one rank: what is taken and given back, tensor by tensor.

>>> step = step_memory(model="gpt2", run=Run(sequence=1024, micro_batches=2))
>>> step.peak == max(step.allocated) > step.allocated[0]
True
>>> sum(step.at_peak().values()) == step.peak
True
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

from memsim.estimate import Estimate
from memsim.memory.layers_of_rank import Layer, Piece, held_parameters, layers_of_rank
from memsim.memory.model_states import conventions, model_states
from memsim.memory.run import Run
from memsim.model import Model
from memsim.parameters import model_of
from refimpl.parallel.schedules import pipeline_schedule, steps_of

__all__ = ["Event", "Step", "host_memory", "step_memory"]

Place = Sequence[int]  # the micro-batch, and the chunk of layers


class Event(NamedTuple):
    """Bytes taken (above 0) or given back (below 0) for a tensor, and during what."""

    when: str
    key: tuple[Any, ...]
    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class Step:
    """All events of a step; what lives through all of it comes first."""

    events: tuple[Event, ...]

    @property
    def allocated(self) -> list[int]:
        """Bytes alive after each event; whole numbers of any size."""
        return list(itertools.accumulate(event.size for event in self.events))

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return max(self.allocated)

    @property
    def when(self) -> str:
        """During what the peak is reached first."""
        return self.events[self._highest].when

    @property
    def _highest(self) -> int:
        allocated = self.allocated
        return allocated.index(max(allocated))

    def at_peak(self) -> dict[str, int]:
        """Return the bytes of each kind that are alive at the peak."""
        alive: dict[str, int] = {}
        for event in self.events[: self._highest + 1]:
            alive[event.kind] = alive.get(event.kind, 0) + event.size
        return {kind: size for kind, size in alive.items() if size}

    def each_at_most(self) -> dict[str, int]:
        """Return the most bytes of each kind, whenever that is: their sum is what a static estimate says."""
        alive: dict[str, int] = {}
        most: dict[str, int] = {}
        for event in self.events:
            alive[event.kind] = alive.get(event.kind, 0) + event.size
            most[event.kind] = max(most.get(event.kind, 0), alive[event.kind])
        return most


def step_memory(*, model: str | Model, run: Run, index: int = 0) -> Step:
    """Return what one rank of a stage takes and gives back in a step.

    Parameters
    ----------
    model : str or Model
        A name, or a description.
    run : Run
        How it is trained.
    index : int
        The stage of the pipeline, from 0.

    Returns
    -------
    Step
        Bytes are whole.  Of many micro-batches only so many are gone through that the peak is reached.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    OptionError
        If the run does not divide the model, or nothing is known of a part.

    Notes
    -----
    Gradients appear layer by layer in the first backward pass, in Megatron's convention in one buffer before.
    Stage 2 keeps a whole gradient of one layer only, stage 3 the whole weights of one layer only, each gone
    when the layer is done; nothing is fetched ahead.  The backward pass of a part goes from its last matrix
    to its first: gradients come before what was kept for them goes.  The loss has its logits, a copy in fp32
    and their logarithms at once, and on the way back two gradients in fp32.
    """
    described = model_of(model)
    chunks = layers_of_rank(described, run, index)
    events = list(_lasting(chunks, run))
    for backward, *where in _order(run, index):
        layers = chunks[where[1]]
        events += _backward(layers, run, where) if backward else _forward(layers, run, where)
    return Step((*events, *_optimizer_step(chunks, run)))


def host_memory(*, model: str | Model, run: Run, index: int = 0) -> int:
    """Return the bytes of states that the host keeps for one rank of a stage.

    >>> host_memory(model="gpt2", run=Run(gpus=4, stage=2, offload="optimizer"))  # gradients and optimizer
    435539328
    """
    kept = 0
    for states in _states(layers_of_rank(model_of(model), run, index), replace(run, offload="none")):
        kept += _up(Fraction(states.total))
    for states in _states(layers_of_rank(model_of(model), run, index), run):
        kept -= _up(Fraction(states.total))
    return kept


def _order(run: Run, index: int) -> Iterator[tuple[bool, int, int]]:
    """Yield the passes of a stage: whether backward, which micro-batch and which chunk of layers.

    Of many micro-batches so many that the pipeline fills and the pattern repeats.
    """
    p, v = run.pipeline, run.interleave
    rows = pipeline_schedule(
        schedule="1f1b" if v == 1 else "interleaved",
        ranks=p,
        micro_batches=min(run.micro_batches, p + 2 if v == 1 else 3 * p),
        chunks=v,
    )
    for step in steps_of(rows[index]):
        yield step.backward, step.micro, (step.stage - index) // p


def _lasting(chunks: list[list[Layer]], run: Run) -> Iterator[Event]:
    """Yield what lives from step to step: weights, optimizer states, buffers, Megatron's gradients."""
    for group, states in enumerate(_states(chunks, run)):
        for item in states.terms:
            if item.name == "gradients" and run.convention != "megatron":
                continue
            kind = item.name if item.name in ("weights", "gradients") else "optimizer states"
            if item.value:
                yield Event("between steps", (group, item.name), kind, _up(Fraction(item.value)))
    if run.bucket:
        yield Event("between steps", ("bucket",), "buffers", 2 * run.bucket)


def _optimizer_step(chunks: list[list[Layer]], run: Run) -> Iterator[Event]:
    """Yield the copy that an optimizer needs which goes through all parameters operator by operator."""
    if run.adam == "foreach":
        for group, states in enumerate(_states(chunks, run)):
            size = _up(Fraction(states.terms[-1].value))
            yield Event("optimizer step", (group, "scratch"), "optimizer states", size)
            yield Event("optimizer step", (group, "scratch"), "optimizer states", -size)


def _states(chunks: list[list[Layer]], run: Run) -> Iterator[Estimate]:
    """Yield the states of all parameters but experts', and of experts', which fewer ranks share."""
    ranks = run.data, run.data // run.expert
    for count, shared in zip(held_parameters(chunks), ranks, strict=True):
        if count:
            yield model_states(
                parameters=count,
                ranks=shared,
                stage=run.stage,
                convention=run.convention,
                offload=run.offload,
            )


def _forward(layers: list[Layer], run: Run, where: Place) -> Iterator[Event]:
    for place, layer in enumerate(layers):
        when = f"forward pass of micro-batch {where[0]}, {layer.name} {place}"
        yield from _gathered(layer, run, when, (*where, place, "fwd"), taken=True)
        again = _made_again(layer, run)
        for number, tensor in enumerate(layer.kept):
            yield Event(when, (*where, place, number), _kind(layer), tensor.size)
        if layer.logits:
            copy = 4 * layer.logits
            yield Event(when, (*where, place, "logits"), "logits and loss", 2 * layer.logits)
            yield Event(when, (*where, place, "copy"), "logits and loss", copy)
            yield Event(when, (*where, place, "copy"), "logits and loss", -copy)
            yield Event(when, (*where, place, "logits"), "logits and loss", -2 * layer.logits)
        if run.recompute == "full" and not layer.is_end:
            yield Event(when, (*where, place, "checkpoint"), "activations", layer.checkpoint)
        for number in again:
            yield Event(when, (*where, place, number), _kind(layer), -layer.kept[number].size)
        yield from _gathered(layer, run, when, (*where, place, "fwd"), taken=False)


def _backward(layers: list[Layer], run: Run, where: Place) -> Iterator[Event]:
    for place, layer in reversed(list(enumerate(layers))):
        when = f"backward pass of micro-batch {where[0]}, {layer.name} {place}"
        yield from _gathered(layer, run, when, (*where, place, "bwd"), taken=True)
        for number in _made_again(layer, run):
            yield Event(when, (*where, place, number), _kind(layer), layer.kept[number].size)
        stream = (*where, place, "gradient of the stream")
        if not layer.logits:
            yield Event(when, stream, "gradients of activations", layer.entering)
        number = len(layer.kept)
        for at, piece in reversed(list(enumerate(layer.pieces))):
            number -= len(piece.kept)
            yield from _piece_backward(layer, piece, run, when, (*where, place, at), number)
        if not layer.logits:
            yield Event(when, stream, "gradients of activations", -layer.entering)
        if run.recompute == "full" and not layer.is_end:
            yield Event(when, (*where, place, "checkpoint"), "activations", -layer.checkpoint)
        yield from _gathered(layer, run, when, (*where, place, "bwd"), taken=False)


def _piece_backward(
    layer: Layer, piece: Piece, run: Run, when: str, where: Place, number: int
) -> Iterator[Event]:
    """Yield the backward pass of a part: gradients come, what it kept goes, in autograd's order.

    First the gradient of the last matrix and of what it read, which then goes; then gradients before it.
    """
    if piece.kind == "head":
        yield from _loss_backward(layer, piece, run, when, where, number)
        return
    inner, outer = _inside(piece, run)
    kept = [(number + n, tensor) for n, tensor in enumerate(piece.kept)]
    read = kept[-1:] if piece.kind in ("ffn", "experts") and inner else []  # what the last matrix read
    work = "gradients of activations"
    yield from _gradients(piece, run, when, where, "last", piece.last)
    yield from (Event(when, (*where, "inner", n), work, size) for n, size in enumerate(inner))
    yield from (Event(when, (*where[:-1], n), _kind(layer), -tensor.size) for n, tensor in read)
    yield from (Event(when, (*where, "outer", n), work, size) for n, size in enumerate(outer))
    yield from (Event(when, (*where, "inner", n), work, -size) for n, size in enumerate(inner))
    gone = [item for item in kept if item not in read]
    yield from (Event(when, (*where[:-1], n), _kind(layer), -tensor.size) for n, tensor in gone)
    rest = piece.parameters + piece.expert_parameters - piece.last
    yield from _gradients(piece, run, when, where, "rest", rest)
    yield from (Event(when, (*where, "outer", n), work, -size) for n, size in enumerate(outer))


def _loss_backward(
    layer: Layer, piece: Piece, run: Run, when: str, where: Place, number: int
) -> Iterator[Event]:
    """Yield the backward pass of loss and head: logarithms and logits in fp32, then logits in 16 bits."""
    work = "gradients of activations"
    full, half = 4 * layer.logits, 2 * layer.logits
    yield Event(when, (*where, "logarithms"), work, full)
    yield Event(when, (*where, "logits in fp32"), work, full)
    for n, tensor in enumerate(piece.kept):
        yield Event(when, (*where[:-1], number + n), _kind(layer), -tensor.size)
    yield Event(when, (*where, "logarithms"), work, -full)
    yield Event(when, (*where, "logits"), work, half)
    yield Event(when, (*where, "logits in fp32"), work, -full)
    yield Event(when, (*where, "stream"), work, layer.entering)
    yield from _gradients(piece, run, when, where, "last", piece.parameters)
    yield Event(when, (*where, "stream"), work, -layer.entering)
    yield Event(when, (*where, "logits"), work, -half)


def _inside(piece: Piece, run: Run) -> tuple[list[int], list[int]]:
    """Return the gradients inside a part: of what its last matrix read, and of what that is made of."""
    sizes = {tensor.name.partition(": ")[2]: tensor.size for tensor in piece.kept}
    if "input in fp32" in sizes:  # an RMSNorm written out: four of its steps in fp32, and what it gives
        return [sizes["input in fp32"]] * 4, [sizes["input in fp32"] // 2]
    if piece.kind in ("ffn", "experts"):
        widest = max(sizes.values(), default=0)
        return [widest], [widest] * (2 if "product" in sizes else 1)
    if piece.kind == "mamba":  # of the scan's output, and of both branches, Δ and the convolution
        scanned = sizes["output of the scan"]
        return [scanned], [sizes["both branches"], scanned, scanned]
    if piece.kind in ("attention", "latent_attention"):
        made = [size for name, size in sizes.items() if name not in ("mask", "logsumexp", "mask of scores")]
        # Scores in memory: the gradient of softmax is made of that of its result, while both are there.
        scores = [sizes[name] for name in ("softmax",) if name in sizes]
        return [sizes["output"], *scores * (2 if run.softmax_product else 1)], made
    return [], []


def _gradients(piece: Piece, run: Run, when: str, where: Place, which: str, count: int) -> Iterator[Event]:
    """Yield the gradients of `count` of a part's parameters: whole, and what of them this rank keeps."""
    if run.convention == "megatron" or not count:
        return
    each = Fraction(conventions()[run.convention]["gradients"])
    ranks = run.data // run.expert if piece.expert_parameters else run.data
    sent = run.stage >= 2 or run.offload != "none"
    whole = _up(each * count)
    if sent:
        yield Event(when, (*where, which, "whole gradient"), "gradients", whole)
    if where[0] == 0 and run.offload == "none":
        kept = _up(each * Fraction(count, ranks)) if sent else whole
        yield Event(when, (*where[1:], which, "gradient"), "gradients", kept)
    if sent:
        yield Event(when, (*where, which, "whole gradient"), "gradients", -whole)


def _gathered(layer: Layer, run: Run, when: str, key: tuple[Any, ...], *, taken: bool) -> Iterator[Event]:
    """Yield the whole weights of a layer while it works, where ranks keep a share of them only."""
    count = layer.parameters + layer.expert_parameters
    if count and (run.stage == 3 or run.offload == "all"):
        size = _up(Fraction(conventions()[run.convention]["weights"]) * count)
        yield Event(when, key, "gathered weights", size if taken else -size)


def _made_again(layer: Layer, run: Run) -> list[int]:
    """Return which of a layer's tensors are given back and made again."""
    if layer.is_end or run.recompute == "none":
        return []
    return [n for n, t in enumerate(layer.kept) if run.recompute == "full" or t.of_scores]


def _kind(layer: Layer) -> str:
    return "logits and loss" if layer.logits else "activations"


def _up(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)
