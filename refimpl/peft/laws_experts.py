"""Laws of experts as modules: which of them count, and that a closed one is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.moe.gating import dense_mixture
from refimpl.numerics import Array, in_float64, round_to
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]
EXPERT_OPTIONS = ("w_gate", "delta_gate")


def _same(one: Any, other: Any, message: str) -> None:
    if not np.array_equal(in_float64(one), in_float64(other)):
        raise LawViolation(message)


def _reordered(case: Case, change: Callable[[Array], Array]) -> Case:
    """Return the case with `change` applied along the axis of experts of everything that has one."""
    x, delta_in, delta_out, w_router, w_in, w_out = case.args
    experts = [change(array) for array in (delta_in, delta_out, w_in, w_out)]
    options = {
        name: change(case.kwargs[name])
        for name in (*EXPERT_OPTIONS, "trained", "router_bias")
        if case.kwargs.get(name) is not None
    }
    return case.replace(x, *experts[:2], change(w_router.T).T.copy(), *experts[2:], **options)


@law("peft.expert_tuning")
def frozen_experts_stay(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """What is added to a frozen expert changes nothing, bit for bit, even if it is infinite."""
    x, delta_in, delta_out, *rest = case.args
    frozen = ~np.asarray(case.kwargs["trained"])[:, None, None]
    odd = [np.where(frozen, delta.dtype.type(np.inf), delta) for delta in (delta_in, delta_out)]
    _same(case.replace(x, *odd, *rest).call(f), case.call(f), "a frozen expert moved")


@law("peft.expert_tuning")
def trained_experts_are_the_sum(f: Function, case: Case, close: Close) -> None:
    """What was added to a trained expert may lie in its weight from the start."""
    x, delta_in, delta_out, w_router, w_in, w_out = case.args
    mask = np.asarray(case.kwargs["trained"])[:, None, None]

    def added(w: Array, delta: Array) -> Array:
        return round_to(in_float64(w) + np.where(mask, in_float64(delta), 0.0), w.dtype)

    options: dict[str, Any] = {"trained": np.zeros(len(w_in), bool)}
    if case.kwargs.get("delta_gate") is not None:
        options["w_gate"] = added(case.kwargs["w_gate"], case.kwargs["delta_gate"])
    before = case.replace(
        x, delta_in, delta_out, w_router, added(w_in, delta_in), added(w_out, delta_out), **options
    )
    close(before.call(f), case.call(f), "the update in the weight", factor=2.0)


@law("peft.expert_tuning")
def a_closed_expert_is_not_there(f: Function, case: Case, close: Close) -> None:
    """One more expert, trained, whose router's bias is -inf, changes nothing."""
    E = case.args[3].shape[1]
    bias = case.kwargs.get("router_bias")
    case = case.replace(router_bias=np.zeros(E, case.args[0].dtype) if bias is None else bias)
    more = _reordered(case, lambda array: np.concatenate([array, array[-1:]]))
    more.kwargs["router_bias"][-1] = -np.inf
    more.kwargs["trained"][-1] = True
    close(more.call(f), case.call(f), "one more expert")


@law("peft.expert_tuning")
def experts_have_no_order(f: Function, case: Case, close: Close) -> None:
    """All arrays with the experts in reverse order give the same output."""
    close(_reordered(case, lambda array: array[::-1].copy()).call(f), case.call(f), "experts reversed")


@law("peft.expert_tuning")
def untrained_it_is_the_layer_before(f: Function, case: Case, close: Close) -> None:
    """With nothing added and k = E it is the dense mixture of the open experts."""
    x, delta_in, delta_out, w_router, w_in, w_out = case.args
    E = w_router.shape[1]
    bare = case.replace(x, delta_in * 0, delta_out * 0, w_router, w_in, w_out, k=E)
    if case.kwargs.get("delta_gate") is not None:
        bare = bare.replace(delta_gate=case.kwargs["delta_gate"] * 0)
    bias = case.kwargs.get("router_bias")
    is_open = np.ones(E, bool) if bias is None else np.isfinite(in_float64(bias))
    options: dict[str, Any] = {"activation": case.kwargs["activation"]}
    if case.kwargs.get("w_gate") is not None:
        options["w_gate"] = in_float64(case.kwargs["w_gate"])[is_open]
    layer = (in_float64(w_router)[:, is_open], in_float64(w_in)[is_open], in_float64(w_out)[is_open])
    close.on(bare)(
        bare.call(f), dense_mixture(in_float64(x), *layer, **options), "the dense mixture", factor=2.0
    )


@law("peft.expert_tuning")
def experts_beyond_k_do_not_run(f: Function, case: Case, close: Close) -> None:
    """For one token, the experts that are not among its k best may be anything."""
    x, delta_in, delta_out, w_router, w_in, w_out = case.args
    if not len(x):
        return
    bias = case.kwargs.get("router_bias")
    logits = in_float64(x[:1]) @ in_float64(w_router) + (0 if bias is None else in_float64(bias))
    best = np.argsort(-logits[0], kind="stable")[: case.kwargs["k"]]
    chosen = np.isin(np.arange(len(w_in)), best)[:, None, None]
    odd = [round_to(np.where(chosen, in_float64(w), 7.0), w.dtype) for w in (w_in, w_out)]
    one, other = (case.replace(x[:1], delta_in, delta_out, w_router, *w) for w in ((w_in, w_out), odd))
    close.on(one)(other.call(f), one.call(f), "other weights where the token does not go")
