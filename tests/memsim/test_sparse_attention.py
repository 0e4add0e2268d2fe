"""The closed forms of the scores that sparse attentions use, against masks counted cell by cell."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.sparse_attention import bigbird_pairs, dilated_pairs, global_pairs, group_pairs, window_pairs
from refimpl import attention
from refimpl.attention.laws_sparse import seen
from refimpl.errors import DTypeError, OptionError
from refimpl.memory import Memory
from refimpl.registry import Case


def _counted(f: Any, N: int, heads: int = 1, **options: Any) -> int:
    """Count the scores that the last head of `f` uses, from the weights that it gives."""
    x = np.ones((1, N, heads, 1))
    return int(seen(f, Case((x, x, x), options))[0, -1].sum())


@given(N=st.integers(0, 30), radius=st.integers(0, 40), causal=st.booleans())
def test_window(N: int, radius: int, causal: bool) -> None:
    counted = _counted(attention.sliding_window_attention, N, radius=radius, causal=causal)
    assert window_pairs(N=N, radius=radius, causal=causal).total == counted


@given(N=st.integers(0, 30), radius=st.integers(0, 9), dilation=st.integers(1, 35))
def test_dilated(N: int, radius: int, dilation: int) -> None:
    counted = _counted(attention.dilated_window_attention, N, radius=radius, dilation=dilation)
    assert dilated_pairs(N=N, radius=radius, dilation=dilation).total == counted


@given(N=st.integers(0, 30), radius=st.integers(0, 9), share=st.floats(0, 1))
def test_global(N: int, radius: int, share: float) -> None:
    g = round(share * N)
    counted = _counted(attention.global_tokens_attention, N, radius=radius, is_global=np.arange(N) < g)
    assert global_pairs(N=N, radius=radius, global_tokens=g).total == counted


@given(size=st.integers(1, 3), w=st.sampled_from([1, 3, 5]), r=st.integers(0, 3), more=st.integers(0, 3))
def test_bigbird(size: int, w: int, r: int, more: int) -> None:
    blocks = 2 + w + r + more
    plan = attention.bigbird_plan(blocks, heads=1, random_blocks=r, window_blocks=w, rng=0)
    layout = {"block_size": size, "window_blocks": w, "plan": plan}
    counted = _counted(attention.bigbird_attention, size * blocks, **layout)
    estimate = bigbird_pairs(N=size * blocks, block_size=size, window_blocks=w, random_blocks=r)
    assert estimate.total == counted


@given(
    half=st.integers(1, 3), groups=st.integers(0, 4), shifted=st.booleans(), causal=st.booleans(),
    ends=st.sampled_from(["roll", "no_wrap"]),
)  # fmt: skip
def test_groups(half: int, groups: int, shifted: bool, causal: bool, ends: Any) -> None:
    N, f = 2 * half * groups, attention.shifted_groups_attention
    x = np.ones((1, N, 2, 1))
    mask = seen(f, Case((x, x, x), {"group_size": 2 * half, "causal": causal, "ends": ends}))
    estimate = group_pairs(N=N, group_size=2 * half, shifted=shifted, causal=causal, ends=ends)
    assert estimate.total == mask[0, int(shifted)].sum()


def test_groups_divide_the_cost_by_their_number() -> None:
    """LongLoRA: with groups of N/4 the scores are a quarter of those of full attention."""
    assert Fraction(8192**2, int(group_pairs(N=8192, group_size=2048).total)) == 4


def test_bigbird_of_the_paper_sees_512_keys() -> None:
    """N = 4096, b = 64: each query outside the global blocks sees (2 + 3 + 3) * 64 keys."""
    estimate = bigbird_pairs(N=4096)
    assert estimate["other queries"] == (4096 - 2 * 64) * 512
    assert estimate["window blocks that are global or beyond the ends"] == -2 * 64 * 64


@pytest.mark.parametrize("name", ["window", "bigbird"])
def test_operations_are_linear_in_the_length(name: str) -> None:
    """Twice the tokens cost twice the operations and traffic, half more than the scores need at most.

    A block of as many queries as the radius reads 3 radii of keys, where each query needs 2.
    """
    counted = []
    for N in (1024, 2048):
        x, memory = np.zeros((1, N, 1, 8)), Memory()
        if name == "window":
            attention.sliding_window_attention_banded(x, x, x, radius=64, memory=memory)
            pairs = window_pairs(N=N, radius=64).total
        else:
            plan = attention.bigbird_plan(N // 32, heads=1, rng=0)
            attention.bigbird_attention_blocked(x, x, x, block_size=32, plan=plan, memory=memory)
            pairs = bigbird_pairs(N=N, block_size=32).total
        assert pairs * 4 * 8 <= memory.flops <= 1.55 * float(pairs) * 4 * 8
        counted.append((memory.flops, memory.elements_read))
    assert all(2.0 <= b / a <= 2.1 for a, b in zip(*counted, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: global_pairs(N=4, radius=1, global_tokens=5), "at most N = 4, got 5"),
        (lambda: bigbird_pairs(N=100), "b must divide N"),
        (lambda: bigbird_pairs(N=640, window_blocks=2), "w be odd"),
        (lambda: bigbird_pairs(N=448), "at least 2 \\+ w \\+ r blocks, got 7"),
        (lambda: group_pairs(N=9, group_size=3), "even divisor of N = 9, got 3"),
        (lambda: window_pairs(N=4, radius=-1), "radius: expected at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()
    with pytest.raises(DTypeError, match="whole number"):
        window_pairs(N=4.0, radius=1)  # type: ignore[arg-type]
