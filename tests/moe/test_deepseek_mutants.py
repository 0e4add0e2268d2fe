"""DeepSeek-V3's router wrong in one way, its block against transformers', and what its bias is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import OptionError
from refimpl.moe.balanced_bias import balanced_bias
from refimpl.moe.deepseek_v3 import deepseek_v3, deepseek_v3_vjp
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.routing import router_logits, router_logits_vjp, top_k_indices
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(z, -700, 700)))


def _router(
    logits: Any, bias: Any, *, k: int, groups: int, top_groups: int, scale: float, judged: Any = None,
    closed: float = -np.inf, weights: Any = None, owner: Any = None, divide: bool = True,
) -> Any:  # fmt: skip
    """The router in plain steps, of which a mutant changes one."""
    scores = _sigmoid(logits)
    chooses = scores + bias
    T, E = scores.shape
    owner = np.arange(E) // (E // groups) if owner is None else owner(E, groups)
    by = chooses if judged is None else judged(scores, bias)
    values = np.stack([np.sort(by[:, owner == g], axis=1)[:, -2:].sum(axis=1) for g in range(groups)], axis=1)
    entered = np.zeros((T, groups), bool)
    np.put_along_axis(entered, top_k_indices(values, top_groups), True, axis=1)
    expert = top_k_indices(np.where(entered[:, owner], chooses, closed), k)
    kept = np.take_along_axis(scores if weights is None else weights(logits, bias), expert, axis=1)
    gates = np.zeros_like(scores)
    with np.errstate(invalid="ignore"):
        share = kept / kept.sum(axis=1, keepdims=True) if divide else kept
    np.put_along_axis(gates, expert, scale * share, axis=1)
    return gates


@mutant("moe.deepseek_v3")
def the_bias_weighs(logits: Any, bias: Any, /, **options: Any) -> Any:
    return _router(logits, bias, weights=lambda z, b: _sigmoid(z) + b, **options)


@mutant("moe.deepseek_v3")
def softmax_shares(logits: Any, bias: Any, /, **options: Any) -> Any:
    return _router(logits, bias, weights=lambda z, b: np.exp(z - z.max(initial=0)), **options)


@mutant("moe.deepseek_v3")
def not_divided(logits: Any, bias: Any, /, **options: Any) -> Any:
    return _router(logits, bias, divide=False, **options)


@mutant("moe.deepseek_v3")
def divided_by_vanishing_scores(logits: Any, bias: Any, /, **options: Any) -> Any:
    with np.errstate(over="ignore"):
        return _router(logits, bias, weights=lambda z, b: 1 / (1 + np.exp(-z)), **options)


@mutant("moe.deepseek_v3")
def scale_forgotten(logits: Any, bias: Any, /, *, scale: float, **options: Any) -> Any:
    return deepseek_v3(logits, bias, **options)


@mutant("moe.deepseek_v3")
def bias_forgotten(logits: Any, bias: Any, /, **options: Any) -> Any:
    return deepseek_v3(logits, 0 * bias, **options)


@mutant("moe.deepseek_v3")
def groups_forgotten(logits: Any, bias: Any, /, *, groups: int, top_groups: int, **options: Any) -> Any:
    return deepseek_v3(logits, bias, **options)


@mutant("moe.deepseek_v3")
def one_group_more(logits: Any, bias: Any, /, *, groups: int, top_groups: int, **options: Any) -> Any:
    return deepseek_v3(logits, bias, groups=groups, top_groups=min(top_groups + 1, groups), **options)


@mutant("moe.deepseek_v3")
def groups_judged_by_their_best(logits: Any, bias: Any, /, **options: Any) -> Any:
    """As in DeepSeek-V2."""
    return deepseek_v3(logits, bias, per_group=1, **options)


@mutant("moe.deepseek_v3")
def groups_judged_by_all(logits: Any, bias: Any, /, **options: Any) -> Any:
    return deepseek_v3(logits, bias, per_group=1000, **options)


@mutant("moe.deepseek_v3")
def groups_judged_without_bias(logits: Any, bias: Any, /, **options: Any) -> Any:
    return _router(logits, bias, judged=lambda scores, b: scores, **options)


@mutant("moe.deepseek_v3")
def groups_judged_by_logits(logits: Any, bias: Any, /, **options: Any) -> Any:
    return _router(logits, bias, judged=lambda scores, b: logits + b, **options)


@mutant("moe.deepseek_v3")
def closed_groups_score_zero(logits: Any, bias: Any, /, **options: Any) -> Any:
    """As in the first released code for transformers."""
    return _router(logits, bias, closed=0.0, **options)


@mutant("moe.deepseek_v3")
def groups_interleaved(logits: Any, bias: Any, /, **options: Any) -> Any:
    return _router(logits, bias, owner=lambda E, groups: np.arange(E) % groups, **options)


@mutant("moe.deepseek_v3")
def ties_to_the_last(logits: Any, bias: Any, /, **options: Any) -> Any:
    return deepseek_v3(logits[:, ::-1], bias[::-1], **options)[:, ::-1]


@mutant("moe.deepseek_v3.bias")
def overloaded_experts_rise(bias: Any, load: Any, /, *, speed: float) -> Any:
    return balanced_bias(bias, load, speed=-speed)


@mutant("moe.deepseek_v3.bias")
def by_the_size_of_the_excess(bias: Any, load: Any, /, *, speed: float) -> Any:
    return bias + speed * (load.mean() - load)


@mutant("moe.deepseek_v3.bias")
def the_mean_load_sinks(bias: Any, load: Any, /, *, speed: float) -> Any:
    return bias + speed * np.where(load >= load.mean(), -1, 1)


@mutant("moe.deepseek_v3.bias")
def against_the_median(bias: Any, load: Any, /, *, speed: float) -> Any:
    return bias + speed * np.sign(np.median(load) - load)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


def test_the_steps_of_mutants_are_right_unchanged() -> None:
    record = registry.get("moe.deepseek_v3")
    assert record.sample is not None
    shape: dict[str, Any] = {"T": 6, "groups": 4, "size": 4, "top": 2, "k": 5, "values": "normal"}
    for seed in range(20):
        case = record.sample(np.random.default_rng(seed), **shape, chosen_by="both")
        np.testing.assert_allclose(case.call(_router), case.call(deepseek_v3), atol=1e-14)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_block_of_transformers(groups: int) -> None:
    """Output and gradients of the whole block: router, experts, shared expert; its router is in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    rng = np.random.default_rng(groups)
    T, D, E, F, k, top = 9, 5, 8, 6, 3, min(2, groups)
    config = transformers.DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=k, n_group=groups,
        topk_group=top, n_shared_experts=1, routed_scaling_factor=2.5, experts_implementation="eager",
    )  # fmt: skip
    block = DeepseekV3MoE(config).double()
    x, w_router, bias = rng.standard_normal((T, D)), rng.standard_normal((D, E)), 0.3 * rng.standard_normal(E)
    w_gate, w_in, w_out = (rng.standard_normal(shape) for shape in ((E, D, F), (E, D, F), (E, F, D)))
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(w_router.T.copy()))
        block.gate.e_score_correction_bias.copy_(torch.from_numpy(bias))
        fused = np.concatenate([w_gate, w_in], axis=2).transpose(0, 2, 1)
        block.experts.gate_up_proj.copy_(torch.from_numpy(fused.copy()))
        block.experts.down_proj.copy_(torch.from_numpy(w_out.transpose(0, 2, 1).copy()))
    tokens = torch.tensor(x[None], requires_grad=True)
    routed = block(tokens) - block.shared_experts(tokens)
    options: dict[str, Any] = {"k": k, "groups": groups, "top_groups": top, "scale": 2.5}
    logits = router_logits(x, w_router)
    gates = deepseek_v3(logits, bias, **options)
    experts: dict[str, Any] = {"w_gate": w_gate, "activation": "silu", "selected": gates != 0}
    y = mixture(x, gates, w_in, w_out, **experts)
    np.testing.assert_allclose(y, routed[0].detach().numpy(), rtol=0, atol=1e-5)

    dy = rng.standard_normal(x.shape)
    routed.backward(torch.from_numpy(dy[None]))
    back = mixture_vjp(x, gates, w_in, w_out, dy, **experts)
    dlogits, dbias = deepseek_v3_vjp(logits, bias, back.dgates, **options)
    dx, dw_router = router_logits_vjp(x, w_router, dlogits)
    w_grad: Any = block.gate.weight.grad
    np.testing.assert_allclose(back.dx + dx, tokens.grad[0].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(dw_router, w_grad.numpy().T, rtol=0, atol=1e-4)
    assert not dbias.any()


def test_a_bias_balances_what_a_router_does_not() -> None:
    """Logits that prefer half of the experts: after some steps the fullest has little more than the mean."""
    rng = np.random.default_rng(0)
    favor, loads = np.repeat([1.5, -1.5], 4), []
    bias: Any = np.zeros(8)
    for _ in range(300):
        gates = deepseek_v3(rng.standard_normal((256, 8)) + favor, bias, k=2)
        loads.append((gates > 0).sum(axis=0))
        bias = balanced_bias(bias, loads[-1], speed=0.01)
    assert loads[0].max() > 1.8 * loads[0].mean()
    late = np.sum(loads[-50:], axis=0)
    assert late.max() < 1.05 * late.mean()
    np.testing.assert_allclose(gates.sum(axis=1), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 2, "groups": 3}, "groups: expected a divisor of the 8 experts, got 3"),
        ({"k": 2, "groups": 4, "top_groups": 5}, "top_groups: expected at most 4"),
        ({"k": 5, "groups": 4, "top_groups": 2}, "k: expected at most 4, the experts of 2 of 4 groups"),
        ({"k": 2, "scale": 0.0}, "scale: expected a finite number above 0"),
        ({"k": 2, "per_group": 0}, "per_group: expected at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        deepseek_v3(np.zeros((1, 8)), np.zeros(8), **options)


def test_loads_are_counts() -> None:
    with pytest.raises(OptionError, match="load: expected whole numbers, got float64"):
        balanced_bias(np.zeros(2), np.ones(2))  # type: ignore[arg-type]
    huge = np.array([2**62, 2**62 + 1, 2**62 - 1])
    assert balanced_bias(np.zeros(3), huge, speed=1.0).tolist() == [0.0, -1.0, 1.0]
