"""Laws of attention's HBM traffic: what SRAM, blocks, heads and masks change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from memsim.estimate import Estimate
from memsim.laws.comparison import same
from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Estimate]
Comparing = Callable[..., tuple[Estimate, Estimate]]


@law("cost.attention_io")
def more_sram_never_costs_traffic(f: Model, case: Case, _close: object) -> None:
    """Traffic does not increase with the SRAM, and standard attention's does not depend on it."""
    if "sram" not in case.kwargs:
        return
    totals = [case.replace(sram=case.kwargs["sram"] * factor).call(f).total for factor in (1, 2, 4)]
    require(totals == sorted(totals, reverse=True), f"traffic grew with the SRAM: {totals}")


@law("cost.attention_io")
def one_block_moves_every_array_once(f: Model, case: Case, _close: object) -> None:
    """If all keys and queries fit on chip, each operand is read once: compulsory traffic."""
    shape = case.kwargs
    if shape["algorithm"] == "standard" or not (shape["Tq"] and shape["Tk"]):
        return
    if shape["direction"] == "both":
        return
    whole = case.without("sram", "count_initialization").replace(
        block_sizes=(shape["Tq"], shape["Tk"]), itemsize=2, accumulator_itemsize=2, statistics_itemsize=0
    )
    copies = shape["H"] * shape["B"]
    operands = 2 * (shape["Tq"] * (shape["D"] + shape["Dv"]) + shape["Tk"] * (shape["D"] + shape["Dv"]))
    if shape["direction"] == "forward":  # Q, K, V in, O out; Algorithm 1 also reads the initial O
        expected = operands + (2 * shape["Tq"] * shape["Dv"] if shape["algorithm"] == "flash1" else 0)
    else:  # Q, K, V, O, dO in, dQ, dK, dV out, dQ read once; flash2 reads dO twice
        once = shape["Tq"] * (3 * shape["D"] + 2 * shape["Dv"]) + 2 * shape["Tk"] * (shape["D"] + shape["Dv"])
        expected = 2 * (once + (shape["Tq"] * shape["Dv"] if shape["algorithm"] == "flash2" else 0))
    same(whole.call(f).total, expected * copies, "traffic with one block")


@law("cost.attention_io")
def heads_and_batch_multiply(f: Model, case: Case, _close: object) -> None:
    """Every head of every sequence moves the same."""
    one = case.replace(H=1, B=1).call(f).total
    same(case.call(f).total, one * case.kwargs["H"] * case.kwargs["B"], "traffic of all heads")


@law("cost.attention_io")
def a_full_block_mask_is_dense(f: Model, case: Case, _close: object) -> None:
    """Algorithm 5 with no zero block moves what Algorithm 1 moves."""
    shape = case.kwargs
    if shape["algorithm"] != "flash1" or shape["direction"] != "forward" or not (shape["Tq"] and shape["Tk"]):
        return
    dense = case.without("sram", "accumulator_itemsize").replace(block_sizes=(5, 7))
    mask = np.ones((-(-shape["Tq"] // 5), -(-shape["Tk"] // 7)), bool)
    sparse = dense.replace(algorithm="block_sparse", block_mask=mask)
    same(sparse.call(f).total, dense.call(f).total, "block-sparse traffic at sparsity 1")
