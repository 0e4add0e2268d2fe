"""Laws of windowed attention: what a token sees, tested by changing what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.errors import LawViolation
from refimpl.numerics import Array, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

__all__ = ["changed", "output_of", "plain", "reached", "without_lse"]

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


def reached(f: Attention, case: Case, tokens: Array, layers: int = 1) -> Array:
    """Return to which tokens what `tokens` hold flows in so many layers, masks of shape (T,).

    With queries of 0 every key that is seen has the same weight, so the value 1 of a token that has been
    reached shows, as something above 0, at every query that sees it.
    """
    q, k, v = case.args[:3]
    for _ in range(layers):
        values = np.broadcast_to(tokens[None, :, None, None], (*v.shape[:3], 1)).astype(v.dtype)
        out = output_of(case.replace(np.zeros_like(q), k, values, *case.args[3:]), f)
        tokens = np.any(out > 0, axis=(0, 2, 3))
    return tokens


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
def layers_reach_a_radius_each(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """So many layers see exactly so many radii to each side."""
    case, length = plain(case), case.args[0].shape[1]
    if not case.args[0].size:
        return
    here = np.arange(length) == length // 2
    for layers in (1, 2, 3):
        expected = np.abs(np.arange(length) - length // 2) <= layers * case.kwargs["radius"]
        if np.any(reached(f, case, here, layers) != expected):
            raise LawViolation(f"{layers} layers of radius {case.kwargs['radius']} see other tokens")


@law("attention.sliding_window")
def tokens_outside_the_window_do_not_matter(f: Attention, case: Case, close: Close) -> None:
    """A key and a value that change do so for the queries within the radius only."""
    case = plain(case)
    q, k, v = case.args
    there = np.arange(q.shape[1]) == q.shape[1] // 3
    far = np.abs(np.arange(q.shape[1]) - q.shape[1] // 3) > case.kwargs["radius"]
    other = case.replace(q, changed(k, there), changed(v, there))
    close.on(without_lse(case))(
        output_of(other, f)[:, far], output_of(case, f)[:, far], "a token outside the window changed"
    )


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
    case, length = plain(case), case.args[0].shape[1]
    lower = case.replace(attn_mask=np.tri(length, dtype=bool))
    causal = case.replace(causal=True)
    close.on(without_lse(causal))(output_of(causal, f), output_of(lower, f), "causal against a triangle")
