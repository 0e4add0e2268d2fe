"""Tensor factorisation of stacked weights: bases that all blocks share, and a small core (Tucker)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = ["Tucker", "tucker", "tucker_factors", "tucker_parameters"]


class Tucker(NamedTuple):
    """The core (r_n, r_K, r_N), and the bases of blocks (n, r_n), inputs (K, r_K) and outputs (N, r_N)."""

    core: FloatArray
    blocks: FloatArray
    inputs: FloatArray
    outputs: FloatArray


def tucker_parameters(shape: tuple[int, int, int], ranks: tuple[int, int, int]) -> int:
    """Return how many numbers the factors hold: the core, and a basis of every axis.

    Examples
    --------
    >>> tucker_parameters((12, 768, 768), (12, 128, 128)), 12 * 768 * 768
    (393360, 7077888)
    """
    return int(np.prod(ranks)) + sum(size * rank for size, rank in zip(shape, ranks, strict=True))


def sample_stack(rng: np.random.Generator, *, n: int, K: int, N: int, cut: str) -> Case:
    """Return a call of `tucker`: ranks "full", "half", or "one".

    Examples
    --------
    >>> sample_stack(np.random.default_rng(0), n=2, K=3, N=4, cut="half").kwargs
    {'ranks': (1, 2, 2)}
    """
    shape = (n, K, N)
    ranks = {"full": shape, "half": tuple((size + 1) // 2 for size in shape)}.get(
        cut, tuple(min(1, s) for s in shape)
    )
    return Case((rng.standard_normal(shape),), {"ranks": ranks})


def _terms(case: Case) -> tuple[int, FloatArray]:
    (blocks,) = case.args
    return 4 * sum(blocks.shape), np.full(blocks.shape, np.linalg.norm(blocks))


@technique(
    "compress.factorization",
    entries=(89,),
    kind="function",
    source=Source("Ren et al. 2022", "arXiv:2205.10036", "section 4: tensor decompositions"),
    axes={"n": (1, 3), "K": (1, 5), "N": (1, 5)},
    options={"cut": ("full", "half", "one")},
    edges=(
        {"n": 1, "K": 1, "N": 1, "cut": "full"},
        {"n": 0, "K": 2, "N": 2, "cut": "full"},
        {"n": 2, "K": 3, "N": 5, "cut": "full"},
        {"n": 3, "K": 4, "N": 4, "cut": "one"},
        {"n": 3, "K": 5, "N": 4, "cut": "half"},
    ),
    sample=sample_stack,
    terms=_terms,
)
def tucker(blocks: FloatArray, /, *, ranks: tuple[int, int, int]) -> FloatArray:
    """Return stacked weights through bases of given ranks: what `tucker_factors` stand for.

    Parameters
    ----------
    blocks : ndarray of float, shape (n, K, N)
        Weights of n layers or parts.
    ranks : tuple of three int
        How many directions are kept along blocks, inputs and outputs.

    Returns
    -------
    ndarray of float, shape (n, K, N)
        Each axis projected onto its leading left singular vectors.

    Raises
    ------
    ShapeError, DTypeError
        If `blocks` is not of three axes or not real.
    OptionError
        If there are not three ranks, one is negative or larger than its axis, or a number is NaN or infinite.

    Notes
    -----
    It is the truncated higher-order SVD: its squared error is at most the sum of the squared singular values
    left out along the three axes, and at most three times the least possible.

    **Special cases**

    - Full ranks give the blocks back.
    - Where a cut falls between equal singular values the result is one of several.

    References
    ----------
    .. [1] De Lathauwer et al., 2000, doi:10.1137/S0895479896305696, property 10: truncated HOSVD.
    .. [2] Ren et al., 2022, arXiv:2205.10036, section 4 (ICLR 2022, whose program names Wang first).

    Examples
    --------
    Two blocks that are multiples of one matrix of rank 1 are kept whole by ranks of 1:

    >>> one = np.array([[1.0, 2.0], [2.0, 4.0]])
    >>> tucker(np.stack([one, 3 * one]), ranks=(1, 1, 1)).round(12)[1]
    array([[ 3.,  6.],
           [ 6., 12.]])
    """
    (blocks,) = floating(blocks=blocks)
    core, *bases = (widen(part) for part in _factors(blocks, ranks))
    return round_to(np.einsum("abc,na,kb,mc->nkm", core, *bases, optimize=True), blocks.dtype)


def tucker_factors(blocks: FloatArray, /, *, ranks: tuple[int, int, int]) -> Tucker:
    """Return the core and the bases of stacked weights.

    Parameters
    ----------
    blocks, ranks
        As for `tucker`.

    Returns
    -------
    Tucker
        Bases have orthonormal columns, whose signs are open.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `tucker`.

    Examples
    --------
    >>> [part.shape for part in tucker_factors(np.ones((2, 3, 4)), ranks=(1, 2, 3))]
    [(1, 2, 3), (2, 1), (3, 2), (4, 3)]
    """
    (blocks,) = floating(blocks=blocks)
    return Tucker(*(round_to(part, blocks.dtype) for part in _factors(blocks, ranks)))


def _factors(blocks: FloatArray, ranks: tuple[int, int, int]) -> Tucker:
    """Return the factors in the wide dtype."""
    bind_axes({"blocks": (blocks, "n K N")})
    if len(ranks) != 3:
        raise OptionError(f"ranks: expected three, got {ranks}")
    for axis, (size, rank) in enumerate(zip(blocks.shape, ranks, strict=True)):
        if whole(f"ranks[{axis}]", rank, least=0) > size:
            raise OptionError(f"ranks[{axis}]: expected at most {size}, got {rank}")
    wide = widen(blocks).astype(wide_dtype(blocks.dtype), copy=False)
    if not np.isfinite(wide).all():
        raise OptionError("blocks: expected finite numbers, got NaN or infinity")
    bases = []
    for axis, rank in enumerate(ranks):
        rows = np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1 if wide.size else 0)
        vectors = (
            np.linalg.svd(rows, full_matrices=True)[0] if rows.size else np.eye(len(rows), dtype=wide.dtype)
        )
        bases.append(vectors[:, :rank])
    core = np.einsum("nkm,na,kb,mc->abc", wide, *bases, optimize=True)
    return Tucker(core, *bases)
