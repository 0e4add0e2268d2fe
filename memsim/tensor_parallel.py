"""What tensor parallelism sends, and what activations are left on a rank.

>>> step = tensor_parallel_communication(batch=1, sequence=2048, hidden=4096, layers=36, ranks=8)
>>> print(step.explain()[0])
forward: 4*b*s*h*L*(t - 1)/t = 4*1*2048*4096*36*(8 - 1)/8 = 1.057 B elements
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Quantity
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = ["tensor_parallel_activations", "tensor_parallel_communication"]

_MEGATRON = "Shoeybi et al. 2019, arXiv:1909.08053, section 3, Figure 4"
_NARAYANAN = "Narayanan et al. 2021, arXiv:2104.04473, section 3.5"
_KORTHIKANTI = "Korthikanti et al. 2022, arXiv:2205.05198, table 2"
Recompute = Literal["none", "selective", "full"]


def _sample(rng: np.random.Generator, **shape: Any) -> Case:
    options = {"batch": int(rng.integers(1, 9)), "sequence": int(rng.integers(1, 5000))}
    return Case((), {**options, "hidden": int(rng.integers(1, 10000)), **shape})


@technique(
    "cost.tensor_parallel",
    entries=(94, 95),
    kind="cost",
    source=Source("Shoeybi et al. 2019", "arXiv:1909.08053", "section 3, Figure 4"),
    axes={"layers": (1, 100), "ranks": (1, 64)},
    options={"recompute": ("none", "full")},
    edges=({"ranks": 1}, {"ranks": 8, "recompute": "full"}),
    sample=_sample,
    exact=True,
)
def tensor_parallel_communication(
    *,
    batch: Quantity,
    sequence: Quantity,
    hidden: Quantity,
    layers: Quantity,
    ranks: Quantity,
    recompute: Literal["none", "full"] = "none",
) -> Estimate:
    """Return the elements that one rank sends for the blocks of a micro-batch: 8·b·s·h·L(t-1)/t.

    Parameters
    ----------
    batch, sequence, hidden, layers, ranks : int
        b, s, h, L, t.
    recompute : {"none", "full"}
        Whether every block runs once more on the way back, and sends once more.

    Returns
    -------
    Estimate
        One term a pass, each of two all-reduces a block by rings.  Sequence parallelism sends as much, as
        reduce-scatters and all-gathers.

    Raises
    ------
    OptionError
        If a number is not positive, or the recomputation is unknown.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3.
    .. [2] Narayanan et al., 2021, arXiv:2104.04473, section 3.5.

    Examples
    --------
    >>> block = dict(batch=1, sequence=10, hidden=4, layers=1, ranks=2)
    >>> tensor_parallel_communication(**block).total, 8 * 10 * 4 // 2
    (160, 160)
    """
    values = positive_values(b=batch, s=sequence, h=hidden, L=layers, t=ranks)
    if recompute not in ("none", "full"):
        raise OptionError(f"recompute: expected 'none' or 'full'; got {recompute!r}")
    one = "4*b*s*h*L*(t - 1)/t"
    passes = ["forward", *(["recomputation"] if recompute == "full" else []), "backward"]
    return estimate(
        "tensor parallelism, elements sent",
        [
            term(name, one, values, "elements", _NARAYANAN if name == "recomputation" else _MEGATRON)
            for name in passes
        ],
        leaves_out="embedding and loss; gradients of what every rank has",
    )


@technique(
    "cost.tensor_parallel.activations",
    entries=(94, 98),
    kind="cost",
    source=Source("Korthikanti et al. 2022", "arXiv:2205.05198", "table 2"),
    axes={"heads": (1, 96), "ranks": (1, 64)},
    options={"sequence_parallel": (False, True), "recompute": ("none", "selective", "full")},
    edges=(
        {"ranks": 1, "sequence_parallel": True, "recompute": "none"},
        {"ranks": 8, "sequence_parallel": False, "recompute": "full"},
    ),
    sample=_sample,
    exact=True,
)
def tensor_parallel_activations(
    *,
    batch: Quantity,
    sequence: Quantity,
    hidden: Quantity,
    heads: Quantity,
    ranks: Quantity,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
) -> Estimate:
    """Return the bytes of activations that one rank keeps of one layer, in half precision.

    Parameters
    ----------
    batch, sequence, hidden, heads, ranks : int
        b, s, h, a, t.
    sequence_parallel : bool
        Whether tokens are split outside of the sublayers: what every rank has otherwise.
    recompute : {"none", "selective", "full"}
        Selective: the scores of attention are computed once more.  Full: the input alone is kept.

    Returns
    -------
    Estimate
        Of a layer with GELU, dropout and h_ffn = 4h.

    Raises
    ------
    OptionError
        If a number is not positive, or the recomputation is unknown.

    References
    ----------
    .. [1] Korthikanti et al., 2022, arXiv:2205.05198, section 4, table 2.

    Examples
    --------
    >>> layer = dict(batch=1, sequence=2048, hidden=12288, heads=96)
    >>> [int(tensor_parallel_activations(**layer, ranks=8, recompute=kind).total) // 2**20
    ...  for kind in ("none", "selective", "full")]
    [552, 312, 48]
    """
    values = positive_values(b=batch, s=sequence, h=hidden, a=heads, t=ranks)
    if recompute not in ("none", "selective", "full"):
        raise OptionError(f"recompute: expected 'none', 'selective' or 'full'; got {recompute!r}")
    formulas = {"split": "24*s*b*h/t", "outside the sublayers": "10*s*b*h" + "/t" * sequence_parallel}
    if recompute == "none":
        formulas["scores"] = "5*a*s*s*b/t"
    if recompute == "full":
        formulas = {"input": "2*s*b*h"}
    return estimate(
        "activations of a layer",
        [term(name, formula, values, "B", _KORTHIKANTI) for name, formula in formulas.items()],
        leaves_out="embedding, last normalisation and loss",
    )
