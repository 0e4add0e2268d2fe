"""Oracles of layers whose weight alone is quantised: scalar loops, PyTorch."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.quant_codes import NF4, _dynamic_map, _nf4_blocks, double_number_by_number


@oracle("quant.weight_only_int8")
def int8_groups_in_scalars(x: Any, weight: Any, /, *, bias: Any = None, group_size: int = 128) -> Any:
    """Weight by weight, the codes from exact quotients, sums without rounding."""
    (M, K), N = x.shape, weight.shape[1]
    out = np.zeros((M, N))
    for n in range(N):
        column: list[float] = []
        for start in range(0, K, group_size):
            group = [float(weight[k, n]) for k in range(start, min(start + group_size, K))]
            absmax = max(abs(w) for w in group)
            for w in group:
                code = round(Fraction(w) * 127 / Fraction(absmax)) if absmax else 0
                column.append(code * (absmax / 127))
        for m in range(M):
            terms = [float(x[m, k]) * column[k] for k in range(K)]
            out[m, n] = math.fsum([*terms, 0.0 if bias is None else float(bias[n])])
    return out


@oracle("quant.weight_only_int8")
def int8_groups_in_torch(x: Any, weight: Any, /, *, bias: Any = None, group_size: int = 128) -> Any:
    """Groups as rows of a padded tensor, rounded by PyTorch, multiplied by its linear layer."""
    torch = library("torch")
    K, N = weight.shape
    if not weight.size or not x.size:
        raise NotImplementedError("arrays that are not empty")
    padded = torch.nn.functional.pad(torch.from_numpy(weight.T.copy()), (0, -K % group_size))
    groups = padded.reshape(-1, group_size)
    step = groups.abs().amax(1, keepdim=True) / 127
    restored = torch.round(groups / step).nan_to_num(0) * step
    dense = restored.reshape(N, -1)[:, :K]
    given = None if bias is None else torch.from_numpy(np.asarray(bias))
    return torch.nn.functional.linear(torch.from_numpy(x), dense, given).numpy()


@oracle("quant.weight_only_nf4")
def nf4_weights_in_scalars(
    x: Any, weight: Any, /, *, bias: Any = None, block_size: int = 64, scale_block_size: int = 256
) -> Any:
    """Feature by feature: a block of weights of an output feature, its absmax from a code of its own."""
    (M, K), N = x.shape, weight.shape[1]
    flat = [float(weight[k, n]) for n in range(N) for k in range(K)]
    out = np.zeros((M, N)) + (0.0 if bias is None else np.asarray(bias))
    if not flat:
        return out
    codes, absmax = _nf4_blocks(flat, block_size)
    indices, scales, (offset,) = double_number_by_number(np.array(absmax), block_size=scale_block_size)
    levels = [float(np.float32(level)) for level in _dynamic_map()]
    restored = [levels[int(i)] * scales[b // scale_block_size] + offset for b, i in enumerate(indices)]
    for n in range(N):
        row = [NF4[codes[n * K + k]] * restored[(n * K + k) // block_size] for k in range(K)]
        for m in range(M):
            terms = [float(x[m, k]) * row[k] for k in range(K)]
            out[m, n] = math.fsum([*terms, out[m, n]])
    return out
