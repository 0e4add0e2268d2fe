"""What mixture-of-experts models hold, activate for a token, and compute.

>>> counts = moe_parameters(model="mixtral-8x7b")
>>> counts.total.total, counts.activated.total
(46702792704, 12879925248)
>>> shape = dict(layers=62, width=4096, sequence=4096, vocabulary=102400)  # DeepSeekMoE 145B
>>> print(moe_flops(**shape, activated=4 + 12, expert_width=1408).explain()[1])
feed-forward networks: 6l*L*n*3d*f = 6*4096*62*16*3*4096*1408 = 421.8 TFLOP
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.model import Model, Part
from memsim.parameters import model_of, parameters
from memsim.sparse_model import sparse
from memsim.training_memory import positive_values
from memsim.units import Quantity
from refimpl.registry import Case, Source, technique

__all__ = [
    "MoeParameters",
    "activated_model",
    "activated_parameters",
    "moe_flops",
    "moe_parameters",
]

_RULE = "DeepSeek LLM, arXiv:2401.02954, eq. 2"


class MoeParameters(NamedTuple):
    """All parameters of a model, and those that a token activates, an estimate each."""

    total: Estimate
    activated: Estimate


def _sample(
    rng: np.random.Generator, *, layers: int, moe_layers: int, experts: int, active: int, **options: bool
) -> Case:
    described = sparse(
        layers=layers,
        moe_layers=min(moe_layers, layers),
        width=int(rng.integers(1, 40)),
        heads=int(rng.integers(1, 5)),
        head_width=int(rng.integers(1, 9)),
        experts=experts,
        active=min(active, experts),
        expert_width=int(rng.integers(1, 50)),
        ffn=int(rng.integers(1, 90)),
        shared_width=int(rng.integers(1, 50)) * options["shared"],
        vocabulary=int(rng.integers(1, 99)) * options["embedded"],
        gated=options["gated"],
        tied=options["tied"],
    )
    return Case((), {"model": described})


@technique(
    "cost.moe_parameters",
    entries=(45, 58),
    kind="cost",
    source=Source("Cai et al. 2024", "arXiv:2407.06204", "table of MoE designs; each model's own report"),
    axes={"layers": (1, 6), "moe_layers": (0, 6), "experts": (1, 9), "active": (1, 9)},
    options={
        "gated": (False, True),
        "shared": (False, True),
        "embedded": (False, True),
        "tied": (False, True),
    },
    sample=_sample,
    edges=(
        {"layers": 1, "moe_layers": 0},
        {"layers": 3, "moe_layers": 3, "experts": 1, "active": 1},
        {"layers": 2, "moe_layers": 1, "experts": 5, "active": 5, "shared": True},
        {"layers": 4, "moe_layers": 2, "experts": 8, "active": 2, "embedded": True, "tied": False},
    ),
    exact=True,
)
def moe_parameters(*, model: str | Model) -> MoeParameters:
    """Return how many parameters a model has, and how many of them one token activates.

    Parameters
    ----------
    model : str or Model
        A name (`memsim.model.model_names`), or a description, such as `memsim.sparse_model.sparse` makes.

    Returns
    -------
    MoeParameters
        Two estimates, exact, a term for each kind of tensors.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    OptionError
        If sizes do not fit together.

    Notes
    -----
    Everything but experts that are not chosen counts as activated: embeddings, heads and routers too.  What
    papers call activated leaves out now one of them and now another.

    References
    ----------
    .. [1] Cai et al., 2024, arXiv:2407.06204, the table of MoE designs that the lecture shows.

    Examples
    --------
    >>> [estimate.total for estimate in moe_parameters(model="deepseekmoe-16b")]
    [16375728128, 2828650496]
    """
    return MoeParameters(parameters(model=model), activated_parameters(model=model))


def activated_parameters(*, model: str | Model) -> Estimate:
    """Return the parameters that a token activates; see `moe_parameters`.

    Examples
    --------
    >>> activated_parameters(model="gpt2").total == parameters(model="gpt2").total
    True
    """
    found = parameters(model=activated_model(model))
    return replace(found, name=f"activated {found.name}")


def activated_model(model: str | Model) -> Model:
    """Return the model that one token sees: of the experts of each layer only those it is sent to.

    Examples
    --------
    >>> activated_model("mixtral-8x7b").part("block", "experts").sizes["experts"]
    2
    """
    described = model_of(model)
    stacks = (replace(s, parts=tuple(map(_chosen, s.parts))) for s in described.stacks)
    return replace(described, stacks=tuple(stacks))


def _chosen(part: Part) -> Part:
    if part.kind != "experts":
        return part
    return replace(part, sizes={**part.sizes, "experts": part.sizes["active"]})


def _sample_flops(
    rng: np.random.Generator, *, layers: int, sequence: int, activated: int, sized: bool
) -> Case:
    width = 8 * int(rng.integers(1, 60))
    shape = {"layers": layers, "width": width, "sequence": sequence, "vocabulary": int(rng.integers(1, 999))}
    wide = {"expert_width": int(rng.integers(1, 200))} if sized else {}
    return Case((), {**shape, "activated": activated, **wide})


@technique(
    "cost.moe_flops",
    entries=(57,),
    kind="cost",
    source=Source(
        "Dai et al. 2024", "arXiv:2401.06066", "tables 1 to 6, by DeepSeek LLM, arXiv:2401.02954, eq. 2"
    ),
    axes={"layers": (1, 100), "sequence": (1, 8192), "activated": (1, 20)},
    options={"sized": (False, True)},
    sample=_sample_flops,
    edges=({"layers": 1, "sequence": 1, "activated": 1}, {"layers": 62, "activated": 16, "sized": True}),
    exact=True,
)
def moe_flops(
    *,
    layers: Quantity,
    width: Quantity,
    sequence: Quantity,
    vocabulary: Quantity,
    activated: Quantity = 1,
    expert_width: Quantity | None = None,
) -> Estimate:
    """Return the FLOPs of a forward and a backward pass over one sequence, by the rule of DeepSeek's tables.

    Parameters
    ----------
    layers, width, sequence, vocabulary : int
        L, d, l and V.
    activated : int or Fraction
        n, networks that a token goes through in each layer, shared experts among them: 1 in a dense model.
    expert_width : int, optional
        f, with three matrices of d x f in each network.  Default: each is a standard network of 8 d².

    Returns
    -------
    Estimate
        In FLOP: ``l (6 L (4 d² + n 8 d²) + 12 L d l + 6 d V)``.

    Raises
    ------
    OptionError
        If a number is not above 0.

    Notes
    -----
    The rule is that of a model whose layers are all alike, with as many key heads as heads, no routers, no
    causal mask, and experts of the ideal width unless their own is given.  `memsim.model_flops` counts what a
    model really has.

    References
    ----------
    .. [1] Bi et al., 2024, arXiv:2401.02954, eq. 2: ``72 L d² + 12 L d l`` a token, and 6 d V for the head.
    .. [2] Dai et al., 2024, arXiv:2401.06066, tables 1, 2, 3, 5 and 6.

    Examples
    --------
    >>> dense = moe_flops(layers=30, width=4096, sequence=4096, vocabulary=102400)  # DeepSeek 7B: 183.5
    >>> round(float(dense.total) / 1e12, 1)
    183.5
    """
    values = positive_values(L=layers, d=width, l=sequence, V=vocabulary, n=activated)
    networks = "6l*L*n*8d²"
    if expert_width is not None:
        values |= positive_values(f=expert_width)
        networks = "6l*L*n*3d*f"
    terms = {
        "attention projections": "6l*L*4d²",
        "feed-forward networks": networks,
        "scores and mixing": "12L*d*l²",
        "head": "6l*d*V",
    }
    return estimate(
        "FLOPs of a forward and a backward pass over a sequence",
        [term(name, formula, values, "FLOP", _RULE) for name, formula in terms.items()],
        leaves_out="routers, norms, grouped key heads, the causal mask's half",
    )
