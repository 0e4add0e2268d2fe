"""Cases on which sparse attentions are judged: those of dense attention, with queries and keys alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.samples import sample_attention
from refimpl.registry import Case

__all__ = ["EDGES", "OPTIONS", "SHAPE", "sample_pattern"]

SHAPE = {"B": (1, 2), "T": (1, 40), "Hkv": (1, 2), "group": (1, 2), "D": (1, 5), "Dv": (1, 5)}
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "causal": (False, "top_left", "bottom_right"),
    "extra": ("none", "attn_mask", "lengths", "softcap_and_bias", "all"),
    "return_lse": (False, True),
}

_PLAIN: dict[str, int | str | bool] = {"causal": False, "extra": "none", "return_lse": False}
_SMALL: dict[str, int | str | bool] = {**_PLAIN, "B": 1, "Hkv": 1, "group": 1, "D": 3, "Dv": 2}
EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_SMALL, "T": 1, "D": 1, "Dv": 1},
    {**_SMALL, "B": 0, "T": 5},
    {**_SMALL, "T": 0},
    {**_SMALL, "T": 33, "return_lse": True},  # a ragged last block
    {**_SMALL, "T": 70, "group": 2, "causal": True},
    {**_SMALL, "T": 20},
    {**_SMALL, "T": 24, "extra": "attn_mask", "return_lse": True},  # rows that see nothing
    {**_SMALL, "T": 9, "extra": "ties"},
    {**_SMALL, "T": 18, "extra": "large", "return_lse": True},
    {**_SMALL, "B": 2, "T": 30, "causal": "bottom_right", "extra": "lengths", "return_lse": True},
)


def sample_pattern(rng: np.random.Generator, *, T: int, **shape: Any) -> Case:
    """Return a call of a self-attention of length `T`, without what says the pattern.

    Examples
    --------
    >>> shape = dict(B=1, T=4, Hkv=1, group=1, D=2, Dv=3)
    >>> [array.shape for array in sample_pattern(np.random.default_rng(0), **shape).args]
    [(1, 4, 1, 2), (1, 4, 1, 2), (1, 4, 1, 3)]
    """
    return sample_attention(rng, Tq=T, Tk=T, **shape)
