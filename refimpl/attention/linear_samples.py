"""Cases on which linear attention is judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import Case

__all__ = ["AXES", "EDGES", "OPTIONS", "linear_terms", "sample_linear"]

AXES = {"B": (1, 2), "Tq": (1, 12), "Tk": (1, 12), "Hkv": (1, 2), "group": (1, 2), "D": (1, 5), "Dv": (1, 5)}
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "causal": (False, "top_left", "bottom_right"),
    "extra": ("none", "key_mask", "eps", "no_eps", "negative"),
}
_PLAIN: dict[str, int | str | bool] = {"causal": False, "extra": "none"}
EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_PLAIN, "B": 1, "Tq": 1, "Tk": 1, "Hkv": 1, "group": 1, "D": 1, "Dv": 1},
    {**_PLAIN, "B": 0},
    {**_PLAIN, "Tq": 0, "Tk": 3},
    {**_PLAIN, "Tq": 3, "Tk": 0},
    {**_PLAIN, "Tq": 3, "Tk": 0, "extra": "no_eps", "causal": "bottom_right"},
    {**_PLAIN, "Tq": 17, "Tk": 17, "causal": True},
    {**_PLAIN, "Tq": 5, "Tk": 12, "causal": "top_left"},
    {**_PLAIN, "Tq": 5, "Tk": 12, "causal": "bottom_right"},
    {**_PLAIN, "Tq": 12, "Tk": 5, "causal": "top_left"},
    {**_PLAIN, "Tq": 12, "Tk": 5, "causal": "bottom_right", "extra": "no_eps"},
    {**_PLAIN, "Tq": 7, "Tk": 9, "causal": "bottom_right", "extra": "key_mask"},
    {**_PLAIN, "Tq": 6, "Tk": 6, "extra": "ties"},
    {**_PLAIN, "Tq": 6, "Tk": 6, "extra": "negative", "causal": "top_left"},
    {**_PLAIN, "Tq": 6, "Tk": 6, "extra": "masked", "causal": "top_left"},
)


def sample_linear(
    rng: np.random.Generator,
    *,
    B: int,
    Tq: int,
    Tk: int,
    Hkv: int,
    group: int,
    D: int,
    Dv: int,
    causal: bool | str = False,
    extra: str = "none",
    chunk_size: int = 0,
) -> Case:
    """Return one call of linear attention, its arrays drawn from `rng` in float64.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    B, Tq, Tk, Hkv, group, D, Dv : int
        Sequences, queries, keys, key heads, query heads a key head, head width, value width.
    causal : {False, True, "top_left", "bottom_right"}
        As for `linear_attention`.
    extra : str
        ``"key_mask"`` hides keys, ``"masked"`` all of them; ``"negative"`` gives features near 1e-9.
    chunk_size : int
        Tokens taken together, for the chunked form; 0 leaves it out.

    Returns
    -------
    Case
        ``(q, k, v)`` and the options that differ from their defaults.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=3, Hkv=1, group=2, D=4, Dv=5)
    >>> sample_linear(np.random.default_rng(0), extra="eps", **shape).kwargs
    {'eps': 0.01}
    """
    q = _off_the_bend(rng.standard_normal((B, Tq, Hkv * group, D)))
    k = _off_the_bend(rng.standard_normal((B, Tk, Hkv, D)))
    v = rng.standard_normal((B, Tk, Hkv, Dv))
    if extra == "ties":
        q, k = np.ones_like(q), np.ones_like(k)
    if extra == "negative":
        q, k = q - 10.0, k - 10.0
    options: dict[str, Any] = {}
    if causal is not False:
        options["causal"] = causal
    if extra in ("key_mask", "masked"):
        options["key_mask"] = rng.random((B, Tk)) < (0.6 if extra == "key_mask" else 0.0)
    if extra in ("eps", "no_eps"):
        options["eps"] = 0.01 if extra == "eps" else 0.0
    if chunk_size:
        options["chunk_size"] = chunk_size
    return Case((q, k, v), options)


def _off_the_bend(x: FloatArray) -> FloatArray:
    """Move numbers away from 0, where elu bends and a central difference is wrong to first order."""
    return np.where(np.abs(x) < 1e-3, 0.5, x)


def linear_terms(case: Case) -> tuple[int, Any]:
    """Return the length of the reductions and the sums of absolute terms: the weights are positive.

    Examples
    --------
    >>> case = sample_linear(np.random.default_rng(0), B=1, Tq=2, Tk=3, Hkv=1, group=1, D=4, Dv=5)
    >>> linear_terms(case)[0]
    7
    """
    from refimpl.attention.linear import linear_attention

    q, k, v = case.args
    plain = case.without("chunk_size").replace(q, k, np.abs(v))
    return k.shape[1] + q.shape[3], plain.call(linear_attention)
