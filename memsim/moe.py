"""What mixture-of-experts models hold, activate for a token, compute and exchange.

>>> counts = moe_parameters(model="mixtral-8x7b")
>>> counts.total.total, counts.activated.total
(46702792704, 12879925248)
>>> rule = dict(width=4096, sequence=4096, vocabulary=102400)  # DeepSeek 67B's half: 28.5% of 2057.5 TFLOP
>>> print(moe_flops(layers=62, activated=12 + 4, expert_width=1408, **rule).explain()[1])
feed-forward networks: 6l*L*n*3d*f = 6*4096*62*16*3*4096*1408 = 421.8 TFLOP
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.model import Model, Part
from memsim.parameters import model_of, parameters
from memsim.sparse_model import sparse
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = [
    "MoeParameters",
    "activated_model",
    "activated_parameters",
    "moe_all_to_all",
    "moe_flops",
    "moe_parameters",
]

_ALL_TO_ALL = "Lepikhin et al. 2020, arXiv:2006.16668, Algorithm 2"
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


def moe_all_to_all(
    *,
    experts: Quantity,
    capacity: Quantity,
    width: Quantity,
    ranks: Quantity,
    itemsize: Quantity = 2,
    held: Quantity | None = None,
    direction: Literal["forward", "backward", "both"] = "forward",
) -> Estimate:
    """Return the bytes that a rank sends in the all-to-alls of one layer under expert parallelism.

    Parameters
    ----------
    experts : int
        E of the layer.
    capacity : int
        C, places for the tokens of one rank in each expert's buffer; empty ones travel too.
    width, ranks, itemsize : int
        d, p, and bytes an element.
    held : int, optional
        Experts on the rank that is asked about.  Default: E / p, which must be whole.
    direction : {"forward", "backward", "both"}
        A pass has two all-to-alls, to the experts and back; the backward pass sends gradients.

    Returns
    -------
    Estimate
        In bytes; 0 with one rank.

    Raises
    ------
    OptionError
        If a number is not whole and above 0, `held` is not below E or there is no even share, or `direction`
        is unknown.
    DTypeError
        If a number is not whole.

    Notes
    -----
    A rank sends its tokens to the experts that others hold, and to others what its own experts made of
    theirs.  Together, with an even share, that is ``2 (p - 1)/p E C d`` elements.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, section 3.2 and Algorithm 2.

    Examples
    --------
    >>> moe_all_to_all(experts=8, capacity=1024, width=4096, ranks=8).total == 2 * 7 * 1024 * 4096 * 2
    True
    """
    sizes = {"E": experts, "C": capacity, "d": width, "p": ranks, "e": itemsize}
    values: dict[str, Number] = {name: whole(name, exact(size, name)) for name, size in sizes.items()}
    share, rest = divmod(int(values["E"]), int(values["p"]))
    if held is None and rest:
        raise OptionError(f"held: {experts} experts on {ranks} ranks have no even share; say how many")
    values["h"] = share if held is None else whole("held", exact(held, "held"), 0)
    if values["h"] > values["E"]:
        raise OptionError(f"held: expected at most E={experts} experts on a rank, got {held}")
    if direction not in ("forward", "backward", "both"):
        raise OptionError(f"direction: expected 'forward', 'backward' or 'both'; got {direction!r}")
    ways = ("forward", "backward") if direction == "both" else (direction,)
    formulas = {"dispatch": "(E - h)*C*d*e", "combine": "(p - 1)*h*C*d*e"}
    return estimate(
        f"all-to-alls of a layer with experts, {direction}",
        [
            term(f"{way}, {name}", formula, values, "B", _ALL_TO_ALL)
            for way in ways
            for name, formula in formulas.items()
        ],
        leaves_out="indices and gates of the tokens, the router's gradient",
    )
