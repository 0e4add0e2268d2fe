"""A decoder in PyTorch, written from the formulas: autograd makes its gradients, AdamW trains it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.oracles import library


def _norm(torch: Any, x: Any, w: dict[str, Any], gain: str, shift: str, options: dict[str, Any]) -> Any:
    eps = options.get("eps", 1e-5)
    if options.get("norm", "layer_norm") == "layer_norm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], w[gain], w[shift], eps)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w[gain]


def _turned(torch: Any, x: Any, base: float) -> Any:
    """Rotary positions of the half-split pairing, (B, T, H, D), as complex numbers."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    turned = (
        torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat([turned.real, turned.imag], -1)


def _attention(torch: Any, x: Any, w: dict[str, Any], options: dict[str, Any]) -> Any:
    B, T, _ = x.shape
    H = options["num_heads"]
    q, k, v = (x @ w[f"w_{n}"] + w.get(f"b_{n}", 0) for n in "qkv")
    D = q.shape[-1] // H
    kv = k.shape[-1] // D
    q, k, v = q.view(B, T, H, D), k.view(B, T, kv, D), v.view(B, T, kv, D)
    if options.get("rope") is not None:
        q, k = (_turned(torch, a, options["rope"].base) for a in (q, k))
    k, v = (a.repeat_interleave(H // kv, dim=2) for a in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
    if options.get("alibi_slopes") is not None:
        far = (torch.arange(T)[:, None] - torch.arange(T)).abs()
        scores = scores - torch.tensor(options["alibi_slopes"])[:, None, None] * far
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    joined = torch.einsum("bhts,bshd->bthd", torch.softmax(scores, -1), v).reshape(B, T, H * D)
    return joined @ w["w_o"] + w.get("b_o", 0)


def _hidden(torch: Any, x: Any, w: dict[str, Any], options: dict[str, Any]) -> Any:
    functional = torch.nn.functional
    active = {
        "relu": functional.relu,
        "silu": functional.silu,
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    }[options.get("activation", "relu")]
    if "w_router" in w:
        logits = x @ w["w_router"]
        best, expert = logits.topk(options["k"], dim=-1)
        weight, y = torch.softmax(best, -1), torch.zeros_like(x)
        for e in range(logits.shape[-1]):
            up = x @ w["experts_in"][e]
            hidden = active(x @ w["experts_gate"][e]) * up if "experts_gate" in w else active(up)
            share = (weight * (expert == e)).sum(-1, keepdim=True)
            y = y + share * (hidden @ w["experts_out"][e])
        return y
    if "w_gate" in w:
        return (active(x @ w["w_gate"]) * (x @ w["w_up"])) @ w["w_down"]
    return active(x @ w["w_1"] + w.get("b_1", 0)) @ w["w_2"] + w.get("b_2", 0)


def block(torch: Any, x: Any, w: dict[str, Any], options: dict[str, Any]) -> Any:
    """One decoder block on torch tensors."""
    for sublayer, n in ((_attention, 1), (_hidden, 2)):
        if options.get("order", "post") == "pre":
            x = x + sublayer(torch, _norm(torch, x, w, f"gamma_{n}", f"beta_{n}", options), w, options)
        else:
            x = _norm(torch, x + sublayer(torch, x, w, options), w, f"gamma_{n}", f"beta_{n}", options)
    return x


def _waves(torch: Any, x: Any) -> Any:
    """Sines at even features, cosines at odd ones."""
    feature = torch.arange(x.shape[-1], dtype=x.dtype)
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (2 * (feature // 2) / x.shape[-1])
    return torch.where(feature % 2 == 0, angles.sin(), angles.cos())


def leaves(torch: Any, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return arrays as tensors with gradients."""
    return {name: torch.tensor(np.asarray(array), requires_grad=True) for name, array in arrays.items()}


def loss_sum(torch: Any, w: dict[str, Any], tokens: Any, mask: Any, config: Any) -> Any:
    """Sum of the next-token losses of a decoder-only model over the counted tokens."""
    words, counts = torch.tensor(tokens), torch.tensor(mask)
    options = {
        "num_heads": config.num_heads,
        "order": config.order,
        "norm": config.norm,
        "eps": config.eps,
        "activation": config.activation,
    }
    options["k"] = getattr(config, "k", 0)
    x = w["embedding"][words[:, :-1]] * config.embedding_scale
    if config.positions == "learned":
        x = x + w["positions"][: x.shape[1]]
    elif config.positions == "sinusoidal":
        x = x + _waves(torch, x)
    elif config.positions == "alibi":  # of a power of two of heads
        H = config.num_heads
        options["alibi_slopes"] = [2.0 ** (-8 * (head + 1) / H) for head in range(H)]
    else:
        options["rope"] = config.positions
    for layer in range(config.layers):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): array for name, array in w.items() if name.startswith(prefix)}
        x = block(torch, x, own, options)
    if config.order == "pre":
        x = _norm(torch, x, w, "gamma", "beta", options)
    logits = x @ w["embedding" if config.tied else "head"].T
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), words[:, 1:], reduction="none")
    return each[counts].sum()


def torch_library() -> Any:
    """Return torch, or say that its oracles cannot judge."""
    return library("torch")
