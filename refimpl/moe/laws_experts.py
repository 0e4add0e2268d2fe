"""Laws of fine-grained, shared and residual experts: what always counts, what is chosen, what adds up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.laws_gating import slack
from refimpl.moe.samples import observed_weights, scaling_experts
from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]


def _softmax(z: FloatArray) -> FloatArray:
    powers = np.exp(z - z.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _loosest(close: Close, *cases: Case) -> Close:
    """Return, among these cases, the comparison that allows most: parts may be larger than their sum."""
    return max((close, *(close.on(case) for case in cases)), key=lambda found: found.tolerance)


def _demand_top_k(weights: FloatArray, case: Case, k: int, close: Close) -> None:
    """Require that weights (T, E) are those of the k largest logits ``x @ w_router`` under the convention."""
    x, w_router = case.args[:2]
    logits = in_float64(x) @ in_float64(w_router)
    shares, kept = _softmax(logits), np.argsort(np.argsort(-logits, axis=1), axis=1) < k
    expected = np.where(kept, shares, 0)
    if case.kwargs["convention"] != "switch":
        expected = expected / expected.sum(axis=1, keepdims=True)
    require(abs(weights - expected) <= slack(close), "weights are not those of the k largest logits")


# Fine-grained experts


def _weights_of_segments(f: Function, case: Case) -> FloatArray:
    """Return the weight of each segment: one at a time is the identity, and the others give 0."""
    x, w_router, w_in, _ = case.args
    N, D, m = len(w_in), x.shape[1], case.kwargs["segments"]
    tokens, weights = in_float64(x), np.zeros((len(x), N * m))
    square = np.sum(tokens * tokens, axis=1)
    ins, outs = scaling_experts(np.ones(1), D)
    for n, j in np.ndindex(N, m):
        probe_in, probe_out = np.zeros((N, D, m * 2 * D)), np.zeros((N, m * 2 * D, D))
        units = slice(j * 2 * D, (j + 1) * 2 * D)
        probe_in[n, :, units], probe_out[n, units] = ins[0], outs[0]
        experts = (round_to(w, x.dtype) for w in (probe_in, probe_out))
        y = in_float64(case.without("w_gate").replace(x, w_router, *experts).call(f))
        scaled = np.sum(tokens * y, axis=1)
        weights[:, n * m + j] = np.divide(scaled, square, out=np.zeros(len(x)), where=square > 0)
    return weights


@law("moe.fine_grained")
def segments_are_chosen_one_by_one(f: Function, case: Case, close: Close) -> None:
    """As many segments as m k of the m N count, with the gates of their own logits."""
    chosen = case.kwargs["segments"] * case.kwargs["k"]
    _demand_top_k(_weights_of_segments(f, case), case, chosen, close)


@law("moe.fine_grained")
def segments_that_share_a_gate_are_the_expert(f: Function, case: Case, close: Close) -> None:
    """If the m segments of an expert share its logit, the layer is 1 / m of the one that is not cut."""
    x, w_router, *experts = case.args
    m = case.kwargs["segments"]
    columns = w_router[:, ::m]
    shared = case.replace(x, np.repeat(columns, m, axis=1), *experts)
    uncut = case.replace(x, columns, *experts).replace(segments=1)
    close.on(uncut)(m * np.asarray(shared.call(f)), uncut.call(f), "segments with one gate", factor=float(m))


@law("moe.fine_grained")
def neighboring_units_make_a_segment(f: Function, case: Case, close: Close) -> None:
    """Reversing the hidden units and the columns of the router changes nothing."""
    x, w_router, w_in, w_out = case.args
    gate = case.kwargs.get("w_gate")
    options = {} if gate is None else {"w_gate": gate[::-1, :, ::-1]}
    moved = case.replace(x, w_router[:, ::-1], w_in[::-1, :, ::-1], w_out[::-1, ::-1]).replace(**options)
    close.on(moved)(moved.call(f), case.call(f), "experts and units reversed")


# Shared experts


def _without_shared(case: Case) -> Case:
    *rest, shared_out = case.args
    return case.replace(*rest, np.zeros_like(shared_out))


def _shared_alone(case: Case) -> Case:
    x, w_router, w_in, w_out, *shared = case.args
    return case.replace(x, w_router, w_in, np.zeros_like(w_out), *shared)


@law("moe.shared_experts")
def silent_routed_experts_leave_the_shared(f: Function, case: Case, close: Close) -> None:
    """With routed experts that give 0 the layer is the sum of its shared ones, as dense layers."""
    from refimpl.transformer.ffn import ffn, gated_ffn

    alone = _shared_alone(case)
    x, *_, shared_in, shared_out = (in_float64(array) for array in case.args)
    gate, router = (case.kwargs.get(name) for name in ("shared_gate", "shared_router"))
    total = np.zeros(x.shape)
    for s, (w_in, w_out) in enumerate(zip(shared_in, shared_out, strict=True)):
        factor = 1.0 if router is None else 1 / (1 + np.exp(-(x @ in_float64(router)[:, s : s + 1])))
        if gate is None:
            total += factor * ffn(x, w_in, w_out, activation=case.kwargs["activation"])
        else:
            part = gated_ffn(x, in_float64(gate)[s], w_in, w_out, activation=case.kwargs["activation"])
            total += factor * part
    close.on(alone)(alone.call(f), total, "routed experts that give 0")


@law("moe.shared_experts")
def shared_and_routed_add_up(f: Function, case: Case, close: Close) -> None:
    """The layer is its shared experts alone plus its routed ones alone."""
    parts = _shared_alone(case), _without_shared(case)
    alone, routed = (in_float64(part.call(f)) for part in parts)
    _loosest(close, *parts)(
        alone + routed, in_float64(case.call(f)), "shared alone plus routed alone", factor=2.0
    )


@law("moe.shared_experts")
def the_router_does_not_see_the_shared(f: Function, case: Case, close: Close) -> None:
    """Besides the shared experts k routed ones count, with gates among the routed ones alone."""
    x, w_router, *experts = case.args
    shared = _without_shared(case).args[4:]

    def routed(*arrays: Any, **options: Any) -> Any:
        return f(*arrays, *shared, **options)

    _demand_top_k(observed_weights(routed, case), case, case.kwargs["k"], close)
    other = _shared_alone(case.replace(x, -w_router, *experts))
    close.on(other)(other.call(f), _shared_alone(case).call(f), "shared experts under another router")


@law("moe.shared_experts")
def shared_experts_side_by_side_are_one(f: Function, case: Case, close: Close) -> None:
    """Shared experts side by side are one of their joint width: that is how checkpoints hold them."""
    *rest, shared_in, shared_out = case.without("shared_router").args
    if not len(shared_in):
        return
    gate = case.kwargs.get("shared_gate")
    options = {} if gate is None else {"shared_gate": np.concatenate(list(gate), axis=1)[None]}
    wide_in, wide_out = np.concatenate(list(shared_in), axis=1), np.concatenate(list(shared_out), axis=0)
    plain = case.without("shared_router")
    joined = plain.replace(*rest, wide_in[None], wide_out[None]).replace(**options)
    close.on(joined)(joined.call(f), plain.call(f), "one wide shared expert")


# Residual experts


def _residual_parts(case: Case) -> tuple[Case, Case]:
    """Return the case with a dense layer that gives 0, and with experts that do."""
    x, w_1, w_2, w_router, w_in, w_out, *more = case.args
    return (
        case.replace(x, w_1, np.zeros_like(w_2), w_router, w_in, w_out, *more),
        case.replace(x, w_1, w_2, w_router, w_in, np.zeros_like(w_out), *more),
    )


def _expert_weights(f: Function, case: Case) -> FloatArray:
    x, w_1, w_2, *rest = _residual_parts(case)[0].args
    more = rest[3:]

    def routed(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
        return f(x, w_1, w_2, w_router, w_in, w_out, *more, **options)

    return observed_weights(routed, Case((x, *rest[:3]), case.kwargs))


@law("moe.residual", "moe.residual.deepspeed")
def one_expert_a_token(f: Function, case: Case, close: Close) -> None:
    """Exactly one expert counts for a token, its best; in the paper with its share of the softmax."""
    x, router = case.args[0], case.args[3]
    logits = in_float64(x) @ in_float64(router)
    weights = _expert_weights(f, case)
    seen = np.any(x != 0, axis=1)
    require((np.count_nonzero(weights, axis=1) == 1)[seen], "a token has not exactly one expert")
    require((np.argmax(weights, axis=1) == np.argmax(logits, axis=1))[seen], "not the best expert")
    if len(case.args) == 6:  # no coefficients
        require(
            abs(weights.max(axis=1) - _softmax(logits).max(axis=1))[seen] <= slack(close), "not its share"
        )


@law("moe.residual", "moe.residual.deepspeed")
def dense_and_expert_add_up(f: Function, case: Case, close: Close) -> None:
    """The layer is its dense part alone plus its expert alone."""
    parts = _residual_parts(case)
    routed, dense = (in_float64(part.call(f)) for part in parts)
    _loosest(close, *parts)(routed + dense, in_float64(case.call(f)), "dense plus expert", factor=2.0)


@law("moe.residual")
def silent_experts_leave_the_dense_layer(f: Function, case: Case, close: Close) -> None:
    """With experts that give 0 the layer is the dense one."""
    from refimpl.transformer.ffn import ffn

    silent = _residual_parts(case)[1]
    x, w_1, w_2 = (in_float64(array) for array in case.args[:3])
    dense = ffn(x, w_1, w_2, activation=case.kwargs["activation"])
    close.on(silent)(silent.call(f), dense, "experts that give 0")


@law("moe.residual.deepspeed")
def coefficients_share_one(f: Function, case: Case, close: Close) -> None:
    """Coefficients of 0 give half of the paper's layer; exchanged columns make up the other half."""
    from refimpl.moe.residual import residual

    *rest, w_c = case.args
    flat, other = case.replace(*rest, np.zeros_like(w_c)), case.replace(*rest, w_c[:, ::-1])
    paper = in_float64(residual(*(in_float64(array) for array in rest), activation=case.kwargs["activation"]))
    close.on(flat)(2 * np.asarray(flat.call(f)), paper, "coefficients of one half", factor=2.0)
    both = in_float64(case.call(f)) + in_float64(other.call(f))
    _loosest(close, other)(both, paper, "both orders of the coefficients", factor=2.0)


@law("moe.residual.deepspeed")
def the_first_coefficient_is_the_experts(f: Function, case: Case, close: Close) -> None:
    """A first column that says yes silences the dense layer."""
    x, *weights, w_c = case.args
    x, sure = np.abs(x) + 1, np.zeros_like(w_c)
    sure[:, 0] = 1e4
    routed, dense = (part.call(f) for part in _residual_parts(case.replace(x, *weights, sure)))
    close.on(case.replace(x, *weights, sure))(dense, np.zeros(x.shape), "dense layer under a sure expert")
    require(np.array_equal(np.shape(routed), x.shape), "expert alone has another shape")


@law("moe.residual.pyramid")
def silent_layers_keep_the_tokens(f: Function, case: Case, close: Close) -> None:
    """Layers that give 0 leave the tokens as they are; so does a stack of none."""
    silent = [layer._replace(w_2=0 * layer.w_2, w_out=0 * layer.w_out) for layer in case.kwargs["layers"]]
    for stack in (silent, []):
        quiet = case.replace(layers=stack)
        close.on(quiet)(quiet.call(f), case.args[0], "layers that give 0")


@law("moe.residual.pyramid")
def a_pyramid_is_its_layers_in_turn(f: Function, case: Case, close: Close) -> None:
    """The first layers, and the last ones on what they give, are the whole; one layer adds to its input."""
    from refimpl.moe.residual import residual

    (x,), layers = case.args, case.kwargs["layers"]
    one = case.replace(layers=layers[:1])
    rest = case.replace(np.asarray(one.call(f))).replace(layers=layers[1:])
    close(rest.call(f), case.call(f), "first layer, then the others")
    if layers:
        y = residual(in_float64(x), *map(in_float64, layers[0]), activation=case.kwargs["activation"])
        close.on(one)(one.call(f), in_float64(x) + in_float64(y), "one layer")
