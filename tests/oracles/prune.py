"""Oracles of pruning: brute force, PyTorch's prune, scipy's distributions, loops over units and domains."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


@oracle("prune.constrained")
def every_subset(weights: Any, hessian: Any, /, *, keep: int) -> Any:
    """Evaluate the loss of every choice; of equal ones take the first in lexicographic order."""
    n, best, chosen = len(weights), math.inf, ()
    for subset in itertools.combinations(range(n), keep):
        removed = [i for i in range(n) if i not in subset]
        loss = math.fsum(0.5 * hessian[i] * weights[i] ** 2 for i in removed)
        if loss < best:
            best, chosen = loss, subset
    return np.isin(np.arange(n), chosen)


@oracle("prune.magnitude")
def sorted_by_hand(weights: Any, /, *, keep: int) -> Any:
    flat = [abs(float(w)) for w in weights.reshape(-1)]
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    return np.isin(np.arange(len(flat)), order[:keep]).reshape(weights.shape)


@oracle("prune.magnitude")
def torch_l1_unstructured(weights: Any, /, *, keep: int) -> Any:
    torch = library("torch")
    prune = library("torch.nn.utils.prune")
    if len(np.unique(np.abs(weights))) < weights.size or not weights.size:
        raise NotImplementedError("ties, whose order PyTorch leaves open")
    layer = torch.nn.Linear(weights.shape[1], weights.shape[0], dtype=torch.float64)
    layer.weight.data = torch.from_numpy(weights.copy())
    prune.global_unstructured(
        [(layer, "weight")], pruning_method=prune.L1Unstructured, amount=weights.size - keep
    )
    return layer.weight_mask.numpy().astype(bool)


@oracle("prune.magnitude.n_m")
def group_by_group(weights: Any, /, *, n: int, m: int) -> Any:
    mask = np.zeros(weights.shape, bool)
    for row in range(len(weights)):
        for start in range(0, weights.shape[1], m):
            places = sorted(range(start, start + m), key=lambda i: (-abs(weights[row, i]), i))
            mask[row, places[:n]] = True
    return mask


@oracle("prune.structured")
def loop_over_kept_units(
    x: Any, w_1: Any, w_2: Any, keep: Any, /, *, b_1: Any = None, b_2: Any = None
) -> Any:
    out = np.zeros((len(x), w_2.shape[1])) if b_2 is None else np.tile(b_2, (len(x), 1))
    for unit in np.flatnonzero(keep):
        hidden = x @ w_1[:, unit] + (0.0 if b_1 is None else b_1[unit])
        out = out + np.outer(np.maximum(hidden, 0), w_2[unit])
    return out


@oracle("prune.structured.heads")
def loop_over_kept_heads(
    x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, keep: Any, /, *, causal: bool
) -> Any:
    D = w_o.shape[0] // len(keep)
    out = np.zeros(x.shape)
    for head in np.flatnonzero(keep):
        part = slice(head * D, (head + 1) * D)
        for b, tokens in enumerate(x):
            q, k, v = (tokens @ w[:, part] for w in (w_q, w_k, w_v))
            for i in range(len(tokens)):
                seen = slice(0, i + 1 if causal else len(tokens))
                scores = k[seen] @ q[i] / math.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[b, i] += weights @ v[seen] / weights.sum() @ w_o[part]
    return out


@oracle("prune.structured.width")
def loop_over_kept_features(x: Any, gamma: Any, weight: Any, keep: Any, /) -> Any:
    places = np.flatnonzero(keep)
    out = np.zeros((len(x), weight.shape[1]))
    for t, row in enumerate(x):
        mean = math.fsum(row[i] ** 2 for i in places) / len(places)
        for n in range(weight.shape[1]):
            out[t, n] = math.fsum(row[i] / math.sqrt(mean + 1e-6) * gamma[i] * weight[i, n] for i in places)
    return out


def _clamped(log_alpha: float, convention: str) -> float:
    limit = math.log(100)
    return max(-limit, min(limit, log_alpha)) if convention == "released" else log_alpha


@oracle("prune.hard_concrete")
def stretched_by_scipy(log_alpha: Any, u: Any, /, *, convention: str) -> Any:
    """The concrete number is a logistic distribution's quantile function, seen through a sigmoid."""
    from scipy.special import expit
    from scipy.stats import logistic

    masks = []
    for location, draw in zip(log_alpha, u, strict=True):
        if convention == "released":
            draw = max(1e-6, min(1 - 1e-6, draw))
        noise = logistic.ppf(draw, loc=_clamped(location, convention))
        masks.append(min(1.0, max(0.0, float(expit(noise * 1.5)) * 1.2 - 0.1)))
    return np.array(masks)


@oracle("prune.hard_concrete.open")
def open_by_quadrature(log_alpha: Any, /, *, convention: str) -> Any:
    """One minus the logistic distribution's mass below the draw at which the mask closes."""
    from scipy.special import logit
    from scipy.stats import logistic

    edge = float(logit(0.1 / 1.2)) * 2 / 3
    open_ = np.array([logistic.sf(edge, loc=_clamped(location, convention)) for location in log_alpha])
    return np.clip(open_, 1e-6, 1 - 1e-6) if convention == "released" else open_


@oracle("prune.target_structure")
def penalty_by_kind(sparsity: Any, first: Any, second: Any, /, *, target: Any) -> Any:
    return np.array([
        a * (s - t) + b * (s - t) * (s - t)
        for s, a, b, t in zip(sparsity, first, second, target, strict=True)
    ]).reshape(len(sparsity))  # fmt: skip


@oracle("prune.dynamic_batch_loading")
def shares_by_scipy(weights: Any, loss: Any, reference: Any, /) -> Any:
    from scipy.special import softmax

    return softmax(np.log(weights) + np.clip(loss - reference, 0, None))


@oracle("prune.dynamic_batch_loading.released")
def shares_mixed(weights: Any, loss: Any, reference: Any, /) -> Any:
    raised = [w * math.exp(a - b) for w, a, b in zip(weights, loss, reference, strict=True)]
    total = math.fsum(raised)
    return np.array([0.9999 * r / total + 0.0001 / len(raised) for r in raised])
