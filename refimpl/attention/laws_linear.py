"""Laws of linear attention: its weights are a positive kernel's, and its past is a sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Attention = Callable[..., Any]
LINEAR = ("attention.linear", "attention.linear_chunked")


def _out(case: Case, f: Attention) -> Array:
    return widen(np.asarray(case.call(f)))


def _other(x: Array, where: Array) -> Array:
    """Return `x` with other numbers where asked, as far from 0 as they were."""
    return round_to(np.where(where, -widen(x), widen(x)), x.dtype)


@law(*LINEAR)
def keys_sum_in_any_order(f: Attention, case: Case, close: Close) -> None:
    """Without a causal mask, permuting keys with their values and their padding changes nothing."""
    case = case.without("causal")
    q, k, v = case.args
    order = np.random.default_rng(0).permutation(k.shape[1])
    moved = case.replace(q, k[:, order], v[:, order])
    if "key_mask" in case.kwargs:
        moved = moved.replace(key_mask=case.kwargs["key_mask"][:, order])
    close.on(case)(_out(moved, f), _out(case, f), "keys permuted with values")


@law(*LINEAR)
def values_are_averaged(f: Attention, case: Case, close: Close) -> None:
    """Every output lies between the least and the greatest value, or 0: the weights are positive."""
    q, _, v = case.args
    if v.shape[1] == 0:
        return
    out = np.asarray(_out(case, f), dtype=np.float64)
    values = np.repeat(widen(v).astype(np.float64), q.shape[2] // v.shape[2], axis=2)
    low = np.minimum(values.min(axis=1, keepdims=True), 0.0) - close.tolerance
    high = np.maximum(values.max(axis=1, keepdims=True), 0.0) + close.tolerance
    if not np.all((out >= low) & (out <= high)):
        raise LawViolation(f"outside the values by {np.max(np.maximum(low - out, out - high))}")


@law(*LINEAR)
def weights_sum_to_one_without_eps(f: Attention, case: Case, close: Close) -> None:
    """With eps 0 and all values 1 every row that sees a key is 1, and every other row is 0."""
    case = case.without("key_mask").replace(eps=0.0)
    q, k, v = case.args
    ones = case.replace(q, k, np.ones_like(v))
    offset = k.shape[1] - q.shape[1] if case.kwargs.get("causal") == "bottom_right" else 0
    sees = k.shape[1] > 0 and (not case.kwargs.get("causal") or np.arange(q.shape[1]) + offset >= 0)
    out = _out(ones, f)
    expected = np.broadcast_to(np.asarray(sees, dtype=float).reshape(1, -1, 1, 1), out.shape)
    close.on(ones)(out, expected, "values of 1")


@law(*LINEAR)
def eps_takes_its_share(f: Attention, case: Case, close: Close) -> None:
    """With features of 1, m keys of value 1 give D m / (D m + eps): eps stands in the denominator, once."""
    q, k, v = case.args
    m, D = k.shape[1], k.shape[3]
    flat = Case((np.zeros_like(q), np.zeros_like(k), np.ones_like(v)), {"eps": 0.5})
    out = _out(flat, f)
    close.on(flat)(out, np.full(out.shape, D * m / (D * m + 0.5)), "features and values of 1, eps 1/2")


@law(*LINEAR)
def features_grow_linearly_above_zero(f: Attention, case: Case, close: Close) -> None:
    """Where all queries and keys are positive, their features are theirs plus 1: the weights say so."""
    q, k, v = (widen(x) for x in case.args)
    q, k = np.abs(q), np.abs(k)
    positive = Case(
        tuple(round_to(x, y.dtype) for x, y in zip((q, k, v), case.args, strict=True)), {"eps": 1.0}
    )
    q, k, v = (widen(x).astype(np.float64) for x in positive.args)
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    weights = np.einsum("bihd,bjhd->bhij", q + 1, k + 1)
    expected = np.einsum("bhij,bjhe->bihe", weights, v) / (1.0 + weights.sum(-1).swapaxes(1, 2)[..., None])
    close.on(positive)(_out(positive, f), expected, "positive queries and keys", factor=2.0)


@law(*LINEAR)
def features_halve_by_log_two_below_zero(f: Attention, case: Case, close: Close) -> None:
    """A negative key weighs what two copies of it do, each lower by log 2: its features are exponentials."""
    q, k, v = case.args
    if k.shape[1] == 0:
        return
    k = round_to(-np.abs(widen(k)), k.dtype)
    lower = round_to(widen(k[:, :1]) - widen(k[:, :1]).dtype.type(np.log(2.0)), k.dtype)
    plain = Case((q, k, v), {"eps": 0.1})
    split = plain.replace(
        q, np.concatenate([lower, lower, k[:, 1:]], axis=1), np.concatenate([v[:, :1], v], axis=1)
    )
    close.on(split)(_out(split, f), _out(plain, f), "the first key split in two", factor=2.0)


@law(*LINEAR)
def padded_keys_add_nothing(f: Attention, case: Case, close: Close) -> None:
    """What stands at a padded key changes nothing."""
    q, k, v = case.args
    mask = np.random.default_rng(0).random(k.shape[:2]) < 0.5
    masked = case.replace(key_mask=mask)
    hidden = ~mask[:, :, None, None]
    moved = masked.replace(q, _other(k, hidden), _other(v, hidden))
    close.on(masked)(_out(moved, f), _out(masked, f), "other keys behind the mask")


@law(*LINEAR)
def later_keys_change_nothing(f: Attention, case: Case, close: Close) -> None:
    """Under a causal mask, keys after the last one that a query sees do not change its output."""
    case = case.replace(causal="top_left")
    q, k, v = case.args
    half = min(q.shape[1], k.shape[1]) // 2
    future = np.arange(k.shape[1])[None, :, None, None] >= half
    moved = case.replace(q, _other(k, future), _other(v, future))
    close.on(case)(_out(moved, f)[:, :half], _out(case, f)[:, :half], f"keys from {half} on changed")


@law(*LINEAR)
def the_last_query_sees_everything(f: Attention, case: Case, close: Close) -> None:
    """Under "bottom_right" the last query's output is that without a mask; so is any other's on its keys."""
    q, k, v = case.args
    if q.shape[1] == 0 or k.shape[1] == 0:
        return
    aligned = case.replace(causal="bottom_right")
    out, close = _out(aligned, f), close.on(aligned)
    for back in range(min(q.shape[1], k.shape[1])):
        i, keys = q.shape[1] - 1 - back, k.shape[1] - back
        alone = case.without("causal").replace(q[:, i : i + 1], k[:, :keys], v[:, :keys])
        if "key_mask" in case.kwargs:
            alone = alone.replace(key_mask=case.kwargs["key_mask"][:, :keys])
        close(_out(alone, f), out[:, i : i + 1], f"query {i} with {keys} keys and no mask")


@law(*LINEAR)
def shared_key_heads_are_repeated_ones(f: Attention, case: Case, close: Close) -> None:
    """Query heads that share a key head give what a copy of it for each gives."""
    q, k, v = case.args
    group = q.shape[2] // k.shape[2]
    repeated = case.replace(q, np.repeat(k, group, axis=2), np.repeat(v, group, axis=2))
    close(_out(repeated, f), _out(case, f), "key heads repeated for their group")


@law("attention.linear_chunked")
def chunk_borders_do_not_matter(f: Attention, case: Case, close: Close) -> None:
    """Chunks of 1, 3 and more tokens than there are give the same."""
    base = _out(case, f)
    for size in (1, 3, 64):
        close(_out(case.replace(chunk_size=size), f), base, f"chunks of {size}")
