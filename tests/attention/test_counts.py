"""What the tiled references move, counted as they run, equals the models to the element and to the byte."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsim.attention_io import attention_traffic
from refimpl import registry
from refimpl.attention import (
    block_sizes_for,
    flash_attention,
    flash_attention_steps,
    flash_attention_vjp,
    scaled_dot_product_attention,
    standard_attention,
)
from refimpl.consistency import check_price
from refimpl.errors import CapacityError, OptionError
from refimpl.memory import Memory
from refimpl.registry import Case
from refimpl.tolerances import cast

registry.load()

LENGTHS = st.integers(0, 40)
DTYPES = st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
SHAPES = st.fixed_dictionaries(
    {"Tq": LENGTHS, "Tk": LENGTHS, "D": st.integers(1, 9), "Dv": st.integers(1, 9), "H": st.integers(1, 2)}
)


def _arrays(shape: dict[str, int], dtype: Any, heads: int = 1) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    sizes = (shape["Tq"], shape["H"], shape["D"]), (shape["Tk"], 1, shape["D"]), (shape["Tk"], 1, shape["Dv"])
    arrays = tuple(rng.standard_normal((heads, *size)) for size in sizes)
    return cast(Case(arrays), np.dtype(dtype)).args


def _assert_priced(name: str, case: Case) -> None:
    for price in registry.PRICES:
        if price.technique == name:
            assert check_price(price, registry.get(name), case) is None
            return
    pytest.fail(f"{name} has no price")


@given(shape=SHAPES, dtype=DTYPES, sram=st.integers(1, 400), initialized=st.booleans(), narrow=st.booleans())
def test_algorithm_1(shape: dict[str, int], dtype: Any, sram: int, initialized: bool, narrow: bool) -> None:
    arrays = _arrays(shape, dtype)
    options = {"sram": sram, "count_initialization": initialized}
    _assert_priced(
        "attention.flash", Case(arrays, {**options, **({"accumulator": arrays[0].dtype} if narrow else {})})
    )


@given(shape=SHAPES, dtype=DTYPES)
def test_algorithm_0(shape: dict[str, int], dtype: Any) -> None:
    _assert_priced("attention.standard", Case(_arrays(shape, dtype)))


@given(shape=SHAPES, dtype=DTYPES)
def test_algorithm_3(shape: dict[str, int], dtype: Any) -> None:
    q, k, v = _arrays(shape, dtype)
    do = np.ones((*q.shape[:3], v.shape[3])).astype(q.dtype)
    _assert_priced("attention.standard_backward", Case((q, k, v, do)))


@given(shape=SHAPES, dtype=DTYPES, sram=st.integers(1, 400), initialized=st.booleans())
def test_algorithm_4(shape: dict[str, int], dtype: Any, sram: int, initialized: bool) -> None:
    q, k, v = _arrays(shape, dtype)
    o, lse = flash_attention(q, k, v, return_lse=True)
    options = {"sram": sram, "count_initialization": initialized}
    _assert_priced("attention.flash_backward", Case((q, k, v, o, lse, o), options))


@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 99), initialized=st.booleans())
def test_algorithm_5(shape: dict[str, int], dtype: Any, seed: int, initialized: bool) -> None:
    mask = np.random.default_rng(seed).random((-(-shape["Tq"] // 3), -(-shape["Tk"] // 4))) < 0.4
    options = {"block_mask": mask, "block_sizes": (3, 4), "count_initialization": initialized}
    _assert_priced("attention.block_sparse_flash", Case(_arrays(shape, dtype), options))


@given(N=st.integers(1, 60), d=st.integers(1, 8), M=st.integers(1, 500))
def test_the_papers_formulas(N: int, d: int, M: int) -> None:
    """One head: 4Nd + 4N² for Algorithm 0, 2Nd + T_c (3Nd + 4N) for Algorithm 1."""
    x = np.zeros((1, N, 1, d))
    standard, flash = Memory(), Memory()
    standard_attention(x, x, x, memory=standard)
    flash_attention(x, x, x, memory=flash, sram=M)
    T_c = -(-N // -(-M // (4 * d)))
    assert standard.elements_read + standard.elements_written == 4 * N * d + 4 * N**2
    assert flash.elements_read + flash.elements_written == 2 * N * d + T_c * (3 * N * d + 4 * N)


def test_more_sram_never_moves_more() -> None:
    counted = []
    for sram in (16, 64, 256, 1024, 4096):
        memory, x = Memory(), np.zeros((1, 64, 1, 4))
        flash_attention(x, x, x, memory=memory, sram=sram)
        counted.append(memory.elements_read + memory.elements_written)
    assert counted == sorted(counted, reverse=True)
    assert counted[0] > counted[-1]


@given(
    shape=SHAPES,
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    causal=st.sampled_from([False, "top_left", "bottom_right"]),
)
def test_after_each_outer_step_the_output_is_exact_over_the_keys_so_far(
    shape: dict[str, int], blocks: tuple[int, int], causal: Any
) -> None:
    q, k, v = _arrays(shape, np.float64, heads=2)
    mask = np.tri(
        shape["Tq"], shape["Tk"], shape["Tk"] - shape["Tq"] if causal == "bottom_right" else 0, dtype=bool
    )
    for keys, step in flash_attention_steps(q, k, v, block_sizes=blocks, causal=causal):
        options = {"attn_mask": mask[:, :keys]} if causal else {}
        exact = scaled_dot_product_attention(q, k[:, :keys], v[:, :keys], return_lse=True, **options)
        np.testing.assert_allclose(step.out, exact.out, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(step.lse, exact.lse, rtol=1e-12, atol=1e-13)


def test_the_statistics_of_algorithm_1_only_grow() -> None:
    q, k, v = _arrays({"Tq": 9, "Tk": 20, "D": 4, "Dv": 4, "H": 1}, np.float64)
    sums = [step.lse for _, step in flash_attention_steps(q, k, v, block_sizes=(4, 3))]
    assert all((after >= before).all() for before, after in pairwise(sums))


def test_a_memory_with_a_capacity_enforces_it() -> None:
    x = np.zeros((1, 16, 1, 4))
    rows, columns = block_sizes_for(64, 4)
    with pytest.raises(CapacityError, match="do not fit on chip"):
        flash_attention(x, x, x, sram=64, memory=Memory(64))
    room = 2 * columns * 4 + 2 * rows * 4 + 2 * rows + rows * columns
    memory = Memory(room)
    flash_attention(x, x, x, sram=64, memory=memory)
    assert memory.peak == room
    assert memory.held == 0


def test_a_log_has_every_step() -> None:
    memory, x = Memory(log=True), np.zeros((1, 4, 1, 2))
    flash_attention(x, x, x, block_sizes=(2, 2), memory=memory)
    assert [event.step for event in memory.events] == list(range(1, len(memory.events) + 1))
    for kind, total in (("load", memory.elements_read), ("store", memory.elements_written)):
        assert sum(event.elements for event in memory.events if event.kind == kind) == total


@pytest.mark.parametrize(
    "options", [{"block_sizes": (0, 1)}, {"sram": 0}, {"sram": 4, "block_sizes": (1, 1)}]
)
def test_bad_tiles_are_refused(options: dict[str, Any]) -> None:
    x = np.zeros((1, 4, 1, 2))
    with pytest.raises(OptionError, match=r"block_sizes|sram"):
        flash_attention(x, x, x, **options)


def test_gradient_traffic_of_the_paper() -> None:
    """4Nd + T_c 5Nd and one statistic a row for each block of keys."""
    N, d = 24, 4
    x = np.zeros((1, N, 1, d))
    out, lse = flash_attention(x, x, x, return_lse=True)
    memory = Memory()
    flash_attention_vjp(x, x, x, out, lse, x, block_sizes=(4, 8), memory=memory)
    assert memory.elements_read + memory.elements_written == 4 * N * d + 3 * (5 * N * d + N)
    assert attention_traffic(algorithm="standard", Tq=N, D=d, direction="backward")["elements_read"] > 0
