"""Oracles of tensor parallelism: unsplit blocks by loops and by PyTorch, losses by autograd."""

from __future__ import annotations

from typing import Any

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
