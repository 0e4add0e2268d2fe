"""Random routed experts (PanGu-Σ): the domain of a text names a group of experts, the token one of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.moe.hash_tables import random_table
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import Case, Source, technique
from refimpl.transformer.embedding import indices
from refimpl.validation import bind_axes, floating, whole

__all__ = ["domain_routing"]


def _sample(rng: np.random.Generator, *, T: int, V: int, G: int) -> Case:
    sizes = tuple(int(size) for size in rng.integers(1, 5, G))
    return Case((rng.integers(0, V, T), rng.integers(0, G, T), rng.random((G, V))), {"group_sizes": sizes})


@technique(
    "moe.domain_routing",
    entries=(42,),
    kind="function",
    source=Source("Ren et al. 2023 (PanGu-Σ)", "arXiv:2303.10845", "section 3.3, Random Routed Experts"),
    axes={"T": (0, 12), "V": (1, 9), "G": (1, 4)},
    edges=({"T": 0}, {"T": 1, "V": 1, "G": 1}, {"T": 12, "G": 1}, {"T": 12, "V": 2, "G": 4}),
    sample=_sample,
    exact=True,
)
def domain_routing(
    tokens: IntArray, domains: IntArray, draws: FloatArray, /, *, group_sizes: Sequence[int]
) -> IntArray:
    """Return the expert of each token: its domain's group first, then by a fixed table inside the group.

    Parameters
    ----------
    tokens, domains : ndarray of int, shape (...)
        Token ids, and the domain of the text (a language, a task) that each is from.
    draws : ndarray of float, shape (G, V)
        Uniform numbers in [0, 1), one table for each group: `refimpl.moe.hash_tables.random_table`.
    group_sizes : sequence of int
        Experts of each of the G domains.  Groups follow one another: domain g has the experts from
        ``sum(group_sizes[:g])`` on.

    Returns
    -------
    ndarray of int, shape (...)
        Experts in [0, sum(group_sizes)).

    Raises
    ------
    OptionError
        If a token, domain, draw or size is out of range.
    ShapeError, DTypeError
        If the arrays do not fit together, or are of the wrong kind.

    Notes
    -----
    No router, no loss of balance, no all-to-all beyond a group, and a group is a model of its own: the
    experts of one domain can be taken out and used without the others.  With one group it is the random hash.

    References
    ----------
    .. [1] Ren et al., 2023, arXiv:2303.10845, section 3.3.

    Examples
    --------
    >>> draws = np.array([[0.0, 0.9], [0.6, 0.0]])
    >>> domain_routing(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), draws, group_sizes=(2, 3))
    array([0, 1, 3, 2])
    """
    sizes = [whole("group_sizes", size) for size in group_sizes]
    (draws,) = floating(draws=draws)
    V = bind_axes({"draws": (draws, "G V")})["V"]
    if len(draws) != len(sizes):
        raise ShapeError(f"draws: expected {len(sizes)} rows, one a group, got shape {draws.shape}")
    if not sizes:
        raise OptionError("group_sizes: expected at least one group")
    tokens, domains = indices("tokens", tokens, V), indices("domains", domains, len(sizes))
    if tokens.shape != domains.shape:
        raise ShapeError(f"domains: expected shape {tokens.shape}, that of tokens, got {domains.shape}")
    starts = np.cumsum([0, *sizes[:-1]])
    tables = [
        start + random_table(row, num_experts=size)
        for start, row, size in zip(starts, draws, sizes, strict=True)
    ]
    return np.asarray(np.stack(tables)[domains, tokens])
