"""Laws of the Mamba block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close
from refimpl.transformer.activations import activate

Block = Callable[..., Any]
BLOCK = "ssm.mamba_block"


def _out(case: Case, f: Block) -> Array:
    return widen(np.asarray(case.call(f)))


@law(BLOCK)
def outputs_ignore_later_tokens(f: Block, case: Case, close: Close) -> None:
    """Changing a token changes nothing earlier."""
    (x,) = case.args
    half = (x.shape[1] + 1) // 2
    later = np.arange(x.shape[1])[None, :, None] >= half
    other = round_to(np.where(later, widen(x) - np.float32(1.5), widen(x)), x.dtype)
    close(_out(case.replace(other), f)[:, :half], _out(case, f)[:, :half], f"tokens from {half} on changed")


@law(BLOCK)
def token_by_token_is_the_whole(f: Block, case: Case, close: Close) -> None:
    """Feeding tokens one at a time, with the two states handed on, gives what the whole pass gives."""
    (x,) = case.args
    whole = case.replace(return_state=True).call(f)
    given, outputs = case.replace(return_state=True), []
    for t in range(x.shape[1]):
        out, conv_state, scan_state = given.replace(x[:, t : t + 1]).call(f)
        outputs.append(widen(np.asarray(out)))
        given = given.replace(conv_state=conv_state, scan_state=scan_state)
    if outputs:
        close(np.concatenate(outputs, axis=1), widen(np.asarray(whole[0])), "token by token")
        if not np.array_equal(np.asarray(conv_state)[..., 0].shape, np.asarray(whole[1])[..., 0].shape):
            raise LawViolation("the convolution's state changes its shape")


@law(BLOCK)
def states_do_not_grow(f: Block, case: Case, close: Close) -> None:  # noqa: ARG001
    """The states have Din (k - 1) and Din N numbers a sequence, whatever its length."""
    (x,) = case.args
    Din, k = case.kwargs["w_conv"].shape
    N = case.kwargs["A_log"].shape[1]
    for tokens in (x, np.concatenate([x, x, x], axis=1)):
        _, conv_state, scan_state = case.replace(tokens, return_state=True).call(f)
        found = np.shape(conv_state), np.shape(scan_state)
        if found != ((len(x), k - 1, Din), (len(x), Din, N)):
            raise LawViolation(f"states of shapes {found} after {tokens.shape[1]} tokens")


@law(BLOCK)
def an_unread_state_leaves_convolution_skip_and_gate(f: Block, case: Case, close: Close) -> None:
    """With C = 0 the output is ``(D silu(conv(x)) silu(z)) w_out``, the convolution from left to right."""
    weights = {name: widen(value).astype(np.float64) for name, value in case.kwargs.items()
               if isinstance(value, np.ndarray)}  # fmt: skip
    (x,) = case.args
    Din, k = weights["w_conv"].shape
    w_x = case.kwargs["w_x"].copy()
    w_x[:, w_x.shape[1] - weights["A_log"].shape[1] :] = 0
    unread = case.replace(w_x=w_x)
    projected = widen(x).astype(np.float64) @ weights["w_in"] + weights.get("b_in", 0.0)
    past = weights.get("conv_state", np.zeros((len(x), k - 1, Din)))
    tokens = np.concatenate([past, projected[..., :Din]], axis=1)
    conv = np.zeros_like(projected[..., :Din])
    for t in range(x.shape[1]):
        conv[:, t] = sum(weights["w_conv"][:, j] * tokens[:, t + j] for j in range(k))
    u = activate("silu", conv + weights.get("b_conv", 0.0))
    y = weights["D"] * u * activate("silu", projected[..., Din:])
    expected = y @ weights["w_out"] + weights.get("b_out", 0.0)
    close.on(unread)(_out(unread, f).astype(np.float64), expected, "without the state", factor=4.0)


@law(BLOCK)
def the_output_projection_is_linear(f: Block, case: Case, close: Close) -> None:
    """Doubling ``w_out`` and its bias doubles the output."""
    names = [name for name in ("w_out", "b_out") if name in case.kwargs]
    doubled = case.replace(**{n: round_to(2 * widen(case.kwargs[n]), case.kwargs[n].dtype) for n in names})
    close(_out(doubled, f), 2 * _out(case, f), "w_out doubled", factor=2.0)


@law(BLOCK)
def sequences_are_independent(f: Block, case: Case, close: Close) -> None:
    """A sequence alone gives what it gives in a batch."""
    (x,) = case.args
    states = {n: case.kwargs[n][-1:] for n in ("conv_state", "scan_state") if n in case.kwargs}
    close(_out(case.replace(x[-1:], **states), f), _out(case, f)[-1:], "the last sequence alone")


@law(BLOCK)
def channels_commute(f: Block, case: Case, close: Close) -> None:
    """Permuting the inner channels, in all weights and states, changes nothing."""
    given = case.kwargs
    Din = given["D"].shape[0]
    order = np.random.default_rng(0).permutation(Din)
    both = np.concatenate([order, Din + order])
    moved: dict[str, Array] = {name: given[name][..., both] for name in ("w_in", "b_in") if name in given}
    moved |= {
        n: given[n][order] for n in ("w_conv", "b_conv", "w_x", "b_dt", "A_log", "D", "w_out") if n in given
    }
    moved["w_dt"] = given["w_dt"][:, order]
    if "conv_state" in given:
        moved["conv_state"], moved["scan_state"] = (
            given["conv_state"][..., order],
            given["scan_state"][:, order],
        )
    close(_out(case.replace(**moved), f), _out(case, f), "channels permuted")
