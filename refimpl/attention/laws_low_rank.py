"""Laws of low-rank attention: dense attention to fixed mixtures of the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.numerics import Array, contract, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Attention = Callable[..., Any]


def _out(case: Case, f: Attention) -> Array:
    return widen(np.asarray(case.call(f)))


def _identity(n: int, like: Array) -> Array:
    return round_to(np.eye(n)[None], like.dtype)


@law("attention.low_rank")
def identity_projections_give_full_attention(f: Attention, case: Case, close: Close) -> None:
    """With R = Tk and identities for projections it is scaled dot-product attention."""
    q, k, v, e, _ = case.args
    eye = _identity(k.shape[1], e)
    full = case.without("key_mask").replace(q, k, v, eye, eye)
    expected = scaled_dot_product_attention(q, k, v, scale=case.kwargs.get("scale"))
    close.on(full)(_out(full, f), widen(expected), "identity projections against dense attention")


@law("attention.low_rank")
def projecting_before_or_inside_is_the_same(f: Attention, case: Case, close: Close) -> None:
    """Keys and values that were projected before are attended to as they are."""
    q, k, v, e, g = case.args
    if "key_mask" in case.kwargs:
        real = case.kwargs["key_mask"][:, :, None, None]
        k, v = (round_to(np.where(real, widen(x), 0), x.dtype) for x in (k, v))
    heads = (k.shape[2], *e.shape[1:])
    keys, values = (
        round_to(contract("hrj,bjhd->brhd", np.broadcast_to(widen(w), heads), widen(x)), x.dtype)
        for w, x in ((e, k), (g, v))
    )
    eye = _identity(e.shape[1], e)
    before = case.without("key_mask").replace(q, keys, values, eye, eye)
    close.on(before)(_out(before, f), _out(case, f), "projected before", factor=4.0)


@law("attention.low_rank")
def rows_sum_to_one_over_the_projected_keys(f: Attention, case: Case, close: Close) -> None:
    """Where every projected value is 1, so is every output."""
    q, k, v, e, g = case.args
    if not k.shape[1] or not e.shape[1]:
        return
    first = np.zeros(g.shape)
    first[:, :, 0] = 1.0
    ones = case.without("key_mask").replace(q, k, np.ones_like(v), e, round_to(first, g.dtype))
    out = _out(ones, f)
    close.on(ones)(out, np.ones(out.shape), "projected values of 1")


@law("attention.low_rank")
def projected_keys_commute(f: Attention, case: Case, close: Close) -> None:
    """Permuting the rows of both projections together changes nothing."""
    q, k, v, e, g = case.args
    order = np.random.default_rng(0).permutation(e.shape[1])
    moved = case.replace(q, k, v, e[:, order], g[:, order])
    close(_out(moved, f), _out(case, f), "rows of the projections permuted")


@law("attention.low_rank")
def positions_are_columns_of_the_projections(f: Attention, case: Case, close: Close) -> None:
    """Permuting keys, values and padding with the columns of the projections changes nothing."""
    q, k, v, e, g = case.args
    order = np.random.default_rng(0).permutation(k.shape[1])
    moved = case.replace(q, k[:, order], v[:, order], e[:, :, order], g[:, :, order])
    if "key_mask" in case.kwargs:
        moved = moved.replace(key_mask=case.kwargs["key_mask"][:, order])
    close(_out(moved, f), _out(case, f), "keys and columns permuted")


@law("attention.low_rank")
def padding_is_zero_before_the_projections(f: Attention, case: Case, close: Close) -> None:
    """Masking a key is the same as a key and a value of 0 there, whatever stands in the padding."""
    q, k, v, e, g = case.args
    mask = np.random.default_rng(0).random(k.shape[:2]) < 0.5

    def padded(filling: float) -> Iterator[Array]:
        return (round_to(np.where(mask[:, :, None, None], widen(x), filling), x.dtype) for x in (k, v))

    masked = case.replace(q, *padded(np.nan), e, g, key_mask=mask)
    plain = case.without("key_mask").replace(q, *padded(0.0), e, g)
    close.on(plain)(_out(masked, f), _out(plain, f), "padding against zeros")


@law("attention.low_rank")
def low_rank_queries_are_independent(f: Attention, case: Case, close: Close) -> None:
    """Permuting queries permutes the rows of the output."""
    q, *rest = case.args
    order = np.random.default_rng(0).permutation(q.shape[1])
    close(_out(case.replace(q[:, order], *rest), f), _out(case, f)[:, order], "queries permuted")


@law("attention.low_rank")
def each_key_head_has_its_projection(f: Attention, case: Case, close: Close) -> None:
    """A projection shared by the heads is a copy of it for each; so is a key head shared by its group."""
    q, k, v, e, g = case.args
    group, heads = q.shape[2] // k.shape[2], k.shape[2]
    e, g = (np.repeat(np.broadcast_to(x, (heads, *x.shape[1:])), group, axis=0) for x in (e, g))
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    close(_out(case.replace(q, k, v, e, g), f), _out(case, f), "everything repeated for each query head")
