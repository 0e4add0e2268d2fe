"""Memory over time in one training step of one rank: what is taken and given back, tensor by tensor.

>>> step = step_memory(model="gpt2", run=Run(sequence=1024, micro_batches=2))
>>> step.peak == int(step.allocated.max()) > int(step.allocated[0])
True
>>> sum(step.at_peak().values()) == step.peak
True
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from memsim.layers_of_rank import Layer, held_parameters, layers_of_rank
from memsim.model import Model
from memsim.model_states import conventions, model_states
from memsim.parameters import model_of
from memsim.run import Run
from refimpl.numerics import IntArray
from refimpl.parallel.schedules import pipeline_schedule, steps_of

__all__ = ["Event", "Step", "step_memory"]

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
    def allocated(self) -> IntArray:
        """Bytes alive after each event."""
        return np.cumsum(np.array([event.size for event in self.events], np.int64))

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return int(self.allocated.max())

    @property
    def when(self) -> str:
        """During what the peak is reached first."""
        return self.events[int(self.allocated.argmax())].when

    def at_peak(self) -> dict[str, int]:
        """Return the bytes of each kind that are alive at the peak."""
        alive: dict[str, int] = {}
        for event in self.events[: int(self.allocated.argmax()) + 1]:
            alive[event.kind] = alive.get(event.kind, 0) + event.size
        return {kind: size for kind, size in alive.items() if size}

    def each_at_most(self) -> dict[str, int]:
        """Return the most bytes of each kind, whenever that is: their sum is what a static estimate says."""
        most: dict[str, int] = {}
        for kind in dict.fromkeys(event.kind for event in self.events):
            sizes = np.array([event.size if event.kind == kind else 0 for event in self.events], np.int64)
            most[kind] = int(np.cumsum(sizes).max())
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
    when the layer is done; nothing is fetched ahead.  In the backward pass of a layer lives the gradient of
    what it gives and the gradient of its largest tensor.  The loss has its logits, a copy in fp32 and their
    logarithms at once.
    """
    described = model_of(model)
    chunks = layers_of_rank(described, run, index)
    events = list(_lasting(chunks, run))
    for backward, *where in _order(run, index):
        layers = chunks[where[1]]
        events += _backward(layers, run, where) if backward else _forward(layers, run, where)
    return Step(tuple(events))


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
    for name, count, ranks in zip(
        ("", "experts' "), held_parameters(chunks), (run.data, run.data // run.expert), strict=True
    ):
        if not count:
            continue
        states = model_states(
            parameters=count,
            ranks=ranks,
            stage=run.stage,
            convention=run.convention,
            offload=run.offload,
        )
        for item in states.terms:
            if item.name == "gradients" and run.convention != "megatron":
                continue
            kind = item.name if item.name in ("weights", "gradients") else "optimizer states"
            if item.value:
                yield Event("between steps", (name + item.name,), kind, _up(Fraction(item.value)))
    if run.bucket:
        yield Event("between steps", ("bucket",), "buffers", 2 * run.bucket)


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
            yield Event(when, (*where, place, "checkpoint"), "activations", layer.entering)
        for number in again:
            yield Event(when, (*where, place, number), _kind(layer), -layer.kept[number].size)
        yield from _gathered(layer, run, when, (*where, place, "fwd"), taken=False)


def _backward(layers: list[Layer], run: Run, where: Place) -> Iterator[Event]:
    for place, layer in reversed(list(enumerate(layers))):
        when = f"backward pass of micro-batch {where[0]}, {layer.name} {place}"
        yield from _gathered(layer, run, when, (*where, place, "bwd"), taken=True)
        for number in _made_again(layer, run):
            yield Event(when, (*where, place, number), _kind(layer), layer.kept[number].size)
        working = {"stream": layer.entering, "largest": max((t.size for t in layer.kept), default=0)}
        if layer.logits:
            working = {"logits": 2 * layer.logits, "largest": 4 * layer.logits}
        for name, size in working.items():
            yield Event(when, (*where, place, f"gradient of {name}"), "gradients of activations", size)
        yield from _gradients(layer, run, when, where, place)
        for name, size in working.items():
            yield Event(when, (*where, place, f"gradient of {name}"), "gradients of activations", -size)
        for number, tensor in enumerate(layer.kept):
            yield Event(when, (*where, place, number), _kind(layer), -tensor.size)
        if run.recompute == "full" and not layer.is_end:
            yield Event(when, (*where, place, "checkpoint"), "activations", -layer.entering)
        yield from _gathered(layer, run, when, (*where, place, "bwd"), taken=False)


def _gradients(layer: Layer, run: Run, when: str, where: Place, place: int) -> Iterator[Event]:
    """Yield the gradients of a layer's parameters: whole ones, those that are sent on, or a rank's share."""
    if run.convention == "megatron":
        return
    each = Fraction(conventions()[run.convention]["gradients"])
    counts = (layer.parameters, run.data), (layer.expert_parameters, run.data // run.expert)
    sent = run.stage >= 2 or run.offload != "none"
    whole = _up(each * sum(count for count, _ in counts))
    if sent:
        yield Event(when, (*where, place, "whole gradient"), "gradients", whole)
    if where[0] == 0 and run.offload == "none":
        kept = sum(_up(each * Fraction(count, ranks)) for count, ranks in counts) if sent else whole
        yield Event(when, (where[1], place, "gradient"), "gradients", kept)
    if sent:
        yield Event(when, (*where, place, "whole gradient"), "gradients", -whole)


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
