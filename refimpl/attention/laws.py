"""Laws of attention: what must hold for every implementation, whatever it is written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Attention = Callable[..., Any]

ATTENTION = ("attention.dense", "attention.standard", "attention.flash", "attention.block_sparse_flash")
# Patterns of self-attention: what says nothing of the order of tokens holds for them too.
SPARSE = (
    "attention.sliding_window",
    "attention.dilated_window",
    "attention.global_tokens",
    "attention.bigbird",
    "attention.shifted_groups",
)
PER_KEY = ("attn_mask", "bias", "dropout_mask")  # options with an axis of keys


def _out(case: Case, f: Attention) -> Array:
    """Return the output alone, bfloat16 widened so that NumPy can compute with it."""
    return widen(np.asarray(case.without("return_lse").call(f)))


def _unordered(case: Case) -> Case:
    """Return the case without the options that tie a key to its position."""
    return case.without("causal", "alibi_slopes", "q_lengths", "k_lengths", "dropout_p", "rng", "block_mask")


@law(*ATTENTION)
def keys_commute(f: Attention, case: Case, close: Close) -> None:
    """Permuting keys together with their values, masks and biases changes nothing."""
    case = _unordered(case)
    q, k, v = case.args
    order = np.random.default_rng(0).permutation(k.shape[1])
    moved = {
        name: value[..., order] if name in PER_KEY and value.shape[-1] > 1 else value
        for name, value in case.kwargs.items()
    }
    moved_case = Case((q, k[:, order], v[:, order]), moved)
    close.on(case)(_out(moved_case, f), _out(case, f), "keys permuted with values")


@law(*ATTENTION)
def queries_are_independent(f: Attention, case: Case, close: Close) -> None:
    """Permuting queries permutes the rows of the output."""
    case = _unordered(case)
    q, k, v = case.args
    order = np.random.default_rng(0).permutation(q.shape[1])
    moved = {
        name: value[..., order, :] if name in PER_KEY and value.shape[-2] > 1 else value
        for name, value in case.kwargs.items()
    }
    close.on(case)(_out(Case((q[:, order], k, v), moved), f), _out(case, f)[:, order], "queries permuted")


@law(*ATTENTION, *SPARSE)
def output_is_an_average_of_values(f: Attention, case: Case, close: Close) -> None:
    """Without dropout every output lies between the least and the greatest value, or is 0."""
    case = case.without("dropout_p", "rng", "dropout_mask")
    close = close.on(case)
    q, _, v = case.args
    if v.shape[1] == 0:
        return
    out = np.asarray(_out(case, f), dtype=np.float64)
    values = np.repeat(widen(v).astype(np.float64), q.shape[2] // v.shape[2], axis=2)
    low = np.minimum(values.min(axis=1, keepdims=True), 0.0) - close.tolerance
    high = np.maximum(values.max(axis=1, keepdims=True), 0.0) + close.tolerance
    if not np.all((out >= low) & (out <= high)):
        raise LawViolation(
            f"output outside the range of the values by {np.max(np.maximum(low - out, out - high))}"
        )


@law(*ATTENTION, *SPARSE)
def values_scale_linearly(f: Attention, case: Case, close: Close) -> None:
    """Doubling the values doubles the output: the weights do not depend on them."""
    q, k, v = case.args
    doubled = round_to(2 * widen(v), v.dtype)
    close(_out(case.replace(q, k, doubled), f), 2 * _out(case, f), "values doubled", factor=2.0)


@law(*ATTENTION)
def masked_keys_do_not_matter(f: Attention, case: Case, close: Close) -> None:
    """What stands at a masked key changes nothing."""
    case = case.without("bias", "alibi_slopes", "q_lengths", "k_lengths", "dropout_p", "rng", "causal")
    q, k, v = case.args
    B, Tq, Tk = q.shape[0], q.shape[1], k.shape[1]
    mask = np.random.default_rng(0).random((B, 1, 1, Tk)) < 0.5
    hidden = ~mask[:, 0, 0, :, None, None]
    masked = case.replace(attn_mask=np.broadcast_to(mask, (B, 1, Tq, Tk)).copy())
    other = [np.where(hidden, round_to(np.float32(3.0) - widen(x), x.dtype), x) for x in (k, v)]
    other = [round_to(widen(x), k.dtype) for x in other]
    close.on(masked)(_out(masked.replace(q, *other), f), _out(masked, f), "other keys behind the mask")


@law(*ATTENTION, *SPARSE)
def rows_without_keys_are_zero(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """A query that may attend to no key gets exactly 0."""
    q, k, _ = case.args
    mask = np.ones((1, 1, q.shape[1], k.shape[1]), dtype=bool)
    mask[:, :, ::2] = False
    out = _out(case.replace(attn_mask=mask), f)
    if np.any(out[:, ::2] != 0):
        raise LawViolation("a row with every key masked is not 0")


@law(*ATTENTION)
def causal_rows_ignore_the_future(f: Attention, case: Case, close: Close) -> None:
    """Under a causal mask, keys after the last one that a query sees do not change its output."""
    case = case.without("q_lengths", "k_lengths", "alibi_slopes").replace(causal="top_left")
    q, k, v = case.args
    half = min(q.shape[1], k.shape[1]) // 2
    future = np.arange(k.shape[1])[None, :, None, None] >= half
    other = [round_to(np.where(future, widen(x) + np.float32(1.0), widen(x)), x.dtype) for x in (k, v)]
    close.on(case)(
        _out(case.replace(q, *other), f)[:, :half],
        _out(case, f)[:, :half],
        f"keys from {half} on changed, rows before it compared",
    )


@law(*ATTENTION, *SPARSE)
def grouped_heads_repeat_keys(f: Attention, case: Case, close: Close) -> None:
    """Grouped heads give what repeating each key head for its group gives."""
    q, k, v = case.args
    group = q.shape[2] // k.shape[2]
    repeated = case.replace(q, np.repeat(k, group, axis=2), np.repeat(v, group, axis=2))
    close(_out(repeated, f), _out(case, f), "key heads repeated for their group")


@law(*ATTENTION)
def equal_scores_give_the_mean(f: Attention, case: Case, close: Close) -> None:
    """With all keys 0 every key has the same weight, so the output is the mean of the values."""
    q, k, v = case.args
    if k.shape[1] == 0:
        return
    flat = Case((q, np.zeros_like(k), v))
    out = _out(flat, f)
    mean = widen(v).astype(np.float64).mean(axis=1, keepdims=True)
    mean = np.broadcast_to(np.repeat(mean, q.shape[2] // v.shape[2], axis=2), out.shape)
    close.on(flat)(out, mean, "keys of 0 against the mean of the values")


@law(*ATTENTION)
def lse_merges_halves_of_the_keys(f: Attention, case: Case, close: Close) -> None:
    """The outputs over two halves of the keys, weighted by their log-sum-exps, make the whole."""
    case = _unordered(case).without("attn_mask", "bias", "dropout_mask").replace(return_lse=True)
    q, k, v = case.args
    close = close.on(case)
    half = k.shape[1] // 2
    parts = [case.replace(q, k[:, s], v[:, s]).call(f) for s in (slice(0, half), slice(half, None))]
    whole = case.call(f)
    lse = np.logaddexp(parts[0][1], parts[1][1], dtype=np.float64)
    close(lse, np.asarray(whole[1], dtype=np.float64), "log-sum-exp of two halves", of="lse")
    total = np.zeros(np.asarray(whole[0]).shape)
    for out, part in parts:
        weight = np.exp(_finite(np.asarray(part, dtype=np.float64)) - _finite(lse))
        weight[np.isneginf(part)] = 0.0
        total += widen(np.asarray(out)).astype(np.float64) * np.swapaxes(weight, 1, 2)[..., None]
    close(total, widen(np.asarray(whole[0])).astype(np.float64), "two halves merged", factor=2.0)


def _finite(x: Array) -> Array:
    return np.where(np.isfinite(x), x, 0.0)


@law("attention.flash", "attention.block_sparse_flash")
def block_borders_do_not_matter(f: Attention, case: Case, close: Close) -> None:
    """Any block sizes give the same result, ragged last blocks included."""
    case = case.without("block_mask", "block_sizes", "sram")
    small, ragged = (_out(case.replace(block_sizes=size), f) for size in ((3, 2), (7, 5)))
    close.on(case)(small, ragged, "blocks of 3 x 2 and of 7 x 5")


@law("attention.block_sparse_flash")
def skipped_blocks_are_masked_keys(f: Attention, case: Case, close: Close) -> None:
    """Skipping blocks gives what masking their scores gives."""
    if case.kwargs.get("block_mask") is None:
        return
    q, k, _ = case.args
    block_q, block_k = case.kwargs["block_sizes"]
    rows, columns = np.arange(q.shape[1]) // block_q, np.arange(k.shape[1]) // block_k
    tiles = q.shape[0], q.shape[2], -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    mask = np.broadcast_to(case.kwargs["block_mask"], tiles)[:, :, rows[:, None], columns]
    masked = case.kwargs.get("attn_mask", np.True_) & mask
    close(
        _out(case, f), _out(case.without("block_mask").replace(attn_mask=masked), f), "blocks masked instead"
    )
