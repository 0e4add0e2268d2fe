"""Oracles of attention: scalar loops, PyTorch, the ONNX reference evaluator, SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.special

from refimpl.registry import oracle
from tests.oracles import library

NEGATIVE = float("-inf")


def philox_word(b: int, h: int, i: int, j: int, seed: int) -> int:
    """One dropout word in Python integers, from the published round function."""
    x, key = [b, h, i, j // 4], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [
            second >> 32 ^ x[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ x[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x[j % 4]


def _attends(b: int, i: int, j: int, q: Any, k: Any, options: dict[str, Any]) -> bool:
    q_lengths, k_lengths = options.get("q_lengths"), options.get("k_lengths")
    queries = q.shape[1] if q_lengths is None else int(q_lengths[b])
    keys = k.shape[1] if k_lengths is None else int(k_lengths[b])
    if i >= queries or j >= keys:
        return False
    causal = options.get("causal", False)
    if causal == "bottom_right":
        return j <= i + keys - queries
    return j <= i if causal else True


def _at(array: Any, shape: tuple[int, ...], *index: int) -> Any:
    return np.broadcast_to(array, shape)[index]


def _score(b: int, h: int, i: int, j: int, q: Any, k: Any, options: dict[str, Any]) -> float:
    full = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    if not _attends(b, i, j, q, k, options):
        return NEGATIVE
    if options.get("attn_mask") is not None and not _at(options["attn_mask"], full, b, h, i, j):
        return NEGATIVE
    scale = options.get("scale")
    terms = [float(q[b, i, h, d]) * float(k[b, j, h // group, d]) for d in range(q.shape[3])]
    score = math.fsum(terms) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    cap = options.get("softcap")
    if cap is not None:
        score = cap * math.tanh(score / cap)
    if options.get("bias") is not None:
        score += float(_at(options["bias"], full, b, h, i, j))
    if options.get("alibi_slopes") is not None:
        shift = 0
        if options.get("causal") == "bottom_right":
            keys = k.shape[1] if options.get("k_lengths") is None else int(options["k_lengths"][b])
            queries = q.shape[1] if options.get("q_lengths") is None else int(options["q_lengths"][b])
            shift = keys - queries
        score -= float(options["alibi_slopes"][h]) * abs(i + shift - j)
    return score


def _weights(b: int, h: int, i: int, q: Any, k: Any, options: dict[str, Any]) -> tuple[list[float], float]:
    scores = [_score(b, h, i, j, q, k, options) for j in range(k.shape[1])]
    top = max(scores, default=NEGATIVE)
    if top == NEGATIVE:
        return [0.0] * len(scores), NEGATIVE
    powers = [math.exp(score - top) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers], top + math.log(total)


@oracle("attention.dense", "attention.standard", "attention.flash")
def scalar_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Attention one number at a time."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.zeros((q.shape[0], q.shape[2], q.shape[1]))
    p = options.get("dropout_p", 0.0)
    for b, i, h in np.ndindex(q.shape[:3]):
        weights, lse[b, h, i] = _weights(b, h, i, q, k, options)
        if p:
            kept = [
                philox_word(b, h, i, j, options["rng"]) >= math.ceil(p * 2**32) for j in range(len(weights))
            ]
            weights = [w / (1 - p) if keep else 0.0 for w, keep in zip(weights, kept, strict=True)]
        for d in range(v.shape[3]):
            values = v[b, :, h // (q.shape[2] // v.shape[2]), d]
            out[b, i, h, d] = math.fsum(w * float(x) for w, x in zip(weights, values, strict=True))
    return (out, lse) if options.get("return_lse") else out


@oracle("attention.block_sparse_flash")
def scalar_block_sparse(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Scalar attention, a score taking part only if its block does."""
    block_mask = options.pop("block_mask", None)
    rows, columns = options.pop("block_sizes")
    if block_mask is not None:
        full = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
        tiles = full[0], full[1], -(-full[2] // rows), -(-full[3] // columns)
        mask = np.zeros(full, dtype=bool)
        for b, h, i, j in np.ndindex(full):
            inside = options.get("attn_mask") is None or _at(options["attn_mask"], full, b, h, i, j)
            mask[b, h, i, j] = inside and _at(block_mask, tiles, b, h, i // rows, j // columns)
        options["attn_mask"] = mask
    return scalar_attention(q, k, v, **options)


@oracle("attention.dense", "attention.flash")
def torch_sdpa(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """PyTorch's own attention, where it has the option."""
    known = {"attn_mask", "bias", "scale", "causal", "block_sizes", "sram"}
    if set(options) - known or 0 in (*q.shape, *k.shape):
        raise NotImplementedError
    torch = library("torch")
    q_, k_, v_ = (torch.from_numpy(np.ascontiguousarray(x)).transpose(1, 2) for x in (q, k, v))
    bias = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.float64)
    if "bias" in options:
        bias = bias + torch.from_numpy(options["bias"])
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    if options.get("causal"):
        mask = mask.tril(k.shape[1] - q.shape[1] if options["causal"] == "bottom_right" else 0)
    mask = mask.expand(bias.shape).clone()
    if "attn_mask" in options:
        mask &= torch.from_numpy(options["attn_mask"])
    alive = mask.any(-1, keepdim=True)  # PyTorch leaves a fully masked row undefined
    bias = bias.masked_fill(~(mask | ~alive), NEGATIVE)
    out = torch.nn.functional.scaled_dot_product_attention(
        q_, k_, v_, attn_mask=bias, scale=options.get("scale"), enable_gqa=True
    )
    return (out * alive).transpose(1, 2).numpy()


@oracle("attention.dense", "attention.standard")
def onnx_attention(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """The Attention operator of the ONNX reference evaluator (opset 24)."""
    if set(options) - {"attn_mask", "scale", "softcap"} or 0 in (*q.shape, *k.shape):
        raise NotImplementedError
    onnx, reference = library("onnx"), library("onnx.reference")
    names = ["q", "k", "v"] + (["m"] if "attn_mask" in options else [])
    attributes = {"softcap": float(options["softcap"])} if "softcap" in options else {}
    if "scale" in options:  # attributes are float32, so the queries carry it
        attributes["scale"], q = 1.0, q * options["scale"]
    node = onnx.helper.make_node("Attention", names, ["y"], **attributes)
    kinds = {"m": onnx.TensorProto.BOOL}
    inputs = [
        onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.DOUBLE), None)
        for name in names
    ]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "attention", inputs, [output]),
        opset_imports=[onnx.helper.make_opsetid("", 24)],
    )
    feed = {name: np.swapaxes(x, 1, 2) for name, x in zip("qkv", (q, k, v), strict=True)}
    mask = options.get("attn_mask")
    if mask is not None:
        if not np.broadcast_to(mask, (q.shape[0], 1, q.shape[1], k.shape[1])).any(-1).all():
            raise NotImplementedError("a fully masked row")
        feed["m"] = np.broadcast_to(mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    return np.swapaxes(reference.ReferenceEvaluator(model).run(None, feed)[0], 1, 2)


def _torch_gradients(q: Any, k: Any, v: Any, do: Any, options: dict[str, Any]) -> Any:
    """Gradients by PyTorch's autograd, through scores masked and weighted from the scalar definition."""
    if 0 in (*q.shape, *k.shape):
        raise NotImplementedError
    torch = library("torch")
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    q_, k_, v_ = (x.transpose(1, 2) for x in leaves)
    k_, v_ = (x.repeat_interleave(group, dim=1) for x in (k_, v_))
    scale = options.get("scale")
    s = q_ @ k_.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if "softcap" in options:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    zero = np.zeros((*q.shape[:3], 1)), np.zeros((*k.shape[:3], 1))
    plain = {name: value for name, value in options.items() if name != "softcap"}
    added = np.array(
        [_score(b, h, i, j, *zero, {**plain, "scale": 1.0}) for b, h, i, j in np.ndindex(tuple(s.shape))]
    ).reshape(s.shape)
    s = s + torch.from_numpy(added)
    alive = torch.from_numpy(np.isfinite(added).any(-1, keepdims=True))
    p = torch.softmax(torch.where(alive, s, torch.zeros_like(s)), dim=-1) * alive
    if options.get("dropout_p"):
        rate, seed = options["dropout_p"], options["rng"]
        kept = [philox_word(*index, seed) >= math.ceil(rate * 2**32) for index in np.ndindex(tuple(s.shape))]
        p = p * torch.tensor(kept).reshape(s.shape) / (1 - rate)
    out = (p @ v_).transpose(1, 2)
    out.backward(torch.from_numpy(do))
    return tuple(leaf.grad.numpy() for leaf in leaves)


@oracle("attention.flash_backward")
def torch_autograd_flash(q: Any, k: Any, v: Any, o: Any, lse: Any, do: Any, **options: Any) -> Any:
    """PyTorch's gradients."""
    return _torch_gradients(q, k, v, do, options)


@oracle("attention.standard_backward")
def torch_autograd_standard(q: Any, k: Any, v: Any, do: Any, **options: Any) -> Any:
    """PyTorch's gradients."""
    return _torch_gradients(q, k, v, do, options)


@oracle("attention.online_softmax")
def scipy_softmax(x: Any, **options: Any) -> Any:
    """SciPy's softmax, with rows of nothing but -inf set to 0."""
    if x.shape[-1] == 0:
        raise NotImplementedError
    dead = np.isneginf(x).all(axis=-1, keepdims=True)
    return np.where(dead, 0.0, scipy.special.softmax(np.where(dead, 0.0, x), axis=-1))


@oracle("attention.multi_head", "attention.head_decomposition")
def torch_multi_head(x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, **options: Any) -> Any:
    """``torch.nn.functional.multi_head_attention_forward``, which wants square weights."""
    heads = options.pop("num_heads")
    causal = options.pop("causal", False)
    square = w_q.shape[0] == w_q.shape[1] == w_k.shape[1]
    if set(options) - {"b_o"} or not square or 0 in x.shape:
        raise NotImplementedError
    torch = library("torch")
    width = x.shape[2]
    tokens = torch.from_numpy(x).transpose(0, 1)
    packed = torch.from_numpy(np.concatenate([w_q, w_k, w_v], axis=1).T.copy())
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    bias = torch.from_numpy(options.get("b_o", np.zeros(width)))
    out, _ = torch.nn.functional.multi_head_attention_forward(
        tokens, tokens, tokens, width, heads, packed, torch.zeros(3 * width, dtype=torch.float64),
        None, None, False, 0.0, torch.from_numpy(w_o.T.copy()), bias, training=False, attn_mask=mask,
    )  # fmt: skip
    return out.transpose(0, 1).numpy()


@oracle("attention.multi_head", "attention.head_decomposition")
def looped_multi_head(x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, **options: Any) -> Any:
    """A loop over tokens and heads, on scalar attention."""
    heads, kv_heads = options["num_heads"], options.get("num_kv_heads") or options["num_heads"]
    context = options.get("context", x)
    if 0 in x.shape:
        raise NotImplementedError

    def cut(tokens: Any, w: Any, bias: Any, count: int) -> Any:
        y = np.array([[[math.fsum(t * c) for c in w.T] for t in row] for row in tokens])
        y = y + (0 if bias is None else bias)
        width = w.shape[1] // count
        return np.stack([y[:, :, h * width : (h + 1) * width] for h in range(count)], axis=2)

    q = cut(x, w_q, options.get("b_q"), heads)
    k = cut(context, w_k, options.get("b_k"), kv_heads)
    v = cut(context, w_v, options.get("b_v"), kv_heads)
    out = scalar_attention(q, k, v, causal=options.get("causal", False))
    joined = np.concatenate([out[:, :, h] for h in range(heads)], axis=2)
    return cut(joined, w_o, options.get("b_o"), 1)[:, :, 0]
