"""Oracles of losses and metrics: PyTorch, SciPy, scikit-learn, scalar loops and enumeration."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library

IGNORED = -100


def _label_rows(tokens: Any, weights: Any, document_ids: Any) -> list[list[tuple[int, int, float]]]:
    """For every sequence: (position, label, weight) of each prediction, found one by one."""
    rows = []
    for b in range(tokens.shape[0]):
        found = []
        for t in range(tokens.shape[1] - 1):
            weight = 1.0 if weights is None else float(weights[b, t + 1])
            if document_ids is not None and document_ids[b, t] != document_ids[b, t + 1]:
                weight = 0.0
            found.append((t, int(tokens[b, t + 1]), weight))
        rows.append(found)
    return rows


def _reduce(costs: list[list[tuple[float, float]]], reduction: str) -> float:
    total = math.fsum(c * w for row in costs for c, w in row if w)
    if reduction == "sum":
        return total
    if reduction == "token":
        return total / (math.fsum(w for row in costs for _, w in row) or 1.0)
    means = [
        math.fsum(c * w for c, w in row if w) / math.fsum(w for _, w in row)
        for row in costs
        if any(w for _, w in row)
    ]
    return statistics.fmean(means) if means else 0.0


@oracle("objectives.next_token")
def scipy_next_token(
    logits: Any, tokens: Any, /, *, weights: Any = None, document_ids: Any = None, reduction: str = "token"
) -> Any:
    """scipy.special.logsumexp, one label at a time."""
    special = library("scipy.special")
    costs = [
        [(float(special.logsumexp(z[t])) - float(z[t, label]) if w else 0.0, w) for t, label, w in row]
        for z, row in zip(logits, _label_rows(tokens, weights, document_ids), strict=True)
    ]
    return _reduce(costs, reduction)


@oracle("objectives.instruction")
def scipy_instruction(
    logits: Any, tokens: Any, response: Any, /, *, document_ids: Any = None, reduction: str = "token"
) -> Any:
    """The same, for labels inside the response."""
    return scipy_next_token(logits, tokens, weights=response, document_ids=document_ids, reduction=reduction)


def torch_loss(logits: Any, labels: Any, reduction: str) -> tuple[float, Any]:
    """PyTorch's cross_entropy with ignore_index, and its gradient; labels are shifted already."""
    torch = library("torch")
    z = torch.tensor(np.asarray(logits, np.float64), requires_grad=True)
    flat = torch.nn.functional.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        torch.tensor(np.asarray(labels, np.int64).reshape(-1)),
        ignore_index=IGNORED,
        reduction="sum" if reduction == "sum" else "mean",
    )
    flat.backward()
    return float(flat.detach()), z.grad.numpy()


@oracle("objectives.instruction")
def torch_instruction(
    logits: Any, tokens: Any, response: Any, /, *, document_ids: Any = None, reduction: str = "token"
) -> Any:
    """Labels of -100 outside the response, as released training code has them."""
    if reduction == "sequence":
        raise NotImplementedError("cross_entropy has no mean of means")
    labels = np.full(tokens.shape, IGNORED)
    labels[:, :-1] = np.where(response, tokens, IGNORED)[:, 1:]
    if document_ids is not None:
        labels[:, :-1][document_ids[:, 1:] != document_ids[:, :-1]] = IGNORED
    if not np.any(labels != IGNORED):
        raise NotImplementedError("PyTorch's mean of nothing is NaN")
    return torch_loss(logits, labels, reduction)[0]


@oracle("objectives.bradley_terry")
def torch_bradley_terry(chosen: Any, rejected: Any, /, *, rankings: Any = None) -> Any:
    """PyTorch's logsigmoid, averaged ranking by ranking in Python."""
    torch = library("torch")
    margins = torch.tensor(np.asarray(chosen - rejected, np.float64))
    costs = (-torch.nn.functional.logsigmoid(margins)).tolist()
    groups: dict[int, list[float]] = {}
    for index, cost in enumerate(costs):
        groups.setdefault(index if rankings is None else int(rankings[index]), []).append(cost)
    means = [statistics.fmean(group) for group in groups.values()]
    return statistics.fmean(means) if means else 0.0


@oracle("objectives.metrics")
def metrics_in_bits(nats: Any, tokens: Any, n_bytes: Any, /) -> Any:
    """Through bits and powers of two, in exact sums."""
    bits = math.fsum(value / math.log(2) for value in nats)
    return 2 ** (bits / sum(map(int, tokens))), bits / sum(map(int, n_bytes))


@oracle("objectives.metrics.pass_at_k")
def enumerated_pass_at_k(correct: Any, samples: Any, /, *, k: int) -> Any:
    """Every choice of k samples, looked at one by one."""
    if any(math.comb(int(n), k) > 5000 for n in samples):
        raise NotImplementedError("too many choices to enumerate")
    found = []
    for c, n in zip(correct.tolist(), samples.tolist(), strict=True):
        choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
        found.append(sum(map(any, choices)) / len(choices))
    return np.array(found, np.float64)


@oracle("objectives.metrics.standard_error")
def statistics_standard_error(values: Any, /) -> Any:
    """The standard library's sample standard deviation."""
    return statistics.stdev(values.tolist()) / math.sqrt(len(values))
