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
    "aligned": (False, True),
}
_PLAIN: dict[str, int | str | bool] = {
    "B": 1, "Hkv": 1, "group": 2, "D": 3, "Dv": 2, "splits": 3,
    "lengths": "all", "extra": "none", "return_lse": True, "aligned": False,
}  # fmt: skip
_ALIGNED = {**_PLAIN, "aligned": True}
PAGED_EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_PLAIN, "Tq": 1, "Tk": 1},
    {**_PLAIN, "B": 0, "Tq": 1, "Tk": 5},
    {**_PLAIN, "Tq": 0, "Tk": 5},
    {**_PLAIN, "Tq": 1, "Tk": 33, "splits": 7},
    {**_PLAIN, "Tq": 3, "Tk": 2},  # queries that see no key
    {**_PLAIN, "B": 2, "Tq": 2, "Tk": 17, "lengths": "ragged"},
    {**_PLAIN, "Tq": 1, "Tk": 9, "extra": "large"},
    {**_ALIGNED, "B": 2, "Tq": 3, "Tk": 33, "Hkv": 2, "D": 17, "lengths": "ragged"},
    {**_ALIGNED, "Tq": 3, "Tk": 2, "splits": 1},
    {**_ALIGNED, "Tq": 1, "Tk": 100, "Dv": 33, "splits": 7, "extra": "large"},
)
EDGES = (*PAGED_EDGES, {**_PLAIN, "Tq": 1, "Tk": 0})
UNIT = 16  # numbers and keys that tensor cores take at once


def sample_decode(
    rng: np.random.Generator, *, splits: int, D: int, Dv: int, lengths: str = "all", aligned: bool = False,
    **shape: Any,
) -> Case:  # fmt: skip
    """Return a call of `split_kv_attention`; `aligned` heads are as wide as the next multiple of 16.

    Examples
    --------
    >>> shape = dict(B=1, Tq=1, Tk=3, Hkv=1, group=1, D=2, Dv=2)
    >>> sample_decode(np.random.default_rng(0), splits=2, **shape).kwargs
    {'splits': 2}
    """
    D, Dv = (-(-width // UNIT) * UNIT if aligned else width for width in (D, Dv))
    case = sample_attention(rng, D=D, Dv=Dv, **shape).replace(splits=splits)
    B, Tk = case.args[1].shape[:2]
    return case.replace(k_lengths=rng.integers(0, Tk + 1, B)) if lengths == "ragged" else case


def sample_paged(rng: np.random.Generator, *, aligned: bool = False, **shape: Any) -> Case:
    """Return a call of `paged_attention` with pages out of order, and one that nobody has.

    Pages are of 4 tokens; where heads are `aligned`, of 16.

    Examples
    --------
    >>> shape = dict(B=1, Tq=1, Tk=6, Hkv=1, group=1, D=2, Dv=2, splits=1)
    >>> [a.shape for a in sample_paged(np.random.default_rng(0), **shape).args[1:]]
    [(3, 4, 1, 2), (3, 4, 1, 2), (1, 2)]
    """
    case = sample_decode(rng, aligned=aligned, **shape)
    q, k, v = case.args
    (B, Tk), page = k.shape[:2], UNIT if aligned else 4
    count, spare = -(-Tk // page), 1
    table = rng.permutation(B * count + spare)[: B * count].reshape(B, count)
    pages = [rng.standard_normal((B * count + spare, page, *x.shape[2:])) for x in (k, v)]
    lengths = case.kwargs.get("k_lengths", np.full(B, Tk))
    table = np.where(np.arange(count) * page < lengths[:, None], table, -1)
    return Case((q, *pages, table), {**case.kwargs, "k_lengths": lengths})
