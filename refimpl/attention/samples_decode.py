"""Cases of a decode step: a few queries, a cache, its parts and pages."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.samples import sample_attention
from refimpl.registry import Case

__all__ = ["AXES", "EDGES", "OPTIONS", "PAGED_EDGES", "sample_decode", "sample_paged"]

AXES = {
    "B": (1, 2), "Tq": (1, 3), "Tk": (1, 18), "Hkv": (1, 2), "group": (1, 3),
    "D": (1, 5), "Dv": (1, 5), "splits": (1, 5),
}  # fmt: skip
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "lengths": ("all", "ragged"),
    "extra": ("none", "scale"),
    "return_lse": (False, True),
}
_PLAIN: dict[str, int | str | bool] = {
    "B": 1, "Hkv": 1, "group": 2, "D": 3, "Dv": 2, "splits": 3,
    "lengths": "all", "extra": "none", "return_lse": True,
}  # fmt: skip
PAGED_EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_PLAIN, "Tq": 1, "Tk": 1},
    {**_PLAIN, "B": 0, "Tq": 1, "Tk": 5},
    {**_PLAIN, "Tq": 0, "Tk": 5},
    {**_PLAIN, "Tq": 1, "Tk": 33, "splits": 7},
    {**_PLAIN, "Tq": 3, "Tk": 2},  # queries that see no key
    {**_PLAIN, "B": 2, "Tq": 2, "Tk": 17, "lengths": "ragged"},
    {**_PLAIN, "Tq": 1, "Tk": 9, "extra": "large"},
)
EDGES = (*PAGED_EDGES, {**_PLAIN, "Tq": 1, "Tk": 0})


def sample_decode(rng: np.random.Generator, *, splits: int, lengths: str = "all", **shape: Any) -> Case:
    """Return a call of `split_kv_attention`.

    Examples
    --------
    >>> shape = dict(B=1, Tq=1, Tk=3, Hkv=1, group=1, D=2, Dv=2)
    >>> sample_decode(np.random.default_rng(0), splits=2, **shape).kwargs
    {'splits': 2}
    """
    case = sample_attention(rng, **shape).replace(splits=splits)
    B, Tk = case.args[1].shape[:2]
    return case.replace(k_lengths=rng.integers(0, Tk + 1, B)) if lengths == "ragged" else case


def sample_paged(rng: np.random.Generator, **shape: Any) -> Case:
    """Return a call of `paged_attention` with pages of 4 tokens, out of order, and some that nobody has.

    Examples
    --------
    >>> shape = dict(B=1, Tq=1, Tk=6, Hkv=1, group=1, D=2, Dv=2, splits=1)
    >>> [a.shape for a in sample_paged(np.random.default_rng(0), **shape).args[1:]]
    [(3, 4, 1, 2), (3, 4, 1, 2), (1, 2)]
    """
    case = sample_decode(rng, **shape)
    q, k, v = case.args
    B, Tk = k.shape[:2]
    count, spare = -(-Tk // 4), 1
    table = rng.permutation(B * count + spare)[: B * count].reshape(B, count)
    pages = [rng.standard_normal((B * count + spare, 4, *x.shape[2:])) for x in (k, v)]
    lengths = case.kwargs.get("k_lengths", np.full(B, Tk))
    table = np.where(np.arange(count) * 4 < lengths[:, None], table, -1)
    return Case((q, *pages, table), {**case.kwargs, "k_lengths": lengths})
