"""Cases of sequences of different lengths, packed one behind the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.samples import sample_attention
from refimpl.registry import Case

__all__ = ["AXES", "EDGES", "OPTIONS", "sample_varlen", "varlen_terms"]

AXES = {"S": (1, 4), "Lq": (0, 6), "Lk": (0, 6), "Hkv": (1, 2), "group": (1, 3), "D": (1, 5), "Dv": (1, 5)}
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "causal": (False, True, "top_left", "bottom_right"),
    "window": ("none", "left", "both"),
    "extra": ("none", "scale", "softcap"),
    "tail": ("none", "padded"),
    "return_lse": (False, True),
}
_PLAIN: dict[str, int | str | bool] = {
    "S": 3, "Lq": 5, "Lk": 7, "Hkv": 1, "group": 2, "D": 3, "Dv": 2,
    "causal": False, "window": "none", "extra": "none", "tail": "none", "return_lse": True,
}  # fmt: skip
EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_PLAIN, "S": 0},
    {**_PLAIN, "S": 0, "tail": "padded"},
    {**_PLAIN, "S": 1, "Lq": 1, "Lk": 1, "group": 1, "D": 1, "Dv": 1, "causal": True},
    {**_PLAIN, "Lq": 0},
    {**_PLAIN, "Lk": 0, "causal": "bottom_right"},  # queries that see no key
    {**_PLAIN, "S": 7, "Lq": 2, "Lk": 2, "causal": "top_left", "tail": "padded"},  # many in one tile
    {**_PLAIN, "S": 2, "Lq": 33, "Lk": 20, "causal": "bottom_right", "tail": "padded"},
    {**_PLAIN, "S": 2, "Lq": 20, "Lk": 33, "causal": "bottom_right", "group": 1},
    {**_PLAIN, "S": 2, "Lq": 19, "Lk": 19, "causal": True, "extra": "softcap"},
    {**_PLAIN, "Lq": 6, "Lk": 9, "extra": "large"},
    {**_PLAIN, "S": 2, "Lq": 20, "Lk": 33, "window": "both", "tail": "padded"},
    {**_PLAIN, "S": 2, "Lq": 9, "Lk": 4, "causal": "top_left", "window": "left"},  # windows behind all keys
)


def sample_varlen(
    rng: np.random.Generator,
    *,
    S: int,
    Lq: int,
    Lk: int,
    causal: bool | str,
    tail: str,
    window: str = "none",
    **shape: Any,
) -> Case:
    """Return a call of `varlen_attention` on S sequences of at most Lq queries and Lk keys, some empty.

    With causal=True each sequence has as many keys as queries.  A padded tail is three tokens behind the last
    sequence.  A window is of two keys on the left and the query's own, or of one more on the right, too.

    Examples
    --------
    >>> shape = dict(S=2, Lq=3, Lk=3, Hkv=1, group=1, D=2, Dv=2, causal=False, tail="none")
    >>> sample_varlen(np.random.default_rng(0), **shape).args[3:]
    (array([0, 3, 5], dtype=int32), array([0, 2, 3], dtype=int32))
    """
    lengths_q, lengths_k = rng.integers(0, Lq + 1, S), rng.integers(0, Lk + 1, S)
    if causal is True:
        lengths_k = lengths_q
    starts = [np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (lengths_q, lengths_k)]
    behind = 3 if tail == "padded" else 0
    Tq, Tk = (int(start[-1]) + behind for start in starts)
    case = sample_attention(rng, B=1, Tq=Tq, Tk=Tk, **shape)
    found = Case((*(x[0] for x in case.args), *starts), case.kwargs)
    if window != "none":
        found = found.replace(window_size=(2, -1 if window == "left" else 1))
    return found.replace(causal=causal) if causal is not False else found


def varlen_terms(case: Case) -> tuple[int, Any]:
    """Return the length of the reductions and the sums of absolute terms, as `attention_terms` does."""
    from refimpl.attention.dense import AttentionOutput
    from refimpl.attention.varlen import varlen_attention

    q, k, v, *starts = case.args
    magnitude = case.replace(q, k, np.abs(v), *starts).call(varlen_attention)
    if isinstance(magnitude, AttentionOutput):
        lse = np.where(np.isfinite(magnitude.lse), np.abs(magnitude.lse), 0.0) + 1.0
        magnitude = AttentionOutput(magnitude.out, lse)
    return int(np.max(np.diff(starts[1]), initial=0)) + q.shape[2], magnitude
