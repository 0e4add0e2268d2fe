"""What ``frugal bench growth`` measures: ways to mix N tokens, each on one sequence and one head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from refimpl.memory import Memory
    from refimpl.numerics import FloatArray

__all__ = ["METHODS", "NAMES", "Call", "Method"]

# Small, so that lengths and not widths decide; the layouts are those of the papers.
HEAD, RADIUS, BLOCK, MODEL, STATES, TAPS = 32, 64, 64, 8, 16, 4

Call = Callable[["Memory"], Any]


class Method(NamedTuple):
    """One way to mix tokens.

    Attributes
    ----------
    name, function
        What ``--method`` and the rows call it, and what is run.
    theory
        The power of N with which time and memory grow.
    longest
        Lengths beyond it are left out: scores of N² would not fit.
    prepare
        ``prepare(N)`` draws the inputs and returns ``call(memory)``.
    flops
        ``flops(N)``, from memsim; where it is None the call counts its operations, as prices are held to.
    """

    name: str
    function: str
    theory: int
    longest: int | None
    prepare: Callable[[int], Call]
    flops: Callable[[int], int] | None = None


def _normal(*shape: int) -> FloatArray:
    """Return normal numbers, the same at every run."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _heads(length: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    q, k, v = _normal(3, 1, length, 1, HEAD)
    return q, k, v


def _full(length: int) -> Call:
    from refimpl.attention import scaled_dot_product_attention

    q, k, v = _heads(length)
    return lambda _memory: scaled_dot_product_attention(q, k, v)


def _full_flops(length: int) -> int:
    from memsim.flops import attention_flops

    return int(attention_flops(Tq=length, D=HEAD).total)


def _window(length: int) -> Call:
    from refimpl.attention import sliding_window_attention_banded

    q, k, v = _heads(length)
    return lambda memory: sliding_window_attention_banded(q, k, v, radius=RADIUS, memory=memory)


def _bigbird(length: int) -> Call:
    """Prepare BigBird with its random blocks, which are drawn when a model is built."""
    from refimpl.attention import bigbird_attention_blocked, bigbird_plan

    q, k, v = _heads(length)
    plan = bigbird_plan(-(-length // BLOCK), heads=1, rng=0)
    return lambda memory: bigbird_attention_blocked(q, k, v, block_size=BLOCK, plan=plan, memory=memory)


def _linear(length: int) -> Call:
    from refimpl.attention import linear_attention_chunked

    q, k, v = _heads(length)
    return lambda memory: linear_attention_chunked(q, k, v, causal=True, memory=memory)


def _mamba(length: int) -> Call:
    """Prepare a whole block: projections, convolution, scan in chunks, gate."""
    from refimpl.ssm import mamba_block_chunked

    inner, rank = 2 * MODEL, 1
    weights = {
        "w_in": _normal(MODEL, 2 * inner) / MODEL**0.5, "w_conv": _normal(inner, TAPS) / TAPS**0.5,
        "b_conv": _normal(inner), "w_x": _normal(inner, rank + 2 * STATES) / inner**0.5,
        "w_dt": _normal(rank, inner), "b_dt": _normal(inner), "A_log": _normal(inner, STATES),
        "D": _normal(inner), "w_out": _normal(inner, MODEL) / inner**0.5,
    }  # fmt: skip
    block: Callable[..., Any] = partial(mamba_block_chunked, _normal(1, length, MODEL), **weights)
    return lambda memory: block(memory=memory)


def _mamba_flops(length: int) -> int:
    """Return what is priced; the call would not count the recurrence inside its chunks."""
    from memsim.ssm import mamba_flops

    return int(mamba_flops(T=length, M=MODEL, D=2 * MODEL, N=STATES, R=1, k=TAPS).total)


METHODS = (
    Method("full", "scaled_dot_product_attention", 2, 16_384, _full, _full_flops),
    Method("sliding", "sliding_window_attention_banded", 1, None, _window),
    Method("bigbird", "bigbird_attention_blocked", 1, None, _bigbird),
    Method("linear", "linear_attention_chunked", 1, None, _linear),
    Method("mamba", "mamba_block_chunked", 1, None, _mamba, _mamba_flops),
)
NAMES = tuple(method.name for method in METHODS)
