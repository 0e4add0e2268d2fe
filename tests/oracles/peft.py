"""Oracles of fine-tuning: the peft library, scikit-learn, loops over tokens and modules."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library, moe

GELU_CUBIC = 0.044715


@oracle("peft.full")
def full_by_loops(x: Any, delta: Any, weight: Any, /) -> Any:
    out = np.zeros((len(x), weight.shape[1]))
    for t in range(out.shape[0]):
        for n in range(out.shape[1]):
            out[t, n] = math.fsum(x[t, k] * (weight[k, n] + delta[k, n]) for k in range(len(weight)))
    return out


def _peft_layer(weight: Any, a: Any, b: Any, alpha: float) -> Any:
    """Return a layer of the peft library that holds these numbers; its matrices are our transposes."""
    torch = library("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = library("peft")
    base = torch.nn.Linear(*weight.shape, bias=False, dtype=torch.float64)
    base.weight.data = torch.from_numpy(weight.T.copy())
    config = peft.LoraConfig(r=a.shape[1], lora_alpha=alpha, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.from_numpy(a.T.copy())
    layer.lora_B["default"].weight.data = torch.from_numpy(b.T.copy())
    return model, torch


@oracle("peft.lora")
def peft_library(
    x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: float, dropout_mask: Any = None
) -> Any:
    if dropout_mask is not None or not a.shape[1] or not weight.size:
        raise NotImplementedError("a given dropout mask, or no rank")
    model, torch = _peft_layer(weight, a, b, lora_alpha)
    return model(torch.from_numpy(x)).detach().numpy()


@oracle("peft.lora.merge")
def peft_library_merged(a: Any, b: Any, weight: Any, /, *, lora_alpha: float) -> Any:
    if not a.shape[1] or not weight.size:
        raise NotImplementedError("no rank")
    model, _ = _peft_layer(weight, a, b, lora_alpha)
    return model.merge_and_unload()[0].weight.detach().numpy().T


@oracle("peft.lora")
def dense_update(
    x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: float, dropout_mask: Any = None
) -> Any:
    branch = x if dropout_mask is None else x * dropout_mask
    return x @ weight + (lora_alpha / max(a.shape[1], 1)) * (branch @ (a @ b))


@oracle("peft.lora.merge")
def merge_by_loops(a: Any, b: Any, weight: Any, /, *, lora_alpha: float) -> Any:
    out = weight.copy()
    for r in range(a.shape[1]):
        out += lora_alpha / a.shape[1] * np.outer(a[:, r], b[r])
    return out


@oracle("peft.lora.embedding")
def embedding_token_by_token(a: Any, b: Any, table: Any, tokens: Any, /, *, lora_alpha: float) -> Any:
    rows = [
        [
            table[token, m] + lora_alpha / max(a.shape[1], 1) * math.fsum(a[token] * b[:, m])
            for m in range(table.shape[1])
        ]
        for token in tokens
    ]
    return np.array(rows).reshape(len(tokens), table.shape[1])


@oracle("peft.lora.fused")
def fused_part_by_part(x: Any, a: Any, b: Any, weight: Any, /, *, enabled: Any, lora_alpha: float) -> Any:
    out, adapted, N = x @ weight, 0, weight.shape[1] // len(enabled)
    for part, on in enumerate(enabled):
        if on:
            columns = slice(part * N, (part + 1) * N)
            out[:, columns] += lora_alpha / a.shape[2] * (x @ (a[adapted] @ b[adapted]))
            adapted += 1
    return out


def _activate(name: str, z: float) -> float:
    if name == "relu":
        return max(z, 0.0)
    if name == "gelu":
        return 0.5 * z * (1 + math.erf(z / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + GELU_CUBIC * z**3)))
    return z / (1 + math.exp(-(1.702 if name == "gelu_sigmoid" else 1.0) * z))


@oracle("peft.adapter")
def adapter_by_loops(x: Any, w_down: Any, b_down: Any, w_up: Any, b_up: Any, /, *, activation: str) -> Any:
    out = np.zeros(x.shape)
    for t, token in enumerate(x):
        hidden = [
            _activate(activation, math.fsum(token * w_down[:, j]) + b_down[j]) for j in range(len(b_down))
        ]
        for d in range(x.shape[1]):
            out[t, d] = token[d] + math.fsum(h * w_up[j, d] for j, h in enumerate(hidden)) + b_up[d]
    return out


@oracle("peft.prefix")
def prefix_query_by_query(q: Any, k: Any, v: Any, prefix_k: Any, prefix_v: Any, /, *, causal: Any) -> Any:
    B, Tq, H, D = q.shape
    Tk, group = k.shape[1], H // k.shape[2]
    shift = {"top_left": 0, "bottom_right": Tk - Tq}.get(causal, Tk)
    out = np.zeros((B, Tq, H, v.shape[3]))
    for b in range(B):
        for h in range(H):
            for i in range(Tq):
                seen = range(Tk) if causal is False else range(max(0, min(Tk, i + shift + 1)))
                pairs = [(prefix_k[p, h // group], prefix_v[p, h // group]) for p in range(len(prefix_k))]
                pairs += [(k[b, j, h // group], v[b, j, h // group]) for j in seen]
                if not pairs:
                    continue
                scores = [float(q[b, i, h] @ key) / math.sqrt(D) for key, _ in pairs]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                out[b, i, h] = sum(w * value for w, (_, value) in zip(weights, pairs, strict=True))
                out[b, i, h] /= sum(weights)
    return out


@oracle("peft.prefix")
def torch_past_keys(q: Any, k: Any, v: Any, prefix_k: Any, prefix_v: Any, /, *, causal: Any) -> Any:
    """The prefix as keys and values of the past, under a mask made apart, by PyTorch's attention."""
    torch = library("torch")
    B, Tq, _, _ = q.shape
    P, Tk = len(prefix_k), k.shape[1]
    if not q.size or not P + Tk or (causal == "bottom_right" and Tk < Tq and not P):
        raise NotImplementedError("a row without keys")
    whole_k, whole_v = (
        np.concatenate([np.stack([head] * B), text], axis=1) for head, text in ((prefix_k, k), (prefix_v, v))
    )
    mask = np.ones((Tq, P + Tk), bool)
    for i in range(Tq):
        for j in range(Tk):
            if causal is not False:
                mask[i, P + j] = j <= i + (Tk - Tq if causal == "bottom_right" else 0)
    arrays = (torch.from_numpy(np.ascontiguousarray(x)).transpose(1, 2) for x in (q, whole_k, whole_v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *arrays, attn_mask=torch.from_numpy(mask), enable_gqa=True
    )
    return out.transpose(1, 2).numpy()


@oracle("peft.prefix.reparametrized")
def network_by_loops(e: Any, w_1: Any, b_1: Any, w_2: Any, b_2: Any, /) -> Any:
    out = np.zeros((len(e), len(b_2)))
    for p, row in enumerate(e):
        hidden = [math.tanh(math.fsum(row * w_1[:, j]) + b_1[j]) for j in range(len(b_1))]
        for n in range(len(b_2)):
            out[p, n] = math.fsum(h * w_2[j, n] for j, h in enumerate(hidden)) + b_2[n]
    return out


@oracle("peft.soft_prompt")
def prompt_by_loops(prompt: Any, embedded: Any, /) -> Any:
    B, T, M = embedded.shape
    out = np.full((B, len(prompt) + T, M), np.nan)
    for b in range(B):
        for position in range(out.shape[1]):
            text = position - len(prompt)
            out[b, position] = prompt[position] if text < 0 else embedded[b, text]
    return out


@oracle("peft.composition")
def updates_one_by_one(weights: Any, a: Any, b: Any, /) -> Any:
    total = np.zeros((a.shape[1], b.shape[2]))
    for w, left, right in zip(weights, a, b, strict=True):
        for r in range(a.shape[2]):
            total += w * np.outer(left[:, r], right[r])
    return total


def _peft_weighted(weights: Any, a: Any, b: Any, combination: str) -> Any:
    """Return the update of several adapters put together by the peft library."""
    if not weights.size or not a.shape[2] or not a.shape[1] or not b.shape[2] or np.any(weights <= 0):
        raise NotImplementedError("no modules, or weights that are not above 0")
    torch, size = library("torch"), a.shape[2]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # new adapters are made in the default format
    try:
        model, _ = _peft_layer(np.zeros((a.shape[1], b.shape[2])), a[0], b[0], size)
        layer, names = model.base_model.model[0], ["default"]
        config = library("peft").LoraConfig(r=size, lora_alpha=size, target_modules=["0"])
        for left, right in zip(a[1:], b[1:], strict=True):
            names.append(f"other{len(names)}")
            model.add_adapter(names[-1], config)
            layer.lora_A[names[-1]].weight.data = torch.from_numpy(left.T.copy())
            layer.lora_B[names[-1]].weight.data = torch.from_numpy(right.T.copy())
        model.add_weighted_adapter(names, weights.tolist(), "all", combination_type=combination)
        return layer.get_delta_weight("all").detach().numpy().T
    finally:
        torch.set_default_dtype(usual)


@oracle("peft.composition")
def peft_library_cat(weights: Any, a: Any, b: Any, /) -> Any:
    """Adapters put together by the peft library's ``combination_type="cat"``."""
    return _peft_weighted(weights, a, b, "cat")


@oracle("peft.composition.lorahub")
def peft_library_linear(weights: Any, a: Any, b: Any, /) -> Any:
    """Its ``combination_type="linear"`` sums the factors times the *roots* of the weights."""
    if np.any(weights <= 0):
        raise NotImplementedError("weights that are not above 0")
    return _peft_weighted(weights**2, a, b, "linear")


@oracle("peft.composition.lorahub")
def all_cross_terms(weights: Any, a: Any, b: Any, /) -> Any:
    total = np.zeros((a.shape[1], b.shape[2]))
    for i, wi in enumerate(weights):
        for j, wj in enumerate(weights):
            total += wi * wj * (a[i] @ b[j])
    return total


@oracle("peft.composition.gated")
def gated_token_by_token(x: Any, gates: Any, a: Any, b: Any, weight: Any, /) -> Any:
    rows = []
    for token, shares in zip(x, gates, strict=True):
        merged = weight + sum((g * (a[i] @ b[i]) for i, g in enumerate(shares)), np.zeros_like(weight))
        rows.append(token @ merged)
    return np.array(rows).reshape(len(x), weight.shape[1])


@oracle("peft.composition.fusion")
def fusion_token_by_token(x: Any, adapted: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    out = np.zeros(x.shape)
    for t in range(len(x)):
        scores = [float((x[t] @ w_q) @ (z[t] @ w_k)) for z in adapted]
        if scores:
            weights = [math.exp(score - max(scores)) for score in scores]
            out[t] = sum(w * (z[t] @ w_v) for w, z in zip(weights, adapted, strict=True)) / sum(weights)
    return out


@oracle("peft.retrieval")
def sklearn_neighbors(query: Any, keys: Any, /, *, k: int, excluded: Any = None) -> Any:
    neighbors = library("sklearn.neighbors")
    allowed = np.flatnonzero(~excluded) if excluded is not None else np.arange(len(keys))
    if k == 0 or len(np.unique(keys[allowed], axis=0)) < len(allowed):
        raise NotImplementedError("ties, or nothing to find")
    search = neighbors.NearestNeighbors(n_neighbors=k, metric="cosine").fit(keys[allowed])
    distances, found = search.kneighbors(query[None])
    return allowed[found[0]], 1 - distances[0]


@oracle("peft.retrieval")
def cosines_by_loops(query: Any, keys: Any, /, *, k: int, excluded: Any = None) -> Any:
    def cosine(key: Any) -> float:
        lengths = math.hypot(*key) * math.hypot(*query)
        return math.fsum(key * query) / lengths if lengths else 0.0

    allowed = [i for i in range(len(keys)) if excluded is None or not excluded[i]]
    same = {i: min(j for j in allowed if np.array_equal(keys[i], keys[j])) for i in allowed}
    scores = {i: cosine(keys[same[i]]) for i in allowed}  # equal keys have equal cosines to the last bit
    best = sorted(allowed, key=lambda i: (-scores[i], i))[:k]
    return np.array(best, np.int64), np.array([scores[i] for i in best])


@oracle("peft.expert_tuning")
def tuned_experts_by_loops(
    x: Any, delta_in: Any, delta_out: Any, w_router: Any, w_in: Any, w_out: Any, /, *, trained: Any, k: int,
    convention: str, router_bias: Any = None, w_gate: Any = None, delta_gate: Any = None, activation: str,
) -> Any:  # fmt: skip
    """Token by token over the open experts alone."""
    E, y = w_router.shape[1], np.zeros(x.shape)
    is_open = [e for e in range(E) if router_bias is None or router_bias[e] > -math.inf]
    after = []
    for w, delta in ((w_in, delta_in), (w_out, delta_out), (w_gate, delta_gate)):
        whole = None if w is None else np.array(w, np.float64)
        for e in range(E):
            if whole is not None and delta is not None and trained[e]:
                whole[e] = w[e] + delta[e]
        after.append(whole)
    for t, row in enumerate(x):
        z = moe.logits_of(row, w_router)
        z = [z[e] + (0.0 if router_bias is None else float(router_bias[e])) for e in is_open]
        chosen = moe.best(z, min(k, len(z)))
        shares = moe.softmax(z)
        kept = [shares[e] for e in chosen]
        if convention != "switch":
            kept = moe.softmax([z[e] for e in chosen])
        for e, share in zip(chosen, kept, strict=True):
            out = moe.expert(row, is_open[e], after[0], after[1], activation=activation, w_gate=after[2])
            y[t] += share * out
    return y
