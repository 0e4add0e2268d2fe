"""Oracles of distillation: PyTorch's losses and autograd, full enumeration, loops over words."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


@oracle("distill.soft_targets")
def torch_kl_div(student: Any, teacher: Any, labels: Any, /, *, temperature: float, weight: float) -> Any:
    torch = library("torch")
    if not len(labels):
        raise NotImplementedError("no positions")
    F, T = torch.nn.functional, temperature
    s, t = torch.from_numpy(student), torch.from_numpy(teacher)
    soft = F.kl_div(F.log_softmax(s / T, 1), F.log_softmax(t / T, 1), reduction="batchmean", log_target=True)
    hard = F.cross_entropy(s, torch.from_numpy(labels))
    return np.asarray(((1 - weight) * hard + weight * T * T * soft).item())


def _softmax(row: Any, T: float = 1.0) -> list[float]:
    top = max(row)
    raised = [math.exp((z - top) / T) for z in row]
    return [r / math.fsum(raised) for r in raised]


@oracle("distill.soft_targets")
def class_by_class(student: Any, teacher: Any, labels: Any, /, *, temperature: float, weight: float) -> Any:
    if np.abs(student).max(initial=0) > 100 or not len(labels):
        raise NotImplementedError("probabilities too small for a logarithm")
    total = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        p_t, p_s = _softmax(t, temperature), _softmax(s, temperature)
        soft = math.fsum(a * math.log(a / b) for a, b in zip(p_t, p_s, strict=True))
        total.append(-(1 - weight) * math.log(_softmax(s)[label]) + weight * temperature**2 * soft)
    return np.asarray(math.fsum(total) / len(total))


@oracle("distill.tinybert")
def torch_mse(
    scores_s: Any, scores_t: Any, hidden_s: Any, hidden_t: Any, w: Any, /, *, convention: str
) -> Any:
    torch = library("torch")
    mse = torch.nn.MSELoss()
    pairs = [torch.from_numpy(np.ascontiguousarray(x)) for x in (scores_s, scores_t)]
    if convention == "released":
        pairs = [torch.where(x <= -1e2, torch.zeros_like(x), x) for x in pairs]
    loss = mse(*pairs).item() if scores_s.size else 0.0
    if hidden_t.size:
        dense = torch.nn.Linear(*w.shape, bias=False, dtype=torch.float64)
        dense.weight.data = torch.from_numpy(w.T.copy())
        loss += mse(dense(torch.from_numpy(hidden_s)), torch.from_numpy(hidden_t)).item()
    return np.asarray(loss)


@oracle("distill.tinybert.prediction")
def torch_soft_cross_entropy(student: Any, teacher: Any, /, *, temperature: float, convention: str) -> Any:
    torch = library("torch")
    if not student.size:
        raise NotImplementedError("no examples")
    s, t = torch.from_numpy(student) / temperature, torch.from_numpy(teacher) / temperature
    if convention == "paper":
        return np.asarray(torch.nn.functional.cross_entropy(s, t.softmax(1)).item())
    return np.asarray((-t.softmax(-1) * s.log_softmax(-1)).mean().item())


@oracle("distill.sequence_level")
def torch_ignore_index(student: Any, tokens: Any, written: Any, /) -> Any:
    torch = library("torch")
    labels = np.where(written, tokens, -100)[:, 1:]
    if not (labels >= 0).any():
        raise NotImplementedError("nothing was written")
    logits = torch.from_numpy(student[:, :-1]).reshape(-1, student.shape[2])
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels.reshape(-1)), ignore_index=-100)
    return np.asarray(loss.item())


@oracle("distill.minillm.reverse_kl")
def kl_over_all_sequences(student: Any, teacher: Any, /) -> Any:
    V = student.shape[1]
    steps = {sum(V**t for t in range(n)): n for n in range(5)}[len(student)] if V > 1 else len(student)
    total = []
    for sequence in itertools.product(range(V), repeat=steps):
        log_q = log_p = 0.0
        row = 0
        for token in sequence:
            log_q += math.log(_softmax(student[row])[token])
            log_p += math.log(_softmax(teacher[row])[token])
            row = row * V + 1 + token
        total.append(math.exp(log_q) * (log_q - log_p))
    return np.asarray(math.fsum(total) if steps else 0.0)


@oracle("distill.minillm")
def torch_policy_gradient(
    student: Any, teacher: Any, tokens: Any, /, *, estimator: str, weights: Any = None
) -> Any:
    """Autograd of a surrogate loss whose rewards are constants."""
    torch = library("torch")
    if not student.size:
        raise NotImplementedError("nothing was sampled")
    n, T, _ = student.shape
    s = torch.from_numpy(student).requires_grad_()
    log_q, log_p = s.log_softmax(-1), torch.from_numpy(teacher).log_softmax(-1)
    picked = [x.gather(2, torch.from_numpy(tokens)[..., None])[..., 0] for x in (log_q, log_p)]
    rewards = (picked[1] - picked[0]).detach()
    share = torch.ones(n, T, dtype=torch.float64) if weights is None else torch.from_numpy(weights)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        for t in range(T):
            steps = [rewards[i, u] for u in range(t, T)]
            if estimator == "reinforce":
                term = -(sum(steps) - 1) * picked[0][i, t]
            else:
                later = sum(steps[1:], torch.zeros((), dtype=torch.float64))
                if estimator == "length_normalized" and len(steps) > 1:
                    later = later / (len(steps) - 1)
                term = -later * picked[0][i, t] + (log_q[i, t].exp() * (log_q[i, t] - log_p[i, t])).sum()
            loss = loss + share[i, t] * term / n
    loss.backward()
    return s.grad.numpy()


@oracle("distill.augmentation")
def word_by_word(
    tokens: Any, candidates: Any, u_replace: Any, u_choice: Any, /, *, probability: float
) -> Any:
    rows = [list(tokens)]
    for replace, choice in zip(u_replace, u_choice, strict=True):
        row = []
        for place, token in enumerate(tokens):
            words = [word for word in candidates[place] if word >= 0]
            if words and replace[place] < probability:
                token = words[int(choice[place] * len(words))]
            row.append(token)
        rows.append(row)
    return np.array(rows, np.int64).reshape(len(rows), len(tokens))
