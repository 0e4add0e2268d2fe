"""``frugal bench decode``: a few new queries over a long cache, beside SDPA and a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.parameters import PRECISIONS
from cli.problems import SAMPLED_HEADS, Arrays, Draw, Problem, ToHost, kernel, sampled

if TYPE_CHECKING:
    from cuda_backend.torch_rivals import Rival

__all__ = ["decode_problems"]

PAGE = 64
BLOCKS = 264  # two for each processor of the largest GPU here
COPY = "torch copy of as many bytes"


def decode_problems(shape: Sequence[int], dtype: str, splits: int | None = None) -> list[Problem]:
    """Return decoding over a cache that lies whole, and over one in pages of 64 tokens out of order.

    `shape` is (B, Hq, Hkv, Tk, D).  Without a number of parts, portable kernels get
    as many as fill the GPU twice.  Outputs are judged by the reference on sampled heads of the very case.

    >>> [problem.compulsory_bytes for problem in decode_problems((1, 2, 1, 64, 8), "float16")]
    [2112, 2112]
    """
    B, Hq, Hkv, Tk, D = shape
    itemsize, precision = PRECISIONS[dtype]
    moved = (2 * B * Hkv * Tk * D + 2 * B * Hq * D) * itemsize
    parts = splits or max(1, min(-(-BLOCKS // (B * Hkv)), Tk // PAGE))
    return [
        Problem(
            operation=operation,
            shape=tuple(shape),
            dtype=dtype,
            causal=None,
            technique=technique,
            axes={},
            work=4 * B * Hq * Tk * D,
            compulsory_bytes=moved,
            precision=precision,
            options={},
            operands=partial(operands, shape, dtype),
            check=partial(check, dtype),
            rival_names=("torch SDPA", COPY),
            rivals=partial(_rivals, moved),
            functions=partial(_functions, technique, splits, parts),
        )
        for operation, technique, operands, check in (
            ("split-KV", "attention.split_kv", _whole, _check_whole),
            ("paged", "attention.paged", _in_pages, _check_pages),
        )
    ]


def _functions(
    technique: str, splits: int | None, parts: int, backend: str
) -> Mapping[str, Callable[..., Any]]:
    """Return ours by tier; lengths of a paged cache come last, for they lie on the GPU.

    Tensor cores cut the cache by themselves, if nobody says otherwise.
    """
    paged = technique == "attention.paged"
    f = kernel("paged_attention" if paged else "split_kv_attention")

    def called(tier: str, *operands: Any) -> Any:
        *arrays, last = operands
        own = {"splits": splits} if tier == "ampere" else {"splits": parts}
        if paged:
            return f(*arrays, k_lengths=last, tier=tier, **own)
        return f(*arrays, last, tier=tier, **own)

    tiers = ("portable",) if backend == "cudasim" else ("ampere", "portable")
    return {f"frugal {tier}": partial(called, tier) for tier in tiers}


def _whole(shape: Sequence[int], dtype: str, draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
    B, Hq, Hkv, Tk, D = shape
    sizes = ((B, 1, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, D))
    arrays = tuple(draw(size, dtype, 3 * seed + index) for index, size in enumerate(sizes))
    return arrays, arrays


def _in_pages(shape: Sequence[int], dtype: str, draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
    from cuda_backend.torch_ops import beside

    B, Hq, Hkv, Tk, D = shape
    count = -(-Tk // PAGE)
    q, *pages = (
        draw(size, dtype, 3 * seed + index)
        for index, size in enumerate(((B, 1, Hq, D), *((B * count, PAGE, Hkv, D),) * 2))
    )
    table = np.random.default_rng(seed).permutation(B * count).reshape(B, count).astype(np.int32)
    lengths = beside(np.full(B, Tk, np.int32), q)
    _, theirs = _whole(shape, dtype, draw, seed)
    return (q, *pages, beside(table, q), lengths), theirs


def _check_whole(dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    q, k, v = (to_host(x, dtype) for x in operands)
    return _check(dtype, q, lambda b, g: (k[b, :, g], v[b, :, g]), k.shape[2], to_host(output, dtype))


def _check_pages(dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    q, k, v = (to_host(x, dtype) for x in operands[:3])
    table, lengths = (to_host(x, "int32") for x in operands[3:])

    def cache(b: int, g: int) -> tuple[Any, Any]:
        found = (x[table[b]][:, :, g].reshape(-1, x.shape[3])[: int(lengths[b])] for x in (k, v))
        return next(found), next(found)

    return _check(dtype, q, cache, k.shape[2], to_host(output, dtype))


def _check(
    dtype: str, q: Any, cache: Callable[[int, int], tuple[Any, Any]], kv_heads: int, output: Any
) -> str | None:
    """Hold the queries of sampled key heads to attention over all their keys, in float64."""
    from refimpl import registry
    from refimpl.registry import Case
    from refimpl.testing import dtype_named
    from refimpl.tolerances import baseline_limits, mismatch

    group = q.shape[2] // kv_heads
    for index in sampled(q.shape[0] * kv_heads, SAMPLED_HEADS):
        b, g = divmod(int(index), kv_heads)
        heads = slice(g * group, (g + 1) * group)
        k, v = (x[None, :, None] for x in cache(b, g))
        case = Case((q[b : b + 1, :, heads], k, v), {})
        truth, _, limits, invalid = baseline_limits(registry.get("attention.dense"), case, dtype_named(dtype))
        if invalid:
            return f"the sampled heads say nothing: {invalid}"
        found = output[b : b + 1, :, heads]
        problem = mismatch(found, truth["output"], limits["output"], name=f"batch {b}, key head {g}")
        if problem:
            return problem
    return None


def _rivals(count: int) -> Mapping[str, Rival]:
    """Return SDPA, and a copy of half the cache: it writes what it reads."""
    from cuda_backend.torch_rivals import byte_copy_rival, decode_rivals

    copy = byte_copy_rival(count)
    return {**decode_rivals(), COPY: copy._replace(prepare=lambda q, k, _: copy.prepare(q, k))}
