"""Oracles of sparse attention: scalar loops over what a token sees, flex_attention, transformers."""

from __future__ import annotations

import collections
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.csgraph
import scipy.sparse.linalg

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.attention import scalar_attention

Sees = Callable[[int, int, int, int], bool]  # (b, h, i, j): may query i of head h see key j


def _scalar(q: Any, k: Any, v: Any, sees: Sees, options: dict[str, Any]) -> Any:
    """Scalar attention over the pairs of a pattern, written down one by one."""
    given = options.pop("attn_mask", None)
    full = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    mask = np.zeros(full, dtype=bool)
    for b, h, i, j in np.ndindex(full):
        mask[b, h, i, j] = sees(b, h, i, j) and (given is None or np.broadcast_to(given, full)[b, h, i, j])
    return scalar_attention(q, k, v, attn_mask=mask, **options)


def _short(q: Any) -> None:
    if q.shape[0] * q.shape[1] ** 2 * q.shape[2] > 1500:
        raise NotImplementedError("too long for scalar loops")


@oracle("attention.sliding_window")
def scalar_window(q: Any, k: Any, v: Any, *, radius: int, **options: Any) -> Any:
    """Attention one number at a time, over the keys at distance `radius` or less."""
    _short(q)
    return _scalar(q, k, v, lambda b, h, i, j: i - radius <= j <= i + radius, options)


def flex(q: Any, k: Any, v: Any, sees: Callable[..., Any], options: dict[str, Any]) -> Any:
    """``torch.nn.attention.flex_attention`` with a `mask_mod`, eager: nothing is compiled on a CPU."""
    if set(options) - {"causal", "scale"} or 0 in (*q.shape, *v.shape):
        raise NotImplementedError
    torch = library("torch")
    attention = library("torch.nn.attention.flex_attention")
    causal = options.get("causal", False)

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return sees(b, h, i, j) & ((j <= i) if causal else torch.ones_like(i, dtype=torch.bool))

    T = q.shape[1]
    mask = attention.create_block_mask(mask_mod, q.shape[0], q.shape[2], T, T, device="cpu", BLOCK_SIZE=16)
    heads = [torch.from_numpy(np.ascontiguousarray(np.swapaxes(x, 1, 2))) for x in (q, k, v)]
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    with warnings.catch_warnings():  # it says once that eager mode makes the whole score matrix
        warnings.simplefilter("ignore", UserWarning)
        out = attention.flex_attention(*heads, block_mask=mask, scale=options.get("scale"), **grouped)
    return out.transpose(1, 2).numpy()


@oracle("attention.sliding_window")
def flex_window(q: Any, k: Any, v: Any, *, radius: int, **options: Any) -> Any:
    """flex_attention with the band as its mask."""
    return flex(q, k, v, lambda b, h, i, j: (i - j <= radius) & (j - i <= radius), options)


@oracle("attention.bigbird")
def scalar_bigbird(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """Attention one number at a time, over the keys whose block a query's block sees."""
    _short(q)
    size, window = options.pop("block_size"), options.pop("window_blocks")
    last = (q.shape[1] - 1) // size
    everywhere = [block if block >= 0 else last + 1 + block for block in options.pop("global_blocks")]
    plan = options.pop("plan")

    def sees(b: int, h: int, i: int, j: int) -> bool:
        mine, other = i // size, j // size
        if mine in everywhere or other in everywhere:
            return True
        return 2 * abs(mine - other) < window or other in plan[h, mine]

    return _scalar(q, k, v, sees, options)


@oracle("attention.bigbird")
def flex_bigbird(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """flex_attention with BigBird's blocks looked up in a table."""
    if 0 in q.shape:
        raise NotImplementedError
    torch = library("torch")
    size, window = options.pop("block_size"), options.pop("window_blocks")
    last = (q.shape[1] - 1) // size
    table = np.zeros((q.shape[2], last + 1, last + 1), dtype=bool)
    for block in options.pop("global_blocks"):
        table[:, block] = table[:, :, block] = True
    for h, i, draw in np.argwhere(options["plan"] >= 0):
        table[h, i, options["plan"][h, i, draw]] = True
    del options["plan"]
    blocks = torch.from_numpy(table)
    return flex(
        q, k, v, lambda b, h, i, j: blocks[h, i // size, j // size]
        | ((i // size - j // size).abs() * 2 < window), options,
    )  # fmt: skip


@oracle("attention.dilated_window")
def scalar_dilated(q: Any, k: Any, v: Any, *, radius: int, dilation: Any, **options: Any) -> Any:
    """Attention one number at a time, over the keys ``i + m dilation``."""
    _short(q)

    def sees(b: int, h: int, i: int, j: int) -> bool:
        gap = int(np.ravel(dilation)[h % np.size(dilation)])
        return j in [i + m * gap for m in range(-radius, radius + 1)]

    return _scalar(q, k, v, sees, options)


@oracle("attention.dilated_window")
def flex_dilated(q: Any, k: Any, v: Any, *, radius: int, dilation: Any, **options: Any) -> Any:
    """flex_attention with a mask of gaps, those of each head looked up."""
    torch = library("torch")
    gaps = torch.from_numpy(np.broadcast_to(dilation, q.shape[2]).copy())
    return flex(
        q, k, v, lambda b, h, i, j: ((i - j) % gaps[h] == 0) & ((i - j).abs() <= radius * gaps[h]), options
    )  # fmt: skip


@oracle("attention.global_tokens")
def scalar_global(q: Any, k: Any, v: Any, *, radius: int, is_global: Any, **options: Any) -> Any:
    """Attention one number at a time, over near keys and global ones."""
    _short(q)
    hub = np.broadcast_to(is_global, q.shape[:2])
    return _scalar(q, k, v, lambda b, h, i, j: bool(abs(i - j) <= radius or hub[b, i] or hub[b, j]), options)


@oracle("attention.global_tokens")
def flex_global(q: Any, k: Any, v: Any, *, radius: int, is_global: Any, **options: Any) -> Any:
    """flex_attention with a band and crosses."""
    torch = library("torch")
    hub = torch.from_numpy(np.broadcast_to(is_global, q.shape[:2]).copy())
    return flex(q, k, v, lambda b, h, i, j: ((i - j).abs() <= radius) | hub[b, i] | hub[b, j], options)


@oracle("attention.longformer")
def scalar_longformer(*args: Any, radius: int, is_global: Any, **options: Any) -> Any:
    """Two scalar attentions, a query at a time taken from the one that is its own."""
    _short(args[0])
    if options.get("return_lse"):
        raise NotImplementedError
    hub = np.broadcast_to(is_global, args[0].shape[:2])
    everywhere = scalar_attention(*args[3:], **options)
    out = _scalar(*args[:3], lambda b, h, i, j: bool(abs(i - j) <= radius or hub[b, j]), options)
    for b, i in np.ndindex(hub.shape):
        if hub[b, i]:
            out[b, i] = everywhere[b, i]
    return out


@oracle("attention.shifted_groups")
def scalar_groups(q: Any, k: Any, v: Any, *, group_size: int, ends: str, **options: Any) -> Any:
    """Scalar attention on every group alone, the sequence of a shifted head rotated by hand."""
    _short(q)
    if set(options) - {"causal", "return_lse", "scale"}:
        raise NotImplementedError
    causal = bool(options.get("causal"))
    length, half = q.shape[1], group_size // 2
    out = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.zeros((q.shape[0], q.shape[2], length))
    for h in range(q.shape[2]):
        order = list(range(length))
        cuts = list(range(0, length + 1, group_size))
        if h >= q.shape[2] // 2:
            if ends == "roll":
                order = order[half:] + order[:half]
            else:
                cuts = sorted({0, length, *range(half, length, group_size)})
        for start, stop in itertools.pairwise(cuts):
            tokens, g = order[start:stop], h // (q.shape[2] // k.shape[2])
            part = scalar_attention(
                q[:, tokens, h : h + 1], k[:, tokens, g : g + 1], v[:, tokens, g : g + 1],
                causal="top_left" if causal else False, return_lse=True,
            )  # fmt: skip
            out[:, tokens, h], lse[:, h, tokens] = part[0][:, :, 0], part[1][:, 0]
    return (out, lse) if options.get("return_lse") else out


def _symmetric(mask: Any) -> Any:
    """The graph with loops at single tokens, as floats; small ones say nothing of eigenvalues."""
    graph = np.logical_or(mask, mask.T).astype(float)
    lonely = graph.sum(axis=1) == 0
    graph[lonely, lonely] = 1.0
    if len(graph) < 2:
        raise NotImplementedError
    return graph


@oracle("attention.rapid_mixing")
def scipy_mixing(mask: Any) -> Any:
    """The generalized eigenvalues of the Laplacian by SciPy's eigsh, and Floyd and Warshall's distances."""
    graph = _symmetric(mask)
    if len(graph) < 5:
        raise NotImplementedError
    degree = graph.sum(axis=1)
    shifted = scipy.sparse.csc_array(np.diag(degree) + graph)  # (D + A) x = (2 - μ) D x
    top = scipy.sparse.linalg.eigsh(
        shifted, k=2, M=scipy.sparse.csc_array(np.diag(degree)), which="LA", return_eigenvectors=False
    )
    return 2.0 - float(np.min(top)), scipy.sparse.csgraph.floyd_warshall(graph, unweighted=True).max()


@oracle("attention.rapid_mixing")
def walked_mixing(mask: Any) -> Any:
    """The eigenvalues of the walk itself, which is not symmetric, and a search from every token."""
    graph = _symmetric(mask)
    walk = graph / graph.sum(axis=1, keepdims=True)
    second = np.sort(np.linalg.eigvals(walk).real)[-2]
    longest = 0.0
    for source in range(len(graph)):
        steps, queue = {source: 0}, collections.deque([source])
        while queue:
            here = queue.popleft()
            for other in np.flatnonzero(graph[here]).tolist():
                if other not in steps:
                    steps[other] = steps[here] + 1
                    queue.append(other)
        longest = max(longest, max(steps.values()) if len(steps) == len(graph) else float("inf"))
    return 1.0 - second, longest
