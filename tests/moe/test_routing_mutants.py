"""Gates, routers and dispatches that are wrong in one way: the laws of the records must catch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.attention.online_softmax import softmax
from refimpl.moe.batch_priority import batch_priority
from refimpl.moe.buffers import routed
from refimpl.moe.dispatch import dispatch
from refimpl.moe.expert_ffn import expert_ffn
from refimpl.moe.expert_parallel import expert_parallel, expert_parallel_vjp
from refimpl.moe.gating import dense_mixture, top_k_gates
from refimpl.moe.gshard import gshard_as_printed
from refimpl.moe.gshard_as_coded import gshard_as_coded
from refimpl.moe.mixture import mixture
from refimpl.moe.noisy_gating import noisy_top_k_gates, vmoe_noisy_gates
from refimpl.moe.switch import switch, switch_routing
from refimpl.moe.token_choice import token_choice
from tests.survivors import Mutants

registry.load()

Function = Callable[..., Any]
CAPACITY = ("capacity", "capacity_factor", "rounding", "min_capacity", "groups")
MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("moe.dense_mixture")
def temperature_multiplied(x: Any, w: Any, *experts: Any, temperature: float, **options: Any) -> Any:
    return dense_mixture(x, w, *experts, temperature=1 / temperature, **options)


@mutant("moe.dense_mixture")
def sigmoid_gates(x: Any, w: Any, *experts: Any, temperature: float, **options: Any) -> Any:
    return mixture(x, 1 / (1 + np.exp(-np.clip(x @ w / temperature, -700, 700))), *experts, **options)


@mutant("moe.dense_mixture")
def softmax_over_tokens(x: Any, w: Any, *experts: Any, temperature: float, **options: Any) -> Any:
    return mixture(x, softmax((x @ w / temperature).T).T, *experts, **options)


@mutant("moe.dense_mixture")
def a_mean_of_experts(x: Any, w: Any, *experts: Any, temperature: float, **options: Any) -> Any:
    return dense_mixture(x, 0 * w, *experts, **options)


@mutant("moe.top_k")
def never_divided(logits: Any, /, *, k: int, convention: str) -> Any:
    return top_k_gates(logits, k=k, convention="switch")


@mutant("moe.top_k")
def always_divided(logits: Any, /, *, k: int, convention: str) -> Any:
    return top_k_gates(logits, k=k, convention="mixtral")


@mutant("moe.top_k")
def the_smallest_kept(logits: Any, /, *, k: int, convention: str) -> Any:
    gates = softmax(logits) * (np.argsort(np.argsort(logits, axis=1), axis=1) < k)
    return gates if convention == "switch" else gates / gates.sum(axis=1, keepdims=True)


@mutant("moe.top_k")
def ties_to_the_highest(logits: Any, /, *, k: int, convention: str) -> Any:
    return top_k_gates(logits[:, ::-1], k=k, convention=convention)[:, ::-1]


@mutant("moe.top_k")
def ties_all_kept(logits: Any, /, *, k: int, convention: str) -> Any:
    gates = softmax(logits)
    gates = np.where(gates >= -np.sort(-gates, axis=1)[:, k - 1 : k], gates, 0)
    return gates if convention == "switch" else gates / gates.sum(axis=1, keepdims=True)


@mutant("moe.top_k")
def exp_without_the_maximum(logits: Any, /, *, k: int, convention: str) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        powers = np.exp(logits)
        gates = powers / powers.sum(axis=1, keepdims=True)
        gates = gates * (np.argsort(np.argsort(-logits, axis=1, kind="stable"), axis=1) < k)
        return gates if convention == "switch" else gates / gates.sum(axis=1, keepdims=True)


@mutant("moe.noisy_top_k")
def chosen_before_the_noise(x: Any, w: Any, w_noise: Any, /, *, k: int, noise: Any = None) -> Any:
    kept = top_k_gates(x @ w, k=k, convention="switch") != 0
    full = noisy_top_k_gates(x, w, w_noise, k=w.shape[1], noise=noise)
    return full * kept / np.maximum((full * kept).sum(axis=1, keepdims=True), 1e-300)


@mutant("moe.noisy_top_k")
def relu_for_softplus(x: Any, w: Any, w_noise: Any, /, *, k: int, noise: Any = 0.0) -> Any:
    return top_k_gates(x @ w + noise * np.maximum(x @ w_noise, 0), k=k, convention="mixtral")


@mutant("moe.noisy_top_k")
def noise_not_scaled(x: Any, w: Any, w_noise: Any, /, *, k: int, noise: Any = 0.0) -> Any:
    return top_k_gates(x @ w + noise, k=k, convention="mixtral")


@mutant("moe.noisy_top_k")
def softmax_before_keeping(x: Any, w: Any, w_noise: Any, /, *, k: int, noise: Any = 0.0) -> Any:
    return top_k_gates(x @ w + noise * np.logaddexp(0, x @ w_noise), k=k, convention="switch")


@mutant("moe.noisy_top_k.vmoe")
def noise_not_over_experts(x: Any, w: Any, /, *, noise_std: float, **options: Any) -> Any:
    return vmoe_noisy_gates(x, w, noise_std=noise_std * w.shape[1], **options)


@mutant("moe.noisy_top_k.vmoe")
def kept_gates_divided(x: Any, w: Any, /, *, k: int, noise_std: float, noise: Any = 0.0) -> Any:
    return top_k_gates(x @ w + noise_std / w.shape[1] * noise, k=k, convention="gshard")


@mutant("moe.noisy_top_k.vmoe")
def noise_on_the_gates(x: Any, w: Any, /, *, k: int, noise_std: float, noise: Any = 0.0) -> Any:
    return top_k_gates(np.log(softmax(x @ w) + 1e-30) + noise_std * noise, k=k, convention="switch")


def _parts(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the routing that all layers share, and those of the experts."""
    return (
        {name: options[name] for name in CAPACITY if name in options},
        {name: options[name] for name in ("activation", "w_gate") if name in options},
    )


@mutant("moe.switch")
def gate_forgotten(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    sizes, ffn = _parts(options)
    routing = switch_routing(x, w, **sizes)
    return routed(x, routing._replace(weight=routing.kept.astype(float)), *experts, **ffn)


@mutant("moe.switch")
def one_place_more(x: Any, w: Any, *experts: Any, capacity: Any = None, **options: Any) -> Any:
    return switch(x, w, *experts, capacity=None if capacity is None else capacity + 1, **options)


@mutant("moe.switch")
def groups_ignored(x: Any, w: Any, *experts: Any, groups: int, capacity: Any = None, **options: Any) -> Any:
    return switch(x, w, *experts, capacity=None if capacity is None else capacity * groups, **options)


@mutant("moe.switch")
def last_tokens_served(x: Any, w: Any, *experts: Any, uniforms: Any = None, **options: Any) -> Any:
    draws = {} if uniforms is None else {"uniforms": uniforms[::-1]}
    return switch(x[::-1], w, *experts, **draws, **options)[::-1]


@mutant("moe.switch")
def dropped_tokens_pass_through(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    sizes, _ = _parts(options)
    return switch(x, w, *experts, **options) + np.where(switch_routing(x, w, **sizes).kept, 0, x)


@mutant("moe.switch")
def jitter_in_the_experts(
    x: Any, w: Any, *experts: Any, jitter: float = 0, uniforms: Any = 0, **o: Any
) -> Any:
    return switch(x * (1 + jitter * (2 * uniforms - 1)), w, *experts, **o)


@mutant("moe.switch")
def jitter_up_only(x: Any, w: Any, *experts: Any, uniforms: Any = None, **options: Any) -> Any:
    draws = {} if uniforms is None else {"uniforms": 0.5 + uniforms / 2}
    return switch(x, w, *experts, **draws, **options)


@mutant("moe.switch", "moe.batch_priority")
def two_experts_in_stead_of_one(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    sizes, ffn = _parts(options)
    k = min(options.get("k", 1) + 1, w.shape[1])
    return routed(x, token_choice(x, w, k=k, convention="switch", **sizes).routing, *experts, **ffn)


@mutant("moe.gshard", "moe.gshard.as_coded")
def not_divided(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    sizes, ffn = _parts(options)
    sizes.setdefault("capacity_factor", 2.0)
    return routed(x, token_choice(x, w, k=2, convention="switch", **sizes).routing, *experts, **ffn)


@mutant("moe.gshard", "moe.gshard.as_coded")
def the_best_expert_alone(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    sizes, ffn = _parts(options)
    return routed(x, token_choice(x, w, k=1, convention="gshard", **sizes).routing, *experts, **ffn)


@mutant("moe.gshard", "moe.gshard.as_coded")
def divided_after_dropping(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    """Lingvo without its legacy behavior: what was kept sums to 1 again."""
    sizes, ffn = _parts(options)
    sizes.setdefault("capacity_factor", 2.0)
    routing = token_choice(x, w, k=2, convention="gshard", **sizes).routing
    total = routing.weight.sum(axis=1, keepdims=True)
    return routed(x, routing._replace(weight=routing.weight / np.where(total > 0, total, 1)), *experts, **ffn)


@mutant("moe.gshard", "moe.gshard.as_coded")
def token_by_token(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    """Both choices of a token before the next token: second choices displace first ones."""
    sizes, ffn = _parts(options)
    groups = sizes.get("groups", 1)
    roomy = token_choice(x, w, k=2, convention="gshard", capacity=2 * len(x), groups=groups).routing
    places = token_choice(
        x, w, k=2, convention="gshard", **{"capacity_factor": 2.0, **sizes}
    ).routing.capacity
    kept = roomy.kept.copy()
    for g in range(groups):
        count = np.zeros(w.shape[1], int)
        for t in range(g * len(x) // groups, (g + 1) * len(x) // groups):
            for j in range(2):
                e = roomy.expert[t, j]
                kept[t, j] = count[e] < places // groups
                count[e] += 1
    return routed(x, roomy._replace(kept=kept, weight=np.where(kept, roomy.weight, 0)), *experts, **ffn)


@mutant("moe.gshard")
def counted_as_coded(x: Any, w: Any, *experts: Any, uniforms: Any, **options: Any) -> Any:
    policy = {"second_policy": "random", "threshold": 0.5, "uniforms": uniforms}
    return gshard_as_coded(x, w, *experts, **policy, **options)


@mutant("moe.gshard")
def chance_ignored(x: Any, w: Any, *experts: Any, uniforms: Any, **options: Any) -> Any:
    return gshard_as_printed(x, w, *experts, **options)


@mutant("moe.gshard.as_coded")
def counted_as_printed(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    if options.pop("second_policy", "all") != "random":
        raise NotImplementedError
    half = 0.5 / options.pop("threshold")
    draws = options.pop("uniforms", 0.0) / half * np.ones(len(x))
    return gshard_as_printed(x, w, *experts, uniforms=draws, **options)


@mutant("moe.batch_priority")
def as_they_come(x: Any, w: Any, *experts: Any, k: int, **options: Any) -> Any:
    sizes, ffn = _parts({"rounding": "vmoe", **options})
    return routed(x, token_choice(x, w, k=k, convention="switch", **sizes).routing, *experts, **ffn)


@mutant("moe.batch_priority")
def the_least_sure_first(x: Any, w: Any, *experts: Any, k: int, **options: Any) -> Any:
    sizes, ffn = _parts({"rounding": "vmoe", **options})
    chosen = token_choice(
        x, w, k=k, convention="switch", order=lambda g: np.argsort(g[:, 0], kind="stable"), **sizes
    )
    return routed(x, chosen.routing, *experts, **ffn)


@mutant("moe.batch_priority")
def order_not_undone(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    order = np.argsort(-softmax(x @ w).max(axis=1), kind="stable")
    return batch_priority(x, w, *experts, **options)[order]


@mutant("moe.dispatch")
def not_weighted(x: Any, combine: Any, *experts: Any, dispatch_mask: Any = None, **options: Any) -> Any:
    mask = combine != 0 if dispatch_mask is None else dispatch_mask
    return dispatch(x, mask.astype(float), *experts, dispatch_mask=mask, **options)


@mutant("moe.dispatch")
def weighted_before_the_experts(
    x: Any, combine: Any, w_in: Any, w_out: Any, *, dispatch_mask: Any = None, **options: Any
) -> Any:
    mask = combine != 0 if dispatch_mask is None else dispatch_mask
    rows = np.einsum("gsec,gsd->egcd", combine * mask, x)
    out = expert_ffn(rows.reshape(len(w_in), -1, x.shape[2]), w_in, w_out, **options).reshape(rows.shape)
    return np.einsum("gsec,egcd->gsd", mask, out)


@mutant("moe.dispatch")
def groups_share_places(x: Any, combine: Any, *experts: Any, **options: Any) -> Any:
    return dispatch(x + 0.1 * (x.mean(axis=0) - x), combine, *experts, **options)


@mutant("moe.dispatch")
def mask_not_asked(x: Any, combine: Any, *experts: Any, dispatch_mask: Any = None, **options: Any) -> Any:
    taken = combine != 0
    if (taken.sum(axis=1) > 1).any():
        return dispatch(x, np.full_like(combine, np.nan), *experts, dispatch_mask=dispatch_mask, **options)
    return dispatch(x, combine, *experts, **options)


@mutant("moe.dispatch")
def first_expert_everywhere(x: Any, combine: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    same = [np.repeat(w[:1], len(w), axis=0) for w in (w_in, w_out)]
    return dispatch(x, combine, *same, **options)


@mutant("moe.expert_parallel")
def ranks_share_the_places(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    R, T, D = x.shape
    flat = expert_parallel(x.reshape(1, R * T, D), w, *experts, **options)
    return flat.reshape(x.shape)


@mutant("moe.expert_parallel")
def results_to_the_next_rank(x: Any, w: Any, *experts: Any, **options: Any) -> Any:
    return np.roll(expert_parallel(x, w, *experts, **options), 1, axis=0)


@mutant("moe.expert_parallel")
def experts_of_another_rank(x: Any, w: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    shift = len(x) - 1
    return expert_parallel(x, w, np.roll(w_in, shift, axis=0), np.roll(w_out, shift, axis=0), **options)


@mutant("moe.expert_parallel.backward")
def router_gradient_of_rank_0(x: Any, w: Any, w_in: Any, w_out: Any, dy: Any, **options: Any) -> Any:
    whole = expert_parallel_vjp(x, w, w_in, w_out, dy, **options)
    own = expert_parallel_vjp(x[:1], w, w_in, w_out, dy[:1], **options)
    return whole._replace(dw_router=own.dw_router)


@mutant("moe.expert_parallel.backward")
def averaged_over_ranks(x: Any, w: Any, w_in: Any, w_out: Any, dy: Any, **options: Any) -> Any:
    whole = expert_parallel_vjp(x, w, w_in, w_out, dy, **options)
    return whole._replace(dw_in=whole.dw_in / len(x))


@mutant("moe.expert_parallel.backward")
def dropped_tokens_count(x: Any, w: Any, w_in: Any, w_out: Any, dy: Any, **options: Any) -> Any:
    whole = expert_parallel_vjp(x, w, w_in, w_out, dy, **options)
    return whole._replace(dx=whole.dx + (whole.dx == 0) * dy)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)
