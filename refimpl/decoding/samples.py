"""Cases on which sampling is judged."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.registry import Case

__all__ = ["SAMPLING", "sample_law", "sample_sampling"]

_ALL: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
SAMPLING: dict[str, Any] = {
    "axes": {"B": (1, 3), "V": (1, 12)},
    "options": {
        "values": ("normal", "ties", "forbidden", "wide"),
        "temperature": (1.0, 0.0, 0.5, 2.0),
        "top_k": (None, 1, 3, 20),
        "top_p": (1.0, 0.91, 0.47, 0.0),  # no sum of the tied probabilities hits these
    },
    "edges": (
        {"B": 0, "V": 3},
        {"V": 1},
        {"V": 9, **_ALL},
        {"V": 9, **_ALL, "temperature": 0.0, "values": "ties"},
        {"V": 9, **_ALL, "top_k": 3, "values": "ties"},
        {"V": 9, **_ALL, "top_p": 0.47, "values": "forbidden"},
        {"V": 12, **_ALL, "top_p": 0.91, "top_k": 20, "values": "wide"},
        {"V": 12, "temperature": 2.0, "top_k": 3, "top_p": 0.91, "values": "normal"},
    ),
}


def sample_law(
    rng: np.random.Generator, *, B: int, V: int, values: str, top_k: int | None, **options: Any
) -> Case:
    """Return one call of `sampling_law`.

    "ties" holds equal logits, "forbidden" some of -inf, "wide" such that most probabilities vanish.

    Examples
    --------
    >>> shape = dict(B=1, V=3, values="normal", temperature=1.0, top_k=2, top_p=0.9)
    >>> case = sample_law(np.random.default_rng(0), **shape)
    >>> case.args[0].shape, case.kwargs
    ((1, 3), {'temperature': 1.0, 'top_p': 0.9, 'top_k': 2})
    """
    logits = 2.0 * rng.standard_normal((B, V))
    if values == "ties":
        logits = rng.integers(0, 2, (B, V)) * np.log(3.0)
    if values == "forbidden":
        logits[rng.random((B, V)) < 0.5] = -np.inf
        logits[:, rng.integers(V)] = 0.0
    if values == "wide":
        logits = 300.0 * logits
    return Case((logits,), options if top_k is None else {**options, "top_k": top_k})


def sample_sampling(rng: np.random.Generator, *, B: int, **options: Any) -> Case:
    """Return one call of `sampling`, with the draws.

    Examples
    --------
    >>> shape = dict(B=1, V=3, values="normal", temperature=1.0, top_k=None, top_p=1.0)
    >>> sample_sampling(np.random.default_rng(0), **shape).kwargs["uniforms"].shape
    (1,)
    """
    return sample_law(rng, B=B, **options).replace(uniforms=rng.random(B))
