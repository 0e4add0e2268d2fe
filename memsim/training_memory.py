r"""Memory of training: model states, and the activations as two sources count them.

The sources disagree about activations by up to five times, so each has a function of its own and every table
names the one it used.

>>> print(*training_memory(parameters="1.5B").explain(), sep="\n")
fp16 parameters: 2Ψ = 2*1.5e9 = 3 GB
fp16 gradients: 2Ψ = 2*1.5e9 = 3 GB
fp32 parameters: 4Ψ = 4*1.5e9 = 6 GB
fp32 momentum: 4Ψ = 4*1.5e9 = 6 GB
fp32 variance: 4Ψ = 4*1.5e9 = 6 GB
total: 16Ψ = 16*1.5e9 = 24 GB
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = [
    "block_activations",
    "checkpoint_activations",
    "fused_buffer",
    "inference_weights",
    "positive_values",
    "training_memory",
    "zero_activations",
]

_ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054"


def positive_values(**quantities: Quantity) -> dict[str, Number]:
    """Return the quantities as exact positive numbers, by name.

    Raises
    ------
    OptionError
        If one is not a finite number above 0.
    """
    values = {name: exact(value, name) for name, value in quantities.items()}
    for name, value in values.items():
        if value <= 0:
            raise OptionError(f"{name}: expected a number above 0; got {quantities[name]!r}")
    return values


def _sample(rng: np.random.Generator, **axes: int) -> Case:
    options: dict[str, Any] = {"parameters": axes["thousands"] * 1000}
    if rng.integers(2):
        options["activations"] = checkpoint_activations(hidden=64, batch=2, sequence=128, layers=4)
    return Case((), options)


@technique(
    "cost.training_memory",
    entries=(98,),
    kind="cost",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "section 3.1"),
    axes={"thousands": (1, 10**9)},
    sample=_sample,
    edges=({"thousands": 1},),
    exact=True,
)
def training_memory(*, parameters: Quantity, activations: Estimate | None = None) -> Estimate:
    """Return the memory of mixed-precision Adam training: 16 bytes a parameter, and activations.

    Parameters
    ----------
    parameters : int or str
        Ψ, the number of parameters; strings such as ``"7B"`` are read.
    activations : Estimate, optional
        What to add: `zero_activations`, `block_activations` or `checkpoint_activations`.

    Returns
    -------
    Estimate
        In bytes: 2Ψ fp16 parameters, 2Ψ fp16 gradients; fp32 parameters, momentum, variance of 4Ψ each.

    Raises
    ------
    OptionError
        If `parameters` is not positive.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1.

    Examples
    --------
    >>> training_memory(parameters="7B").total
    112000000000
    """
    values = positive_values(Ψ=parameters)
    terms = [
        term(name, formula, values, "B", f"{_ZERO}, section 3.1")
        for name, formula in (
            ("fp16 parameters", "2Ψ"),
            ("fp16 gradients", "2Ψ"),
            ("fp32 parameters", "4Ψ"),
            ("fp32 momentum", "4Ψ"),
            ("fp32 variance", "4Ψ"),
        )
    ]
    if activations is not None:
        return estimate(
            "training memory", [*terms, *activations.terms], leaves_out="buffers, fragmentation, context"
        )
    return estimate(
        "model states",
        terms,
        formula="16Ψ",
        values=values,
        leaves_out="activations, buffers, fragmentation, context",
    )


def inference_weights(*, parameters: Quantity) -> Estimate:
    """Return the memory of the fp16 weights alone, 2Ψ bytes.

    >>> inference_weights(parameters="1.5B").total
    3000000000
    """
    values = positive_values(Ψ=parameters)
    return estimate("fp16 weights", [term("fp16 parameters", "2Ψ", values, "B", f"{_ZERO}, section 3.1")])


def fused_buffer(*, parameters: Quantity) -> Estimate:
    """Return the memory of one fp32 buffer into which all gradients are fused, 4Ψ bytes.

    >>> fused_buffer(parameters="1.5B").total
    6000000000
    """
    values = positive_values(Ψ=parameters)
    return estimate("fused buffer", [term("fp32 buffer", "4Ψ", values, "B", f"{_ZERO}, section 3.2")])


def zero_activations(*, hidden: Quantity, batch: Quantity, sequence: Quantity, layers: Quantity) -> Estimate:
    """Return activations as the ZeRO paper counts them: 12 hidden-sized fp16 values a token and layer.

    Parameters
    ----------
    hidden, batch, sequence, layers : int
        h, b, s, L.

    Returns
    -------
    Estimate
        In bytes.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 3.2 and its footnote.

    Examples
    --------
    >>> zero_activations(hidden=1600, batch=32, sequence=1024, layers=48).total
    60397977600
    """
    values = positive_values(h=hidden, b=batch, s=sequence, L=layers)
    return estimate(
        "activations, ZeRO's count",
        [term("activations", "2*12*h*b*s*L", values, "B", f"{_ZERO}, section 3.2, footnote")],
        leaves_out="what else a block keeps; compare block_activations",
    )


def block_activations(
    *, hidden: Quantity, batch: Quantity, sequence: Quantity, layers: Quantity, heads: Quantity
) -> Estimate:
    """Return activations as Korthikanti et al. count them, tensor by tensor: L·s·b·h·(34 + 5as/h) bytes.

    Parameters
    ----------
    hidden, batch, sequence, layers, heads : int
        h, b, s, L, a.

    Returns
    -------
    Estimate
        In bytes, attention matrices apart.

    References
    ----------
    .. [1] Korthikanti et al. 2022, arXiv:2205.05198, equation 1 and Table 2.

    Examples
    --------
    >>> block_activations(hidden=1600, batch=32, sequence=1024, layers=48, heads=25)["linear in sequence"]
    85563801600
    """
    values = positive_values(h=hidden, b=batch, s=sequence, L=layers, a=heads)
    source = "Korthikanti et al. 2022, arXiv:2205.05198, equation 1"
    return estimate(
        "activations, Korthikanti's count",
        [
            term("linear in sequence", "34*s*b*h*L", values, "B", source),
            term("attention matrices", "5*a*s²*b*L", values, "B", source),
        ],
        formula="L*s*b*h*(34 + 5a*s/h)",
        values=values,
        leaves_out="gated feed-forwards, flash attention and training without dropout, which differ",
    )


def checkpoint_activations(
    *, hidden: Quantity, batch: Quantity, sequence: Quantity, layers: Quantity
) -> Estimate:
    """Return the fp16 checkpoints, one hidden state a token and layer: 2·s·b·h·L bytes.

    >>> checkpoint_activations(hidden=1600, batch=32, sequence=1024, layers=48).total
    5033164800
    """
    values = positive_values(h=hidden, b=batch, s=sequence, L=layers)
    return estimate(
        "activation checkpoints",
        [term("checkpoints", "2*s*b*h*L", values, "B", f"{_ZERO}, section 6.1")],
        leaves_out="the working set of the layer that is recomputed",
    )
