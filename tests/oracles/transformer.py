"""Oracles of the transformer: PyTorch's modules, SciPy, transformers, and scalar loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.special

from refimpl.registry import oracle
from tests.oracles import library


def tensor(torch: Any, x: Any) -> Any:
    return torch.from_numpy(np.array(x, dtype=np.float64))


# Activations and feed-forward layers


@oracle("transformer.gelu")
def gelu_of_scipy(x: Any, /, *, form: str = "exact") -> Any:
    if form == "exact":
        return x * scipy.special.ndtr(x)
    if form == "sigmoid":
        return x / (1.0 + np.exp(-1.702 * np.clip(x, -400, None)))
    raise NotImplementedError("scipy has no tanh form")


@oracle("transformer.gelu")
def gelu_of_torch(x: Any, /, *, form: str = "exact") -> Any:
    if form == "sigmoid":
        raise NotImplementedError("torch has no sigmoid form")
    torch = library("torch")
    approximate = {"exact": "none", "tanh": "tanh"}[form]
    return torch.nn.functional.gelu(tensor(torch, x), approximate=approximate).numpy()


def activated(x: float, activation: str) -> float:
    """One activation in Python floats."""
    if activation == "relu":
        return x if x > 0 else 0.0
    if activation == "gelu":
        return x * math.erfc(-x / math.sqrt(2)) / 2
    if activation == "gelu_tanh":
        return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    rate = {"silu": 1.0, "gelu_sigmoid": 1.702}[activation]
    return x / (1 + math.exp(-rate * x)) if rate * x > -700 else 0.0


def _cell(x: Any, w: Any, t: int, j: int, b: Any = None) -> float:
    return math.fsum(float(x[t, m]) * float(w[m, j]) for m in range(w.shape[0])) + (
        0.0 if b is None else float(b[j])
    )


@oracle("transformer.ffn", "transformer.ffn_decomposition")
def ffn_in_loops(
    x: Any, w_1: Any, w_2: Any, /, *, activation: str, b_1: Any = None, b_2: Any = None, parts: int = 1
) -> Any:
    y = np.zeros((x.shape[0], w_2.shape[1]))
    for t in range(x.shape[0]):
        units = [activated(_cell(x, w_1, t, h, b_1), activation) for h in range(w_1.shape[1])]
        for m in range(w_2.shape[1]):
            y[t, m] = math.fsum(unit * float(w_2[h, m]) for h, unit in enumerate(units))
            y[t, m] += 0.0 if b_2 is None else float(b_2[m])
    return y


@oracle("transformer.ffn")
def ffn_of_torch(x: Any, w_1: Any, w_2: Any, /, *, activation: str, b_1: Any = None, b_2: Any = None) -> Any:
    torch = library("torch")
    functional = torch.nn.functional
    acts = {
        "relu": functional.relu, "silu": functional.silu, "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }  # fmt: skip
    if activation not in acts:
        raise NotImplementedError(activation)
    a = {n: None if v is None else tensor(torch, v) for n, v in (("b_1", b_1), ("b_2", b_2))}
    hidden = acts[activation](functional.linear(tensor(torch, x), tensor(torch, w_1.T), a["b_1"]))
    return functional.linear(hidden, tensor(torch, w_2.T), a["b_2"]).numpy()


@oracle("transformer.gated_ffn")
def gated_ffn_in_loops(x: Any, w_gate: Any, w_up: Any, w_down: Any, /, *, activation: str) -> Any:
    y = np.zeros((x.shape[0], w_down.shape[1]))
    for t in range(x.shape[0]):
        units = [
            activated(_cell(x, w_gate, t, h), activation) * _cell(x, w_up, t, h)
            for h in range(w_gate.shape[1])
        ]
        for m in range(w_down.shape[1]):
            y[t, m] = math.fsum(unit * float(w_down[h, m]) for h, unit in enumerate(units))
    return y


@oracle("transformer.gated_ffn")
def gated_ffn_of_transformers(x: Any, w_gate: Any, w_up: Any, w_down: Any, /, *, activation: str) -> Any:
    """``LlamaMLP``, in float64."""
    if w_gate.shape[0] != w_down.shape[1]:
        raise NotImplementedError("LlamaMLP returns to the width it came from")
    torch = library("torch")
    llama = library("transformers.models.llama.modeling_llama")
    names = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    if activation not in names:
        raise NotImplementedError(activation)
    config = library("transformers").LlamaConfig(
        hidden_size=w_gate.shape[0],
        intermediate_size=w_gate.shape[1],
        hidden_act=names[activation],
        num_attention_heads=1,
        head_dim=2,
    )
    mlp = llama.LlamaMLP(config).double()
    with torch.no_grad():
        for module, weight in ((mlp.gate_proj, w_gate), (mlp.up_proj, w_up), (mlp.down_proj, w_down)):
            module.weight.copy_(tensor(torch, weight.T))
        return mlp(tensor(torch, x)).numpy()


# Normalisations


@oracle("transformer.layer_norm")
def layer_norm_of_torch(x: Any, gamma: Any, beta: Any, /, *, eps: float) -> Any:
    torch = library("torch")
    return torch.nn.functional.layer_norm(
        tensor(torch, x), gamma.shape, tensor(torch, gamma), tensor(torch, beta), eps
    ).numpy()


@oracle("transformer.layer_norm")
def layer_norm_in_loops(x: Any, gamma: Any, beta: Any, /, *, eps: float) -> Any:
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        mean = math.fsum(row) / len(row)
        variance = math.fsum((float(v) - mean) ** 2 for v in row) / len(row)
        for m, v in enumerate(row):
            y[t, m] = (float(v) - mean) / math.sqrt(variance + eps) * gamma[m] + beta[m]
    return y


@oracle("transformer.rms_norm")
def rms_norm_of_torch(x: Any, gamma: Any, /, *, eps: float, convention: str) -> Any:
    torch = library("torch")
    return torch.nn.functional.rms_norm(tensor(torch, x), gamma.shape, tensor(torch, gamma), eps).numpy()


@oracle("transformer.rms_norm")
def rms_norm_in_loops(x: Any, gamma: Any, /, *, eps: float, convention: str) -> Any:
    y = np.zeros_like(x)
    for t, row in enumerate(x):
        size = math.sqrt(math.fsum(float(v) ** 2 for v in row) / len(row) + eps)
        y[t] = [float(v) / size * g for v, g in zip(row, gamma, strict=True)]
    return y


# Positions, embedding, head


@oracle("transformer.positions")
def sinusoids_in_loops(positions: Any, /, *, width: int, layout: str) -> Any:
    y = np.zeros((len(positions), width))
    for t, p in enumerate(positions):
        for i in range(width // 2):
            angle = float(p) / math.pow(10000.0, 2 * i / width)
            where = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, width // 2 + i)
            y[t, where[0]], y[t, where[1]] = math.sin(angle), math.cos(angle)
    return y


@oracle("transformer.positions.learned")
def learned_positions_of_torch(table: Any, positions: Any, /, *, offset: int) -> Any:
    torch = library("torch")
    return torch.nn.functional.embedding(torch.from_numpy(positions + offset), tensor(torch, table)).numpy()


@oracle("transformer.positions.alibi")
def slopes_of_the_authors_rule(*, num_heads: int) -> Any:
    """The recursive rule: the slopes of the power of two below, then every other one of the next."""

    def slopes(n: int) -> list[float]:
        if math.log2(n).is_integer():
            start = 2 ** -(2 ** -(math.log2(n) - 3))
            return [start * start**i for i in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return slopes(below) + slopes(2 * below)[::2][: n - below]

    return np.array(slopes(num_heads))


@oracle("transformer.positions.alibi")
def slopes_of_bloom(*, num_heads: int) -> Any:
    """``build_alibi_tensor``: the bias of key 1 is the slope itself, in float32."""
    torch = library("torch")
    bloom = library("transformers.models.bloom.modeling_bloom")
    if 8 % num_heads:
        raise NotImplementedError("float32 slopes are exact only where they are powers of two")
    alibi = bloom.build_alibi_tensor(torch.ones((1, 2)), num_heads, torch.float64)
    return alibi[:, 0, 1].numpy()


@oracle("transformer.positions.rotary")
def rotary_in_complex_numbers(x: Any, positions: Any, /, *, pairing: str, rotated: int | None = None) -> Any:
    """Each pair as a complex number times a phase."""
    width = x.shape[-1] if rotated is None else rotated
    y = np.array(x)
    for i in range(width // 2):
        a, b = (i, i + width // 2) if pairing == "half_split" else (2 * i, 2 * i + 1)
        for t, p in enumerate(positions):
            phase = complex(
                math.cos(p * 10000.0 ** (-2 * i / width)), math.sin(p * 10000.0 ** (-2 * i / width))
            )
            turned = (x[:, t, :, a] + 1j * x[:, t, :, b]) * phase
            y[:, t, :, a], y[:, t, :, b] = turned.real, turned.imag
    return y


@oracle("transformer.positions.rotary")
def rotary_of_transformers(x: Any, positions: Any, /, *, pairing: str, rotated: int | None = None) -> Any:
    """``apply_rotary_pos_emb`` of LLaMA (half-split) and of GPT-J (interleaved), on angles in float64."""
    torch = library("torch")
    width = x.shape[-1] if rotated is None else rotated
    angles = torch.from_numpy(np.outer(positions, 10000.0 ** (-np.arange(0, width, 2) / width)))
    turning = tensor(torch, x[..., :width])
    if pairing == "half_split":
        llama = library("transformers.models.llama.modeling_llama")
        both = torch.cat([angles, angles], dim=-1)[None]
        turned, _ = llama.apply_rotary_pos_emb(turning, turning, both.cos(), both.sin(), unsqueeze_dim=2)
    else:
        gptj = library("transformers.models.gptj.modeling_gptj")
        sin, cos = angles.sin()[None], angles.cos()[None]
        turned = gptj.apply_rotary_pos_emb(turning, sin, cos)
    return np.concatenate([turned.numpy(), x[..., width:]], axis=-1)


@oracle("transformer.embedding")
def embedding_of_torch(table: Any, tokens: Any, /, *, scale: float = 1.0) -> Any:
    torch = library("torch")
    return (scale * torch.nn.functional.embedding(torch.from_numpy(tokens), tensor(torch, table))).numpy()


@oracle("transformer.output_head")
def head_of_torch(hidden: Any, table: Any, /, *, bias: Any = None) -> Any:
    torch = library("torch")
    b = None if bias is None else tensor(torch, bias)
    return torch.nn.functional.linear(tensor(torch, hidden), tensor(torch, table), b).numpy()
