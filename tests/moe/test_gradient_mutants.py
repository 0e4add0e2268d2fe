"""Gradients of routed layers that are wrong in one way: central differences must show each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import consistency, registry
from refimpl.attention.online_softmax import softmax
from refimpl.moe.batch_priority import batch_priority_vjp
from refimpl.moe.buffers import routed_vjp, through_router
from refimpl.moe.dispatch import dispatch_vjp
from refimpl.moe.gating import dense_mixture_vjp, top_k_gates_vjp
from refimpl.moe.gshard import gshard_as_printed_routing, gshard_as_printed_vjp
from refimpl.moe.gshard_as_coded import gshard_as_coded_vjp
from refimpl.moe.noisy_gating import noisy_top_k_gates_vjp, vmoe_noisy_gates_vjp
from refimpl.moe.routing import router_logits
from refimpl.moe.switch import switch_routing, switch_vjp
from refimpl.testing import draw

registry.load()

Function = Callable[..., Any]
MUTANTS: dict[str, tuple[str, Function]] = {}
EXPERTS = ("w_gate", "activation")
JITTER = ("jitter", "uniforms", "rng")


def mutant(*techniques: str) -> Callable[[Function], Function]:
    def register(f: Function) -> Function:
        for technique in techniques:
            MUTANTS[f"{technique}-{f.__name__}"] = (technique, f)
        return f

    return register


VJPS = {
    "moe.switch": switch_vjp,
    "moe.gshard": gshard_as_printed_vjp,
    "moe.gshard.as_coded": gshard_as_coded_vjp,
    "moe.batch_priority": batch_priority_vjp,
    "moe.dense_mixture": dense_mixture_vjp,
}


def _of_each(change: Callable[..., Any]) -> None:
    """Register what `change` makes of the right gradients, for every layer."""
    for technique, vjp in VJPS.items():

        def wrong(*args: Any, vjp: Function = vjp, **options: Any) -> Any:
            return change(vjp(*args, **options), *args)

        wrong.__name__ = change.__name__
        mutant(technique)(wrong)


@_of_each
def the_router_learns_nothing(right: Any, *_: Any) -> Any:
    return right._replace(dw_router=0 * right.dw_router)


@_of_each
def the_token_forgets_the_router(right: Any, x: Any, w_router: Any, *_: Any) -> Any:
    """Only the part through the experts is kept: the other one lies in the span of the router's columns."""
    basis = np.linalg.pinv(w_router)
    return right._replace(dx=right.dx - right.dx @ basis.T @ w_router.T)


@_of_each
def experts_get_the_gradient_twice(right: Any, *_: Any) -> Any:
    return right._replace(dw_in=2 * right.dw_in)


@mutant("moe.switch")
def dropped_tokens_teach_the_experts(*args: Any, **options: Any) -> Any:
    *arrays, dy = args
    return switch_vjp(*arrays, dy, **{**options, "capacity": len(dy)})


@mutant("moe.switch")
def jitter_forgotten(x: Any, w_router: Any, w_in: Any, w_out: Any, dy: Any, **options: Any) -> Any:
    routing = switch_routing(x, w_router, **{k: v for k, v in options.items() if k not in EXPERTS})
    back = routed_vjp(x, routing, w_in, w_out, dy, **{k: options[k] for k in EXPERTS if k in options})
    return through_router(back, x, w_router, router_logits(x, w_router), routing, convention="switch")


@mutant("moe.switch")
def straight_through_the_chosen_gate(
    x: Any, w_router: Any, w_in: Any, w_out: Any, dy: Any, **options: Any
) -> Any:
    """The softmax's other experts are left out: the chosen logit alone moves its gate."""
    right = switch_vjp(x, w_router, w_in, w_out, dy, **options)
    plain = {k: v for k, v in options.items() if k not in (*EXPERTS, *JITTER)}
    routing = switch_routing(x, w_router, **plain)
    back = routed_vjp(x, routing, w_in, w_out, dy, **{k: options[k] for k in EXPERTS if k in options})
    dlogits = np.zeros((len(x), w_router.shape[1]))
    p = np.take_along_axis(softmax(x @ w_router), routing.expert, axis=1)
    np.put_along_axis(dlogits, routing.expert, back.dweight * p * (1 - p), axis=1)
    return right._replace(dw_router=x.T @ dlogits)


@mutant("moe.gshard")
def gates_not_divided(x: Any, w_router: Any, w_in: Any, w_out: Any, dy: Any, **options: Any) -> Any:
    routing = gshard_as_printed_routing(x, w_router, **{k: v for k, v in options.items() if k not in EXPERTS})
    back = routed_vjp(x, routing, w_in, w_out, dy, **{k: options[k] for k in EXPERTS if k in options})
    return through_router(back, x, w_router, router_logits(x, w_router), routing, convention="switch")


@mutant("moe.gshard")
def chance_not_asked_on_the_way_back(*args: Any, **options: Any) -> Any:
    return gshard_as_printed_vjp(*args, **{**options, "uniforms": None})


@mutant("moe.batch_priority")
def served_as_they_come_on_the_way_back(*args: Any, k: int, **options: Any) -> Any:
    return switch_vjp(*args, **{"rounding": "vmoe", **options})


@mutant("moe.dense_mixture")
def temperature_forgotten(*args: Any, temperature: float, **options: Any) -> Any:
    right = dense_mixture_vjp(*args, temperature=temperature, **options)
    return right._replace(dw_router=right.dw_router * temperature)


@mutant("moe.top_k")
def all_gates_have_gradients(logits: Any, dgates: Any, /, *, k: int, convention: str) -> Any:
    return top_k_gates_vjp(logits, dgates, k=logits.shape[1], convention=convention)


@mutant("moe.top_k")
def conventions_exchanged(logits: Any, dgates: Any, /, *, k: int, convention: str) -> Any:
    other = "switch" if convention != "switch" else "gshard"
    return top_k_gates_vjp(logits, dgates, k=k, convention=other)


@mutant("moe.noisy_top_k")
def softplus_forgotten(x: Any, w: Any, w_noise: Any, dgates: Any, /, **options: Any) -> Any:
    right = noisy_top_k_gates_vjp(x, w, w_noise, dgates, **options)
    return right._replace(dw_noise=2 * right.dw_noise)


@mutant("moe.noisy_top_k")
def noise_without_tokens(x: Any, w: Any, w_noise: Any, dgates: Any, /, **options: Any) -> Any:
    quiet = {**options, "noise": None}
    right = noisy_top_k_gates_vjp(x, w, w_noise, dgates, **options)
    return right._replace(dx=noisy_top_k_gates_vjp(x, w, w_noise, dgates, **quiet).dx)


@mutant("moe.noisy_top_k.vmoe")
def noise_forgotten(x: Any, w: Any, dgates: Any, /, **options: Any) -> Any:
    return vmoe_noisy_gates_vjp(x, w, dgates, **{**options, "noise": None})


@mutant("moe.dispatch")
def tokens_weighted_twice(x: Any, combine: Any, *rest: Any, dispatch_mask: Any, **options: Any) -> Any:
    right = dispatch_vjp(x, combine, *rest, dispatch_mask=dispatch_mask, **options)
    return right._replace(dx=right.dx * combine.sum(axis=(2, 3))[..., None])


@mutant("moe.dispatch")
def weights_learn_from_empty_places(x: Any, combine: Any, *rest: Any, dispatch_mask: Any, **kw: Any) -> Any:
    right = dispatch_vjp(x, combine, *rest, dispatch_mask=dispatch_mask, **kw)
    return right._replace(dcombine=right.dcombine + ~dispatch_mask * 0.1)


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_gradient_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    technique, wrong = MUTANTS[name]
    record = registry.get(technique)
    assert record.sample is not None
    monkeypatch.setattr(consistency, "resolve", lambda _: wrong)
    for seed in range(60):
        case = record.sample(np.random.default_rng(seed), **draw(record, seed))
        if consistency.check_vjp(record, case, seed) is not None:
            return
    raise AssertionError(f"{name}: finite differences saw nothing")
