"""Routing as TPU code writes it: one-hot masks, running sums along the tokens, products with one-hot tensors.

No sort and no index: what Mesh-TensorFlow and lingvo do, because their device multiplies matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import UnsupportedError
from refimpl.moe.capacity import Rounding, places_of
from refimpl.moe.dispatch import dispatch
from refimpl.moe.routing import router_logits
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import implements
from refimpl.transformer.activations import Activation

__all__ = ["gshard_by_masks", "switch_by_masks"]


@implements("moe.switch", backend="numpy")
def switch_by_masks(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    capacity: int | None = None,
    capacity_factor: float = 1.25,
    rounding: Rounding = "mesh_tf",
    min_capacity: int = 4,
    groups: int = 1,
) -> FloatArray:
    """Compute `refimpl.moe.switch.switch`, without jitter, as Mesh-TensorFlow's ``_switch_gating`` does."""
    gates, C = _gates(x, w_router, capacity, capacity_factor, rounding, min_capacity, groups)
    best = _best(gates)
    place = _exclusive_sum(best)
    combine = _one_hot_places(best, place, C) * np.max(gates, axis=2)[:, :, None, None]
    return _layer(x, combine, w_in, w_out, w_gate=w_gate, activation=activation)


@implements("moe.gshard.as_coded", backend="numpy")
def gshard_by_masks(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    second_policy: str = "all",
    threshold: float = 0.2,
    uniforms: FloatArray | None = None,
    capacity: int | None = None,
    capacity_factor: float = 2.0,
    rounding: Rounding = "mesh_tf",
    min_capacity: int = 4,
    groups: int = 1,
) -> FloatArray:
    """Compute `refimpl.moe.gshard_as_coded.gshard_as_coded` as lingvo's ``Top2GatingOnLogits`` does."""
    gates, C = _gates(x, w_router, capacity, capacity_factor, rounding, min_capacity, groups)
    if np.any(np.sort(gates, axis=2)[:, :, -2:-1] == 0):
        raise UnsupportedError("gates that underflow to 0 tie: masks of gates cannot tell their order")
    first = _best(gates)
    second = _best(np.where(first, -1, gates))
    g1, g2 = (np.sum(gates * mask, axis=2) for mask in (first, second))
    g1, g2 = g1 / (g1 + g2), g2 / (g1 + g2)
    if second_policy == "threshold":
        second &= (g2 > threshold)[:, :, None]
    elif second_policy == "random":
        draws = np.zeros(g2.shape) if uniforms is None else np.reshape(uniforms, g2.shape)
        second &= (draws < g2 / threshold)[:, :, None]
    place_1 = _exclusive_sum(first)
    kept_1 = np.sum(first & (place_1 < C), axis=1, keepdims=True)
    place_2 = _exclusive_sum(second) + kept_1
    combine = _one_hot_places(first, place_1, C) * g1[:, :, None, None]
    combine = combine + _one_hot_places(second, place_2, C) * g2[:, :, None, None]
    return _layer(x, combine, w_in, w_out, w_gate=w_gate, activation=activation)


def _gates(
    x: FloatArray,
    w_router: FloatArray,
    capacity: int | None,
    capacity_factor: float,
    rounding: Rounding,
    min_capacity: int,
    groups: int,
) -> tuple[FloatArray, int]:
    """Return the softmax over experts, shape (G, S, E), and the places of an expert for a group."""
    T, E = len(x), w_router.shape[1]
    places = places_of(
        T,
        E,
        capacity=capacity,
        capacity_factor=capacity_factor,
        rounding=rounding,
        min_capacity=min_capacity,
        groups=groups,
    )
    return softmax(router_logits(x, w_router)).reshape(groups, T // groups, E), places


def _best(gates: FloatArray) -> BoolArray:
    """Return the one-hot mask of the largest gate of each token, the lowest index of equal ones."""
    best = gates == gates.max(axis=2, keepdims=True, initial=-np.inf)
    return np.asarray(best & (np.cumsum(best, axis=2) == 1))


def _exclusive_sum(mask: BoolArray) -> Any:
    """Return for each token and expert how many tokens of the group before it have the mask."""
    return np.cumsum(mask, axis=1) - mask


def _one_hot_places(mask: BoolArray, place: Any, capacity: int) -> BoolArray:
    """Return the mask by place, shape (G, S, E, C); a place past the capacity is none."""
    return np.asarray(mask[..., None] & (place[..., None] == np.arange(capacity)))


def _layer(x: FloatArray, combine: FloatArray, *experts: FloatArray, **options: Any) -> FloatArray:
    """Dispatch by products where the weights are not 0, as the sources do."""
    return dispatch(x.reshape(*combine.shape[:2], x.shape[1]), combine, *experts, **options).reshape(x.shape)
