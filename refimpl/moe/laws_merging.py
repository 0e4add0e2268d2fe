"""Laws of soft merging: averages of parameters, not of outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.moe.laws_assignment import with_a_feature_of_one
from refimpl.moe.samples import scaling_experts
from refimpl.numerics import FloatArray, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]


def _router_of(weights: FloatArray, x: FloatArray) -> FloatArray:
    """Return a router that gives these weights whatever it sees, its input having a last feature of 1."""
    w_router = np.zeros((x.shape[2], len(weights)))
    with np.errstate(divide="ignore"):
        w_router[-1] = np.maximum(np.log(weights), -1e4)
    return round_to(w_router, x.dtype)


def _with_ones(case: Case) -> Case:
    """Return the case with a last feature of 1, which the experts do not see."""
    x, w_router, w_in, w_out = case.args
    gate = case.kwargs.get("w_gate")
    wider = case.replace(
        with_a_feature_of_one(x),
        np.pad(w_router, ((0, 1), (0, 0))),
        np.pad(w_in, ((0, 0), (0, 1), (0, 0))),
        np.pad(w_out, ((0, 0), (0, 0), (0, 1))),
    )
    return wider if gate is None else wider.replace(w_gate=np.pad(gate, ((0, 0), (0, 1), (0, 0))))


def _expert(case: Case, e: int) -> Case:
    """Return the case with expert `e` alone."""
    x, w_router, w_in, w_out = case.args
    one = case.replace(x, w_router[:, :1], w_in[e : e + 1], w_out[e : e + 1])
    gate = case.kwargs.get("w_gate")
    return one if gate is None else one.replace(w_gate=gate[e : e + 1])


@law("moe.soft_merging")
def one_sure_expert_is_that_expert(f: Function, case: Case, close: Close) -> None:
    """If the router is sure of an expert, the merged expert is it, and one expert is itself."""
    x, w_router, w_in, w_out = (wider := _with_ones(case)).args
    E = w_router.shape[1]
    sure = wider.replace(x, _router_of(np.eye(E)[E - 1], x), w_in, w_out)
    close.on(sure)(sure.call(f), _expert(sure, E - 1).call(f), "a sure router against its expert alone")


@law("moe.soft_merging")
def equal_experts_merge_to_themselves(f: Function, case: Case, close: Close) -> None:
    """Experts with the same weights make the router irrelevant: the layer is dense."""
    x, w_router, *experts = case.args
    gate = case.kwargs.get("w_gate")
    options = {} if gate is None else {"w_gate": np.repeat(gate[:1], len(gate), axis=0)}
    same = case.replace(x, w_router, *(np.repeat(w[:1], len(w), axis=0) for w in experts)).replace(**options)
    close.on(same)(same.call(f), _expert(same, 0).call(f), "equal experts against one of them")


@law("moe.soft_merging")
def linear_outputs_are_mixed(f: Function, case: Case, close: Close) -> None:
    """Experts that differ in W_out alone are linear in what differs: merging mixes their outputs."""
    case = _with_ones(case)
    x, w_router, w_in, w_out = case.args
    E = w_router.shape[1]
    router = _router_of(np.arange(1, E + 1) / (E * (E + 1) / 2), x)
    weights = (
        np.exp(in_float64(router)[-1]) / np.exp(in_float64(router)[-1]).sum()
    )  # with what the format rounds
    gate = case.kwargs.get("w_gate")
    options = {} if gate is None else {"w_gate": np.repeat(gate[:1], E, axis=0)}
    mixed = case.replace(x, router, np.repeat(w_in[:1], E, axis=0), w_out)
    mixed = mixed.replace(**options)
    alone = [_expert(mixed, e) for e in range(E)]
    parts = np.stack([in_float64(one.call(f)) for one in alone])
    loosest = max((close.on(one) for one in (mixed, *alone)), key=lambda found: found.tolerance)
    loosest(mixed.call(f), np.tensordot(weights, parts, axes=1), "outputs mixed", factor=float(E))


@law("moe.soft_merging")
def both_matrices_are_averaged(f: Function, case: Case, close: Close) -> None:
    """Experts that scale by 0 and by 4, half in each matrix, merge to a scale of 1, not of 2."""
    case = _with_ones(case).without("w_gate")
    x = case.args[0]
    D = x.shape[2]
    scales = np.array([0.0, 2.0])
    w_in, w_out = scaling_experts(scales, D)
    w_in, w_out = (round_to(w, x.dtype) for w in (w_in * scales[:, None, None], w_out))
    halves = case.replace(x, _router_of(np.array([0.5, 0.5]), x), w_in, w_out)
    if halves.kwargs["activation"] == "relu":  # the only activation that scales with its argument
        close.on(halves)(halves.call(f), x, "two experts averaged in both matrices")


@law("moe.soft_merging")
def each_sequence_has_its_own_average(f: Function, case: Case, close: Close) -> None:
    """The first sequence gives alone what it gives among others, and its tokens may be reordered."""
    x, *rest = case.args
    if not len(x):
        return
    alone, back = case.replace(x[:1], *rest), case.replace(x[:, ::-1], *rest)
    close(alone.call(f), np.asarray(case.call(f))[:1], "first sequence alone")
    close.on(back)(back.call(f), np.asarray(case.call(f))[:, ::-1], "tokens reversed")


@law("moe.soft_merging")
def the_router_sees_the_mean(f: Function, case: Case, close: Close) -> None:
    """A sequence written twice gives its outputs twice: the mean of its tokens is the same."""
    x, *rest = case.args
    twice = case.replace(np.concatenate([x, x], axis=1), *rest)
    y = np.asarray(case.call(f))
    close.on(twice)(twice.call(f), np.concatenate([y, y], axis=1), "sequences written twice")
