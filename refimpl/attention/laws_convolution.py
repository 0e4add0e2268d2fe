"""Laws of lightweight and dynamic convolution, and of the attention that has one for its near half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.lightweight_convolution import lightweight_convolution
from refimpl.attention.multi_head import multi_head_attention
from refimpl.errors import LawViolation
from refimpl.numerics import Array, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]
CONVOLUTIONS = ("attention.lightweight_convolution", "attention.dynamic_convolution")


def _out(case: Case, f: Function) -> Array:
    return widen(np.asarray(case.call(f)))


def _reach(case: Case, K: int) -> tuple[int, int]:
    """Return how many tokens before and after its own a kernel sees."""
    before = K - 1 if case.kwargs.get("causal") else (K - 1) // 2
    return before, K - 1 - before


def _flipped(x: Array, start: int) -> Array:
    """Return tokens whose sign is turned from `start` on."""
    return round_to(np.where(np.arange(x.shape[1])[:, None] < start, widen(x), -widen(x)), x.dtype)


@law(*CONVOLUTIONS)
def constant_sequences_stay(f: Function, case: Case, close: Close) -> None:
    """A constant sequence is unchanged where the whole kernel lies inside: the weights sum to 1."""
    x, w = case.args
    before, after = _reach(case, w.shape[-1])
    if not x.shape[1]:
        return
    same = case.replace(np.repeat(x[:, :1], x.shape[1], axis=1), w)
    inside = slice(before, x.shape[1] - after)
    close.on(same)(_out(same, f)[:, inside], widen(same.args[0])[:, inside], "a constant sequence")


@law(*CONVOLUTIONS)
def kernels_reach_no_further(f: Function, case: Case, close: Close) -> None:
    """An output depends on K tokens: those after its kernel's end change nothing, nor those before it."""
    x, w = case.args
    before, after = _reach(case, w.shape[-1])
    half, T = x.shape[1] // 2, x.shape[1]
    later = case.replace(_flipped(x, half), w)
    rows = max(half - after, 0)
    close(_out(later, f)[:, :rows], _out(case, f)[:, :rows], f"tokens from {half} on changed")
    negative = round_to(-widen(x), x.dtype)
    earlier = case.replace(_flipped(negative, half), w)  # the tokens from `half` on are as they were
    rows = min(half + before, T)
    close(_out(earlier, f)[:, rows:], _out(case, f)[:, rows:], f"tokens before {half} changed")


@law(*CONVOLUTIONS)
def tokens_may_move(f: Function, case: Case, close: Close) -> None:
    """A sequence that begins one token later, behind a 0, has the same outputs one later."""
    x, w = case.args
    moved = case.replace(np.concatenate([np.zeros_like(x[:, :1]), x], axis=1), w)
    close.on(moved)(_out(moved, f)[:, 1:], _out(case, f), "one token later")


@law(*CONVOLUTIONS)
def batches_do_not_mix(f: Function, case: Case, close: Close) -> None:
    """Reversing the sequences of a batch reverses the outputs."""
    x, w = case.args
    close(_out(case.replace(x[::-1].copy(), w), f)[::-1], _out(case, f), "batch reversed")


@law("attention.lightweight_convolution")
def a_kernel_of_one_tap_moves_tokens(f: Function, case: Case, close: Close) -> None:
    """With all weight on tap j the output at t is the token at t + j - pad, and 0 outside."""
    x, w = case.args
    K, T = w.shape[-1], x.shape[1]
    before, _ = _reach(case, K)
    for j in range(K):
        hot = np.full(w.shape, -500.0)
        hot[:, j] = 500.0
        one = case.replace(x, round_to(hot, w.dtype))
        expected = np.zeros(x.shape)
        for t in range(T):
            if 0 <= t + j - before < T:
                expected[:, t] = widen(x)[:, t + j - before]
        close.on(one)(_out(one, f), expected, f"all weight on tap {j}")


@law("attention.lightweight_convolution")
def kernels_know_no_offset(f: Function, case: Case, close: Close) -> None:
    """Adding 1 to all weights of a kernel changes nothing: they go through a softmax."""
    x, w = case.args
    moved = case.replace(x, round_to(widen(w) + np.float32(1.0), w.dtype))
    base = case.replace(x, round_to(widen(moved.args[1]) - np.float32(1.0), w.dtype))
    close.on(moved)(_out(moved, f), _out(base, f), "kernels plus 1", factor=2.0)


@law("attention.lightweight_convolution")
def heads_own_neighboring_channels(f: Function, case: Case, close: Close) -> None:
    """The channels of a head are those of one part of D: convolved alone they give the same."""
    x, w = case.args
    width = x.shape[2] // w.shape[0]
    parts = [_out(case.replace(x[:, :, h * width : (h + 1) * width], w[h : h + 1]), f) for h in range(len(w))]
    close(np.concatenate(parts, axis=2), _out(case, f), "heads one by one")


@law("attention.lightweight_convolution")
def convolution_is_linear(f: Function, case: Case, close: Close) -> None:
    """Doubling the tokens doubles the output."""
    x, w = case.args
    double = case.replace(round_to(2 * widen(x), x.dtype), w)
    close.on(double)(_out(double, f), 2 * _out(case, f), "tokens doubled", factor=2.0)


@law("attention.dynamic_convolution")
def equal_predictions_are_one_kernel(f: Function, case: Case, close: Close) -> None:
    """Where a channel of 1 alone predicts the kernels, they are the same everywhere: as lightweight ones."""
    x, w = case.args
    ones, only = np.array(x), np.array(w)
    ones[:, :, 0], only[1:] = 1.0, 0.0
    fixed = case.replace(ones, only)
    expected = lightweight_convolution(ones, only[0], causal=bool(case.kwargs.get("causal")))
    close.on(fixed)(_out(fixed, f), widen(expected), "kernels from a channel of 1", factor=4.0)


@law("attention.dynamic_convolution")
def kernels_come_from_their_own_token(f: Function, case: Case, close: Close) -> None:
    """A token of 0 predicts equal weights, whatever its neighbors predict: it gets their mean."""
    x, w = case.args
    silent, middle = np.array(x), x.shape[1] // 2
    silent[:, middle : middle + 1] = 0.0
    mean = lightweight_convolution(silent, np.zeros_like(w[0]), causal=bool(case.kwargs.get("causal")))
    rows = slice(middle, middle + 1)
    moved = case.replace(silent, w)
    close.on(moved)(_out(moved, f)[:, rows], widen(mean)[:, rows], "a token of 0", factor=2.0)


def _parts(case: Case) -> tuple[int, int]:
    """Return how many channels of the tokens and of the output are left ones."""
    return case.args[1].shape[0], case.args[4].shape[1]


@law("attention.lsra")
def the_left_part_is_multi_head_attention(f: Function, case: Case, close: Close) -> None:
    """The first channels of the output are attention to the first channels of the tokens."""
    x, *weights = case.args
    left, out = _parts(case)
    options = {name: case.kwargs[name] for name in ("b_q", "b_k", "b_v", "b_o") if name in case.kwargs}
    if "key_mask" in case.kwargs:
        options["attn_mask"] = case.kwargs["key_mask"][:, None, None, :]
    alone = multi_head_attention(
        *(x[..., :left], *weights[:4]),
        num_heads=case.kwargs["num_heads"],
        causal=case.kwargs.get("causal", False),
        **options,
    )
    close(_out(case, f)[..., :out], widen(alone), "left channels against multi-head attention")


@law("attention.lsra")
def the_parts_do_not_meet(f: Function, case: Case, close: Close) -> None:
    """Left channels do not move the right outputs, nor right channels the left ones."""
    x, *weights = case.args
    left, out = _parts(case)
    first, base = np.arange(x.shape[2]) < left, _out(case, f)
    for where, kept, what in ((first, slice(out, None), "left"), (~first, slice(0, out), "right")):
        turned = case.replace(round_to(np.where(where, -widen(x), widen(x)), x.dtype), *weights)
        close(_out(turned, f)[..., kept], base[..., kept], f"{what} channels changed")


@law("attention.lsra")
def the_right_part_is_local(f: Function, case: Case, close: Close) -> None:
    """Right outputs depend on the tokens under their kernel alone, however long the sequence."""
    x, *weights = case.args
    _, out = _parts(case)
    _, after = _reach(case, weights[5].shape[-1])
    half = x.shape[1] // 2
    rows = max(half - after, 0)
    moved = case.replace(_flipped(x, half), *weights)
    close(_out(moved, f)[:, :rows, out:], _out(case, f)[:, :rows, out:], f"tokens from {half} on changed")


@law("attention.lsra")
def padding_is_neither_seen_nor_mixed_in(f: Function, case: Case, close: Close) -> None:
    """What stands at a padded token moves no output but its own."""
    x, *weights = case.args
    mask = np.random.default_rng(0).random(x.shape[:2]) < 0.5
    masked = case.replace(key_mask=mask)
    real = mask[..., None]
    moved = masked.replace(round_to(np.where(real, widen(x), -widen(x)), x.dtype), *weights)
    close.on(masked)(
        np.where(real, _out(moved, f), 0), np.where(real, _out(masked, f), 0), "other tokens behind the mask"
    )


@law("attention.lsra")
def closed_gates_leave_the_bias(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With values of 0 in the gated unit the right outputs are `b_out`, or 0."""
    x, *weights = case.args
    _, out = _parts(case)
    C = weights[6].shape[0]
    weights[4] = np.array(weights[4])
    weights[4][:, :C] = 0.0
    closed = case.without("b_in").replace(x, *weights)
    found = _out(closed, f)[..., out:]
    bias = widen(np.asarray(case.kwargs.get("b_out", np.zeros(found.shape[-1]))))
    if not np.array_equal(found, np.broadcast_to(bias, found.shape)):
        raise LawViolation("right outputs differ from the bias though nothing passes the gate")
