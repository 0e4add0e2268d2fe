"""The reference in the place of the kernels behind `cuda_backend.torch_layers`, for tensors on the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_backend.int8.linear_hopper import PreparedWeight
from refimpl import quant


def prepare_weight(weight: Any) -> PreparedWeight:
    """Return a weight [K, N] with the room for codes that TMA wants."""
    import torch

    codes, absmax = quant.quantize_columns(weight.numpy())
    K, N = codes.shape
    roomy = torch.zeros((N, -(-K // 16) * 16), dtype=torch.int8)
    roomy[:, :K] = torch.from_numpy(codes.T.copy())
    return PreparedWeight(roomy[:, :K].t(), torch.from_numpy(absmax), None)


def compute(x: Any, weight: Any, *, bias: Any, threshold: float | None) -> Any:
    """Return what `cuda_backend.llm_int8_linear_hopper` does, in float32."""
    import torch

    assert weight._fields == ("codes", "absmax")
    stored = quant.Int8Columns(*[part.numpy() for part in weight])
    shift = None if bias is None else bias.detach().numpy()
    out = quant.llm_int8_linear_fused(x.numpy(), stored, bias=shift, threshold=threshold)
    return torch.from_numpy(np.asarray(out))
