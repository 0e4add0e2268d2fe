"""Fine-tuning by low-rank adapters: what is trained, and what the frozen model takes (LoRA, QLoRA).

>>> adapter_parameters(model="llama-2-7b", rank=8, targets="queries and values").total
4194304
>>> states = adapter_states(model="llama-2-7b", rank=64, targets="all", base="nf4")
>>> round(float(states["frozen matrices"]) / 2**30, 2), round(float(states.total) / 2**30, 2)
(3.11, 5.98)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Literal

from memsim.compression import nf4_bits
from memsim.estimate import Estimate, Term, estimate, term
from memsim.memory.model_states import model_states
from memsim.memory.rank_model import ENDS
from memsim.model import Model, Part
from memsim.parameters import model_of, parameters
from memsim.units import Quantity
from refimpl.errors import OptionError
from refimpl.validation import whole

__all__ = ["BASES", "TARGETS", "Base", "Targets", "adapter_parameters", "adapter_states"]

Targets = Literal["queries and values", "attention", "all"]
TARGETS: tuple[Targets, ...] = ("queries and values", "attention", "all")
Base = Literal["16bit", "int8", "nf4"]
BASES: tuple[Base, ...] = ("16bit", "int8", "nf4")
_LORA = "Hu et al. 2021, arXiv:2106.09685, section 4.1"
_QLORA = "Dettmers et al. 2023, arXiv:2305.14314, section 3"


def adapter_parameters(*, model: str | Model, rank: int, targets: Targets = "all") -> Estimate:
    """Return the parameters of adapters: for a matrix of n x m, r n + r m.

    Parameters
    ----------
    model : str or Model
        A name, or a description.
    rank : int
        r.
    targets : {"queries and values", "attention", "all"}
        Which matrices of the layers have one: two or all four of attention, or those of networks too.

    Returns
    -------
    Estimate
        In parameters, exact.

    Raises
    ------
    UnknownNameError
        If no model has that name.
    OptionError
        If an option is out of range, or the model has nothing that could have an adapter.

    References
    ----------
    .. [1] Hu et al. 2021, arXiv:2106.09685, section 4.1.

    Examples
    --------
    >>> adapter_parameters(model="llama-2-7b", rank=16, targets="all").total
    39976960
    """
    if targets not in TARGETS:
        raise OptionError(f"targets: expected one of {', '.join(TARGETS)}; got {targets!r}")
    described, r = model_of(model), whole("rank", rank)
    terms: list[Term] = []
    for stack in described.stacks:
        if stack.name in ENDS:
            continue
        for part in stack.parts:
            found = list(_matrices(part, described.width, targets))
            if found:
                terms.append(
                    term(
                        f"{stack.name}: {part.name}",
                        f"L*r*({' + '.join(formula for formula, _ in found)})",
                        {"L": stack.layers, "r": r} | {k: v for _, sizes in found for k, v in sizes.items()},
                        "parameters",
                        _LORA,
                    )
                )
    if not terms:
        raise OptionError(f"{described.name}: no part of it takes an adapter here")
    return estimate(f"adapters of rank {r}", terms, leaves_out="biases, embeddings, heads, routers, Mamba")


def adapter_states(
    *,
    model: str | Model,
    rank: int,
    targets: Targets = "all",
    base: Base = "16bit",
    convention: str = "zero",
    ranks: Quantity = 1,
    stage: Literal[0, 1, 2, 3] = 0,
) -> Estimate:
    """Return the states of a device that trains adapters of a frozen model.

    Parameters
    ----------
    model, rank, targets
        As in `adapter_parameters`.
    base : {"16bit", "int8", "nf4"}
        How the matrices of the layers are kept; the rest of the model is in 16 bits.  NF4 has blocks of 64
        with doubly quantised scales, int8 an fp32 scale for each row.
    convention, ranks, stage
        Of the adapters' states, as in `memsim.memory.model_states.model_states`.

    Returns
    -------
    Estimate
        In bytes.

    Raises
    ------
    UnknownNameError
        If no model or convention has that name.
    OptionError
        If an option is out of range.

    References
    ----------
    .. [1] Dettmers et al. 2023, arXiv:2305.14314, section 3.

    Examples
    --------
    >>> full = adapter_states(model="llama-2-7b", rank=8, targets="queries and values")
    >>> full["frozen matrices"] + full["other weights"] == 2 * 6738415616
    True
    """
    if base not in BASES:
        raise OptionError(f"base: expected one of {', '.join(BASES)}; got {base!r}")
    described = model_of(model)
    trained = adapter_parameters(model=described, rank=rank, targets=targets).total
    total, matrices = int(parameters(model=described).total), _frozen(described)
    bits: dict[Base, Fraction] = {
        "16bit": Fraction(16),
        "int8": Fraction(8),
        "nf4": Fraction(nf4_bits().total),
    }
    terms = [
        term("frozen matrices", "n*q/8", {"n": matrices, "q": bits[base]}, "B", _QLORA),
        term("other weights", "2*(Ψ - n)", {"Ψ": total, "n": matrices}, "B", _LORA),
    ]
    states = model_states(parameters=int(trained), ranks=ranks, stage=stage, convention=convention)
    adapters = [replace(item, name=f"adapters' {item.name}") for item in states.terms]
    return estimate(
        f"states of adapters on a frozen model, {base}",
        [*terms, *adapters],
        leaves_out="activations, buffers, scales of int8, one offset of scales a tensor",
    )


def _frozen(model: Model) -> int:
    """Return the parameters of all matrices of the layers: what quantisation takes."""
    weights = 0
    for stack in model.stacks:
        for part in stack.parts if stack.name not in ENDS else ():
            bare = replace(part, choices={k: v for k, v in part.choices.items() if k != "bias"})
            if part.kind in ("attention", "ffn", "experts", "latent_attention"):
                one = replace(model, stacks=(replace(stack, parts=(bare,)),))
                weights += int(parameters(model=one).total)
    return weights


def _matrices(part: Part, width: int, targets: Targets) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield rows and columns of each matrix that has an adapter, as a formula of their sum."""
    if part.kind == "attention":
        heads = part.sizes["heads"]
        sizes = {
            "d": width,
            "H": heads,
            "G": part.sizes.get("key_heads", heads),
            "k": part.sizes.get("head_width", width // heads),
        }
        yield "(d + H*k) + (d + G*k)", sizes
        if targets != "queries and values":
            yield "(d + G*k) + (H*k + d)", sizes
    elif part.kind == "latent_attention":
        if targets == "queries and values":
            raise OptionError("targets: latent attention has no queries and values of its own; expected all")
        names = {"H": "heads", "c": "key_rank", "n": "plain", "p": "rotary", "v": "value_width"}
        low = "query_rank" in part.sizes
        names |= {"q": "query_rank"} if low else {}
        queries = "(d + q) + (q + H*(n + p))" if low else "(d + H*(n + p))"
        yield (
            f"{queries} + (d + c + p) + (c + H*(n + v)) + (H*v + d)",
            {"d": width, **{letter: part.sizes[name] for letter, name in names.items()}},
        )
    elif part.kind in ("ffn", "experts") and targets == "all":
        sizes = {"d": width, "f": part.sizes["width"], "E": part.sizes.get("experts", 1)}
        yield f"{3 if part.choices.get('gated') else 2}E*(d + f)", sizes
