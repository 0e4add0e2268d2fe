"""HBM traffic of attention against loops that enumerate every load and store, one array row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.attention_io import attention_io, attention_traffic, block_sizes
from memsim.flops import attended_pairs, attention_flops
from memsim.prices.attention_schedules import standard_features
from memsim.standard_attention import pass_total, standard_passes
from refimpl import registry
from refimpl.errors import OptionError, ShapeError, UnknownNameError
from tests.oracles.costs import COUNTERS, NAMES, Counting, cut, flash1_backward, flash1_forward

lengths, widths, sizes = st.integers(0, 40), st.integers(1, 9), st.integers(1, 20)


@given(
    way=st.sampled_from(sorted(COUNTERS)), Tq=lengths, Tk=lengths, D=widths, Dv=widths, Br=sizes, Bc=sizes,
    e=st.sampled_from([2, 4, 8]), a=st.sampled_from([2, 4, 8]), s=st.sampled_from([4, 8]),
    initialize=st.booleans(), heads=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=200)
def test_tiled_traffic_is_what_the_loops_move(
    way: Any, Tq: int, Tk: int, D: int, Dv: int, Br: int, Bc: int, e: int, a: int, s: int, initialize: bool,
    heads: int,
) -> None:  # fmt: skip
    counting = Counting()
    for _ in range(heads * 2):
        COUNTERS[way](counting, Tq, Tk, D, Dv, Br, Bc, e, a, s, initialize)
    options: dict[str, Any] = {
        "algorithm": way[0], "direction": way[1], "Tq": Tq, "Tk": Tk, "D": D, "Dv": Dv, "H": heads, "B": 2,
        "block_sizes": (Br, Bc), "itemsize": e, "accumulator_itemsize": a, "statistics_itemsize": s,
        "count_initialization": initialize,
    }  # fmt: skip
    assert attention_traffic(**options) == dict(counting.counts)
    assert attention_io(**options).total == counting.counts["bytes_read"] + counting.counts["bytes_written"]


@given(Tq=lengths, Tk=lengths, D=widths, Dv=widths, Br=sizes, Bc=sizes, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_block_sparse_traffic_is_what_the_loops_move(
    Tq: int, Tk: int, D: int, Dv: int, Br: int, Bc: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = cut(Tq, Br), cut(Tk, Bc)
    mask = rng.random((2, 3, len(rows), len(columns))) < rng.random()
    counting = Counting()
    for head in mask.reshape(6, len(rows), len(columns)):
        counting.write(Tq * Dv, 2)
        counting.write(2 * Tq, 4)
        for j, cols in enumerate(columns):
            if not any(head[i, j] for i in range(len(rows))):
                continue
            counting.read(cols * (D + Dv), 2)
            for i, size in enumerate(rows):
                if head[i, j]:
                    counting.read(size * (D + Dv), 2)
                    counting.read(2 * size, 4)
                    counting.write(size * Dv, 2)
                    counting.write(2 * size, 4)
    got = attention_traffic(
        algorithm="block_sparse", Tq=Tq, Tk=Tk, D=D, Dv=Dv, B=2, H=3, block_sizes=(Br, Bc), block_mask=mask,
        count_initialization=True,
    )  # fmt: skip
    assert got == dict(counting.counts)


@given(Tq=lengths, Tk=lengths, D=widths, Dv=widths)
@settings(max_examples=30)
def test_standard_traffic_is_algorithms_0_and_3(Tq: int, Tk: int, D: int, Dv: int) -> None:
    q, k, v, o, scores = Tq * D, Tk * D, Tk * Dv, Tq * Dv, Tq * Tk
    forward = attention_traffic(algorithm="standard", Tq=Tq, Tk=Tk, D=D, Dv=Dv)
    assert forward["elements_read"] == q + k + scores + scores + v
    assert forward["elements_written"] == scores + scores + o
    backward = attention_traffic(algorithm="standard", direction="backward", Tq=Tq, Tk=Tk, D=D, Dv=Dv)
    assert backward["elements_read"] == (scores + o) + (o + v) + 2 * scores + (scores + k) + (scores + q)
    assert backward["elements_written"] == v + scores + scores + q + k


def test_the_papers_square_counts() -> None:
    N, d = 1024, 64
    totals = {
        way: sum(
            attention_traffic(algorithm="standard", direction=way, Tq=N, D=d)[name] for name in NAMES[:2]
        )
        for way in ("forward", "backward", "both")
    }
    assert totals["forward"] == 4 * N * d + 4 * N * N
    assert totals["backward"] == 8 * N * d + 7 * N * N
    assert totals["both"] == totals["forward"] + totals["backward"]


@pytest.mark.parametrize(("Bc", "gigabytes"), [(64, 17.99), (128, 9.40), (256, 5.10), (512, 2.95)])
def test_figure_2_workload_falls_with_the_block(Bc: int, gigabytes: float) -> None:
    found = attention_io(
        algorithm="flash1", direction="both", Tq=1024, D=64, H=16, B=64, block_sizes=(64, Bc),
        statistics_itemsize=0,
    ).total  # fmt: skip
    u, Tc = 2 * 1024 * 64 * 1024, 1024 // Bc
    assert found == (2 + 3 * Tc + 4 + 5 * Tc) * u
    assert round(found / 1e9, 2) == gigabytes


@pytest.mark.parametrize("initialize", [False, True])
def test_without_keys_the_zeros_are_written_once(initialize: bool) -> None:
    got = attention_traffic(
        algorithm="flash1", Tq=5, Tk=0, D=3, Dv=7, block_sizes=(2, 2), accumulator_itemsize=4,
        count_initialization=initialize,
    )  # fmt: skip
    assert got["bytes_written"] == 5 * 7 * 2 + (2 * 5 * 4 if initialize else 0)
    assert got["elements_read"] == 0


def test_block_sizes_of_the_paper() -> None:
    assert block_sizes(192 * 1024 // 2, 64) == (64, 384)
    assert block_sizes(64 * 5 + 1, 16) == (6, 6)  # ceil(321 / 64), not the floor of the first slide
    with pytest.raises(OptionError):
        block_sizes(0, 64)


def test_flash_moves_less_than_standard_between_d_and_nd() -> None:
    N, d = 2048, 64
    standard = attention_io(algorithm="standard", Tq=N, D=d).total
    previous = standard
    for M in (4 * 128 * d, 4 * 256 * d, 4 * 512 * d):
        flash = attention_io(algorithm="flash1", Tq=N, D=d, sram=M).total
        assert flash < previous
        previous = flash


def test_one_pass_backward_statistics() -> None:
    options = {"algorithm": "flash1", "direction": "backward", "Tq": 10, "D": 4, "block_sizes": (5, 4)}
    two, one = (attention_traffic(**options, row_statistics=n)["elements_read"] for n in (2, 1))
    assert two - one == 3 * 10


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "flash3"},
        {"algorithm": "flash1"},
        {"algorithm": "flash1", "sram": 64, "block_sizes": (4, 4)},
        {"algorithm": "flash1", "block_sizes": (0, 4)},
        {"algorithm": "flash1", "block_sizes": (4, 4), "features": ["mask"]},
        {"algorithm": "flash1", "block_sizes": (4, 4), "block_mask": np.ones((2, 2), bool)},
        {"algorithm": "block_sparse", "block_sizes": (4, 4), "direction": "backward"},
        {"algorithm": "standard", "Tq": -1},
        {"algorithm": "standard", "D": 0},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        attention_io(**({"Tq": 8, "D": 4} | options))


def test_bad_mask_and_feature() -> None:
    with pytest.raises(ShapeError, match=r"\(1, 1, 2, 2\)"):
        attention_io(
            algorithm="block_sparse", Tq=8, D=4, block_sizes=(4, 4), block_mask=np.ones((3, 2), bool)
        )
    with pytest.raises(UnknownNameError, match="dropout"):
        attention_io(algorithm="standard", Tq=8, D=4, features=["dropuot"])


def test_standard_passes_without_features_are_the_algorithms() -> None:
    N, d = 96, 16
    assert standard_passes(Tq=N, D=d).total == 2 * (11 * N * N + 12 * N * d)
    assert standard_features() == ["dropout", "mask", "mask_copy", "mask_gradient"]
    # dropout: read and write P, write Z; read dP and Z, write dP; Z is a byte mask
    more = standard_passes(Tq=N, D=d, features=["dropout"]).total - standard_passes(Tq=N, D=d).total
    assert more == 4 * 2 * N * N + 2 * N * N
    assert pass_total(scores=11, operands=12, N=N, d=d).total == standard_passes(Tq=N, D=d).total


@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from(["top_left", "bottom_right", False]))
@settings(max_examples=60)
def test_attended_pairs_counts_pairs(Tq: int, Tk: int, causal: Any) -> None:
    shift = Tk - Tq if causal == "bottom_right" else 0
    pairs = sum(causal is False or j <= i + shift for i in range(Tq) for j in range(Tk))
    assert attended_pairs(Tq, Tk, causal) == pairs


def test_flops_are_2_4_and_5_products() -> None:
    one = 2 * 96 * 96 * 16 * 6
    for direction, algorithm, products in (
        ("forward", "standard", 2), ("forward", "flash", 2), ("backward", "standard", 4),
        ("backward", "flash", 5), ("both", "flash", 7),
    ):  # fmt: skip
        found = attention_flops(Tq=96, D=16, H=3, B=2, direction=direction, algorithm=algorithm)
        assert found.total == products * one
    uneven = attention_flops(Tq=3, Tk=5, D=2, Dv=7, direction="backward", algorithm="flash")
    assert uneven.total == 2 * 15 * (2 + 7 + 7 + 2 + 2)


def test_causal_flops_refuse_an_unstated_alignment() -> None:
    with pytest.raises(OptionError, match="top_left"):
        attention_flops(Tq=3, Tk=5, D=2, causal=True)
    with pytest.raises(OptionError):
        attention_flops(Tq=3, D=2, direction="sideways")  # type: ignore[arg-type]


def test_prices_are_registered() -> None:
    registry.load()
    priced = {price.technique for price in registry.PRICES if price.counts == "hbm"}
    assert priced >= {
        "attention.standard", "attention.standard_backward", "attention.flash", "attention.flash_backward",
        "attention.block_sparse_flash",
    }  # fmt: skip


def test_prices_of_the_other_references() -> None:
    q, k, v = (np.zeros((1, length, 1, width), np.float16) for length, width in ((10, 3), (7, 3), (7, 5)))
    price = {one.technique: one.function for one in registry.PRICES}
    counting = Counting()
    flash1_backward(counting, 10, 7, 3, 5, 4, 3, 2, 2, 4, False)
    counting.counts["elements_read"] -= 3 * 10  # the reference reads the log-sum-exp instead of l and m
    counting.counts["bytes_read"] -= 3 * 10 * 4
    tiles = registry.Case((q, k, v, None, None, None), {"block_sizes": (4, 3)})
    assert price["attention.flash_backward"](tiles) == dict(counting.counts)
    diagonal = tiles.replace(block_mask=np.eye(3, dtype=bool))
    sparse = price["attention.block_sparse_flash"](diagonal)
    assert sparse["elements_read"] == 7 * (3 + 5) + 10 * (3 + 5 + 2)  # three blocks touch every row once
    assert price["attention.standard"](tiles)["elements_read"] == 10 * 3 + 7 * 3 + 7 * 5 + 2 * 70
    assert price["attention.standard_backward"](tiles)["elements_written"] == 7 * 5 + 2 * 70 + 10 * 3 + 7 * 3
    double = tiles.map_arrays(lambda x: x.astype(np.float64))
    default = price["attention.flash"](
        double.without("block_sizes")
    )  # one 64 x 64 tile, statistics of 8 bytes
    assert default["bytes_read"] == 8 * (7 * (3 + 5) + 10 * (3 + 5 + 2))


def test_price_reads_shapes_dtypes_and_options() -> None:
    q, k = np.zeros((2, 10, 4, 3), np.float16), np.zeros((2, 7, 2, 3), np.float16)
    v = np.zeros((2, 7, 2, 5), np.float16)
    price = next(p for p in registry.PRICES if p.technique == "attention.flash")
    case = registry.Case(
        (q, k, v), {"block_sizes": (4, 3), "count_initialization": True, "causal": "top_left"}
    )
    counting = Counting()
    for _ in range(2 * 4):
        flash1_forward(counting, 10, 7, 3, 5, 4, 3, 2, 4, 4, True)
    assert price.function(case) == dict(counting.counts)
    counting = Counting()
    for _ in range(2 * 4):
        flash1_forward(counting, 10, 7, 3, 5, 3, 5, 2, 2, 4, False)  # M = 60: Bc = 5, Br = min(5, d)
    assert price.function(registry.Case((q, k, v), {"sram": 60, "accumulator": np.float16})) == dict(
        counting.counts
    )
