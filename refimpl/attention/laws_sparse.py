"""Laws of sparse attention: what a token sees is read off the outputs, and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.attention.sliding_window import sliding_window_attention
from refimpl.numerics import Array, BoolArray, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

__all__ = ["changed", "output_of", "plain", "seen", "weighing", "without_lse"]

Attention = Callable[..., Any]

POSITIONAL = ("causal", "attn_mask", "bias", "alibi_slopes", "q_lengths", "k_lengths", "dropout_p", "rng")


def without_lse(case: Case) -> Case:
    """Return the case that asks for the output alone."""
    return case.without("return_lse")


def output_of(case: Case, f: Attention) -> Array:
    """Return the output alone, bfloat16 widened."""
    return widen(np.asarray(without_lse(case).call(f)))


def plain(case: Case) -> Case:
    """Return the case without the options that treat positions apart, the pattern's own left in."""
    return case.without(*POSITIONAL)


def changed(x: Array, tokens: Array) -> Array:
    """Return x [B, T, H, D] with 1 added at `tokens`, a mask of shape (T,)."""
    return round_to(np.where(tokens[None, :, None, None], widen(x) + np.float32(1.0), widen(x)), x.dtype)


def weighing(case: Case) -> Case:
    """Return the case whose output is the weights of its keys, which all score alike.

    With queries of 0 every score is 0; with the unit vectors as values, the weights are the output.
    """
    q, k = case.args[:2]
    length = q.shape[1]
    units = np.broadcast_to(np.eye(length)[None, :, None, :], (*k.shape[:3], length)).astype(q.dtype)
    return without_lse(case).replace(np.zeros_like(q), k, units)


def seen(f: Attention, case: Case) -> BoolArray:
    """Return which query sees which key, shape (B, Hq, T, T): those keys have a weight."""
    mask: BoolArray = np.swapaxes(output_of(weighing(case), f), 1, 2) > 0
    return mask


def _distance(length: int) -> Array:
    i = np.arange(length)
    distance: Array = np.abs(i[:, None] - i)
    return distance


@law("attention.sliding_window", "attention.dilated_window", "attention.global_tokens", "attention.bigbird")
def keys_that_score_alike_weigh_alike(f: Attention, case: Case, close: Close) -> None:
    """Keys of one score have one weight, and all weights sum to 1: no key counts twice, whoever names it."""
    case = weighing(plain(case))
    weights = output_of(case, f)
    present = weights > 0
    count = np.maximum(present.sum(axis=3, keepdims=True), 1)
    close.on(case)(weights, present / count, "keys of one score")


@law("attention.sliding_window", "attention.dilated_window")
def radius_of_zero_returns_values(f: Attention, case: Case, close: Close) -> None:
    """A token that sees itself alone gets its own value."""
    case = plain(case).replace(radius=0)
    q, k, v = case.args
    values = np.repeat(widen(v), q.shape[2] // k.shape[2], axis=2)
    close.on(without_lse(case))(output_of(case, f), values, "radius 0 against the values")


@law("attention.sliding_window")
def wide_window_is_full_attention(f: Attention, case: Case, close: Close) -> None:
    """A window that holds the whole sequence gives dense attention."""
    case = without_lse(case).replace(radius=max(case.args[0].shape[1] - 1, 0))
    full = output_of(case.without("radius"), scaled_dot_product_attention)
    close.on(case)(output_of(case, f), full, "a window over everything against dense attention")


@law("attention.sliding_window")
def window_pairs_are_counted(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """Each head uses N (2h + 1) - h (h + 1) scores for a radius h < N, one at least of each query."""
    case, length = plain(case), case.args[0].shape[1]
    h = min(case.kwargs["radius"], max(length - 1, 0))
    pairs = seen(f, case).sum(axis=(2, 3))
    require(
        np.all(pairs == length * (2 * h + 1) - h * (h + 1)), f"radius {h} over {length} uses {pairs} scores"
    )


@law("attention.sliding_window")
def layers_reach_a_radius_each(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """So many layers see exactly so many radii to each side."""
    case, length = plain(case), case.args[0].shape[1]
    one = seen(f, case).astype(np.int64)
    reached = one
    for layers in (1, 2, 3):
        expected = _distance(length) <= layers * case.kwargs["radius"]
        require(np.all((reached > 0) == expected), f"{layers} layers see other tokens")
        reached = np.minimum(reached @ one, 1)


@law("attention.sliding_window")
def windows_move_with_the_sequence(f: Attention, case: Case, close: Close) -> None:
    """Without its first token a sequence gives the same, from the first window on that did not hold it."""
    case = plain(case)
    q, k, v = case.args
    rest, first = case.replace(q[:, 1:], k[:, 1:], v[:, 1:]), case.kwargs["radius"]
    if q.shape[1] <= first + 1:
        return
    close.on(without_lse(case))(
        output_of(rest, f)[:, first:], output_of(case, f)[:, first + 1 :], "the first token dropped"
    )


@law("attention.sliding_window", "attention.dilated_window", "attention.global_tokens", "attention.bigbird")
def causal_pattern_is_the_lower_half(f: Attention, case: Case, close: Close) -> None:
    """Under a causal mask the part of the pattern on and below the diagonal is left."""
    case = plain(case)
    causal = case.replace(causal=True)
    lower = case.replace(attn_mask=np.tri(case.args[0].shape[1], dtype=bool))
    close.on(without_lse(causal))(output_of(causal, f), output_of(lower, f), "causal against a triangle")


@law("attention.dilated_window")
def dilation_of_one_is_the_window(f: Attention, case: Case, close: Close) -> None:
    """Without gaps it is sliding-window attention."""
    case = without_lse(case).replace(dilation=1)
    window = output_of(case.without("dilation"), sliding_window_attention)
    close.on(case)(output_of(case, f), window, "dilation 1 against the window")


@law("attention.dilated_window")
def classes_of_positions_are_windows(f: Attention, case: Case, close: Close) -> None:
    """Each class of positions modulo the dilation is a sequence of its own, under a sliding window."""
    case = without_lse(plain(case))
    gap = int(np.max(case.kwargs["dilation"], initial=1))
    case = case.replace(dilation=gap)
    close, whole = close.on(case), output_of(case, f)
    for first in range(min(gap, case.args[0].shape[1])):
        part = case.without("dilation").replace(*(x[:, first::gap] for x in case.args))
        close(
            whole[:, first::gap], output_of(part, sliding_window_attention), f"positions {first} modulo {gap}"
        )


@law("attention.dilated_window")
def layers_span_a_dilated_radius_each(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """So many layers span as many radii times the dilation, and see one class of positions in it."""
    case, length = plain(case), case.args[0].shape[1]
    gap = int(np.max(case.kwargs["dilation"], initial=1))
    one = seen(f, case.replace(dilation=gap)).astype(np.int64)
    expected = _distance(length) <= 2 * case.kwargs["radius"] * gap
    expected &= _distance(length) % gap == 0
    require(np.all((one @ one > 0) == expected), f"two layers of dilation {gap} see other tokens")


@law("attention.dilated_window")
def classes_never_meet(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """Tokens whose positions differ modulo a head's dilation do not see each other; no span exceeds it."""
    case, length = plain(case), case.args[0].shape[1]
    mask, distance = seen(f, case), _distance(length)
    for h in range(mask.shape[1]):
        gap = int(np.broadcast_to(case.kwargs["dilation"], mask.shape[1])[h])
        expected = (distance % gap == 0) & (distance // gap <= case.kwargs["radius"])
        require(np.all(mask[:, h] == expected), f"head {h} of dilation {gap} sees others")
