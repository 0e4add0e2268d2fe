"""Fine-grained, shared, residual, split and upcycled experts, wrong in one way: laws must catch each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.moe.fine_grained import fine_grained
from refimpl.moe.residual import pyramid, residual
from refimpl.moe.residual_coefficients import residual_coefficients
from refimpl.moe.routing import router_logits
from refimpl.moe.segments import segment_columns, segment_rows
from refimpl.moe.shared_experts import shared_experts
from refimpl.moe.sparse_mixture import sparse_mixture
from refimpl.moe.split_ffn import SplitExperts, split_ffn
from refimpl.moe.upcycling import upcycling
from tests.moe.mutation import Mutants

registry.load()

MUTANTS = Mutants()


@MUTANTS.of("moe.fine_grained")
def one_segment_less(*arrays: Any, k: int, segments: int, **options: Any) -> Any:
    m, chosen = segments, max(k * segments - 1, 1)
    x, w_router, w_in, w_out = arrays
    if options.get("w_gate") is not None:
        options["w_gate"] = segment_columns(options["w_gate"], m)
    cut = segment_columns(w_in, m), segment_rows(w_out, m)
    return sparse_mixture(x, router_logits(x, w_router), *cut, k=chosen, **options)


@MUTANTS.of("moe.fine_grained")
def gates_renormalized(*arrays: Any, convention: str, **options: Any) -> Any:
    return fine_grained(*arrays, convention="gshard", **options)


@MUTANTS.of("moe.fine_grained")
def columns_interleaved(
    x: Any, w_router: Any, w_in: Any, w_out: Any, /, *, segments: int, **options: Any
) -> Any:
    D, columns = w_router.shape
    mixed = w_router.reshape(D, segments, columns // segments).swapaxes(1, 2).reshape(D, columns)
    return fine_grained(x, mixed, w_in, w_out, segments=segments, **options)


@MUTANTS.of("moe.fine_grained")
def rows_cut_apart_from_columns(x: Any, w_router: Any, w_in: Any, w_out: Any, /, **options: Any) -> Any:
    return fine_grained(x, w_router, w_in, w_out[:, ::-1], **options)


@MUTANTS.of("moe.shared_experts")
def shared_in_the_softmax(x: Any, w_router: Any, *experts: Any, **options: Any) -> Any:
    *routed, shared_in, shared_out = experts
    scale = len(routed[0]) / (len(routed[0]) + len(shared_in))
    return shared_experts(x, w_router, routed[0], scale * routed[1], shared_in, shared_out, **options)


@MUTANTS.of("moe.shared_experts")
def mean_of_the_shared(*arrays: Any, **options: Any) -> Any:
    *rest, shared_out = arrays
    return shared_experts(*rest, shared_out / max(len(shared_out), 1), **options)


@MUTANTS.of("moe.shared_experts")
def residual_added(x: Any, *rest: Any, **options: Any) -> Any:
    return x + shared_experts(x, *rest, **options)


@MUTANTS.of("moe.shared_experts")
def shared_gate_forgotten(*arrays: Any, shared_router: Any = None, **options: Any) -> Any:
    return shared_experts(*arrays, **options)


@MUTANTS.of("moe.shared_experts")
def softmax_for_the_sigmoid(x: Any, *rest: Any, shared_router: Any = None, **options: Any) -> Any:
    if shared_router is None:
        return shared_experts(x, *rest, **options)
    *routed, shared_in, shared_out = rest
    powers = np.exp(x @ shared_router)
    y = shared_experts(x, *routed, shared_in, 0 * shared_out, **options)
    silent = [routed[0], routed[1], 0 * routed[2]]
    for s in range(len(shared_in)):
        gate = options.get("shared_gate")
        one = options if gate is None else {**options, "shared_gate": gate[s : s + 1]}
        part = shared_experts(x, *silent, shared_in[s : s + 1], shared_out[s : s + 1], **one)
        y = y + powers[:, s : s + 1] / powers.sum(axis=1, keepdims=True) * part
    return y


@MUTANTS.of("moe.residual")
def gate_of_one(x: Any, w_1: Any, w_2: Any, w_router: Any, w_in: Any, w_out: Any, /, **options: Any) -> Any:
    dense = w_1[None], w_2[None]
    return shared_experts(x, w_router, w_in, w_out, *dense, k=1, convention="mixtral", **options)


@MUTANTS.of("moe.residual")
def dense_part_gated_too(
    x: Any, w_1: Any, w_2: Any, w_router: Any, w_in: Any, w_out: Any, /, **options: Any
) -> Any:
    return residual(x, w_1, 0.5 * w_2, w_router, w_in, w_out, **options)


@MUTANTS.of("moe.residual")
def expert_sees_the_dense_output(x: Any, w_1: Any, w_2: Any, *experts: Any, activation: str) -> Any:
    dense = residual(x, w_1, w_2, *experts[:2], 0 * experts[2], activation=activation)
    return dense + residual(dense, w_1, 0 * w_2, *experts, activation=activation)


@MUTANTS.of("moe.residual.deepspeed")
def the_papers_sum(*arrays: Any, **options: Any) -> Any:
    return residual(*arrays[:-1], **options)


@MUTANTS.of("moe.residual.deepspeed")
def coefficients_exchanged(*arrays: Any, **options: Any) -> Any:
    return residual_coefficients(*arrays[:-1], arrays[-1][:, ::-1], **options)


@MUTANTS.of("moe.residual.deepspeed")
def sigmoids_for_coefficients(x: Any, *weights: Any, **options: Any) -> Any:
    w_1, w_2, w_router, w_in, w_out, w_c = weights
    first, second = (1 / (1 + np.exp(-(x @ w_c[:, i : i + 1]))) for i in (0, 1))
    routed = residual(x, w_1, 0 * w_2, w_router, w_in, w_out, **options)
    return first * routed + second * residual(x, w_1, w_2, w_router, w_in, 0 * w_out, **options)


@MUTANTS.of("moe.residual.pyramid")
def skips_left_out(x: Any, /, *, layers: Any, **options: Any) -> Any:
    for layer in layers:
        x = residual(x, *layer, **options)
    return x


@MUTANTS.of("moe.residual.pyramid")
def every_layer_sees_the_input(x: Any, /, *, layers: Any, **options: Any) -> Any:
    return x + sum(residual(x, *layer, **options) for layer in layers)


@MUTANTS.of("moe.residual.pyramid")
def last_layer_first(x: Any, /, *, layers: Any, **options: Any) -> Any:
    return pyramid(x, layers=layers[::-1], **options)


@MUTANTS.of("moe.split_ffn")
def order_ignored(x: Any, w_1: Any, w_2: Any, /, *, order: Any = None, **options: Any) -> Any:
    return split_ffn(x, w_1, w_2, **options)


@MUTANTS.of("moe.split_ffn")
def order_of_columns_alone(x: Any, w_1: Any, w_2: Any, /, *, order: Any = None, **options: Any) -> Any:
    moved = w_1 if order is None else w_1[:, order]
    if order is not None and "w_gate" in options:
        options["w_gate"] = options["w_gate"][:, order]
    return split_ffn(x, moved, w_2, **options)


@MUTANTS.of("moe.split_ffn")
def inverse_order(x: Any, w_1: Any, w_2: Any, /, *, order: Any = None, **options: Any) -> Any:
    return split_ffn(x, w_1, w_2, order=None if order is None else np.argsort(order), **options)


@MUTANTS.of("moe.split_ffn")
def gates_renormalized_to_the_dense_scale(
    x: Any, w_1: Any, w_2: Any, /, *, gates: Any = None, **options: Any
) -> Any:
    if gates is not None:
        gates = gates * gates.shape[1] / np.maximum(gates.sum(axis=1, keepdims=True), 1e-9)
    return split_ffn(x, w_1, w_2, gates=gates, **options)


@MUTANTS.of("moe.upcycling")
def outputs_not_scaled(*weights: Any, segments: int, **options: Any) -> Any:
    experts = upcycling(*weights, segments=segments, **options)
    return experts._replace(w_out=experts.w_out / segments)


@MUTANTS.of("moe.upcycling")
def inputs_scaled_too(*weights: Any, segments: int, **options: Any) -> Any:
    experts = upcycling(*weights, segments=segments, **options)
    return experts._replace(w_in=experts.w_in * segments)


@MUTANTS.of("moe.upcycling")
def later_copies_shuffled(*weights: Any, copies: int, segments: int, **options: Any) -> Any:
    experts = upcycling(*weights, copies=copies, segments=segments, **options)
    order = [np.roll(np.arange(segments), c) + c * segments for c in range(copies)]
    return SplitExperts(*(None if w is None else w[np.concatenate(order)] for w in experts))


@MUTANTS.of("moe.upcycling")
def gate_of_the_input(*weights: Any, **options: Any) -> Any:
    experts = upcycling(*weights, **options)
    return experts if experts.w_gate is None else experts._replace(w_gate=experts.w_in)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
