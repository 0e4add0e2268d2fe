"""Outputs and gradients of routed layers against transformers' Mixtral and Switch blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.moe.gating import top_k_gates, top_k_gates_vjp
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.routing import router_logits, router_logits_vjp
from refimpl.moe.samples import sample_layer
from refimpl.moe.switch import switch, switch_vjp

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Mixtral's router takes its softmax in float32 whatever the layer's dtype is.
FLOAT32_ROUTER = 5e-6


def mixtral_block(case: Any, k: int) -> Any:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    _, w_router, w_in, w_out = case.args
    E, D, F = w_in.shape
    config = transformers.MixtralConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=k,
        hidden_act="silu",
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config).double()
    fused = np.concatenate([case.kwargs["w_gate"], w_in], axis=2).transpose(0, 2, 1)
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(w_router.T.copy()))
        block.experts.gate_up_proj.copy_(torch.from_numpy(fused.copy()))
        block.experts.down_proj.copy_(torch.from_numpy(w_out.transpose(0, 2, 1).copy()))
    return block


@pytest.mark.parametrize("convention", ["mixtral", "gshard"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_mixtral_block(k: int, convention: Any) -> None:
    case = sample_layer(np.random.default_rng(k), T=9, D=4, E=5, F=6, experts="gated silu")
    x, w_router, w_in, w_out = case.args
    block = mixtral_block(case, k)
    tokens = torch.tensor(x[None], requires_grad=True)
    expected = block(tokens)
    logits = router_logits(x, w_router)
    gates = top_k_gates(logits, k=k, convention=convention)
    y = mixture(x, gates, w_in, w_out, selected=gates != 0, **case.kwargs)
    np.testing.assert_allclose(y, expected[0].detach().numpy(), rtol=0, atol=FLOAT32_ROUTER)

    dy = np.random.default_rng(9).standard_normal(x.shape)
    expected.backward(torch.from_numpy(dy[None]))
    back = mixture_vjp(x, gates, w_in, w_out, dy, selected=gates != 0, **case.kwargs)
    dlogits = top_k_gates_vjp(logits, back.dgates, k=k, convention=convention).dlogits
    dx, dw_router = router_logits_vjp(x, w_router, dlogits)
    fused = block.experts.gate_up_proj.grad.numpy().transpose(0, 2, 1)
    pairs = {
        "x": (back.dx + dx, tokens.grad[0].numpy()),
        "router": (dw_router, block.gate.weight.grad.numpy().T),
        "gate": (back.dw_gate, fused[..., : w_in.shape[2]]),
        "up": (back.dw_in, fused[..., w_in.shape[2] :]),
        "down": (back.dw_out, block.experts.down_proj.grad.numpy().transpose(0, 2, 1)),
    }
    for name, (ours, theirs) in pairs.items():
        # Gradients of these sums of tokens are some ten times as large as an output.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=20 * FLOAT32_ROUTER, err_msg=name)
    if k == 1:
        assert np.all(dw_router == 0), "one renormalized gate is 1: the router learns nothing"


def test_switch_gradients() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    case = sample_layer(np.random.default_rng(0), T=12, D=4, E=3, F=5)
    x, w_router, w_in, w_out = case.args
    config = transformers.SwitchTransformersConfig(
        d_model=4, d_ff=5, num_experts=3, expert_capacity=2, dropout_rate=0.0, dense_act_fn="relu"
    )
    layer = SwitchTransformersSparseMLP(config).double().eval()
    layer.router.dtype = torch.float64
    with torch.no_grad():
        layer.router.classifier.weight.copy_(torch.from_numpy(w_router.T.copy()))
        for e in range(3):
            layer.experts[f"expert_{e}"].wi.weight.copy_(torch.from_numpy(w_in[e].T.copy()))
            layer.experts[f"expert_{e}"].wo.weight.copy_(torch.from_numpy(w_out[e].T.copy()))
    tokens = torch.tensor(x.reshape(2, 6, 4), requires_grad=True)
    expected = layer(tokens)
    dy = np.random.default_rng(1).standard_normal(x.shape)
    expected.backward(torch.from_numpy(dy.reshape(2, 6, 4)))
    y = switch(*case.args, capacity=2, groups=2, **case.kwargs)
    assert np.any(np.all(y == 0, axis=1)), "no token was dropped: the case says nothing"
    np.testing.assert_allclose(y, expected.detach().numpy().reshape(x.shape), rtol=0, atol=1e-13)
    back = switch_vjp(*case.args, dy, capacity=2, groups=2, **case.kwargs)
    theirs = {
        "dx": tokens.grad.numpy().reshape(x.shape),
        "dw_router": layer.router.classifier.weight.grad.numpy().T,
        "dw_in": np.stack([layer.experts[f"expert_{e}"].wi.weight.grad.numpy().T for e in range(3)]),
        "dw_out": np.stack([layer.experts[f"expert_{e}"].wo.weight.grad.numpy().T for e in range(3)]),
    }
    for name, gradient in theirs.items():
        np.testing.assert_allclose(getattr(back, name), gradient, rtol=0, atol=1e-12, err_msg=name)
