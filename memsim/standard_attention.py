"""How many bytes standard attention moves when masks and dropout run as kernels of their own.

The paper's measured figures cannot be derived from its Algorithms 0 and 3 alone; they depend on how many
passes the framework made.  `standard_passes` counts the editable list in
``memsim/data/standard_attention_passes.toml``; `pass_total` states a number of passes outright.
"""

from __future__ import annotations

from collections.abc import Iterable

from memsim.attention_io import attention_io
from memsim.estimate import Estimate, estimate, term
from memsim.units import Quantity, exact

__all__ = ["pass_total", "standard_passes"]


def standard_passes(
    *, Tq: int, D: int, H: int = 1, B: int = 1, itemsize: int = 2, features: Iterable[str] = ()
) -> Estimate:
    """Return the bytes of one forward and one backward pass of standard attention, step by step.

    Parameters
    ----------
    Tq, D, H, B : int
        Length (of keys too), head dimension, heads, batch.
    itemsize : int
        Bytes of an element of the inputs and of the score matrices.
    features : iterable of str
        "mask", "dropout", "mask_gradient", "mask_copy".

    Returns
    -------
    Estimate
        In bytes.

    Examples
    --------
    The workload of the paper's Figure 2.  Algorithms 0 and 3 alone give 25.2 GB; a mask and dropout make it
    40.3 GB, as arXiv version 2 prints, but the list was completed knowing that print: fitted, not evidence.

    >>> workload = dict(Tq=1024, D=64, H=16, B=64)
    >>> standard_passes(**workload).total, standard_passes(**workload, features=["mask", "dropout"]).total
    (25232932864, 40265318400)
    """
    chosen = tuple(features)
    passes = [
        attention_io(
            algorithm="standard", direction=way, Tq=Tq, D=D, H=H, B=B, itemsize=itemsize, features=chosen
        )
        for way in ("forward", "backward")
    ]
    return estimate(
        f"HBM traffic of standard attention, both passes, with {', '.join(chosen) or 'nothing else'}",
        [item for one in passes for item in one.terms],
        leaves_out="the mask itself, random numbers, re-reads that caches absorb",
    )


def pass_total(
    *, scores: Quantity, operands: Quantity, N: int, d: int, H: int = 1, B: int = 1, itemsize: int = 2
) -> Estimate:
    """Return the bytes of `scores` passes over the N x N matrices and `operands` passes over N x d ones.

    Parameters
    ----------
    scores, operands : int, float or Fraction
        Numbers of passes; a byte mask beside 2-byte scores is half a pass.
    N, d, H, B : int
        Length, head dimension, heads, batch.
    itemsize : int
        Bytes of an element.

    Returns
    -------
    Estimate
        In bytes.

    Examples
    --------
    >>> pass_total(scores=18, operands=11, N=1024, d=64, H=16, B=64).total
    40131100672
    """
    values = {
        "p": exact(scores, "scores"), "u": exact(operands, "operands"), "N": exact(N), "d": exact(d),
        "H": exact(H), "B": exact(B), "e": exact(itemsize),
    }  # fmt: skip
    source = "arXiv:2205.14135, Figure 2, by passes"
    return estimate(
        "HBM traffic by passes",
        [
            term("score passes", "p*N²*e*B*H", values, "B", source),
            term("operand passes", "u*N*d*e*B*H", values, "B", source),
        ],
    )
