"""Oracles of parameter counts: the shape of every tensor of every layer, and PyTorch's modules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library

Shapes = Iterator[tuple[int, ...]]


def linear(inputs: int, outputs: int, bias: bool) -> Shapes:
    yield outputs, inputs
    if bias:
        yield (outputs,)


def tensors(part: Any, d: int, pad: int) -> Shapes:
    """The shapes that a checkpoint lists for one part of one layer."""
    size, choice = part.sizes, part.choices
    biased = choice.get("bias") == "all"
    match part.kind:
        case "embedding" | "head" if part.kind == "embedding" or not choice.get("tied"):
            rows = size["rows"]
            while choice.get("vocabulary") and rows % pad:
                rows += 1
            yield rows, size.get("width", d)
        case "norm":
            yield (d,)
            if choice.get("style") != "rms":
                yield (d,)
        case "attention":
            width = size.get("head_width", d // size["heads"])
            for heads in (
                size["heads"],
                size.get("key_heads", size["heads"]),
                size.get("key_heads", size["heads"]),
            ):
                yield from linear(d, heads * width, biased or choice.get("bias") == "qkv")
            yield from linear(size["heads"] * width, d, biased)
        case "ffn":
            for _ in range(2 if choice.get("gated") else 1):
                yield from linear(d, size["width"], biased)
            yield from linear(size["width"], d, biased)
        case "linear":
            yield from linear(size.get("inputs", d), size.get("outputs", d), biased)


@oracle("cost.parameters")
def tensor_by_tensor(*, model: Any, pad_vocabulary: int) -> Any:
    """Every tensor of a checkpoint, layer after layer."""
    total = 0
    for stack in model.stacks:
        for _ in range(stack.layers):
            for part in stack.parts:
                total += sum(math.prod(shape) for shape in tensors(part, model.width, pad_vocabulary))
    return {"parameters": np.asarray(total, dtype=object)}


@oracle("cost.parameters")
def torch_modules(*, model: Any, pad_vocabulary: int) -> Any:
    """Decoders as PyTorch modules on the meta device."""
    torch = library("torch")
    nn, d, meta = torch.nn, model.width, {"device": "meta"}
    embeddings, block, output = model.stacks
    attention, ffn = block.parts[1], block.parts[3]
    bias = {"bias": attention.choices.get("bias") == "all"}

    def norm() -> Any:
        rms = block.parts[0].choices.get("style") == "rms"
        return nn.RMSNorm(d, **meta) if rms else nn.LayerNorm(d, **meta)

    def table(part: Any) -> Any:
        pad = pad_vocabulary if part.choices.get("vocabulary") else 1
        return nn.Embedding(-(-part.sizes["rows"] // pad) * pad, d, **meta)

    modules = [table(part) for part in embeddings.parts]
    heads, f = attention.sizes["heads"], ffn.sizes["width"]
    for _ in range(block.layers):
        modules += [norm(), norm()]
        if "key_heads" in attention.sizes:
            k, g = attention.sizes["head_width"], attention.sizes["key_heads"]
            modules += [nn.Linear(d, n * k, **bias, **meta) for n in (heads, g, g)]
            modules.append(nn.Linear(heads * k, d, **bias, **meta))
        else:
            modules.append(nn.MultiheadAttention(d, heads, **bias, **meta))
        inputs = 2 if ffn.choices.get("gated") else 1
        modules += [nn.Linear(d, f, **bias, **meta) for _ in range(inputs)]
        modules.append(nn.Linear(f, d, **bias, **meta))
    modules.append(norm())
    head = output.parts[1]
    if not head.choices.get("tied"):
        modules.append(nn.Linear(d, modules[0].num_embeddings, bias=False, **meta))
    total = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return {"parameters": np.asarray(total, dtype=object)}
