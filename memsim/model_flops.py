"""Operations of a model's matrix products, part by part of its description: what is really multiplied.

>>> sparse = model_flops(model="deepseekmoe-16b", sequence=4096)
>>> round(float(sparse.total) / 1e12, 1)  # DeepSeek's rule, with ideal widths and no routers, says 74.4
75.9
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, Term, estimate, term
from memsim.model import Model, Part, Stack
from memsim.moe import activated_model
from memsim.parts import PARTS, Counted
from memsim.sparse_model import sparse
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = ["model_flops"]

Direction = Literal["forward", "both"]
# Operations for one weight and token, a multiply-add being two: the backward pass has two products for each.
PER_WEIGHT = {"forward": 2, "both": 6}


def _sample(rng: np.random.Generator, *, layers: int, experts: int, sequence: int, **options: Any) -> Case:
    heads = int(rng.integers(1, 5))
    described = sparse(
        layers=layers,
        moe_layers=int(rng.integers(0, layers + 1)),
        width=int(rng.integers(1, 30)),
        heads=heads,
        key_heads=1 if options["grouped"] else None,
        head_width=int(rng.integers(1, 9)),
        experts=experts,
        active=int(rng.integers(1, experts + 1)),
        expert_width=int(rng.integers(1, 40)),
        ffn=int(rng.integers(1, 60)),
        shared_width=int(rng.integers(0, 40)),
        vocabulary=int(rng.integers(0, 60)),
        gated=options["gated"],
        tied=bool(rng.integers(2)),
        norm="rms",
    )
    return Case((), {"model": described, "sequence": sequence, "direction": options["direction"]})


@technique(
    "cost.moe_flops.matrices",
    entries=(45, 57),
    kind="cost",
    source=Source("Dai et al. 2024", "arXiv:2401.06066", "section 3: the layers whose products are counted"),
    axes={"layers": (1, 5), "experts": (1, 6), "sequence": (1, 12)},
    options={"grouped": (False, True), "gated": (False, True), "direction": ("forward", "both")},
    sample=_sample,
    edges=({"layers": 1, "experts": 1, "sequence": 1}, {"layers": 4, "experts": 6, "grouped": True}),
    exact=True,
)
def model_flops(*, model: str | Model, sequence: int, direction: Direction = "both") -> Estimate:
    """Return the FLOPs of the matrix products of a model over one sequence, of the activated experts only.

    Parameters
    ----------
    model : str or Model
        A name (`memsim.model.model_names`), or a description.
    sequence : int
        Tokens l of the sequence; in an encoder and decoder, of each.
    direction : {"forward", "both"}
        The forward pass, or three times as much.

    Returns
    -------
    Estimate
        In FLOP: a term for each part with matrices, and one for its scores where it attends.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    OptionError
        If a part is none that is counted here, such as Mamba-2, or an option is out of range.

    Notes
    -----
    Scores count in full, without the half that a causal mask saves; an embedding is looked up and costs
    nothing; a head that is tied is multiplied all the same.

    Examples
    --------
    >>> model_flops(model="gpt2", sequence=1024, direction="forward").total
    291648307200
    """
    whole("sequence", sequence)
    if direction not in PER_WEIGHT:
        raise OptionError(f"direction: expected 'forward' or 'both', got {direction!r}")
    described = activated_model(model)
    terms = [
        found
        for stack in described.stacks
        for part in stack.parts
        for found in _terms(described, stack, part, sequence, PER_WEIGHT[direction])
    ]
    passes = "a forward pass" if direction == "forward" else "a forward and a backward pass"
    return estimate(
        f"FLOPs of {passes} of {described.name} over a sequence",
        terms,
        leaves_out="norms, activations, softmax, the causal mask's half",
    )


def _terms(model: Model, stack: Stack, part: Part, sequence: int, per_weight: int) -> list[Term]:
    if part.kind in ("embedding", "norm"):
        return []
    weights, sizes = _matrices(part, model.width)
    layers = "" if stack.layers == 1 else "L*"
    values: dict[str, int] = {**sizes, "l": sequence} | ({"L": stack.layers} if layers else {})

    def one(name: str, formula: str) -> Term:
        return term(f"{stack.name}: {name}", f"{per_weight}l*{layers}{formula}", values, "FLOP", model.source)

    found = [one(part.name, f"({weights})")]
    if part.kind == "attention":
        found.append(one(f"scores of {part.name}", "l*H*2k"))
    if part.kind == "latent_attention":
        found.append(one(f"scores of {part.name}", "l*H*(n + r + v)"))
    if part.kind == "mamba":  # decay and drive, which are made and applied, and the read-out: `memsim.ssm`
        found.append(one("scan", "4i*n"))
    return found


def _matrices(part: Part, width: int) -> Counted:
    """Return the formula of the weights that are multiplied with every token: no biases, no norms."""
    if part.kind == "mamba2":
        raise OptionError("model_flops: what a scan of Mamba-2 computes in chunks is not counted here")
    if part.kind == "mamba":  # in, to Δ, B and C, Δ back, out, and the taps of the convolution
        names = {"i": "inner", "k": "kernel", "r": "rank", "n": "state"}
        values = {"d": width, **{letter: part.sizes[name] for letter, name in names.items()}}
        return "d*2i + i*(r + 2n) + r*i + i*d + i*k", values
    bare: Mapping[str, str | bool] = {
        k: v for k, v in part.choices.items() if k not in ("bias", "sinks", "tied")
    }
    formula, sizes = PARTS[part.kind](replace(part, choices=bare), width, 1)
    if part.kind == "latent_attention":
        formula = formula.replace(" + q + ", " + ").replace(" + c + ", " + ")
    return formula, sizes
