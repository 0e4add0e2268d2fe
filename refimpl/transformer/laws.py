"""Laws of feed-forward layers, activations and normalisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, in_float64, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]
FFN = ("transformer.ffn", "transformer.ffn_decomposition")
NORMS = ("transformer.layer_norm", "transformer.rms_norm")
# The least value of x Φ(x) is -0.16997, at -0.7518; that of the sigmoid form is above it.
LEAST_GELU = -0.1701
FORM_ERROR = {"exact": 0.0, "tanh": 4.74e-4, "sigmoid": 2.04e-2}


def _scaled(x: Array, factor: float) -> Array:
    """Return `x` times a power of two, exactly."""
    return round_to(widen(x) * np.float32(factor), x.dtype)


# GeLU


@law("transformer.gelu")
def mirrored_parts_differ_by_x(f: Function, case: Case, close: Close) -> None:
    """GeLU(x) - GeLU(-x) = x, in every form."""
    (x,) = case.args
    close.on(case)(
        in_float64(case.call(f)) - in_float64(case.replace(-x).call(f)), in_float64(x), "GeLU(x) - GeLU(-x)"
    )


@law("transformer.gelu")
def gelu_lies_between_bounds(f: Function, case: Case, close: Close) -> None:
    """GeLU(x) lies between 0 and x to the right of 0, and between -0.1701 and 0 to the left."""
    y, x = in_float64(case.call(f)), in_float64(case.args[0])
    room = close.tolerance
    low, high = np.where(x > 0, 0.0, np.maximum(x, LEAST_GELU)), np.maximum(x, 0.0)
    if not np.all((y >= low - room) & (y <= high + room)):
        raise LawViolation(f"GeLU outside its bounds by {np.max(np.maximum(low - y, y - high))}")


@law("transformer.gelu")
def forms_are_close_to_the_exact_one(f: Function, case: Case, close: Close) -> None:
    """The tanh form is within 4.74e-4 of the exact one, the sigmoid form within 2.04e-2."""
    bound = FORM_ERROR[case.kwargs.get("form", "exact")]
    apart = np.abs(in_float64(case.call(f)) - in_float64(case.replace(form="exact").call(f)))
    if not np.all(apart <= bound + 2 * close.tolerance):
        raise LawViolation(f"the form is {np.max(apart)} away from the exact one, expected at most {bound}")


# Feed-forward layers


@law(*FFN, "transformer.gated_ffn")
def tokens_do_not_meet(f: Function, case: Case, close: Close) -> None:
    """Each token's output is what it is without the others."""
    x, *weights = case.args
    order = np.arange(len(x))[::-1]
    alone = [in_float64(case.replace(x[t : t + 1], *weights).call(f)) for t in order]
    if alone:
        close(np.concatenate(alone), in_float64(case.call(f))[order], "tokens one by one")


@law(*FFN)
def hidden_units_may_be_reordered(f: Function, case: Case, close: Close) -> None:
    """Reversing the hidden units in both weights and the bias changes nothing."""
    x, w_1, w_2 = case.args
    moved = case.replace(x, w_1[:, ::-1], w_2[::-1])
    if case.kwargs.get("b_1") is not None:
        moved = moved.replace(b_1=case.kwargs["b_1"][::-1])
    close.on(moved)(moved.call(f), case.call(f), "hidden units reversed")


@law(*FFN)
def relu_is_positively_homogeneous(f: Function, case: Case, close: Close) -> None:
    """With ReLU and no biases, doubling the input doubles the output, and a unit's scale moves through it."""
    case = case.without("b_1", "b_2").replace(activation="relu")
    x, w_1, w_2 = case.args
    once = in_float64(case.call(f))
    close = close.on(case)
    close(in_float64(case.replace(_scaled(x, 2), w_1, w_2).call(f)), 2 * once, "input doubled", factor=2.0)
    moved = case.replace(x, _scaled(w_1, 4), _scaled(w_2, 0.25))
    close(moved.call(f), once, "units times 4 in, by 4 out")


@law(*FFN)
def output_bias_is_added_once(f: Function, case: Case, close: Close) -> None:
    """The output bias shifts every token's output by itself, whatever the hidden units do."""
    w_2 = case.args[2]
    shift = np.random.default_rng(0).standard_normal(w_2.shape[1]).astype(np.float64)
    shift = round_to(shift, w_2.dtype)
    plain, shifted = case.without("b_2"), case.replace(b_2=shift)
    close.on(shifted)(shifted.call(f), in_float64(plain.call(f)) + in_float64(shift), "output bias added")


@law("transformer.ffn_decomposition")
def groups_add_up_to_the_layer(f: Function, case: Case, close: Close) -> None:
    """The sum over groups of hidden units equals the feed-forward layer with the same activation."""
    from refimpl.transformer.ffn import ffn

    close.on(case)(
        case.call(f), case.without("parts").call(ffn), "groups against the whole layer", factor=4.0
    )


@law("transformer.gated_ffn")
def linear_in_the_ungated_half(f: Function, case: Case, close: Close) -> None:
    """Doubling W_up doubles the output: only the other half passes the activation."""
    x, w_gate, w_up, w_down = case.args
    doubled = case.replace(x, w_gate, _scaled(w_up, 2), w_down)
    close(in_float64(doubled.call(f)), 2 * in_float64(case.call(f)), "W_up doubled", factor=2.0)


@law("transformer.gated_ffn")
def hidden_units_of_a_gated_layer_may_be_reordered(f: Function, case: Case, close: Close) -> None:
    """Reversing the hidden units in all three weights changes nothing."""
    x, w_gate, w_up, w_down = case.args
    moved = case.replace(x, w_gate[:, ::-1], w_up[:, ::-1], w_down[::-1])
    close.on(moved)(moved.call(f), case.call(f), "hidden units reversed")


@law("transformer.gated_ffn")
def zero_gate_closes(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every activation is 0 at 0, so a gate of zeros gives exactly 0."""
    x, w_gate, w_up, w_down = case.args
    if np.any(in_float64(case.replace(x, np.zeros_like(w_gate), w_up, w_down).call(f)) != 0):
        raise LawViolation("a gate of zeros lets something pass")


# Normalisations


@law(*NORMS)
def scale_moves_into_eps(f: Function, case: Case, close: Close) -> None:
    """Doubling x and taking four times eps changes nothing: eps stands beside the variance."""
    x, *gains = case.args
    doubled = case.replace(_scaled(x, 2), *gains).replace(eps=4 * case.kwargs["eps"])
    close(doubled.call(f), case.call(f), "x doubled, eps times 4")


@law(*NORMS)
def linear_in_the_gain(f: Function, case: Case, close: Close) -> None:
    """Doubling gain and shift doubles the output."""
    x, *gains = case.args
    doubled = case.replace(x, *(_scaled(gain, 2) for gain in gains))
    close(in_float64(doubled.call(f)), 2 * in_float64(case.call(f)), "gain and shift doubled", factor=2.0)


@law(*NORMS)
def rows_have_their_size(f: Function, case: Case, close: Close) -> None:
    """Before gain and shift, the mean square of a row is v / (v + eps), v the variance of x or its own."""
    x, *gains = case.args
    neutral = Case((x, np.ones_like(gains[0]), *(np.zeros_like(g) for g in gains[1:])), case.kwargs)
    y, wide = in_float64(neutral.call(f)), in_float64(x)
    v = np.mean(np.square(wide), axis=-1) if len(gains) == 1 else np.var(wide, axis=-1)
    v = np.where(np.ptp(wide, axis=-1) == 0, 0, v) if len(gains) == 2 else v
    expected = v / (v + case.kwargs["eps"])
    size = np.sqrt(np.mean(np.square(y), axis=-1))
    close.on(neutral)(size, np.sqrt(expected), "root mean square of the rows", factor=4.0)


@law("transformer.layer_norm")
def rows_have_mean_of_the_shift(f: Function, case: Case, close: Close) -> None:
    """With equal gains every row has the mean of the shift."""
    x, gamma, beta = case.args
    flat = case.replace(x, np.full_like(gamma, 1.0), beta)
    mean = np.mean(in_float64(flat.call(f)), axis=-1)
    close.on(flat)(mean, np.full_like(mean, np.mean(in_float64(beta))), "means of the rows")


@law("transformer.layer_norm")
def shifting_a_token_changes_nothing(f: Function, case: Case, close: Close) -> None:
    """Adding one number to all features of a token changes nothing."""
    x, *gains = case.args
    far = round_to(widen(x) + np.float32(256.0), x.dtype)
    near = round_to(widen(far) - np.float32(256.0), x.dtype)  # exactly
    moved = case.replace(far, *gains)
    close.on(moved)(moved.call(f), case.replace(near, *gains).call(f), "tokens shifted by 256")


@law("transformer.rms_norm")
def rms_norm_is_odd(f: Function, case: Case, close: Close) -> None:
    """Turning a token around turns its output around: there is no mean and no shift."""
    x, gamma = case.args
    close(in_float64(case.replace(-x, gamma).call(f)), -in_float64(case.call(f)), "x turned around")
