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
    weights = _wide_weights(case)
    w_x = case.kwargs["w_x"].copy()
    w_x[:, w_x.shape[1] - weights["A_log"].shape[1] :] = 0
    unread = case.replace(w_x=w_x)
    u, gate = _convolved_and_gate(case, weights)
    y = weights["D"] * u * gate
    expected = y @ weights["w_out"] + weights.get("b_out", 0.0)
    close.on(unread)(_out(unread, f).astype(np.float64), expected, "without the state", factor=4.0)


def _wide_weights(case: Case) -> dict[str, Array]:
    """Return weights and given states in float64."""
    arrays = {name: value for name, value in case.kwargs.items() if isinstance(value, np.ndarray)}
    return {name: widen(value).astype(np.float64) for name, value in arrays.items()}


def _convolved_and_gate(case: Case, weights: dict[str, Array]) -> tuple[Array, Array]:
    """Return what the scan is given, ``silu(conv(x))`` from left to right, and ``silu(z)``."""
    (x,) = case.args
    Din, k = weights["w_conv"].shape
    projected = widen(x).astype(np.float64) @ weights["w_in"] + weights.get("b_in", 0.0)
    past = weights.get("conv_state", np.zeros((len(x), k - 1, Din)))
    tokens = np.concatenate([past, projected[..., :Din]], axis=1)
    conv = np.zeros_like(projected[..., :Din])
    for t in range(x.shape[1]):
        conv[:, t] = sum(weights["w_conv"][:, j] * tokens[:, t + j] for j in range(k))
    return activate("silu", conv + weights.get("b_conv", 0.0)), activate("silu", projected[..., Din:])


@law(BLOCK)
def one_token_moves_the_state_by_its_step(f: Block, case: Case, close: Close) -> None:
    """Over one token h becomes ``exp(Δ A) h + gain B u``, ``A = -exp(A_log)``; Δ has its bias in softplus."""
    x = case.args[0][:, :1]
    if not x.size:
        return
    weights, one = _wide_weights(case), case.replace(x)
    Din, N = weights["A_log"].shape
    R = weights["w_dt"].shape[0]
    before = np.random.default_rng(0).standard_normal((len(x), Din, N))
    one = one.replace(scan_state=before.astype(np.float32 if x.dtype != np.float64 else np.float64))
    u, _ = _convolved_and_gate(one, weights)
    made = u @ weights["w_x"]
    step = np.logaddexp(0, made[..., :R] @ weights["w_dt"] + weights["b_dt"])[:, 0, :, None]
    exponent = -step * np.exp(weights["A_log"])
    gain = step * np.expm1(exponent) / exponent if case.kwargs.get("discretization") == "zoh" else step
    entering = gain * made[:, 0, None, R : R + N] * u[:, 0, :, None]
    expected = np.exp(exponent) * widen(one.kwargs["scan_state"]) + entering
    state = one.replace(return_state=True).call(f)[2]
    limits = close.on(one.replace(return_state=True))
    limits(widen(np.asarray(state)).astype(np.float64), expected, "the state", factor=4.0, of="scan_state")


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
