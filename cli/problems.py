"""What ``frugal bench`` times: problems with their inputs, their work, and how to tell a wrong answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.parameters import PRECISIONS

if TYPE_CHECKING:
    from cli.projections import Layer
    from cuda_backend.torch_rivals import Rival
    from refimpl.numerics import Array

__all__ = ["Arrays", "Draw", "Problem", "ToHost", "attention_problem", "kernel", "sampled", "total_bytes"]

Arrays = tuple[Any, ...]
Draw = Callable[..., Any]
ToHost = Callable[[Any, str], "Array"]

SAMPLED_ROWS, SAMPLED_HEADS = 16, 4
SDPA_NAMES = tuple(f"torch SDPA {name}" for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "default"))


@dataclass(frozen=True, slots=True)
class Problem:
    """One computation that several functions can do.

    Attributes
    ----------
    operation, shape, dtype, causal
        What the rows of the result say of it.
    technique
        The record that our functions are registered under and held to.
    axes
        Axes of small cases, of that technique, that every tier of ours takes.
    work, compulsory_bytes, precision
        Operations; bytes of inputs and outputs, each moved once; the format whose peak counts.
    options
        Keyword arguments of our functions.
    operands
        ``operands(draw, seed)`` gives a set for our functions, and the same for those of others.
    check
        ``check(operands, output, to_host)`` says what is wrong with an output of this size, or None.
    rival_names, rivals
        Functions of others, and ``rivals()``, which gives those that are there, by name.
    functions
        ``functions(backend)`` gives ours by name, where they are registered under no technique of their own:
        `check` alone judges them.  It imports no kernel, so that any machine can tell the names.
    error
        ``error(operands, output, to_host)``, the rms error relative to what an output without quantisation
        would be: shown beside the time.
    layer
        Which layers of a model have this size, if it is asked for as theirs.
    """

    operation: str
    shape: tuple[int, ...]
    dtype: str
    causal: bool | None
    technique: str
    axes: Mapping[str, Any]
    work: int
    compulsory_bytes: int
    precision: str
    options: Mapping[str, Any]
    operands: Callable[[Draw, int], tuple[Arrays, Arrays]]
    check: Callable[[Arrays, Any, ToHost], str | None]
    rival_names: tuple[str, ...]
    rivals: Callable[[], Mapping[str, Rival]]
    functions: Callable[[str], Mapping[str, Callable[..., Any]]] | None = None
    error: Callable[[Arrays, Any, ToHost], float] | None = None
    layer: Layer | None = None


def attention_problem(shape: Sequence[int], dtype: str, causal: bool) -> Problem:
    """Return the forward pass of attention; `shape` is (B, H, N, D), or (B, H, Hkv, N, D) with grouped heads.

    Two products of 2 N² D operations for each head, of which a causal mask leaves half: as FlashAttention's
    authors count.

    >>> attention_problem((1, 2, 8, 4), "float16", True).work
    1024
    """
    B, H, *rest, N, D = shape
    (kv_heads,) = rest or (H,)
    itemsize, precision = PRECISIONS[dtype]

    def operands(draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
        heads = enumerate((H, kv_heads, kv_heads))
        arrays = tuple(draw((B, N, count, D), dtype, 3 * seed + index) for index, count in heads)
        return arrays, arrays

    def rivals() -> Mapping[str, Rival]:
        from cuda_backend.torch_rivals import attention_rivals

        return attention_rivals(causal)

    return Problem(
        operation="attention forward",
        shape=tuple(shape),
        dtype=dtype,
        causal=causal,
        technique="attention.flash",
        axes={"D": 8, "Dv": 8, "extra": "none"},
        work=4 * B * H * N * N * D // (2 if causal else 1),
        compulsory_bytes=2 * B * (H + kv_heads) * N * D * itemsize,
        precision=precision,
        options={"causal": causal},
        operands=operands,
        check=partial(_check_attention, dtype, causal),
        rival_names=(*SDPA_NAMES, "torch FlexAttention"),
        rivals=rivals,
    )


def kernel(name: str) -> Callable[..., Any]:
    """Return a function of ours on a GPU that is imported when it is called: its import needs numba."""

    def called(*arrays: Any, **options: Any) -> Any:
        import cuda_backend

        return getattr(cuda_backend, name)(*arrays, **options)

    return called


def sampled(count: int, most: int) -> Any:
    """Return the first and the last index, and some between them."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def _check_attention(dtype: str, causal: bool, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold sampled rows of sampled heads to the reference in float64, as `refimpl.tolerances` does."""
    from refimpl import registry
    from refimpl.registry import Case
    from refimpl.testing import dtype_named
    from refimpl.tolerances import baseline_limits, mismatch

    q, k, v = (to_host(x, dtype) for x in operands)
    out = to_host(output, dtype)
    B, N, H, _ = out.shape
    rows = sampled(N, SAMPLED_ROWS)
    mask = np.arange(N)[None, :] <= rows[:, None] if causal else None
    heads = sampled(B * H, SAMPLED_HEADS)
    for batch, head in ((int(index) // H, int(index) % H) for index in heads):
        part = slice(batch, batch + 1), slice(None), slice(head, head + 1)
        kv_head = head // (H // k.shape[2])
        keys = slice(batch, batch + 1), slice(None), slice(kv_head, kv_head + 1)
        case = Case((q[part][:, rows], k[keys], v[keys]), {} if mask is None else {"attn_mask": mask})
        truth, _, limits, invalid = baseline_limits(registry.get("attention.dense"), case, dtype_named(dtype))
        if invalid:
            return f"the sampled rows say nothing: {invalid}"
        problem = mismatch(
            out[part][:, rows], truth["output"], limits["output"], name=f"batch {batch}, head {head}"
        )
        if problem:
            return problem
    return None


def total_bytes(arrays: Arrays) -> int:
    """Return the bytes of arrays, of tuples of them too; sizes among them count nothing.

    >>> total_bytes((np.zeros(3, np.int8), (np.zeros(2, np.float32),)))
    11
    """
    total = 0
    for item in arrays:
        if isinstance(item, tuple):
            total += total_bytes(item)
        elif hasattr(item, "shape"):
            total += math.prod(item.shape) * int(item.dtype.itemsize)
    return total
