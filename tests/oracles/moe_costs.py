"""Oracles of mixture-of-experts costs: every tensor of every expert, every product of matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def tensors(part: Any, d: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor that one layer's part has; an expert's name says which it is."""
    size = part.sizes
    gated = part.choices.get("gated")
    match part.kind:
        case "embedding":
            yield "table", (size["rows"], d)
        case "head":
            yield ("shared table" if part.choices.get("tied") else "matrix"), (d, size["rows"])
        case "norm":
            yield "gain", (d,)
        case "attention":
            k = size["head_width"]
            keys = size.get("key_heads", size["heads"])
            for count in (size["heads"], keys, keys):
                yield "matrix", (d, count * k)
            yield "matrix", (size["heads"] * k, d)
        case "linear":
            yield "matrix", (d, size["outputs"])
        case "ffn" | "experts":
            for expert in range(size.get("experts", 1)):
                name = f"expert {expert}" if part.kind == "experts" else "matrix"
                for _ in range(2 if gated else 1):
                    yield name, (d, size["width"])
                yield name, (size["width"], d)


def layers(model: Any) -> Iterator[Any]:
    for stack in model.stacks:
        for _ in range(stack.layers):
            yield from stack.parts


@oracle("cost.moe_parameters")
def tensor_by_tensor(*, model: Any) -> Any:
    """A token's tensors are all but those of the experts after the first k."""
    total = activated = 0
    for part in layers(model):
        for name, shape in tensors(part, model.width):
            if name == "shared table":
                continue
            total += math.prod(shape)
            idle = name.startswith("expert ") and int(name.split()[1]) >= part.sizes["active"]
            activated += 0 if idle else math.prod(shape)
    return {
        "total.parameters": np.asarray(total, dtype=object),
        "activated.parameters": np.asarray(activated, dtype=object),
    }


@oracle("cost.moe_parameters")
def torch_modules(*, model: Any) -> Any:
    """PyTorch's linear maps and embeddings on the meta device."""
    nn = library("torch").nn
    total = activated = 0
    for part in layers(model):
        modules, idle = [], []
        for name, shape in tensors(part, model.width):
            if name == "table":
                modules.append(nn.Embedding(*shape, device="meta"))
            elif name == "gain":
                modules.append(nn.RMSNorm(shape[0], device="meta"))
            elif name != "shared table":
                chosen = not name.startswith("expert ") or int(name.split()[1]) < part.sizes["active"]
                (modules if chosen else idle).append(nn.Linear(*shape, bias=False, device="meta"))
        here, there = (sum(p.numel() for m in group for p in m.parameters()) for group in (modules, idle))
        activated += here
        total += here + there
    return {
        "total.parameters": np.asarray(total, dtype=object),
        "activated.parameters": np.asarray(activated, dtype=object),
    }


@oracle("cost.moe_flops")
def product_by_product(
    *, layers: int, width: int, sequence: int, vocabulary: int, activated: int, expert_width: Any = None
) -> Any:
    """Rows, inner and columns of every matrix product of a layer, forward, and twice that backward."""
    d, hidden = width, Fraction(8 * width, 3) if expert_width is None else expert_width
    products: list[tuple[Any, Any, Any]] = []
    for _ in range(layers):
        products += [(sequence, d, d)] * 4  # queries, keys, values, output
        products += [(sequence, d, sequence), (sequence, sequence, d)]  # all heads together
        for _ in range(activated):
            products += [(sequence, d, hidden), (sequence, d, hidden), (sequence, hidden, d)]
    products.append((sequence, d, vocabulary))
    total = 3 * sum(2 * rows * inner * columns for rows, inner, columns in products)
    return {"FLOP": np.asarray(int(total), dtype=object)}


@oracle("cost.moe_flops.matrices")
def every_token_through_every_matrix(*, model: Any, sequence: int, direction: str) -> Any:
    """A multiply-add for every element of every matrix that a token meets, and for every score it takes."""
    total = 0
    for _ in range(sequence):
        for part in layers(model):
            for name, shape in tensors(part, model.width):
                idle = name.startswith("expert ") and int(name.split()[1]) >= part.sizes["active"]
                if name not in ("table", "gain") and not idle:
                    total += 2 * math.prod(shape)
            if part.kind == "attention":
                for _ in range(part.sizes["heads"]):
                    total += 2 * 2 * sequence * part.sizes["head_width"]
    return {"FLOP": np.asarray(total * (1 if direction == "forward" else 3), dtype=object)}


@oracle("cost.moe_communication")
def buffer_by_buffer(
    *, experts: int, ranks: int, capacity: int, width: int, itemsize: int, held: int, direction: str
) -> Any:
    """One buffer for each expert of somebody else, and for everybody else one of each expert here."""
    buffer = capacity * width * itemsize
    sent = 0
    for _ in range(2 if direction == "both" else 1):
        for expert in range(experts):
            if expert >= held:
                sent += buffer
        for _other in range(1, ranks):
            for _expert in range(held):
                sent += buffer
    return {"B": np.asarray(sent, dtype=object)}
