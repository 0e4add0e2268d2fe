"""Laws of masks by magnitude and by loss, and of units taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array, in_float64, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
STRUCTURED = ("prune.structured", "prune.structured.heads", "prune.structured.width")


def _times(x: Array, factor: float) -> Array:
    """Return `x` times a power of two, exactly."""
    return round_to(widen(x) * np.float32(factor), x.dtype)


# Masks


@law("prune.constrained")
def no_other_choice_costs_less(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """The removed weights are `keep` fewer than all, and none costs more than one that stays."""
    mask = np.asarray(case.call(f))
    w, h = (in_float64(array) for array in case.args)
    cost = h * w**2
    require(int(mask.sum()) == case.kwargs["keep"], f"{mask.sum()} weights stay")
    if mask.any():
        require(cost[~mask] <= cost[mask].min(), "a removed weight costs more than one that stays")


@law("prune.constrained")
def equal_curvature_is_magnitude(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With equal second derivatives the weights of largest magnitude stay."""
    from refimpl.prune.magnitude import magnitude

    w, h = case.args
    flat = case.replace(w, np.ones_like(h)).call(f)
    require(np.asarray(flat) == magnitude(w, keep=case.kwargs["keep"]), "not the largest magnitudes")


@law("prune.constrained")
def curvature_and_weight_trade(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Weights twice as large on curvatures a quarter as large cost the same, one by one."""
    w, h = case.args
    half = np.arange(w.size) % 2 == 0
    other = case.replace(np.where(half, _times(w, 2.0), w), np.where(half, _times(h, 0.25), h))
    require(np.asarray(other.call(f)) == case.call(f), "the choice changes")


@law("prune.magnitude")
def the_largest_stay(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Exactly `keep` weights stay, none smaller than one that goes; of equals the first."""
    mask, size = np.asarray(case.call(f)), np.abs(in_float64(case.args[0]))
    require(int(mask.sum()) == case.kwargs["keep"], f"{mask.sum()} weights stay")
    if mask.any():
        least = size[mask].min()
        require(size[~mask] <= least, "a larger weight went")
        tied = np.flatnonzero((size == least).reshape(-1))
        stay = mask.reshape(-1)[tied]
        require(stay == np.sort(stay)[::-1], "of equal weights a later one stays")


@law("prune.magnitude")
def masks_are_nested(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """With fewer weights to keep, none stays that went before."""
    keep = case.kwargs["keep"]
    if keep:
        fewer = np.asarray(case.replace(keep=keep - 1).call(f))
        require(~fewer | np.asarray(case.call(f)), "masks are not nested")


@law("prune.magnitude", "prune.magnitude.n_m")
def scale_and_sign_do_not_matter(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Minus four times the weights have the same mask, and masked weights keep theirs."""
    (w,) = case.args
    mask = np.asarray(case.call(f))
    require(np.asarray(case.replace(_times(w, -4.0)).call(f)) == mask, "the mask changes with the scale")
    again = np.asarray(case.replace(np.where(mask, w, w * 0)).call(f))
    require((again == mask) | (in_float64(w) == 0), "the mask of masked weights is another one")


@law("prune.magnitude.n_m")
def n_of_every_m(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Every group keeps exactly its n largest magnitudes."""
    n, m = case.kwargs["n"], case.kwargs["m"]
    w = np.abs(in_float64(case.args[0])).reshape(-1, m) if case.args[0].size else np.zeros((0, m))
    mask = np.asarray(case.call(f)).reshape(w.shape)
    require(mask.sum(axis=1) == n, f"a group does not keep {n}")
    lost, kept = np.where(mask, -1.0, w), np.where(mask, w, np.inf)
    require(lost.max(axis=1, initial=-1) <= kept.min(axis=1, initial=np.inf), "a larger weight went")


@law("prune.magnitude.n_m")
def groups_are_independent(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Groups in another order have their masks in that order."""
    m = case.kwargs["m"]
    (w,) = case.args
    if not w.size:
        return
    turned = w.reshape(len(w), -1, m)[:, ::-1].reshape(w.shape)
    mask = np.asarray(case.replace(turned).call(f)).reshape(len(w), -1, m)[:, ::-1].reshape(w.shape)
    require(mask == case.call(f), "a group's mask depends on another group")


# Units


@law(*STRUCTURED)
def what_a_removed_unit_holds_does_not_matter(f: Function, case: Case, close: Close) -> None:
    """Other weights in removed units, or other features of the stream, change nothing."""
    args = [np.copy(array) for array in case.args]
    keep = args[-1]
    if close.technique.name == "prune.structured":
        args[1][:, ~keep] += args[1].dtype.type(1)
        args[2][~keep] += args[2].dtype.type(1)
    elif close.technique.name == "prune.structured.heads":
        rows = np.repeat(~keep, args[4].shape[0] // keep.size)
        for array in args[1:4]:
            array[:, rows] += array.dtype.type(1)
    else:
        args[0][:, ~keep] += args[0].dtype.type(1)
    close(case.replace(*args).call(f), case.call(f), "removed units changed")


@law(*STRUCTURED)
def all_units_are_the_whole_layer(f: Function, case: Case, close: Close) -> None:
    """With every unit kept it is the layer itself."""
    from refimpl.attention.multi_head import multi_head_attention
    from refimpl.transformer.ffn import ffn
    from refimpl.transformer.norms import rms_norm

    *arrays, keep = case.args
    full = case.replace(*arrays, np.ones_like(keep))
    wide = [in_float64(array) for array in arrays]
    if close.technique.name == "prune.structured":
        biases = [in_float64(case.kwargs[name]) if name in case.kwargs else None for name in ("b_1", "b_2")]
        truth = ffn(*wide, b_1=biases[0], b_2=biases[1])
    elif close.technique.name == "prune.structured.heads":
        truth = multi_head_attention(*wide, num_heads=keep.size, **case.kwargs)
    else:
        truth = rms_norm(wide[0], wide[1]) @ wide[2]
    close.on(full)(full.call(f), truth, "every unit kept", factor=2.0)


@law("prune.structured", "prune.structured.heads")
def units_add_up(f: Function, case: Case, close: Close) -> None:
    """The kept and the removed units together are the whole layer, the last bias counted once."""
    *arrays, keep = case.args
    parts = [in_float64(case.replace(*arrays, mask).call(f)) for mask in (keep, ~keep)]
    bias = in_float64(case.kwargs.get("b_2", np.zeros(1)))
    full = case.replace(*arrays, np.ones_like(keep))
    close.on(full)(full.call(f), parts[0] + parts[1] - bias, "both halves", factor=4.0)


@law("prune.structured.width")
def the_mean_counts_kept_features(f: Function, case: Case, close: Close) -> None:
    """Rows of equal magnitude are normed to 1, however many features went."""
    x, gamma, weight, keep = case.args
    flat = case.replace(np.full_like(x, 2), np.ones_like(gamma), weight, keep)
    truth = np.repeat(in_float64(weight)[keep].sum(axis=0, keepdims=True), len(x), axis=0)
    room = 4.0 if x.dtype.itemsize == 8 else 16.0
    scale = 2 / np.sqrt(4 + 1e-6)
    close.on(flat)(flat.call(f), truth * scale, "rows of twos", factor=room)
