"""What ``frugal bench growth`` measures: ways to mix N tokens, each on one sequence and one head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from refimpl.registry import Case, resolve

if TYPE_CHECKING:
    from refimpl.numerics import FloatArray

__all__ = ["METHODS", "NAMES", "Method"]

# Small, so that lengths and not widths decide; the layouts are those of the papers.
HEAD, RADIUS, BLOCK, MODEL, STATES, TAPS = 64, 64, 64, 8, 16, 4


class Method(NamedTuple):
    """One way to mix tokens.

    Attributes
    ----------
    name : str
        What ``--method`` and the rows call it.
    target : str
        ``module:function`` of what is run.
    theory : int
        The power of N with which time and memory grow.
    longest : int or None
        Lengths beyond it are left out: scores of N² would not fit.
    case : callable
        ``case(N)`` draws the inputs of a call.
    flops : callable
        ``flops(case)``, the price.
    """

    name: str
    target: str
    theory: int
    longest: int | None
    case: Callable[[int], Case]
    flops: Callable[[Case], int]

    @property
    def function(self) -> str:
        """The name of the function."""
        return self.target.partition(":")[2]

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        return resolve(self.target)


def _normal(*shape: int) -> FloatArray:
    """Return normal numbers, the same at every run."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _heads(length: int, **options: Any) -> Case:
    q, k, v = _normal(3, 1, length, 1, HEAD)
    return Case((q, k, v), options)


def _bigbird(length: int) -> Case:
    """Draw a call of BigBird with its random blocks, which are drawn once, when a model is built."""
    from refimpl.attention import bigbird_plan

    plan = bigbird_plan(-(-length // BLOCK), heads=1, rng=0)
    return _heads(length, block_size=BLOCK, plan=plan)


def _mamba(length: int) -> Case:
    """Draw a call of a whole block: projections, convolution, scan in chunks, gate."""
    inner, rank = 2 * MODEL, 1
    weights = {
        "w_in": _normal(MODEL, 2 * inner) / MODEL**0.5, "w_conv": _normal(inner, TAPS) / TAPS**0.5,
        "b_conv": _normal(inner), "w_x": _normal(inner, rank + 2 * STATES) / inner**0.5,
        "w_dt": _normal(rank, inner), "b_dt": _normal(inner), "A_log": _normal(inner, STATES),
        "D": _normal(inner), "w_out": _normal(inner, MODEL) / inner**0.5,
    }  # fmt: skip
    return Case((_normal(1, length, MODEL),), weights)


def _full_flops(case: Case) -> int:
    from memsim.flops import attention_flops

    return int(attention_flops(Tq=case.args[0].shape[1], D=HEAD).total)


def _priced(target: str) -> Callable[[Case], int]:
    """Return the price of operations that `target` computes from a call."""
    return lambda case: int(resolve(target)(case)["flops"])


METHODS = (
    Method("full", "refimpl.attention:scaled_dot_product_attention", 2, 16_384, _heads, _full_flops),
    Method(
        "sliding", "refimpl.attention:sliding_window_attention_banded", 1, None,
        lambda length: _heads(length, radius=RADIUS),
        _priced("memsim.prices.sparse_attention:sliding_window_flops"),
    ),
    Method(
        "bigbird", "refimpl.attention:bigbird_attention_blocked", 1, None, _bigbird,
        _priced("memsim.prices.sparse_attention:bigbird_flops"),
    ),
    Method(
        "linear", "refimpl.attention:linear_attention_chunked", 1, None,
        lambda length: _heads(length, causal=True),
        _priced("memsim.prices.linear_attention:chunked_flops"),
    ),
    Method(
        "mamba", "refimpl.ssm:mamba_block_chunked", 1, None, _mamba,
        _priced("memsim.prices.ssm:block_operations"),
    ),
)  # fmt: skip
NAMES = tuple(method.name for method in METHODS)
