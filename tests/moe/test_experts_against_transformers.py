"""Outputs and gradients of shared and fine-grained experts against DeepSeek-V2 and Qwen2-MoE."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl.moe.fine_grained import fine_grained
from refimpl.moe.segments import segment_columns, segment_rows
from refimpl.moe.shared_experts import sample_shared, shared_experts, shared_experts_vjp

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Their routers take the softmax in float32 whatever the layer's dtype is.
FLOAT32_ROUTER = 5e-6
T, D, E, F, K = 9, 4, 6, 5, 3


def _case(S: int, **options: Any) -> Any:
    return sample_shared(
        np.random.default_rng(S), T=T, D=D, E=E, F=F, S=S, k=K, experts="gated silu", **options
    )


def _fill(block: Any, w_router: Any, w_in: Any, w_out: Any, w_gate: Any) -> None:
    """Copy router and routed experts; both models fuse gate and input, and keep [out, in]."""
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(w_router.T.copy()))
        fused = np.concatenate([w_gate, w_in], axis=2).transpose(0, 2, 1)
        block.experts.gate_up_proj.copy_(torch.from_numpy(fused.copy()))
        block.experts.down_proj.copy_(torch.from_numpy(w_out.transpose(0, 2, 1).copy()))


def _fill_shared(mlp: Any, shared_in: Any, shared_out: Any, shared_gate: Any) -> None:
    """Copy the shared experts, side by side as one wide one."""
    with torch.no_grad():
        mlp.up_proj.weight.copy_(torch.from_numpy(np.concatenate(list(shared_in), axis=1).T.copy()))
        mlp.gate_proj.weight.copy_(torch.from_numpy(np.concatenate(list(shared_gate), axis=1).T.copy()))
        mlp.down_proj.weight.copy_(torch.from_numpy(np.concatenate(list(shared_out), axis=0).T.copy()))


def deepseek_block(experts: int, width: int, k: int, S: int, shared_width: int) -> Any:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek

    config = transformers.DeepseekV2Config(
        hidden_size=D, num_attention_heads=1, moe_intermediate_size=width, n_routed_experts=experts,
        num_experts_per_tok=k, n_shared_experts=S, topk_method="greedy", routed_scaling_factor=1.0,
        norm_topk_prob=False, hidden_act="silu", mlp_bias=False, experts_implementation="eager",
    )  # fmt: skip
    block = deepseek.DeepseekV2Moe(config)
    block.shared_experts = deepseek.DeepseekV2MLP(config, intermediate_size=S * shared_width)
    return block.double()


def _compare(block: Any, case: Any) -> Any:
    """Compare the output and the tokens' gradient; return ours of all arrays."""
    x = case.args[0]
    tokens = torch.tensor(x[None], requires_grad=True)
    expected = block(tokens)
    np.testing.assert_allclose(
        case.call(shared_experts), expected[0].detach().numpy(), rtol=0, atol=FLOAT32_ROUTER
    )
    dy = np.random.default_rng(9).standard_normal(x.shape)
    expected.backward(torch.from_numpy(dy[None]))
    back = shared_experts_vjp(*case.args, dy, **case.kwargs)
    np.testing.assert_allclose(back.dx, tokens.grad[0].numpy(), rtol=0, atol=20 * FLOAT32_ROUTER)
    down = block.experts.down_proj.grad.numpy().transpose(0, 2, 1)
    np.testing.assert_allclose(back.dw_out, down, rtol=0, atol=20 * FLOAT32_ROUTER)
    np.testing.assert_allclose(
        back.dw_router, block.gate.weight.grad.numpy().T, rtol=0, atol=20 * FLOAT32_ROUTER
    )
    return back


@pytest.mark.parametrize("S", [1, 2])
def test_deepseek_v2(S: int) -> None:
    case = _case(S, convention="switch", gated_sum=False)
    _, w_router, w_in, w_out, *shared = case.args
    block = deepseek_block(E, F, K, S, shared[0].shape[2])
    _fill(block, w_router, w_in, w_out, case.kwargs["w_gate"])
    _fill_shared(block.shared_experts, *shared, case.kwargs["shared_gate"])
    _compare(block, case)


@pytest.mark.parametrize("renormalized", [False, True])
def test_qwen2_moe(renormalized: bool) -> None:
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    case = _case(1, convention="gshard" if renormalized else "switch", gated_sum=True)
    _, w_router, w_in, w_out, *shared = case.args
    config = transformers.Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=F, shared_expert_intermediate_size=shared[0].shape[2],
        num_experts=E, num_experts_per_tok=K, norm_topk_prob=renormalized, hidden_act="silu",
        experts_implementation="eager",
    )  # fmt: skip
    block = Qwen2MoeSparseMoeBlock(config).double()
    _fill(block, w_router, w_in, w_out, case.kwargs["w_gate"])
    _fill_shared(block.shared_expert, *shared, case.kwargs["shared_gate"])
    with torch.no_grad():
        block.shared_expert_gate.weight.copy_(torch.from_numpy(case.kwargs["shared_router"].T.copy()))
    back = _compare(block, case)
    gate = block.shared_expert_gate.weight.grad.numpy().T
    np.testing.assert_allclose(back.dshared_router, gate, rtol=0, atol=20 * FLOAT32_ROUTER)


def test_fine_grained_experts_are_deepseeks_routed_ones() -> None:
    rng, m, N = np.random.default_rng(3), 3, 2
    w_in, w_gate, w_out = (rng.standard_normal(s) for s in ((N, D, 6), (N, D, 6), (N, 6, D)))
    x, w_router = rng.standard_normal((T, D)), rng.standard_normal((D, N * m))
    block = deepseek_block(N * m, 6 // m, m, 1, 2)
    cut_gate = segment_columns(w_gate, m)
    _fill(block, w_router, segment_columns(w_in, m), segment_rows(w_out, m), cut_gate)
    with torch.no_grad():
        block.shared_experts.down_proj.weight.zero_()
        expected = block(torch.from_numpy(x[None]))[0].numpy()
    y = fine_grained(x, w_router, w_in, w_out, k=1, segments=m, w_gate=w_gate, activation="silu")
    np.testing.assert_allclose(y, expected, rtol=0, atol=FLOAT32_ROUTER)
