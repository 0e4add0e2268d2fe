"""How many numbers a fine-tuning method trains and keeps, a term for each kind of them.

>>> lora_parameters(layers=96, width=12288, rank=4).total
18874368
>>> print(adapter_parameters(layers=12, width=768, bottleneck=64).explain()[0])
adapters: 2*L*(2*d*m + m + d) = 2*12*(2*768*64 + 64 + 768) = 2379000 parameters
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = ["adapter_parameters", "lora_parameters", "prefix_parameters", "prompt_parameters"]

_HU = Source("Hu et al. 2021", "arXiv:2106.09685", "section 5.1")
_HOULSBY = Source("Houlsby et al. 2019", "arXiv:1902.00751", "section 2.1")
_LI = Source("Li & Liang 2021", "arXiv:2101.00190", "section 4.3")
_LESTER = Source("Lester et al. 2021", "arXiv:2104.08691", "section 2")


def _sample(rng: np.random.Generator, **sizes: Any) -> Case:  # noqa: ARG001 (the contract)
    return Case((), sizes)


@technique(
    "cost.lora_parameters",
    entries=(61,),
    kind="cost",
    source=_HU,
    axes={"layers": (1, 100), "width": (1, 20000), "rank": (1, 256), "matrices": (1, 6)},
    sample=_sample,
    edges=(
        {"layers": 96, "width": 12288, "rank": 4, "matrices": 2},
        {"layers": 0, "width": 1, "rank": 1, "matrices": 1},
        {"layers": 1, "width": 1, "rank": 0, "matrices": 1},
    ),
    exact=True,
)
def lora_parameters(*, layers: Quantity, width: Quantity, rank: Quantity, matrices: Quantity = 2) -> Estimate:
    """Return the parameters of LoRA on square matrices.

    Parameters
    ----------
    layers, width : int
        Of the model.
    rank : int
        Of an update.
    matrices : int
        Adapted in a layer; the paper's default is two, W_q and W_v.

    Returns
    -------
    Estimate

    Raises
    ------
    OptionError
        If a number is negative.

    References
    ----------
    .. [1] Hu et al., 2021, arXiv:2106.09685, section 5.1: ``2 L̂ d r``.

    Examples
    --------
    >>> lora_parameters(layers=24, width=1024, rank=8).total
    786432
    """
    values = _counts(L=layers, d=width, r=rank, n=matrices)
    return _trained(("factors", "2*n*L*d*r"), values=values, source=str(_HU))


@technique(
    "cost.adapter_parameters",
    entries=(62,),
    kind="cost",
    source=_HOULSBY,
    axes={"layers": (1, 100), "width": (1, 20000), "bottleneck": (1, 512)},
    sample=_sample,
    edges=(
        {"layers": 12, "width": 768, "bottleneck": 64},
        {"layers": 1, "width": 1, "bottleneck": 0},
        {"layers": 0, "width": 3, "bottleneck": 2},
    ),
    exact=True,
)
def adapter_parameters(*, layers: Quantity, width: Quantity, bottleneck: Quantity) -> Estimate:
    """Return the parameters of two adapters a layer, and of the layer norms that are trained with them.

    Parameters
    ----------
    layers, width : int
        Of the model.
    bottleneck : int
        The width m inside an adapter; the lecture calls it m and then r.

    Returns
    -------
    Estimate

    Raises
    ------
    OptionError
        If a number is negative.

    References
    ----------
    .. [1] Houlsby et al., 2019, arXiv:1902.00751, section 2.1.

    Examples
    --------
    >>> adapter_parameters(layers=12, width=768, bottleneck=64)["layer norms"]
    36864
    """
    values = _counts(L=layers, d=width, m=bottleneck)
    return _trained(
        ("adapters", "2*L*(2*d*m + m + d)"), ("layer norms", "4*L*d"), values=values,
        source=str(_HOULSBY),
    )  # fmt: skip


@technique(
    "cost.prefix_parameters",
    entries=(63,),
    kind="cost",
    source=_LI,
    axes={"layers": (1, 100), "width": (1, 20000), "positions": (1, 512)},
    sample=_sample,
    edges=(
        {"layers": 24, "width": 1024, "positions": 10},
        {"layers": 1, "width": 1, "positions": 0},
        {"layers": 0, "width": 3, "positions": 2},
    ),
    exact=True,
)
def prefix_parameters(*, layers: Quantity, width: Quantity, positions: Quantity) -> Estimate:
    """Return the numbers that prefix tuning keeps, the network that makes them in training left out.

    Parameters
    ----------
    layers, width : int
        Of the model; with grouped heads the width of all keys of a token.
    positions : int
        Of the prefix.

    Returns
    -------
    Estimate

    Raises
    ------
    OptionError
        If a number is negative.

    References
    ----------
    .. [1] Li and Liang, 2021, arXiv:2101.00190, section 4.3.

    Examples
    --------
    >>> prefix_parameters(layers=24, width=1024, positions=10).total
    491520
    """
    values = _counts(L=layers, d=width, p=positions)
    return _trained(("keys", "L*p*d"), ("values", "L*p*d"), values=values, source=str(_LI))


@technique(
    "cost.prompt_parameters",
    entries=(64,),
    kind="cost",
    source=_LESTER,
    axes={"width": (1, 20000), "positions": (1, 512)},
    sample=_sample,
    edges=(
        {"width": 4096, "positions": 5},
        {"width": 1, "positions": 0},
    ),
    exact=True,
)
def prompt_parameters(*, width: Quantity, positions: Quantity) -> Estimate:
    """Return the parameters of a soft prompt.

    Parameters
    ----------
    width : int
        Of an embedding.
    positions : int
        Of the prompt.

    Returns
    -------
    Estimate

    Raises
    ------
    OptionError
        If a number is negative.

    References
    ----------
    .. [1] Lester et al., 2021, arXiv:2104.08691, section 2.

    Examples
    --------
    >>> prompt_parameters(width=4096, positions=5).total
    20480
    """
    values = _counts(d=width, p=positions)
    return _trained(("embeddings", "p*d"), values=values, source=str(_LESTER))


def _counts(**given: Quantity) -> dict[str, Number]:
    values = {name: exact(value, name) for name, value in given.items()}
    if min(values.values()) < 0:
        raise OptionError(f"sizes: expected at least 0, got {given}")
    return values


def _trained(*parts: tuple[str, str], values: dict[str, Number], source: str) -> Estimate:
    terms = [term(name, formula, values, "parameters", source) for name, formula in parts]
    return estimate("trained parameters", terms)
