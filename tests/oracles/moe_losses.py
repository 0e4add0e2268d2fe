"""Oracles of routers' losses: transformers, SciPy, scikit-learn, PyTorch, and loops over tokens."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def squared_variation(amounts: list[float], kind: str) -> float:
    """The squared coefficient of variation, through SciPy, or the standard library where 1e-10 is added."""
    if len(amounts) == 1 or not math.fsum(amounts):
        return 0.0
    if kind == "shazeer":
        return float(library("scipy.stats").variation(amounts) ** 2)
    spread = statistics.variance(amounts) if kind == "davidmrau" else statistics.pvariance(amounts)
    return spread / (statistics.fmean(amounts) ** 2 + 1e-10)


@oracle("moe.importance_loss")
def scipy_variation(gates: Any, /, *, variation: str) -> Any:
    """scipy.stats.variation of importances added one token at a time."""
    return squared_variation([math.fsum(column) for column in gates.T], variation)


@oracle("moe.load_loss")
def scipy_normal(clean: Any, noisy: Any, noise_std: Any, /, *, k: int, threshold: str, variation: str) -> Any:
    """scipy.stats.norm, with the k-th of the other noisy logits sorted out for each expert of each token."""
    norm, (T, E) = library("scipy.stats").norm, clean.shape
    loads = [0.0] * E
    for t in range(T):
        for e in range(E):
            rivals = sorted(
                (float(h) for j, h in enumerate(noisy[t]) if j != e or threshold == "vmoe"), reverse=True
            )
            if len(rivals) < k:
                loads[e] += 1.0
            else:
                loads[e] += float(norm.cdf(clean[t, e], loc=rivals[k - 1], scale=noise_std[t, e]))
    return squared_variation(loads, variation)


def balance(probabilities: Any, selected: Any, tokens: list[int], normalization: str) -> float:
    """One group's loss, counted token by token."""
    if not tokens:
        return 0.0
    E = probabilities.shape[1]
    hits = Counter(
        int(e) for t in tokens for e in (selected[t] if normalization == "flaxformer" else selected[t][:1])
    )
    means = [math.fsum(probabilities[t, e] for t in tokens) / len(tokens) for e in range(E)]
    total = math.fsum(hits[e] / len(tokens) * means[e] for e in range(E))
    return total / E if normalization == "gshard" else total * E


@oracle("moe.balance_loss")
def counted_by_hand(
    probabilities: Any, selected: Any, /, *, normalization: str, groups: int = 1, counted: Any = None
) -> Any:
    """Dictionaries of counts."""
    size = len(probabilities) // groups
    rows = [
        [t for t in range(g * size, (g + 1) * size) if counted is None or counted[t]] for g in range(groups)
    ]
    return statistics.fmean(balance(probabilities, selected, tokens, normalization) for tokens in rows)


@oracle("moe.balance_loss")
def transformers_switch(
    probabilities: Any, selected: Any, /, *, normalization: str, groups: int = 1, counted: Any = None
) -> Any:
    """load_balancing_loss_func of transformers' Switch, which was taken over from flaxformer."""
    T, E = probabilities.shape
    size = T // groups
    # It casts the shares of tokens to float32, which is exact for sizes that are powers of two.
    if counted is not None or size not in (1, 2, 4):
        raise NotImplementedError("it knows no padding, and other shares are rounded to float32")
    torch = library("torch")
    switch = library("transformers.models.switch_transformers.modeling_switch_transformers")
    K = selected.shape[1] if normalization == "flaxformer" else 1
    found = switch.load_balancing_loss_func(
        torch.tensor(probabilities, dtype=torch.float64).reshape(groups, size, E),
        torch.tensor(selected[:, :K].copy()).reshape(groups, size, K),
    )
    return float(found) / (E**2 if normalization == "gshard" else 1)


@oracle("moe.device_balance_loss.expert")
def counted_experts(scores: Any, selected: Any, /) -> Any:
    """Equations 12 to 14 in fractions."""
    T, E = scores.shape
    chosen = Counter(int(e) for row in selected for e in row)
    return float(
        sum(
            Fraction(E * chosen[e], selected.size) * sum(map(Fraction, scores[:, e].tolist())) / T
            for e in range(E)
            if T
        )
    )


@oracle("moe.device_balance_loss")
def counted_devices(scores: Any, selected: Any, /, *, device_of: Any) -> Any:
    """Equations 15 to 17 in fractions, device by device."""
    T, E = scores.shape
    chosen, total = Counter(int(e) for row in selected for e in row), Fraction(0)
    for device in set(device_of.tolist()) if T else ():
        here = [e for e in range(E) if device_of[e] == device]
        f = sum(Fraction(E * chosen[e], selected.size) for e in here) / len(here)
        total += f * sum(Fraction(float(scores[t, e])) for t in range(T) for e in here) / T
    return float(total)


@oracle("moe.device_balance_loss.communication")
def counted_messages(scores: Any, selected: Any, /, *, device_of: Any, device_limit: int) -> Any:
    """Sets of (token, device), one message each."""
    T, E = scores.shape
    messages = Counter(device for t in range(T) for device in {int(device_of[e]) for e in selected[t]})
    devices, total = set(device_of.tolist()), Fraction(0)
    for device in devices if T else ():
        mean = (
            sum(Fraction(float(scores[t, e])) for t in range(T) for e in range(E) if device_of[e] == device)
            / T
        )
        total += Fraction(len(devices) * messages[device], device_limit * T) * mean
    return float(total)


@oracle("moe.z_loss")
def scipy_logsumexp(logits: Any, /, *, counted: Any = None, padding: str) -> Any:
    """scipy.special.logsumexp, one token at a time."""
    special, E = library("scipy.special"), logits.shape[1]
    squares = []
    for t in range(len(logits)):
        if counted is None or counted[t]:
            squares.append(float(special.logsumexp(logits[t])) ** 2)
        elif padding == "flaxformer":
            squares.append(math.log(E) ** 2)
    return statistics.fmean(squares) if squares else 0.0


@oracle("moe.z_loss")
def transformers_z_loss(logits: Any, /, *, counted: Any = None, padding: str) -> Any:
    """router_z_loss_func of transformers' Switch."""
    if counted is not None or not len(logits):
        raise NotImplementedError("it knows no padding")
    torch = library("torch")
    switch = library("transformers.models.switch_transformers.modeling_switch_transformers")
    return float(switch.router_z_loss_func(torch.tensor(logits, dtype=torch.float64)[None]))


@oracle("moe.mutual_information_loss")
def torch_entropies(logits: Any, /, *, marginal: str) -> Any:
    """Difference of two entropies of torch.distributions, as ModuleFormer has it but for the 1e-8."""
    if marginal != "exact":
        raise NotImplementedError("torch.distributions add nothing inside the logarithm")
    if not len(logits):
        return 0.0
    torch = library("torch")
    gates = torch.distributions.Categorical(logits=torch.tensor(logits, dtype=torch.float64))
    mean = torch.distributions.Categorical(probs=gates.probs.mean(dim=0))
    return float(gates.entropy().mean() - mean.entropy())


@oracle("moe.mutual_information_loss")
def entropies_by_hand(logits: Any, /, *, marginal: str) -> Any:
    """A loop over tokens and experts with the standard library."""
    T, E = logits.shape
    added = 1e-8 if marginal == "moduleformer" else 0.0
    gates = []
    for row in logits.tolist():
        powers = [math.exp(z - max(row)) for z in row]
        gates.append([power / math.fsum(powers) for power in powers])
    means = [math.fsum(gate[e] for gate in gates) / T for e in range(E)] if T else [0.0] * E
    joint = math.fsum(p * math.log(p) for gate in gates for p in gate if p) / max(T, 1)
    return math.fsum(p * math.log(p + added) for p in means if p) - joint


@oracle("moe.mutual_information_loss.tasks")
def sklearn_contingency(logits: Any, tasks: Any, /, *, task_weights: str) -> Any:
    """sklearn.metrics.mutual_info_score of counts: gates that are sure of their experts."""
    metrics, special = library("sklearn.metrics"), library("scipy.special")
    gates = special.softmax(logits, axis=1)
    if not len(tasks) or np.any(np.abs(gates - np.rint(gates)) > 1e-17):
        raise NotImplementedError("scikit-learn wants whole counts")
    known, counts = np.unique(tasks, return_counts=True)
    table = np.array([np.rint(gates[tasks == task]).sum(axis=0) for task in known]).astype(np.int64)
    if task_weights == "equal":
        table *= (math.lcm(*counts.tolist()) // counts)[:, None]
    return -float(metrics.mutual_info_score(None, None, contingency=table))


@oracle("moe.mutual_information_loss.tasks")
def scipy_relative_entropy(logits: Any, tasks: Any, /, *, task_weights: str) -> Any:
    """scipy.special.rel_entr of P(T, E) and of the product of its margins."""
    special, total = library("scipy.special"), 0.0
    gates, known = special.softmax(logits, axis=1), sorted(set(tasks.tolist()))
    rows = {task: gates[tasks == task] for task in known}
    weight = {
        task: len(rows[task]) / len(tasks) if task_weights == "frequency" else 1 / len(known)
        for task in known
    }
    of_expert = sum((weight[task] * rows[task].mean(axis=0) for task in known), np.zeros(logits.shape[1]))
    for task in known:
        total += float(
            special.rel_entr(weight[task] * rows[task].mean(axis=0), weight[task] * of_expert).sum()
        )
    return -total


@oracle("moe.balance_loss.skywork")
def in_fractions(gates: Any, /) -> Any:
    """Exact sums of the gates as they are."""
    T, E = gates.shape
    means = [sum(map(Fraction, column.tolist()), Fraction(0)) / T for column in gates.T] if T else []
    return float(sum((Fraction(1, E) - mean) ** 2 for mean in means))


@oracle("moe.logit_normalization")
def torch_layer_norm(logits: Any, /, *, temperature: float) -> Any:
    """PyTorch's layer_norm without an epsilon."""
    if np.any(np.all(logits == logits[:, :1], axis=1)) or not logits.size:
        raise NotImplementedError("layer_norm divides by 0")
    torch = library("torch")
    x = torch.tensor(logits, dtype=torch.float64)
    return temperature * torch.nn.functional.layer_norm(x, x.shape[1:], eps=0.0).numpy()


@oracle("moe.logit_normalization")
def statistics_z_score(logits: Any, /, *, temperature: float) -> Any:
    """statistics.pstdev of each token."""
    found = np.zeros(logits.shape)
    for t, row in enumerate(logits.tolist()):
        mean, deviation = statistics.fmean(row), statistics.pstdev(row)
        for e, z in enumerate(row):
            found[t, e] = temperature * (z - mean) / deviation if deviation else 0.0
    return found


@oracle("moe.adaptive_coefficient")
def one_layer_at_a_time(coefficient: Any, drop_rate: Any, /) -> Any:
    """Exact fractions of Skywork-MoE's own settings."""
    pairs = zip(coefficient.tolist(), drop_rate.tolist(), strict=True)
    return np.array(
        [float(Fraction(99, 100) * Fraction(a) + Fraction(1, 100) * min(Fraction(d) / 5, Fraction(1, 100)))
         for a, d in pairs]
    )  # fmt: skip


@oracle("moe.loss_coefficients")
def as_read_in_the_reports(*, model: str) -> Any:
    """The numbers again, in the order importance, load, balance, expert, device, communication, z."""
    return {
        "shazeer": (0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0),
        "v-moe": (0.005, 0.005, 0.0, 0.0, 0.0, 0.0, 0.0),
        "switch-transformer": (0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.0),
        "st-moe": (0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.001),
        "deepseekmoe-2b": (0.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0),
        "deepseekmoe-16b": (0.0, 0.0, 0.0, 0.001, 0.0, 0.0, 0.0),
        "deepseekmoe-145b": (0.0, 0.0, 0.0, 0.003, 0.05, 0.0, 0.0),
        "deepseek-v2": (0.0, 0.0, 0.0, 0.003, 0.05, 0.02, 0.0),
    }[model]
