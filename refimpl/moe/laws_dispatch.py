"""Laws of dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.samples import scaling_experts
from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close

Layer = Callable[..., Any]


def _out(case: Case, f: Layer) -> FloatArray:
    return in_float64(case.call(f))


@law("moe.dispatch")
def identical_experts_weigh_the_token(f: Layer, case: Case, close: Close) -> None:
    """With experts that are the identity a token comes back times the sum of its weights."""
    x, combine, w_in, _ = case.args
    ones = (round_to(w, x.dtype) for w in scaling_experts(np.ones(len(w_in)), x.shape[2]))
    probe = case.without("w_gate").replace(x, combine, *ones)
    wanted = in_float64(combine).sum(axis=(2, 3))[..., None] * in_float64(x)
    close.on(probe)(_out(probe, f), wanted, "identity experts", factor=4.0)


@law("moe.dispatch")
def weights_scale_the_output(f: Layer, case: Case, close: Close) -> None:
    """Doubling all weights doubles the output."""
    x, combine, *experts = case.args
    close(_out(case.replace(x, 2 * combine, *experts), f), 2 * _out(case, f), "weights doubled", factor=2.0)


@law("moe.dispatch")
def places_are_alike(f: Layer, case: Case, close: Close) -> None:
    """Permuting the places of all experts changes nothing."""
    x, combine, *experts = case.args
    moved = case.replace(
        x, combine[..., ::-1], *experts, dispatch_mask=case.kwargs["dispatch_mask"][..., ::-1]
    )
    close(_out(moved, f), _out(case, f), "places reversed")


@law("moe.dispatch")
def experts_are_alike(f: Layer, case: Case, close: Close) -> None:
    """Permuting experts together with their places changes nothing."""
    x, combine, w_in, w_out = case.args
    order = np.random.default_rng(0).permutation(len(w_in))
    options = {"dispatch_mask": case.kwargs["dispatch_mask"][:, :, order]}
    if case.kwargs.get("w_gate") is not None:
        options["w_gate"] = case.kwargs["w_gate"][order]
    moved = case.replace(x, combine[:, :, order], w_in[order], w_out[order], **options)
    close(_out(moved, f), _out(case, f), "experts permuted")


@law("moe.dispatch")
def groups_are_independent(f: Layer, case: Case, close: Close) -> None:
    """Each group alone gives its part of the whole."""
    x, combine, *experts = case.args
    whole = _out(case, f)
    for g in range(len(x)):
        part = slice(g, g + 1)
        alone = case.replace(
            x[part], combine[part], *experts, dispatch_mask=case.kwargs["dispatch_mask"][part]
        )
        close(_out(alone, f), whole[part], f"group {g} alone")


@law("moe.dispatch")
def weights_imply_the_places(f: Layer, case: Case, close: Close) -> None:
    """Without a mask a token takes the places where its weight is not 0."""
    close(_out(case.without("dispatch_mask"), f), _out(case, f), "mask left out")


@law("moe.dispatch")
def weights_without_a_place_are_not_looked_at(f: Layer, case: Case, close: Close) -> None:
    """What the combine tensor holds where the mask is False changes nothing."""
    x, combine, *experts = case.args
    other = np.where(case.kwargs["dispatch_mask"], combine, np.asarray(7, combine.dtype))
    close(_out(case.replace(x, other, *experts), f), _out(case, f), "other weights outside the mask")


@law("moe.dispatch")
def a_place_holds_one_token(f: Layer, case: Case, close: Close) -> None:
    """With everything dispatched from one token, the other tokens get 0."""
    x, combine, *experts = case.args
    if x.shape[1] < 2:
        return
    mask = case.kwargs["dispatch_mask"].copy()
    mask[:, 1:] = False
    lone = case.replace(x, combine, *experts, dispatch_mask=mask)
    close(_out(lone, f)[:, 1:], np.zeros_like(x[:, 1:], np.float64), "tokens without a place")
