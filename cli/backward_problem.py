"""The backward pass of attention as a problem of ``frugal bench``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.parameters import PRECISIONS
from cli.problems import SAMPLED_HEADS, SAMPLED_ROWS, SDPA_NAMES, Arrays, Draw, Problem, ToHost, sampled

if TYPE_CHECKING:
    from cuda_backend.torch_rivals import Rival

__all__ = ["attention_backward_problem"]


def attention_backward_problem(shape: Sequence[int], dtype: str, causal: bool) -> Problem:
    """Return the backward pass of attention; `shape` as for `attention_problem`.

    Five products where the forward pass has two, whatever a kernel computes twice: as FlashAttention's
    authors count.  The forward pass is ours, and not timed.

    >>> attention_backward_problem((1, 2, 8, 4), "float16", False).work
    5120
    """
    B, H, *rest, N, D = shape
    (kv_heads,) = rest or (H,)
    itemsize, precision = PRECISIONS[dtype]

    def operands(draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
        from cuda_backend import flash_attention

        heads = enumerate((H, kv_heads, kv_heads, H))
        q, k, v, do = (draw((B, N, count, D), dtype, 4 * seed + index) for index, count in heads)
        out, lse = flash_attention(q, k, v, causal=causal, return_lse=True, tier="auto")
        return (q, k, v, out, lse, do), (q, k, v, do)

    def rivals() -> Mapping[str, Rival]:
        from cuda_backend.torch_rivals import attention_backward_rivals

        return attention_backward_rivals(causal)

    return Problem(
        operation="attention backward",
        shape=tuple(shape),
        dtype=dtype,
        causal=causal,
        technique="attention.flash_backward",
        axes={"D": 8, "Dv": 8, "extra": "none"},
        work=10 * B * H * N * N * D // (2 if causal else 1),
        compulsory_bytes=4 * B * (H + kv_heads) * N * D * itemsize + 4 * B * H * N,
        precision=precision,
        options={"causal": causal},
        operands=operands,
        check=partial(_check, dtype, causal),
        rival_names=SDPA_NAMES,
        rivals=rivals,
    )


def _check(dtype: str, causal: bool, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold dQ of sampled queries, and dK and dV of sampled keys, to the reference in float64.

    Given the log-sum-exp, dQ of a query needs that query and all keys, dK of a key that key and all queries.
    """
    from refimpl import registry
    from refimpl.registry import Case
    from refimpl.testing import dtype_named
    from refimpl.tolerances import baseline_limits, mismatch

    q, k, v, out, lse, do = (to_host(x, dtype if x.ndim == 4 else "float32") for x in operands)
    B, N, kv_heads, _ = k.shape
    group = q.shape[2] // kv_heads
    every, some = np.arange(N), sampled(N, SAMPLED_ROWS)
    for index in sampled(B * kv_heads, SAMPLED_HEADS):
        batch, head = divmod(int(index), kv_heads)
        keys = slice(batch, batch + 1), slice(None), slice(head, head + 1)
        part = keys[0], keys[1], slice(head * group, (head + 1) * group)
        for rows, columns, names in ((some, every, ("dq",)), (every, some, ("dk", "dv"))):
            queries = [x[part][:, rows] for x in (q, out, do)]
            seen = [x[keys][:, columns] for x in (k, v)]
            args = queries[0], *seen, queries[1], lse[part[0], part[2], rows], queries[2]
            options: dict[str, Any] = {"attn_mask": columns[None, :] <= rows[:, None]} if causal else {}
            # One tile, so that the baseline rounds dQ once: tile by tile its error would grow with N.
            options["block_sizes"] = len(rows), len(columns)
            truth, _, limits, invalid = baseline_limits(
                registry.get("attention.flash_backward"), Case(args, options), dtype_named(dtype)
            )
            if invalid:
                return f"the sampled rows say nothing: {invalid}"
            for name in names:
                found = to_host(getattr(output, name), dtype)
                found = found[part][:, rows] if name == "dq" else found[keys][:, columns]
                where = f"{name} of batch {batch}, key head {head}"
                problem = mismatch(found, truth[name], limits[name], name=where)
                if problem:
                    return problem
    return None
