"""Oracles of tensor parallelism: unsplit blocks by loops and by PyTorch, losses by autograd."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles.torch_decoder import block, leaves, torch_library
from tests.oracles.transformer_blocks import decoder_in_loops


def _unsplit(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return weights, and the options of the unsplit block."""
    weights = {n: v for n, v in given.items() if n.startswith(("w_", "b_", "gamma_", "beta_"))}
    split = {"ranks", "sequence_parallel", *weights}
    return weights, {name: value for name, value in given.items() if name not in split}


@oracle("parallel.tensor")
def unsplit_in_loops(x: Any, /, **given: Any) -> Any:
    weights, options = _unsplit(given)
    return decoder_in_loops(x, **weights, **options)


@oracle("parallel.tensor")
def unsplit_of_torch(x: Any, /, **given: Any) -> Any:
    torch = torch_library()
    weights, options = _unsplit(given)
    with torch.no_grad():
        return block(torch, torch.tensor(x), leaves(torch, weights), options).numpy()


@oracle("parallel.tensor.backward")
def unsplit_autograd(x: Any, dy: Any, /, **given: Any) -> Any:
    torch = torch_library()
    weights, options = _unsplit(given)
    if not x.size:
        raise NotImplementedError("autograd leaves gradients of nothing out")
    tensors = leaves(torch, {"x": x, **weights})
    y = block(torch, tensors["x"], {n: t for n, t in tensors.items() if n != "x"}, options)
    y.backward(torch.tensor(dy))
    names = ("x", *(f"{kind}_{n}" for kind in "wb" for n in "qkvo"))  # in the order of the result
    names += (
        "w_1",
        "w_2",
        "b_1",
        "b_2",
        "w_gate",
        "w_up",
        "w_down",
        "gamma_1",
        "beta_1",
        "gamma_2",
        "beta_2",
    )
    return {f"d{name}": tensors[name].grad.numpy() for name in names if name in tensors}


@oracle("parallel.tensor.embedding")
def embedding_of_torch(table: Any, tokens: Any, *, ranks: int, scale: float) -> Any:
    torch = torch_library()
    return (torch.nn.functional.embedding(torch.tensor(tokens), torch.tensor(table)) * scale).numpy()


@oracle("parallel.tensor.cross_entropy")
def cross_entropy_of_torch(hidden: Any, table: Any, targets: Any, *, ranks: int) -> Any:
    torch = torch_library()
    logits = (torch.tensor(hidden) @ torch.tensor(table).T).transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none").numpy()


@oracle("cost.tensor_parallel")
def all_reduces_one_by_one(
    *, batch: int, sequence: int, hidden: int, layers: int, ranks: int, recompute: str
) -> Any:
    """Every all-reduce of every layer, as a ring: each of t - 1 neighbours in turn gets a t-th, twice."""
    sent = Fraction(0)
    times = {"none": 4, "full": 6}[recompute]  # after attention and after the feed-forward layer, each pass
    for _layer in range(layers):
        for _all_reduce in range(times):
            for _phase in ("reduce-scatter", "all-gather"):
                sent += (ranks - 1) * Fraction(batch * sequence * hidden, ranks)
    return {"elements": np.asarray(sent, dtype=object)}


@oracle("cost.tensor_parallel.activations")
def tensors_one_by_one(
    *, batch: int, sequence: int, hidden: int, heads: int, ranks: int, sequence_parallel: bool, recompute: str
) -> Any:
    """The list of section 4.1: bytes an element, elements, and which parallelism splits the tensor."""
    tokens, scores = batch * sequence * hidden, heads * sequence**2 * batch
    tensors = [
        ("input of attention", 2, tokens, "sequence"),
        ("queries", 2, tokens, "tensor"),
        ("keys", 2, tokens, "tensor"),
        ("softmax", 2, scores, "scores"),
        ("its dropout's mask", 1, scores, "scores"),
        ("its dropout's output", 2, scores, "scores"),
        ("values", 2, tokens, "tensor"),
        ("input of the projection", 2, tokens, "tensor"),
        ("dropout's mask", 1, tokens, "sequence"),
        ("input of the feed-forward layer", 2, tokens, "sequence"),
        ("input of GELU", 2, 4 * tokens, "tensor"),
        ("input of the second matrix", 2, 4 * tokens, "tensor"),
        ("dropout's mask", 1, tokens, "sequence"),
        ("input of the first norm", 2, tokens, "sequence"),
        ("input of the second norm", 2, tokens, "sequence"),
    ]
    if recompute == "full":
        return {"B": np.asarray(2 * tokens, dtype=object)}
    kept = Fraction(0)
    for _, size, elements, split in tensors:
        if split == "scores" and recompute == "selective":
            continue
        kept += Fraction(size * elements, 1 if split == "sequence" and not sequence_parallel else ranks)
    return {"B": np.asarray(kept, dtype=object)}
