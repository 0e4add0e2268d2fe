"""Oracles of shared layers and factorised stacks: PyTorch's encoder layer, eigenvectors of Gram matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


@oracle("compress.layer_sharing")
def torch_one_layer_many_times(x: Any, /, *, num_layers: int, num_heads: int, **w: Any) -> Any:
    torch = library("torch")
    if not x.size:
        raise NotImplementedError("no tokens")
    M, F = x.shape[2], w["w_1"].shape[1]
    layer = torch.nn.TransformerEncoderLayer(
        M, num_heads, F, dropout=0.0, activation="relu", batch_first=True, dtype=torch.float64
    )
    state = {
        "self_attn.in_proj_weight": np.concatenate([w["w_q"], w["w_k"], w["w_v"]], axis=1).T,
        "self_attn.in_proj_bias": np.zeros(3 * M),
        "self_attn.out_proj.weight": w["w_o"].T,
        "self_attn.out_proj.bias": np.zeros(M),
        "linear1.weight": w["w_1"].T, "linear1.bias": np.zeros(F),
        "linear2.weight": w["w_2"].T, "linear2.bias": np.zeros(M),
        "norm1.weight": w["gamma_1"], "norm1.bias": w["beta_1"],
        "norm2.weight": w["gamma_2"], "norm2.bias": w["beta_2"],
    }  # fmt: skip
    layer.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    layer.train()  # without the fast path of inference
    out = torch.from_numpy(x)
    for _ in range(num_layers):
        out = layer(out)
    return out.detach().numpy()


@oracle("compress.factorization")
def projected_by_gram_matrices(blocks: Any, /, *, ranks: Any) -> Any:
    """Project each axis, one number at a time, onto the leading eigenvectors of its Gram matrix."""
    out = blocks
    for axis, rank in enumerate(ranks):
        size = blocks.shape[axis]
        gram = np.array(
            [[np.sum(blocks.take(i, axis) * blocks.take(j, axis)) for j in range(size)] for i in range(size)]
        ).reshape(size, size)
        vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :rank] if size else np.zeros((0, 0))
        out = np.moveaxis(np.tensordot(vectors @ vectors.T, out, (1, axis)), 0, axis)
    return out
