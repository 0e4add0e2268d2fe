"""A Switch layer that is trained: with the balance loss its experts share the tokens, else some die."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from refimpl.attention.online_softmax import softmax
from refimpl.moe.routing import router_logits, router_logits_vjp
from refimpl.moe.switch import switch, switch_routing, switch_vjp

losses = pytest.importorskip("refimpl.moe.losses_balance")

E, D, F, T = 4, 8, 12, 64
STEPS, RATE = 300, 0.2
ROOM = {"capacity": T}  # nothing is dropped, so that nothing but the loss keeps the balance


class Trained(NamedTuple):
    """Error at first and at last, and the share of the tokens of each expert."""

    first: float
    last: float
    load: Any


def batch(rng: np.random.Generator, maps: Any, centers: Any) -> tuple[Any, Any]:
    """Tokens of four kinds, each with a linear map of its own to be learned."""
    kind = rng.integers(E, size=T)
    x = centers[kind] + 0.5 * rng.standard_normal((T, D))
    x[:, 0] = 1.0
    return x, np.einsum("td,tde->te", x, maps[kind])


def train(coefficient: float, seed: int) -> Trained:
    """Plain gradient descent on the mean squared error and `coefficient` times the balance loss."""
    rng = np.random.default_rng(seed)
    maps, centers = rng.standard_normal((E, D, D)) / np.sqrt(D), 1.5 * rng.standard_normal((E, D))
    weights = [
        0.1 * rng.standard_normal((D, E)),
        rng.standard_normal((E, D, F)) / np.sqrt(D),
        rng.standard_normal((E, F, D)) / np.sqrt(F),
    ]
    weights[0][0, 0] += 1.0  # the router begins with a liking for expert 0
    errors = []
    for _ in range(STEPS):
        x, wanted = batch(rng, maps, centers)
        miss = switch(x, *weights, activation="gelu", **ROOM) - wanted
        errors.append(float(np.mean(miss**2)))
        back = switch_vjp(x, *weights, 2 * miss / miss.size, activation="gelu", **ROOM)
        p = softmax(router_logits(x, weights[0]))
        chosen = switch_routing(x, weights[0], **ROOM).expert
        dp = losses.balance_loss_vjp(p, chosen, coefficient).dprobabilities
        dlogits = p * (dp - np.sum(p * dp, axis=1, keepdims=True))
        gradients = [back.dw_router + router_logits_vjp(x, weights[0], dlogits)[1], back.dw_in, back.dw_out]
        weights = [w - RATE * g for w, g in zip(weights, gradients, strict=True)]
    x, _ = batch(rng, maps, centers)
    counts = np.bincount(switch_routing(x, weights[0], **ROOM).expert[:, 0], minlength=E)
    return Trained(float(np.mean(errors[:10])), float(np.mean(errors[-10:])), counts / T)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_balance_loss_keeps_experts_alive(seed: int) -> None:
    alone, balanced = train(0.0, seed), train(0.3, seed)
    assert alone.last < 0.2 * alone.first, "without the loss it does not learn: the case says nothing"
    assert balanced.last < 0.2 * balanced.first
    assert np.sum(alone.load == 0) >= 2, f"without the loss no two experts died: {alone.load}"
    assert alone.load.max() > 0.5
    # A perfect balance gives each a quarter; tokens are drawn, so a share of 64 moves by 0.05.
    assert balanced.load.min() > 0.1, f"with the loss an expert starves: {balanced.load}"
    assert balanced.load.max() < 0.45
