"""Laws of packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from refimpl.errors import Inconclusive
from refimpl.numerics import Array, in_float64, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Attention = Callable[..., Any]


def _both(case: Case, f: Attention) -> tuple[Array, Array]:
    """Return the output, and the log-sum-exp with tokens first."""
    out, lse = case.replace(return_lse=True).call(f)
    return in_float64(out), np.asarray(lse).T


def _parts(starts: Array) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in pairwise(starts)]


@law("attention.varlen")
def each_sequence_is_as_if_alone(f: Attention, case: Case, close: Close) -> None:
    """A packed sequence gives what it gives when no other is there."""
    case = case.replace(return_lse=True)
    q, k, v, starts, key_starts = case.args
    out, lse = _both(case, f)
    for queries, keys in zip(_parts(starts), _parts(key_starts), strict=True):
        parts = q[queries], k[keys], v[keys]
        alone = case.replace(*parts, *(np.array([0, len(x)], np.int32) for x in parts[:2]))
        if not len(parts[0]):
            continue
        expected, expected_lse = _both(alone, f)
        close.on(case)(out[queries], expected, "a sequence alone")
        close.on(case)(lse[queries], expected_lse, "its log-sum-exp", of="lse")


@law("attention.varlen")
def padding_does_not_matter(f: Attention, case: Case, close: Close) -> None:
    """Tokens behind the last sequence change nothing before them, and give 0 and -inf."""
    q, k, v, starts, key_starts = case.args
    used, used_keys = int(starts[-1]), int(key_starts[-1])
    tail = np.random.default_rng(0)

    def padded(x: Array, count: int) -> Array:
        behind = tail.standard_normal((4, *x.shape[1:])).astype(widen(x).dtype)
        return np.concatenate([x[:count], round_to(behind, x.dtype)])

    case = case.replace(return_lse=True)
    longer = case.replace(padded(q, used), padded(k, used_keys), padded(v, used_keys), starts, key_starts)
    shorter = case.replace(q[:used], k[:used_keys], v[:used_keys], starts, key_starts)
    (out, lse), (expected, expected_lse) = _both(longer, f), _both(shorter, f)
    require(out[used:] == 0, "the output of padding is not 0")
    require(np.isneginf(lse[used:]), "the log-sum-exp of padding is not -inf")
    close.on(longer)(out[:used], expected, "before padding")
    close.on(longer)(lse[:used], expected_lse, "log-sum-exp before padding", of="lse")


@law("attention.varlen")
def empty_sequences_change_nothing(f: Attention, case: Case, close: Close) -> None:
    """A sequence without tokens, wherever it stands, leaves all others as they are."""
    *arrays, starts, key_starts = case.args
    place = len(starts) // 2
    more = (np.insert(x, place, x[place]) for x in (starts, key_starts))
    with_empty, case = case.replace(*arrays, *more, return_lse=True), case.replace(return_lse=True)
    (out, lse), (expected, expected_lse) = _both(with_empty, f), _both(case, f)
    close.on(case)(out, expected, "with an empty sequence")
    close.on(case)(lse, expected_lse, "log-sum-exp with an empty sequence", of="lse")


@law("attention.varlen")
def the_order_of_sequences_does_not_matter(f: Attention, case: Case, close: Close) -> None:
    """Sequences in another order give the same outputs in that order."""
    q, k, v, starts, key_starts = case.args
    order = np.arange(len(starts) - 1)[::-1]
    queries, keys = [_parts(starts)[s] for s in order], [_parts(key_starts)[s] for s in order]

    def moved(x: Array, parts: list[slice]) -> Array:
        return np.concatenate([x[:0], *(x[part] for part in parts)])

    new = [
        np.concatenate([[0], np.cumsum([p.stop - p.start for p in parts])]).astype(np.int32)
        for parts in (queries, keys)
    ]
    turned = case.replace(moved(q, queries), moved(k, keys), moved(v, keys), *new, return_lse=True)
    (out, lse), (expected, expected_lse) = _both(turned, f), _both(case, f)
    close.on(turned)(out, moved(expected, queries), "in another order")
    close.on(turned)(lse, moved(expected_lse, queries), "log-sum-exp in another order", of="lse")


@law("attention.varlen")
def a_window_as_wide_as_all_tokens_is_none(f: Attention, case: Case, close: Close) -> None:
    """And one of a side is none on the other."""
    if "window_size" in case.kwargs:
        case = Case(case.args, {name: x for name, x in case.kwargs.items() if name != "window_size"})
    wide = len(case.args[0]) + len(case.args[1])
    expected = _both(case, f)
    for window in ((wide, -1), (-1, wide), (wide, wide)):
        for name, found, without in zip(
            ("output", "log-sum-exp"), _both(case.replace(window_size=window), f), expected, strict=True
        ):
            close.on(case)(found, without, f"{name} with a window of {window}")


@law("attention.varlen")
def a_window_hides_what_lies_beyond_it(f: Attention, case: Case, _close: Close) -> None:
    """With a window of the query's own key, and one key each, values are what comes out."""
    q, k, v, starts, _ = case.args
    if int(starts[-1]) > len(k):
        raise Inconclusive("there are fewer keys than queries")
    options = {name: x for name, x in case.kwargs.items() if name not in ("causal", "return_lse")}
    alone = Case((q, k, v, starts, starts), {**options, "window_size": (0, 0)})
    out = in_float64(alone.call(f))
    own = np.repeat(in_float64(v), q.shape[1] // k.shape[1], axis=1)[: int(starts[-1])]
    require(np.allclose(out[: len(own)], own, rtol=1e-6, atol=1e-30), "a key alone is not what comes out")
