"""Oracles of low rank: PyTorch over projected keys, scalar loops, sparse solvers of SciPy and sklearn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.sparse.linalg

from refimpl.registry import oracle
from tests.oracles import library


@oracle("attention.low_rank")
def torch_over_projected_keys(q: Any, k: Any, v: Any, e: Any, f: Any, **options: Any) -> Any:
    """PyTorch's attention, its keys and values multiplied by the projections before."""
    if 0 in (*q.shape, *k.shape, *e.shape):
        raise NotImplementedError
    torch = library("torch")
    mask = torch.from_numpy(options.get("key_mask", np.ones(k.shape[:2], bool)))[:, None, :, None]
    q, k, v = (torch.from_numpy(np.ascontiguousarray(x)).transpose(1, 2) for x in (q, k, v))
    keys, values = torch.from_numpy(e) @ (k * mask), torch.from_numpy(f) @ (v * mask)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, scale=options.get("scale"), enable_gqa=True
    )
    return out.transpose(1, 2).numpy()


@oracle("attention.low_rank")
def scalar_low_rank(q: Any, k: Any, v: Any, e: Any, f: Any, **options: Any) -> Any:
    """One number at a time: a projected key, a weight, a projected value."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    mask = options.get("key_mask", np.ones(k.shape[:2], bool))
    scale = options.get("scale", 1 / math.sqrt(q.shape[3]))

    def mixed(weights: Any, tokens: Any, b: int) -> list[float]:
        terms = [float(w) * float(x) for w, x, real in zip(weights, tokens, mask[b], strict=True) if real]
        return math.fsum(terms)

    for b, i, h in np.ndindex(q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        p = g if len(e) > 1 else 0
        scores = [
            scale * math.fsum(q[b, i, h, d] * mixed(e[p, r], k[b, :, g, d], b) for d in range(q.shape[3]))
            for r in range(e.shape[1])
        ]
        powers = [math.exp(score - max(scores)) for score in scores]
        for d in range(v.shape[3]):
            terms = [w * mixed(f[p, r], v[b, :, g, d], b) for r, w in enumerate(powers)]
            out[b, i, h, d] = math.fsum(terms) / math.fsum(powers) if powers else 0.0
    return out


def _upright(left: Any, right: Any) -> tuple[Any, Any]:
    for column in range(left.shape[1]):
        if left[abs(left[:, column]).argmax(), column] < 0:
            left[:, column] *= -1
            right[:, column] *= -1
    return left, right


@oracle("compress.truncated_svd")
def scipy_svds(x: Any, *, rank: int) -> Any:
    """ARPACK, which iterates on products with the matrix."""
    if not 0 < rank < min(x.shape) or abs(x).max() > 1e100:
        raise NotImplementedError("ARPACK finds fewer triplets than there are, of numbers it can square")
    u, values, v = scipy.sparse.linalg.svds(x, k=rank, v0=np.ones(min(x.shape)), solver="arpack")
    order = values.argsort()[::-1]
    root = np.sqrt(values[order])
    return _upright(u[:, order] * root, v[order].T * root)


@oracle("compress.truncated_svd")
def sklearn_truncated_svd(x: Any, *, rank: int) -> Any:
    """scikit-learn's transformer: scores U Σ, and components Vᵀ."""
    if not 0 < rank < min(x.shape) or abs(x).max() > 1e100:
        raise NotImplementedError
    model = library("sklearn.decomposition").TruncatedSVD(rank, algorithm="arpack", random_state=0)
    scores = model.fit_transform(x)
    root = np.sqrt(model.singular_values_)
    return _upright(scores / root, model.components_.T * root)
