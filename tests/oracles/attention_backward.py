"""Oracles of the backward passes of flexible attention and packed sequences: scalar loops, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from refimpl.registry import oracle


def _add_row(
    at: tuple[Any, Any],
    keys: Iterable[Any],
    arrays: tuple[Any, Any, Any, Any],
    gradients: tuple[Any, Any, Any],
    scale: float,
    score: Callable[[float, Any], float],
    slope: Callable[[float, float, Any], float],
) -> None:
    """Add what one query, at `at[0]`, sends back to the `keys` that it sees, and to itself.

    `slope` takes a gradient, the score before `score` changed it, and the key.
    """
    q, k, v, do = arrays
    dq, dk, dv = gradients
    query, place = at
    plain = {
        key: scale * math.fsum(float(x) * float(y) for x, y in zip(q[query], k[place(key)], strict=True))
        for key in keys
    }
    scores = {key: score(value, key) for key, value in plain.items()}
    top = max(scores.values(), default=-math.inf)
    if top == -math.inf:
        return
    total = math.fsum(math.exp(s - top) for s in scores.values())
    p = {key: math.exp(s - top) / total for key, s in scores.items()}
    back = {
        key: math.fsum(float(x) * float(y) for x, y in zip(do[query], v[place(key)], strict=True))
        for key in p
    }
    mean = math.fsum(p[key] * back[key] for key in p)
    for key, weight in p.items():
        if weight == 0.0:
            continue
        sent = scale * slope(weight * (back[key] - mean), plain[key], key)
        dq[query] += sent * k[place(key)]
        dk[place(key)] += sent * q[query]
        dv[place(key)] += weight * do[query]


@oracle("attention.flexible_backward")
def scalar_flexible_backward(q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, **options: Any) -> Any:
    """One score at a time, each function called with whole numbers; O and lse are not read."""
    mask, score, vjp = (options.get(name) for name in ("mask_mod", "score_mod", "score_mod_vjp"))
    aux = options.get("aux", ())
    scale = options.get("scale", 1 / math.sqrt(q.shape[3]))
    gradients = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)

    def asked(f: Any, *arguments: Any) -> Any:
        return f(*arguments, aux) if f.__code__.co_argcount > len(arguments) else f(*arguments)

    for b, i, h in np.ndindex(q.shape[:3]):
        g = h * k.shape[2] // q.shape[2]
        seen = [j for j in range(k.shape[1]) if mask is None or asked(mask, b, h, i, j)]

        def changed(value: float, j: Any, where: tuple[int, int, int] = (b, h, i)) -> float:
            return value if score is None else float(asked(score, value, *where, j))

        def slope(ds: float, value: float, j: Any, where: tuple[int, int, int] = (b, h, i)) -> float:
            return ds if vjp is None else float(asked(vjp, ds, value, *where, j))

        place = _at(b, g)
        _add_row(((b, i, h), place), seen, (q, k, v, do), gradients, scale, changed, slope)
    return gradients


def _at(b: int, g: int) -> Callable[[int], tuple[int, int, int]]:
    return lambda j: (b, j, g)


@oracle("attention.varlen_backward")
def scalar_varlen_backward(
    q: Any, k: Any, v: Any, starts: Any, key_starts: Any, o: Any, lse: Any, do: Any, **options: Any
) -> Any:
    """Every query of a sequence sends back to the keys of its own that it sees."""
    scale, cap = options.get("scale", 1 / math.sqrt(q.shape[2])), options.get("softcap")
    causal, (left, right) = options.get("causal", False), options.get("window_size", (-1, -1))
    gradients = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)

    def sees(place: int, count: int, key: int, key_count: int) -> bool:
        from_the_end = (key_count - key) - (count - place)  # how much earlier the key is
        ahead = key - place if causal == "top_left" else -from_the_end
        if (left >= 0 and ahead < -left) or (right >= 0 and ahead > right):
            return False
        return not causal or ahead <= 0

    def changed(value: float, _key: Any) -> float:
        return value if cap is None else cap * math.tanh(value / cap)

    def slope(ds: float, value: float, _key: Any) -> float:
        return ds if cap is None else ds * (1 - math.tanh(value / cap) ** 2)

    for s in range(len(starts) - 1):
        first, key_first = int(starts[s]), int(key_starts[s])
        count, key_count = int(starts[s + 1]) - first, int(key_starts[s + 1]) - key_first
        for place, h in np.ndindex(count, q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            seen = [key_first + j for j in range(key_count) if sees(place, count, j, key_count)]
            at = (first + place, h), lambda j, g=g: (j, g)
            _add_row(at, seen, (q, k, v, do), gradients, scale, changed, slope)
    return gradients
