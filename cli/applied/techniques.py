"""What `frugal apply` can do to an encoder: registered techniques, each in one setting, written down.

>>> find("nf4").name, find("2:4").name
('quant.nf4', 'prune.magnitude.n_m')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cli.applied.model import Layer, Model
from cli.applied.structure import (
    RADIUS,
    RANK,
    adapted,
    fewer_heads,
    fewer_neurons,
    inputs_of,
    int8_products,
    merged,
    shared,
    windowed,
)
from cli.applied.weights import (
    CENTROIDS,
    GPTQ_BITS,
    GPTQ_DAMPING,
    OnMatrix,
    codebook16,
    gptq4,
    half_rank,
    int8,
    largest_half,
    nf4,
    two_of_four,
)
from refimpl.errors import UnknownNameError
from refimpl.numerics import IntArray

__all__ = ["APPLICABLE", "Applicable", "find"]

Texts = Sequence[IntArray]
SPARSE_KERNEL = "a sparse kernel"


@dataclass(frozen=True)
class Applicable:
    """A technique with its setting.

    Attributes
    ----------
    name, aliases
        The record's name, and shorter ones.
    setting
        What is chosen where the technique leaves a choice.
    apply
        From the model and calibration texts, the models to compare: before and after.
    with_
        Names of other techniques that take part.
    calibrated
        Whether it looks at the calibration texts.
    needs
        What it takes to save the operations that are counted.
    unsaveable
        Why no checkpoint can hold the result; empty if one can.
    """

    name: str
    aliases: tuple[str, ...]
    setting: str
    apply: Callable[[Model, Texts], tuple[Model, Model]]
    with_: tuple[str, ...] = ()
    calibrated: bool = False
    needs: str = ""
    unsaveable: str = ""


def _matrices(f: OnMatrix) -> Callable[[Model, Texts], tuple[Model, Model]]:
    """Return what applies `f` to the six matrices of every block."""

    def changed(layer: Layer) -> Layer:
        return replace(layer, matrices={name: f(m.values) for name, m in layer.matrices.items()})

    return lambda model, _: (model, model.with_layers([changed(layer) for layer in model.layers]))


def _gptq(model: Model, texts: Texts) -> tuple[Model, Model]:
    """Quantise block after block, each on what the blocks before it, quantised, give."""
    states = [model.states(ids)[0] for ids in texts]
    layers = []
    for layer in model.layers:
        inputs = inputs_of(layer, states)
        rounded = {name: gptq4(m.values, inputs[name]) for name, m in layer.matrices.items()}
        layers.append(replace(layer, matrices=rounded))
        states = [layers[-1](x) for x in states]
    return model, model.with_layers(layers)


def _whole(f: Callable[[Model], Model]) -> Callable[[Model, Texts], tuple[Model, Model]]:
    return lambda model, _: (model, f(model))


APPLICABLE = (
    Applicable("quant.uniform", ("int8",), "int8 weights, a scale a column", _matrices(int8)),
    Applicable(
        "quant.llm_int8",
        ("llm_int8",),
        "int8 weights and activations, outliers from 6 apart",
        _whole(int8_products),
        unsaveable="it quantises activations as they come, which no weights can say",
    ),
    Applicable(
        "quant.nf4",
        ("nf4", "quant.double"),
        "NF4 in blocks of 64, scales in 8 bits",
        _matrices(nf4),
        with_=("quant.double",),
    ),
    Applicable("quant.codebook", ("codebook",), f"{CENTROIDS} centroids a matrix", _matrices(codebook16)),
    Applicable(
        "quant.gptq",
        ("gptq",),
        f"{GPTQ_BITS} bits, a scale a column, damping {GPTQ_DAMPING:g}",
        _gptq,
        calibrated=True,
    ),
    Applicable(
        "prune.magnitude", ("magnitude",), "half of each matrix", _matrices(largest_half), needs=SPARSE_KERNEL
    ),
    Applicable(
        "prune.magnitude.n_m",
        ("2:4", "n_m"),
        "2 of 4 along the inputs",
        _matrices(two_of_four),
        needs=SPARSE_KERNEL,
    ),
    Applicable(
        "prune.structured.heads",
        ("heads",),
        "a quarter of the heads",
        lambda model, texts: (model, fewer_heads(model, texts)),
        calibrated=True,
        unsaveable="a BERT's config.json has one number of heads, which also says how wide they are",
    ),
    Applicable(
        "prune.structured",
        ("neurons",),
        "a quarter of the neurons",
        lambda model, texts: (model, fewer_neurons(model, texts)),
        calibrated=True,
    ),
    Applicable("compress.truncated_svd", ("svd",), "half of the break-even rank", _matrices(half_rank)),
    Applicable("compress.layer_sharing", ("sharing",), "the middle two blocks share weights", _whole(shared)),
    Applicable(
        "attention.sliding_window",
        ("window",),
        f"{RADIUS} tokens on each side",
        _whole(windowed),
        unsaveable="a BERT's config.json has no place for a window",
    ),
    Applicable(
        "peft.lora.merge",
        ("lora",),
        f"rank {RANK} on Q and V, drawn; before: unmerged",
        lambda model, _: (adapted(model), merged(model)),
    ),
)


def find(name: str) -> Applicable:
    """Return the technique of that name or alias.

    Raises
    ------
    UnknownNameError
        If there is none; the message offers the nearest names.
    """
    known = {key: one for one in APPLICABLE for key in (one.name, *one.aliases)}
    if name not in known:
        raise UnknownNameError("technique that can be applied", name, known)
    return known[name]
