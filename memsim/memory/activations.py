"""Activations of a micro-batch, operator by operator: what autograd keeps, to the last byte.

>>> kept = activations(model="llama-2-7b", batch=1, sequence=4096)
>>> round(float(kept.total) / 2**30, 3)
19.317
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from memsim.estimate import Estimate, Term, estimate, term
from memsim.memory.kept_tensors import Keeping, Kept, kept_by
from memsim.memory.korthikanti import RECOMPUTE, Recompute
from memsim.memory.rank_model import ENDS, rank_model
from memsim.model import Model, Stack, dense
from memsim.parameters import model_of
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = ["activations", "layer_activations"]

_SOURCE = "Korthikanti et al. 2022, arXiv:2205.05198, section 4.1, applied to each operator"


def _sample(
    rng: np.random.Generator, *, layers: int, heads: int, tensor: int, batch: int, **options: Any
) -> Case:
    heads *= tensor
    keys = tensor if options.pop("grouped") else heads
    described = dense(
        layers=layers,
        width=heads * int(rng.integers(1, 4)),
        heads=heads,
        key_heads=keys,
        ffn=tensor * int(rng.integers(1, 20)),
        vocabulary=tensor * int(rng.integers(1, 30)),
        positions=99 if rng.integers(2) else 0,
        **{name: options.pop(name) for name in ("gated", "norm")},
    )
    shape = {"batch": batch, "sequence": tensor * int(rng.integers(1, 5)), "tensor": tensor}
    return Case((), {"model": described, **shape, **options})


@technique(
    "cost.training_memory.activations",
    entries=(98,),
    kind="cost",
    source=Source("Korthikanti et al. 2022", "arXiv:2205.05198", "section 4.1, applied to each operator"),
    axes={"layers": (1, 4), "heads": (1, 3), "tensor": (1, 4), "batch": (1, 3)},
    options={
        "gated": (False, True),
        "grouped": (False, True),
        "norm": ("layer", "rms"),
        "attention": ("standard", "flash"),
        "dropout": (False, True),
        "fused_gate": (False, True),
        "fused_norm": (False, True),
        "sequence_parallel": (False, True),
        "recompute": RECOMPUTE,
    },
    sample=_sample,
    edges=(
        {"layers": 1, "heads": 1, "tensor": 1, "batch": 1, "attention": "standard", "dropout": True},
        {"tensor": 4, "grouped": True, "sequence_parallel": True, "recompute": "selective"},
    ),
    exact=True,
)
def activations(
    *,
    model: str | Model,
    batch: int,
    sequence: int,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    attention: Any = "flash",
    dropout: bool = False,
    fused_gate: bool = False,
    fused_norm: bool = True,
    itemsize: int = 2,
) -> Estimate:
    """Return what one rank keeps of the forward pass of one micro-batch until its backward pass.

    Parameters
    ----------
    model : str or Model
        A name, or a description; a stage of a pipeline is one too (`memsim.memory.rank_model.stage_model`).
    batch, sequence : int
        b sequences of s tokens.
    tensor : int
        t ranks that divide the matrices.
    sequence_parallel : bool
        Whether those ranks divide norms and dropouts along the sequence too.
    recompute : {"none", "selective", "full"}
        Nothing; attention's scores; everything of a layer but its input.
    attention : {"standard", "flash"}
        With matrices of scores, or without.
    dropout : bool
        On scores, on what is added to the stream, and on the embedding.
    fused_gate, fused_norm : bool
        A kernel for a gated product, which keeps one tensor less, and one for RMSNorm.
    itemsize : int
        e, bytes of an activation.

    Returns
    -------
    Estimate
        In bytes, exact: a term for each part of each kind of layer.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    OptionError
        If an option is out of range, t does not divide the model, or a part is of a kind that nothing is
        known of here, such as Mamba-2.

    Notes
    -----
    It is what PyTorch's autograd saves when every operator above is one node: LayerNorm and RMSNorm fused,
    the loss in fp32.  Experts are taken as evenly loaded.  Two norms that read the same stream, as in a
    parallel block, keep it once, and are counted twice here.

    References
    ----------
    .. [1] Korthikanti et al. 2022, arXiv:2205.05198, section 4.1: for a GPT, the same sum.

    Examples
    --------
    >>> shape = dict(model="gpt3-175b", batch=1, sequence=2048, attention="standard", dropout=True)
    >>> kept = activations(**shape)
    >>> layers = sum(item.value for item in kept.terms if item.name.startswith("block"))
    >>> layers - 96 * 2 * 8 * 2048  # the statistics of norms, which the paper leaves out
    275414777856
    """
    if recompute not in RECOMPUTE:
        raise OptionError(f"recompute: expected one of {', '.join(RECOMPUTE)}; got {recompute!r}")
    if attention not in ("standard", "flash"):
        raise OptionError(f"attention: expected 'standard' or 'flash'; got {attention!r}")
    how = Keeping(attention, bool(dropout), bool(fused_gate), bool(fused_norm))
    b, s = whole("batch", batch), whole("sequence", sequence)
    divided = whole("tensor", tensor) if sequence_parallel else 1
    values = {"b": b, "s": s, "T": b * s, "e": whole("itemsize", itemsize), "u": divided}
    described = rank_model(model_of(model), tensor=tensor)
    terms = [
        found for stack in described.stacks for found in _terms(described, stack, how, recompute, values)
    ]
    if not terms:
        raise OptionError(f"{described.name}: there is no part of a model")
    return estimate(
        f"activations of a micro-batch, {recompute} recomputed",
        terms,
        leaves_out="tables of rotary positions, workspaces, what is only alive inside an operator",
    )


def layer_activations(kept: Estimate) -> list[Term]:
    """Return the terms of the layers, without embeddings and output.

    >>> len(layer_activations(activations(model="gpt2", batch=1, sequence=8)))
    4
    """
    return [item for item in kept.terms if item.name.partition(":")[0] not in ENDS]


def _terms(
    model: Model, stack: Stack, how: Keeping, recompute: Recompute, values: dict[str, int]
) -> Iterator[Term]:
    """Yield what the layers of one stack keep, a term for each part."""
    layers = "" if stack.layers == 1 else "L*"
    known = values | ({"L": stack.layers} if layers else {})
    if recompute == "full" and stack.name not in ENDS:
        known |= {"d": model.width}
        yield term(f"{stack.name}: checkpoints", f"{layers}e*T*d/u", known, "B", _SOURCE)
        return
    for part in stack.parts:
        kept = kept_by(part, model.width, how)
        if recompute == "selective":
            kept = [one for one in kept if not one.of_scores]
        if kept:
            yield _sum(f"{stack.name}: {part.name}", kept, layers, known)
    if stack.name == "embeddings" and _read_directly(model, stack):
        known |= {"d": model.width}
        yield term("embeddings: what the first layer reads", "e*T*d", known, "B", _SOURCE)


def _sum(name: str, kept: list[Kept], layers: str, known: dict[str, int]) -> Term:
    sizes = {letter: size for one in kept for letter, size in one.sizes.items()}
    formula = " + ".join(one.formula for one in kept)
    return term(name, f"{layers}({formula})" if layers else formula, known | sizes, "B", _SOURCE)


def _read_directly(model: Model, embeddings: Stack) -> bool:
    """Return whether no norm stands between the embedding and the first map: the maps keep it then."""
    following = [stack for stack in model.stacks if stack.name not in ENDS]
    first = following[0].parts[0] if following else None
    return first is not None and "norm" not in (first.kind, embeddings.parts[-1].kind)
