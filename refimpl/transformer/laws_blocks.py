"""Laws of encoder and decoder blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array, in_float64, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]
BLOCKS = ("transformer.encoder", "transformer.decoder")


def _changed(x: Array, where: Array) -> Array:
    """Return `x` with other numbers where asked."""
    return round_to(np.where(where, np.float32(1.5) - widen(x), widen(x)), x.dtype)


@law(*BLOCKS)
def sequences_do_not_meet(f: Function, case: Case, close: Close) -> None:
    """The first sequence's output is what it is without the others."""
    (x,) = case.args
    if not len(x):
        return
    by_sequence = "context", "context_mask", "attn_mask"
    first = {name: value[:1] for name, value in case.kwargs.items() if name in by_sequence}
    alone = case.replace(x[:1], **first)
    close.on(alone)(alone.call(f), np.asarray(case.call(f))[:1], "first sequence alone")


@law(*BLOCKS)
def silent_sublayers_leave_the_residual(f: Function, case: Case, close: Close) -> None:
    """With all output weights 0, "pre" gives x itself, and "post" normalises x once a sublayer."""
    from refimpl.transformer.norms import layer_norm, rms_norm

    outputs = [
        name for name in case.kwargs if name.removeprefix("cross_") in ("w_o", "b_o", "w_2", "b_2", "w_down")
    ]
    silent = case.replace(**{name: np.zeros_like(case.kwargs[name]) for name in outputs})
    expected = in_float64(case.args[0])
    if case.kwargs["order"] == "post":
        options = {"eps": case.kwargs.get("eps", 1e-5)}
        for part in ("{}_1", "cross_{}", "{}_2"):
            gain, shift = (case.kwargs.get(part.format(name)) for name in ("gamma", "beta"))
            if gain is None:
                continue
            if case.kwargs["norm"] == "layer_norm":
                expected = layer_norm(expected, in_float64(gain), in_float64(shift), **options)
            else:
                expected = rms_norm(expected, in_float64(gain), **options)
    close.on(silent)(silent.call(f), expected, "output weights of 0", factor=4.0)


@law("transformer.encoder")
def tokens_without_positions_may_be_reordered(f: Function, case: Case, close: Close) -> None:
    """Without positions, reversing the tokens (and what is hidden) reverses the output."""
    case = case.without("rope", "alibi_slopes")
    moved = case.replace(case.args[0][:, ::-1])
    if "attn_mask" in case.kwargs:
        moved = moved.replace(attn_mask=case.kwargs["attn_mask"][..., ::-1])
    close.on(moved)(moved.call(f), np.asarray(case.call(f))[:, ::-1], "tokens reversed")


@law("transformer.encoder")
def hidden_tokens_do_not_matter(f: Function, case: Case, close: Close) -> None:
    """What stands at a padded token changes nothing for the others."""
    (x,) = case.args
    mask = np.random.default_rng(0).random((x.shape[0], 1, 1, x.shape[1])) < 0.6
    seen = mask[:, 0, 0, :, None]
    case = case.replace(attn_mask=mask)
    other = case.replace(_changed(x, ~seen))
    here, there = (np.where(seen, in_float64(c.call(f)), 0.0) for c in (case, other))
    close.on(other)(there, here, "other tokens behind the mask")


@law("transformer.decoder")
def the_past_ignores_the_future(f: Function, case: Case, close: Close) -> None:
    """Outputs before a token do not change with it, nor if the sequence ends there."""
    (x,) = case.args
    half = x.shape[1] // 2
    future = np.arange(x.shape[1])[None, :, None] >= half
    expected = np.asarray(case.call(f))[:, :half]
    other, cut = case.replace(_changed(x, future)), case.replace(x[:, :half])
    close.on(other)(np.asarray(other.call(f))[:, :half], expected, f"tokens from {half} on changed")
    close(cut.call(f), expected, f"tokens from {half} on cut away")


@law("transformer.decoder")
def context_may_be_reordered(f: Function, case: Case, close: Close) -> None:
    """Reversing the context, and what of it is hidden, changes nothing: it is seen whole, not causally."""
    if "context" not in case.kwargs:
        return
    moved = case.replace(context=case.kwargs["context"][:, ::-1])
    if "context_mask" in case.kwargs:
        moved = moved.replace(context_mask=case.kwargs["context_mask"][..., ::-1])
    close.on(moved)(moved.call(f), case.call(f), "context reversed")


@law("transformer.decoder")
def hidden_context_does_not_matter(f: Function, case: Case, close: Close) -> None:
    """What stands at a padded position of the context changes nothing."""
    if "context" not in case.kwargs:
        return
    context = case.kwargs["context"]
    mask = np.random.default_rng(0).random((context.shape[0], 1, 1, context.shape[1])) < 0.5
    case = case.replace(context_mask=mask)
    other = case.replace(context=_changed(context, ~mask[:, 0, 0, :, None]))
    close.on(other)(other.call(f), case.call(f), "another context behind the mask")
