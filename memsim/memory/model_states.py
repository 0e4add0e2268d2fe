"""Model states of one rank: what each source keeps for a parameter, divided by ZeRO's stages or offloaded.

>>> [str(model_states(parameters=1, convention=name).total) for name in ("zero", "megatron", "adam8bit")]
['16', '18', '2561/256']
>>> print(model_states(parameters="7.5B", ranks=64, stage=1, convention="megatron").explain()[-1])
total: 6Ψ + 12Ψ/N = 6*7.5e9 + 12*7.5e9/64 = 46.41 GB
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from memsim import data_files
from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Quantity
from refimpl.errors import OptionError, UnknownNameError
from refimpl.registry import Case, Source, technique

__all__ = ["CONVENTIONS", "OFFLOADS", "conventions", "model_states"]

CONVENTIONS = ("zero", "deepspeed", "megatron", "fp32", "bf16", "adam8bit", "sgd")
Offload = Literal["none", "optimizer", "all"]
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")
# The stage from which each kind of state is divided among the ranks.
_DIVIDED_FROM = {"weights": 3, "gradients": 2, "optimizer": 1}


def conventions() -> dict[str, dict[str, Any]]:
    """Return what each source keeps for a parameter: bytes of weights, gradients and optimizer states.

    >>> conventions()["megatron"]["gradients"]
    '4'
    """
    data = data_files.read("state_conventions")
    return {name: data[name] for name in CONVENTIONS}


def _sample(rng: np.random.Generator, **chosen: Any) -> Case:  # noqa: ARG001 (the contract)
    return Case((), chosen)


@technique(
    "cost.training_memory.states",
    entries=(98, 99),
    kind="cost",
    source=Source(
        "Rajbhandari et al. 2020", "arXiv:1910.02054", "section 3.1 and Figure 1, with other sources' bytes"
    ),
    axes={"parameters": (1, 10**12), "ranks": (1, 4096)},
    options={"stage": (0, 1, 2, 3), "convention": CONVENTIONS, "offload": OFFLOADS},
    sample=_sample,
    edges=(
        {"parameters": 1, "ranks": 1, "stage": 3, "offload": "all"},
        {"parameters": 5, "ranks": 7, "stage": 1, "convention": "adam8bit", "offload": "none"},
    ),
    exact=True,
)
def model_states(
    *,
    parameters: Quantity,
    ranks: Quantity = 1,
    stage: Literal[0, 1, 2, 3] = 0,
    convention: str = "zero",
    offload: Offload = "none",
) -> Estimate:
    """Return the model states that one rank keeps on its device.

    Parameters
    ----------
    parameters : int or str
        Ψ, the trained parameters that this rank has a share in: those of its part of the model.
    ranks : int
        N, the data-parallel ranks that share them.
    stage : {0, 1, 2, 3}
        ZeRO's stage: 1 divides optimizer states, 2 gradients too, 3 weights too.  Megatron's distributed
        optimizer is stage 1.
    convention : str
        One of `CONVENTIONS`, see `conventions`: what is kept for a parameter.
    offload : {"none", "optimizer", "all"}
        What is kept by the host instead: optimizer states and gradients, or weights as well.

    Returns
    -------
    Estimate
        In bytes, exact; a kind that the host keeps is a term of 0.

    Raises
    ------
    UnknownNameError
        If no source is called `convention`.
    OptionError
        If a number is not positive, or the stage or what is offloaded is unknown.

    Notes
    -----
    With ``offload="optimizer"`` gradients leave as they are made, in buckets that are not counted here; with
    ``"all"`` the layer at work is not counted either.  DeepSpeed's own estimators count otherwise in stage 2:
    `memsim.zero.zero_memory` has them.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1 and Figure 1.
    .. [2] Ren et al. 2021, arXiv:2101.06840, section 3 (offloading).

    Examples
    --------
    >>> model_states(parameters="7.5B", ranks=64, stage=3).total
    1875000000
    >>> model_states(parameters="7.5B", ranks=64, stage=2, offload="optimizer").total
    15000000000
    """
    kept = conventions()
    if convention not in kept:
        raise UnknownNameError("convention of model states", convention, kept)
    if stage not in (0, 1, 2, 3):
        raise OptionError(f"stage: expected 0, 1, 2 or 3; got {stage!r}")
    if offload not in OFFLOADS:
        raise OptionError(f"offload: expected one of {', '.join(OFFLOADS)}; got {offload!r}")
    values = positive_values(Ψ=parameters, N=ranks)
    if not isinstance(values["N"], int):
        raise OptionError(f"ranks: expected a whole number; got {ranks!r}")
    source = kept[convention]
    away = {"none": (), "optimizer": ("gradients", "optimizer"), "all": tuple(_DIVIDED_FROM)}[offload]

    def one(name: str, kind: str, size: str) -> Any:
        formula = f"{size}Ψ" if size.isdigit() else f"{size}*Ψ"
        if stage >= _DIVIDED_FROM[kind]:
            formula += "/N"
        return term(name, f"0*{formula}" if kind in away else formula, values, "B", source["source"])

    terms = [one(kind, kind, source[kind]) for kind in ("weights", "gradients")]
    terms += [one(name, "optimizer", size) for name, size in source["optimizer"].items()]
    total = _total(source, stage) if offload == "none" and convention != "adam8bit" else ""
    return estimate(
        f"model states, {convention}'s bytes, stage {stage}",
        terms,
        formula=total,
        values=values,
        leaves_out="activations, buffers, fragmentation, padding of the partitions",
    )


def _total(source: dict[str, Any], stage: int) -> str:
    """Return the formula as papers print it: what every rank holds, and what they divide."""
    sizes = {kind: int(source[kind]) for kind in ("weights", "gradients")}
    sizes["optimizer"] = sum(map(int, source["optimizer"].values()))
    whole = sum(size for kind, size in sizes.items() if stage < _DIVIDED_FROM[kind])
    divided = sum(sizes.values()) - whole
    return " + ".join([f"{whole}Ψ"] * bool(whole) + [f"{divided}Ψ/N"] * bool(divided))
