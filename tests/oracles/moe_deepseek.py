"""Oracles of DeepSeek-V3's router: a loop over tokens in Python numbers, and transformers' router."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.moe import best


@oracle("moe.deepseek_v3")
def groups_then_experts(
    logits: Any, bias: Any, *, k: int, groups: int, top_groups: int, per_group: int = 2, scale: float
) -> Any:
    """Each token: its scores, the groups by their best sums, the experts in them, the shares."""
    if np.abs(logits).max(initial=0) > 30:
        raise NotImplementedError("scores that vanish: shares of them are not to be had by division")
    gates, size = np.zeros(logits.shape), logits.shape[1] // groups
    for t, row in enumerate(logits.tolist()):
        scores = [1 / (1 + math.exp(-z)) for z in row]
        chooses = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        sums = [
            math.fsum(sorted(chooses[g * size : (g + 1) * size], reverse=True)[:per_group])
            for g in range(groups)
        ]
        entered = best(sums, top_groups)
        candidates = [e for e in range(len(row)) if e // size in entered]
        chosen = [candidates[i] for i in best([chooses[e] for e in candidates], k)]
        total = math.fsum(scores[e] for e in chosen)
        for e in chosen:
            gates[t, e] = scale * scores[e] / total
    return gates


@oracle("moe.deepseek_v3")
def transformers_deepseek(
    logits: Any, bias: Any, *, k: int, groups: int, top_groups: int, per_group: int = 2, scale: float
) -> Any:
    """``DeepseekV3TopkRouter`` whose weight is the identity, so that its logits are those given."""
    T, E = logits.shape
    if E // groups < 2 or per_group != 2 or np.abs(logits).max(initial=0) > 30 or not T:
        raise NotImplementedError("transformers judges a group by two experts, and divides by their scores")
    torch = library("torch")
    transformers = library("transformers")
    router = library("transformers.models.deepseek_v3.modeling_deepseek_v3").DeepseekV3TopkRouter
    config = transformers.DeepseekV3Config(
        hidden_size=E, n_routed_experts=E, num_experts_per_tok=k, n_group=groups, topk_group=top_groups,
        routed_scaling_factor=scale, norm_topk_prob=True,
    )  # fmt: skip
    layer = router(config)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(E))
        layer.e_score_correction_bias.copy_(torch.from_numpy(bias))
        _, weights, indices = layer(torch.from_numpy(logits))
    # It computes in float32: its choice is judged, and its weights by what they are in that format.
    exact = 1 / (1 + np.exp(-np.take_along_axis(logits, indices.numpy(), axis=1)))
    exact = scale * exact / exact.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights.numpy(), exact, rtol=2e-6)
    gates = np.zeros((T, E))
    np.put_along_axis(gates, indices.numpy(), exact, axis=1)
    return gates


@oracle("moe.deepseek_v3.bias")
def signs_one_by_one(bias: Any, load: Any, *, speed: float) -> Any:
    """Algorithm 1, an expert at a time."""
    tokens, moved = sum(load.tolist()), []
    for b, count in zip(bias.tolist(), load.tolist(), strict=True):
        excess = count * len(bias) - tokens
        moved.append(b - speed if excess > 0 else b + speed if excess < 0 else b)
    return np.array(moved)
