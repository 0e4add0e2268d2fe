"""``frugal bench int8-attention``: attention with Q Kᵀ in int8, codes made inside the timing, beside fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cli.problems import (
    SAMPLED_HEADS,
    SAMPLED_ROWS,
    Arrays,
    Problem,
    ToHost,
    attention_problem,
    kernel,
    sampled,
)
from refimpl.attention.int8_attention import DEFAULT_BLOCKS
from refimpl.numerics import Array

__all__ = ["int8_attention_problem"]

INT8, FP16 = "frugal int8", "frugal fp16"


class _Head(NamedTuple):
    """Rows of a head: attention in float64, that of what the codes stand for, and that in 16 bits."""

    batch: int
    head: int
    exact: Array
    coded: Array
    baseline: Array


def int8_attention_problem(shape: Sequence[int], dtype: str, causal: bool) -> Problem:
    """Return attention of normal numbers, `shape` as for `cli.problems.attention_problem`.

    >>> int8_attention_problem((1, 2, 8, 4), "float16", True).operation
    'attention in int8'
    """
    judge = _Judge(dtype, causal)
    return replace(
        attention_problem(shape, dtype, causal),
        operation="attention in int8",
        technique="attention.int8",
        functions=_functions,
        check=judge.check,
        error=judge.error,
    )


def _functions(backend: str) -> Mapping[str, Callable[..., Any]]:
    if backend == "cudasim":
        return {INT8: kernel("int8_attention")}
    return {INT8: kernel("int8_attention_hopper"), FP16: kernel("flash_attention_hopper")}


class _Judge:
    """Sampled rows of sampled heads of one set of inputs, worked out once for all functions."""

    def __init__(self, dtype: str, causal: bool) -> None:
        self._dtype, self._causal = dtype, causal
        self._operands: Arrays = ()
        self._heads: list[_Head] = []

    def check(self, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
        """Hold rows to attention of what the codes stand for, or to attention itself, whichever is computed.

        Both within twice the error that attention has in this format, and one unit in the last place.
        """
        from refimpl.numerics import ulp
        from refimpl.testing import dtype_named
        from refimpl.tolerances import Limit, mismatch

        for head, found in self._found(operands, output, to_host):
            error = np.abs(head.baseline - head.exact).max()
            limit = Limit(np.asarray(2 * error + ulp(np.abs(head.exact).max(), dtype_named(self._dtype))))
            wrong = [mismatch(found, truth, limit) for truth in (head.coded, head.exact)]
            if all(wrong):
                return f"batch {head.batch}, head {head.head}: {wrong[0]}"
        return None

    def error(self, operands: Arrays, output: Any, to_host: ToHost) -> float:
        """Return the rms error of sampled rows against exact attention, relative to its rms."""
        pairs = [(found, head.exact) for head, found in self._found(operands, output, to_host)]
        noise = sum(float(np.square(found - exact).sum()) for found, exact in pairs)
        return float(np.sqrt(noise / sum(float(np.square(exact).sum()) for _, exact in pairs)))

    def _found(self, operands: Arrays, output: Any, to_host: ToHost) -> Iterator[tuple[_Head, Array]]:
        """Yield heads, and the sampled rows of each in an output."""
        from refimpl.numerics import widen

        if self._operands is not operands:
            self._heads, self._operands = (
                list(_truths(self._dtype, self._causal, operands, to_host)),
                operands,
            )
        out = to_host(output, self._dtype)
        rows = sampled(out.shape[1], SAMPLED_ROWS)
        for head in self._heads:
            found = out[head.batch : head.batch + 1][:, rows, head.head : head.head + 1]
            yield head, widen(found).astype(np.float64)


def _truths(dtype: str, causal: bool, operands: Arrays, to_host: ToHost) -> Iterator[_Head]:
    from refimpl.attention import key_mean, quantize_token_blocks, scaled_dot_product_attention
    from refimpl.numerics import widen

    q, k, v = (to_host(x, dtype) for x in operands)
    B, N, H, _ = q.shape
    rows = sampled(N, SAMPLED_ROWS)
    mask = np.arange(N)[None, :] <= rows[:, None] if causal else None
    for index in sampled(B * H, SAMPLED_HEADS):
        batch, head = int(index) // H, int(index) % H
        places = (q, head), (k, head // (H // k.shape[2])), (v, head // (H // k.shape[2]))
        given = [array[batch : batch + 1, :, at : at + 1] for array, at in places]
        queries, keys, values = (widen(array).astype(np.float64) for array in given)
        codes = (
            quantize_token_blocks(queries, block=DEFAULT_BLOCKS[0]),
            quantize_token_blocks(keys, block=DEFAULT_BLOCKS[1], mean=key_mean(keys)),
        )
        restored = [
            found.codes * np.repeat(found.scale, block, axis=2)[0, 0, :N][None, :, None, None]
            for found, block in zip(codes, DEFAULT_BLOCKS, strict=True)
        ]
        baseline = scaled_dot_product_attention(given[0][:, rows], given[1], given[2], attn_mask=mask)
        yield _Head(
            batch,
            head,
            scaled_dot_product_attention(queries[:, rows], keys, values, attn_mask=mask),
            scaled_dot_product_attention(restored[0][:, rows], restored[1], values, attn_mask=mask),
            widen(baseline).astype(np.float64),
        )
