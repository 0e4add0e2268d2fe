"""Judges of training memory: PyTorch's autograd, whose saved tensors are counted, and sums written out."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


@oracle("cost.training_memory.states")
def bytes_of_each_state(*, parameters: int, ranks: int, stage: int, convention: str, offload: str) -> Any:
    """Bytes of each state of a parameter, over the ranks that divide it, unless the host has it."""
    scale = 1 + Fraction(4, 2048)
    sizes: dict[str, tuple[int, int, list[Any]]] = {
        "zero": (2, 2, [4, 4, 4]),
        "deepspeed": (2, 4, [4, 4, 4]),
        "megatron": (2, 4, [4, 4, 4]),
        "fp32": (4, 4, [4, 4]),
        "bf16": (2, 2, [2, 2]),
        "adam8bit": (2, 2, [4, scale, scale]),
        "sgd": (2, 2, [4, 4]),
    }
    weights, gradients, states = sizes[convention]
    held = Fraction(0)
    if offload != "all":
        held += Fraction(weights * parameters, ranks if stage == 3 else 1)
    if offload == "none":
        held += Fraction(gradients * parameters, ranks if stage >= 2 else 1)
        held += sum(map(Fraction, states), Fraction(0)) * Fraction(parameters, ranks if stage else 1)
    return np.asarray(held, object)


@oracle("cost.training_memory.korthikanti")
def tensors_of_the_table(
    *, hidden: int, batch: int, sequence: int, layers: int, heads: int, tensor: int, pipeline: int,
    interleave: int, sequence_parallel: bool, recompute: str,
) -> Any:  # fmt: skip
    """Each tensor that section 4.1 of the paper lists for a layer, divided as its section 4.2 says."""
    token, scores = Fraction(batch * sequence * hidden), Fraction(heads * sequence * sequence * batch)
    along = tensor if sequence_parallel else 1
    if recompute == "full":
        layer = 2 * token
    else:
        replicated = [2, 2, 1, 2, 2, 1]  # inputs of norms, attention and network; masks of two dropouts
        inside = [4, 2, 2, 8, 8]  # queries and keys, values, projection's input; around the GELU
        layer = sum(replicated) * token / along + sum(inside) * token / tensor
        if recompute == "none":
            layer += (2 + 1 + 2) * scores / tensor
    # Chunks of layers whose micro-batches are in flight when the first stage turns around.
    chunk = Fraction(layers, pipeline * interleave)
    chunks = pipeline if interleave == 1 else interleave * pipeline + pipeline - 1
    return np.asarray(layer * chunk * (chunks if pipeline > 1 else interleave), object)


@oracle("cost.training_memory.activations")
def saved_by_autograd(
    *, model: Any, batch: int, sequence: int, tensor: int, sequence_parallel: bool, recompute: str,
    attention: str, dropout: bool, fused_gate: bool, fused_norm: bool,
) -> Any:  # fmt: skip
    """Bytes of the storages that PyTorch's autograd saves in a forward pass of one rank of the model.

    Matrices are those of one of `tensor` ranks.  What a map keeps of an input that is divided along the
    sequence is its part, as Megatron gathers it again in the backward pass.
    """
    torch = library("torch")
    ops = torch.nn.functional
    from torch.autograd.graph import saved_tensors_hooks

    parts = {part.name: part for stack in model.stacks for part in stack.parts}
    layers = next(stack.layers for stack in model.stacks if stack.name == "block")
    heads, keys = (parts["attention"].sizes[key] // tensor for key in ("heads", "key_heads"))
    width, inner = model.width, parts["ffn"].sizes["width"] // tensor
    rows = -(-parts["tokens"].sizes["rows"] // tensor)
    size = width // parts["attention"].sizes["heads"]
    along = tensor if sequence_parallel else 1
    gated, rms = bool(parts["ffn"].choices.get("gated")), parts["final norm"].choices.get("style") == "rms"
    dtype = torch.bfloat16

    def kernel(forward: Any) -> Any:
        """Return an operator whose `forward` gives what it returns, and the tensors that it keeps."""

        class Kernel(torch.autograd.Function):  # type: ignore[misc, name-defined]
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                out, kept = forward(*inputs)
                ctx.save_for_backward(*kept)
                return out

            @staticmethod
            def backward(ctx: Any, *_: Any) -> Any:
                raise AssertionError("only the forward pass is run")

        return Kernel.apply

    def deviations(x: Any) -> Any:
        return torch.zeros(x.shape[:-1], dtype=torch.float32)

    def attend(q: Any, k: Any, v: Any) -> Any:
        out = q.clone()
        return out, (q, k, v, out, deviations(q))

    # What PyTorch has on a GPU only: a map that keeps its own part of a gathered input, flash attention, and
    # the kernels of RMSNorm and of a gated product.
    gathered = kernel(lambda x, w: (x.repeat_interleave(along, 1) @ w, (x, w)))
    flash = kernel(attend)
    rms_norm = kernel(lambda x, w: (x * w, (x, w, deviations(x))))
    fused = kernel(lambda a, b: (ops.silu(a) * b, (a, b)))

    weights: list[Any] = []

    def weight(*shape: int, dtype: Any = dtype) -> Any:
        weights.append(torch.zeros(shape, dtype=dtype, requires_grad=True))
        return weights[-1]

    def norm(x: Any) -> Any:
        if rms and fused_norm:
            return rms_norm(x, weight(width))
        if rms:
            full = x.float()
            return weight(width) * (full * (full.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()).to(dtype)
        # With weights in fp32 the statistics are in fp32 on a CPU too, as they always are on a GPU.
        return ops.layer_norm(x, (width,), *(weight(width, dtype=torch.float32) for _ in range(2)))

    def dropped(x: Any) -> Any:
        return torch.native_dropout(x, 0.1, True)[0] if dropout else x

    def scattered(x: Any) -> Any:
        return x[:, : sequence // along].clone()

    def attended(q: Any, k: Any, v: Any) -> Any:
        if attention == "flash":
            return flash(q, k, v)
        k, v = (x.repeat_interleave(heads // keys, 2) if heads > keys else x for x in (k, v))
        q, k, v = (x.transpose(1, 2).reshape(batch * heads, sequence, size) for x in (q, k, v))
        return dropped((torch.bmm(q, k.transpose(1, 2)) * 0.1).softmax(-1)) @ v

    def gate(a: Any, b: Any) -> Any:
        return fused(a, b) if fused_gate else ops.silu(a) * b

    def block(x: Any) -> Any:
        y = norm(x)
        q, k, v = (
            gathered(y, weight(width, n * size)).view(batch, sequence, n, size) for n in (heads, keys, keys)
        )
        out = attended(q, k, v).reshape(batch, sequence, heads * size)
        x = x + dropped(scattered(out @ weight(heads * size, width)))
        y = norm(x)
        first = gathered(y, weight(width, inner))
        middle = gate(first, gathered(y, weight(width, inner))) if gated else ops.gelu(first)
        return x + dropped(scattered(middle @ weight(inner, width)))

    kept: dict[int, tuple[int, Any]] = {}

    def keep(x: Any) -> Any:
        storage = x.untyped_storage()
        if x.ndim:  # not the one number that tells how many tokens a loss has
            kept[storage._cdata] = storage.nbytes(), storage
        return x

    ids = torch.zeros((batch, sequence), dtype=torch.int64)
    with saved_tensors_hooks(keep, lambda x: x):
        x = dropped(scattered(ops.embedding(ids, weight(rows, width))))
        for _ in range(layers):
            before = set(kept)
            entering = x
            x = block(x)
            if recompute == "full":
                for key in set(kept) - before:
                    del kept[key]
                keep(entering)
        logits = gathered(norm(x), weight(width, rows))
        ops.nll_loss(logits.float().log_softmax(-1).view(batch * sequence, rows), ids.view(-1))
    for own in weights:
        kept.pop(own.untyped_storage()._cdata, None)
    total = sum(size for size, _ in kept.values())
    if recompute == "selective" and attention == "standard":
        square = batch * heads * sequence * sequence
        total -= layers * square * (2 + 1 + 2 if dropout else 2)
    return np.asarray(total, object)
