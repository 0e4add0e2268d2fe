"""Oracles of encoder and decoder blocks: PyTorch's modules, and loops over tokens, heads and keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.transformer import activated, tensor

LAYER_NORM_EPS = 1e-5


def _load(module: Any, torch: Any, names: dict[str, tuple[str, ...]], given: dict[str, Any]) -> Any:
    """Return a torch module in float64 with the weights that `names` puts together."""
    module = module.double().eval()
    state = {}
    for name, parts in names.items():
        arrays = [given[part] for part in parts]
        state[name] = tensor(torch, np.concatenate([a.T if a.ndim == 2 else a for a in arrays], axis=0))
    module.load_state_dict(state)
    return module


def _attention_names(module: str, prefix: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{module}.in_proj_weight": tuple(f"{prefix}w_{n}" for n in "qkv"),
        f"{module}.in_proj_bias": tuple(f"{prefix}b_{n}" for n in "qkv"),
        f"{module}.out_proj.weight": (f"{prefix}w_o",),
        f"{module}.out_proj.bias": (f"{prefix}b_o",),
    }


FFN_NAMES = {
    "linear1.weight": ("w_1",), "linear1.bias": ("b_1",), "linear2.weight": ("w_2",), "linear2.bias": ("b_2",)
}  # fmt: skip


def _norm_names(**modules: str) -> dict[str, tuple[str, ...]]:
    names = {}
    for module, pattern in modules.items():
        names[f"{module}.weight"] = (pattern.format("gamma"),)
        names[f"{module}.bias"] = (pattern.format("beta"),)
    return names


def _torch_options(x: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments, or a refusal where torch's modules have another shape."""
    M, heads = x.shape[2], given["num_heads"]
    square = given["w_q"].shape[1] == M and given["w_k"].shape[1] == M
    if (
        given["norm"] != "layer_norm"
        or not square
        or "rope" in given
        or "alibi_slopes" in given
        or not x.size
    ):
        raise NotImplementedError("torch's block: LayerNorm, H D = M, no grouped heads, no positions")
    torch = library("torch")
    activation = {
        "relu": torch.nn.functional.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[given["activation"]]
    return {
        "d_model": M, "nhead": heads, "dim_feedforward": given["w_1"].shape[1], "dropout": 0.0,
        "activation": activation, "layer_norm_eps": given.get("eps", LAYER_NORM_EPS), "batch_first": True,
        "norm_first": given["order"] == "pre",
    }  # fmt: skip


def _visible(mask: Any) -> Any:
    """Which keys can be seen, (B, T); torch gives NaN where there are none."""
    shown = mask[:, 0, 0, :]
    if not shown.any(axis=1).all():
        raise NotImplementedError("torch gives NaN to a row without keys")
    return shown


@oracle("transformer.encoder")
def encoder_layer_of_torch(x: Any, /, **given: Any) -> Any:
    options = _torch_options(x, given)
    torch = library("torch")
    names = _attention_names("self_attn", "") | FFN_NAMES | _norm_names(norm1="{}_1", norm2="{}_2")
    layer = _load(torch.nn.TransformerEncoderLayer(**options), torch, names, given)
    hidden = None
    if "attn_mask" in given:
        hidden = torch.from_numpy(~_visible(given["attn_mask"]))
    layer.train()  # dropout is 0; the fused inference path takes no mask of this kind
    with torch.no_grad():
        return layer(tensor(torch, x), src_key_padding_mask=hidden).numpy()


@oracle("transformer.decoder")
def decoder_layer_of_torch(x: Any, /, **given: Any) -> Any:
    if "context" not in given:
        raise NotImplementedError("torch's decoder block always attends to a context")
    options = _torch_options(x, given)
    torch = library("torch")
    names = _attention_names("self_attn", "") | _attention_names("multihead_attn", "cross_") | FFN_NAMES
    names |= _norm_names(norm1="{}_1", norm2="cross_{}", norm3="{}_2")
    layer = _load(torch.nn.TransformerDecoderLayer(**options), torch, names, given)
    future = torch.from_numpy(np.triu(np.ones((x.shape[1], x.shape[1]), bool), 1))
    hidden = None
    if "context_mask" in given:
        hidden = torch.from_numpy(~_visible(given["context_mask"]))
    with torch.no_grad():
        return layer(
            tensor(torch, x),
            tensor(torch, given["context"]),
            tgt_mask=future,
            memory_key_padding_mask=hidden,
        ).numpy()


def _norm_row(row: Any, gain: Any, shift: Any, eps: float) -> Any:
    """One row normalised in Python floats: LayerNorm with a shift, RMSNorm without."""
    mean = 0.0 if shift is None else math.fsum(row) / len(row)
    size = math.sqrt(math.fsum((v - mean) ** 2 for v in row) / len(row) + eps)
    return [
        (v - mean) / size * g + (0.0 if shift is None else shift[m])
        for m, (v, g) in enumerate(zip(row, gain, strict=True))
    ]


def _attend_row(x: Any, source: Any, seen: Any, t: int, given: dict[str, Any], prefix: str) -> Any:
    """One token's attention over the tokens `seen`, head by head, key by key."""
    w = {n: given[f"{prefix}w_{n}"] for n in "qkvo"}
    b = {n: given.get(f"{prefix}b_{n}", np.zeros(w[n].shape[1])) for n in "qkvo"}
    heads, kv_heads = given["num_heads"], given.get("num_kv_heads") or given["num_heads"]
    D = w["q"].shape[1] // heads
    joined = np.zeros(heads * D)
    rope = None if prefix else given.get("rope")

    def turned(vector: Any, p: int) -> Any:
        if rope is None:
            return vector
        out = list(vector)
        for i in range(D // 2):
            first, second = (i, i + D // 2) if rope.pairing == "half_split" else (2 * i, 2 * i + 1)
            angle = p * rope.base ** (-2 * i / D)
            out[first] = vector[first] * math.cos(angle) - vector[second] * math.sin(angle)
            out[second] = vector[first] * math.sin(angle) + vector[second] * math.cos(angle)
        return np.array(out)

    for h in range(heads):
        own, shared = slice(h * D, (h + 1) * D), h // (heads // kv_heads)
        keys = slice(shared * D, (shared + 1) * D)
        query = turned(x[t] @ w["q"][:, own] + b["q"][own], t)
        scores = {}
        for j in seen:
            key = turned(source[j] @ w["k"][:, keys] + b["k"][keys], j)
            scores[j] = float(query @ key) / math.sqrt(D)
            if not prefix and given.get("alibi_slopes") is not None:
                scores[j] -= float(given["alibi_slopes"][h]) * abs(t - j)
        top = max(scores.values(), default=0.0)
        powers = {j: math.exp(s - top) for j, s in scores.items()}
        for j, power in powers.items():
            joined[own] += power / math.fsum(powers.values()) * (source[j] @ w["v"][:, keys] + b["v"][keys])
    return joined @ w["o"] + b["o"]


def _hidden_row(row: Any, given: dict[str, Any]) -> Any:
    if "w_gate" in given:
        gate = [activated(float(v), given["activation"]) for v in row @ given["w_gate"]]
        return (np.array(gate) * (row @ given["w_up"])) @ given["w_down"]
    units = [activated(float(v), given["activation"]) for v in row @ given["w_1"] + given["b_1"]]
    return np.array(units) @ given["w_2"] + given["b_2"]


def _seen(shown: Any, t: int, causal: bool) -> list[int]:
    return [j for j in range(len(shown)) if shown[j] and (j <= t or not causal)]


def _block_in_loops(x: Any, given: dict[str, Any], causal: bool) -> Any:
    """A block token by token, sublayer by sublayer."""
    out = np.zeros_like(x)
    for n in range(x.shape[0]):
        tokens, T = x[n], x.shape[1]
        sublayers: list[tuple[str, Any]] = []
        shown = given["attn_mask"][n, 0, 0] if "attn_mask" in given else np.ones(T, bool)
        sublayers.append(
            ("{}_1", lambda y, t, shown=shown: _attend_row(y, y, _seen(shown, t, causal), t, given, ""))
        )
        if "context" in given:
            C = given["context"][n]
            mask = given.get("context_mask")
            far = range(len(C)) if mask is None else np.flatnonzero(mask[n, 0, 0])
            sublayers.append(
                ("cross_{}", lambda y, t, C=C, far=far: _attend_row(y, C, far, t, given, "cross_"))
            )
        sublayers.append(("{}_2", lambda y, t: _hidden_row(y[t], given)))
        for pattern, sublayer in sublayers:
            gain, shift = given[pattern.format("gamma")], given.get(pattern.format("beta"))
            eps = given.get("eps", LAYER_NORM_EPS)
            if given["order"] == "pre":
                normal = np.array([_norm_row(row, gain, shift, eps) for row in tokens]).reshape(tokens.shape)
                tokens = tokens + np.array([sublayer(normal, t) for t in range(T)]).reshape(tokens.shape)
            else:
                summed = tokens + np.array([sublayer(tokens, t) for t in range(T)]).reshape(tokens.shape)
                tokens = np.array([_norm_row(row, gain, shift, eps) for row in summed]).reshape(tokens.shape)
        out[n] = tokens
    return out


@oracle("transformer.encoder")
def encoder_in_loops(x: Any, /, **given: Any) -> Any:
    return _block_in_loops(x, given, causal=False)


@oracle("transformer.decoder")
def decoder_in_loops(x: Any, /, **given: Any) -> Any:
    return _block_in_loops(x, given, causal=True)
