"""Laws of experts made from a dense layer: split, nothing is lost; copied, nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.laws_gating import slack
from refimpl.numerics import FloatArray, in_float64
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]


def _dense(options: Mapping[str, Any], x: Any, w_1: Any, w_2: Any) -> FloatArray:
    from refimpl.transformer.ffn import ffn, gated_ffn

    activation, gate = options.get("activation", "relu"), options.get("w_gate")
    if gate is None:
        return ffn(in_float64(x), in_float64(w_1), in_float64(w_2), activation=activation)
    return gated_ffn(in_float64(x), in_float64(gate), in_float64(w_1), in_float64(w_2), activation=activation)


@law("moe.split_ffn")
def all_parts_are_the_dense_layer(f: Function, case: Case, close: Close) -> None:
    """With all gates 1 the layer is the dense one, in any order of the hidden units."""
    whole = case.without("gates")
    expected = _dense(case.kwargs, *case.args)
    close.on(whole)(whole.call(f), expected, "all experts")
    plain = whole.without("order")
    close.on(plain)(plain.call(f), expected, "all experts, units as they stand")


@law("moe.split_ffn")
def a_silent_part_is_its_units_removed(f: Function, case: Case, close: Close) -> None:
    """Leaving one expert out is removing its hidden units from the dense layer, and no others."""
    x, w_1, w_2 = case.args
    E, F = case.kwargs["num_experts"], w_1.shape[1]
    order = case.kwargs.get("order", np.arange(F))
    for e in (0, E - 1):
        kept = np.ones(F)
        kept[order[e * (F // E) : (e + 1) * (F // E)]] = 0
        gates = np.ones((len(x), E))
        gates[:, e] = 0
        partial = case.replace(gates=gates)
        expected = _dense(case.kwargs, x, w_1, in_float64(w_2) * kept[:, None])
        close.on(partial)(partial.call(f), expected, f"without expert {e}")


@law("moe.split_ffn")
def gates_weigh_their_parts(f: Function, case: Case, close: Close) -> None:
    """Gates of two layers add: their sum gives the sum of the outputs."""
    x, E = case.args[0], case.kwargs["num_experts"]
    one = np.broadcast_to(np.arange(E) % 3, (len(x), E)).astype(float)
    two = 3.0 - one
    first, second, both = (case.replace(gates=gates) for gates in (one, two, one + two))
    total = in_float64(first.call(f)) + in_float64(second.call(f))
    close.on(both)(total, in_float64(both.call(f)), "gates added", factor=2.0)


def _tokens(case: Case) -> FloatArray:
    return np.random.default_rng(0).standard_normal((3, case.args[0].shape[0]))


@law("moe.upcycling")
def upcycled_layers_compute_the_dense_one(f: Function, case: Case, close: Close) -> None:
    """Under any router of whole copies, with gates that sum to 1, the output is the dense layer's."""
    from refimpl.moe.sparse_mixture import sparse_mixture
    from refimpl.moe.upcycling import virtual_groups

    experts = [in_float64(w) for w in case.call(f) if w is not None]
    options: ExpertOptions = {"w_gate": experts[2]} if len(experts) == 3 else {}
    x, segments, copies = _tokens(case), case.kwargs["segments"], case.kwargs["copies"]
    expected = _dense(case.kwargs, x, *case.args)
    router = np.random.default_rng(1).standard_normal((x.shape[1], copies))
    logits = x @ virtual_groups(router, segments=segments)
    for copy_count in range(1, copies + 1):
        k = copy_count * segments
        y = sparse_mixture(x, logits, experts[0], experts[1], k=k, convention="gshard", **options)
        # Sums of a dozen products, computed in float64: what the experts' own format rounds is all.
        require(abs(y - expected) <= 10 * slack(close) * (1 + abs(expected)), "not the dense layer's output")


@law("moe.upcycling")
def copies_are_equal_and_nothing_is_lost(f: Function, case: Case, close: Close) -> None:
    """There are as many parameters as in all copies together, and every copy is the first."""
    copies, segments = case.kwargs["copies"], case.kwargs["segments"]
    dense = [w for w in (*case.args, case.kwargs.get("w_gate")) if w is not None]
    experts = [np.asarray(w) for w in case.call(f) if w is not None]
    require(len(experts) == len(dense), "a matrix is missing")
    for w, expert in zip(dense, experts, strict=True):
        require(expert.size == copies * w.size, f"expected {copies * w.size} parameters, got {expert.size}")
        require(len(expert) == copies * segments, "not one expert for each segment of each copy")
        first = np.tile(expert[:segments], (copies, 1, 1))
        require(expert == first, "a copy differs from the first")
    close(np.asarray(experts[0][0])[:, :1], np.asarray(dense[0])[:, :1], "first hidden unit")
