"""Laws of the cost models: what must hold for every implementation of them.

A law takes any function with the model's signature, so the same laws judge a rival's estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from memsim.estimate import Estimate
from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Estimate]
Comparing = Callable[..., tuple[Estimate, Estimate]]


def same(got: Any, expected: Any, what: str) -> None:
    """Raise LawViolation unless `got` equals `expected`."""
    require(bool(got == expected), f"{what}: expected {expected}, got {got}")


# Attention's HBM traffic (cost.attention_io)


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


# Training memory (cost.training_memory)


@law("cost.training_memory", "cost.zero_memory", "cost.zero_communication")
def proportional_to_parameters(f: Model, case: Case, _close: object) -> None:
    """Three times the parameters cost three times as much."""
    plain = case.without("activations")
    thrice = plain.replace(parameters=3 * plain.kwargs["parameters"])
    same(thrice.call(f).total, 3 * plain.call(f).total, "cost of three times the parameters")


@law("cost.training_memory")
def eight_times_the_weights(f: Model, case: Case, _close: object) -> None:
    """Mixed-precision Adam holds 16 bytes a parameter, eight times the fp16 weights."""
    states = case.without("activations").call(f)
    same(states.total, 16 * case.kwargs["parameters"], "model states")
    same(states.total, 8 * states["fp16 parameters"], "model states over weights")


@law("cost.training_memory")
def activations_add(f: Model, case: Case, _close: object) -> None:
    """Activations come on top of the model states and change nothing else."""
    if "activations" in case.kwargs:
        states = case.without("activations").call(f).total
        same(case.call(f).total, states + case.kwargs["activations"].total, "states and activations")


# Scaling (cost.ideal_scaling, cost.data_vs_model_parallel)


@law("cost.ideal_scaling")
def device_time_is_conserved(f: Model, case: Case, _close: object) -> None:
    """Devices times time is the time on one device."""
    spent = case.call(f).total * case.kwargs["devices"]
    same(spent, case.kwargs["device_seconds"], "device-seconds")


@law("cost.ideal_scaling")
def twice_the_devices_halve_the_time(f: Model, case: Case, _close: object) -> None:
    """Doubling the devices halves the time."""
    doubled = case.replace(devices=2 * case.kwargs["devices"]).call(f).total
    same(2 * doubled, case.call(f).total, "time of twice the devices, doubled")


@law("cost.data_vs_model_parallel")
def both_train_one_model(f: Comparing, case: Case, _close: object) -> None:
    """Data parallelism holds a copy on each rank, model parallelism one copy on all of them."""
    data, model = case.call(f)
    ranks = case.kwargs["ranks"]
    same((data["copies"], model["copies"]), (ranks, 1), "copies")
    same(model["memory"] * ranks, data["memory"], "memory of all model-parallel ranks")


@law("cost.data_vs_model_parallel")
def only_model_parallel_traffic_grows_with_batch(f: Comparing, case: Case, _close: object) -> None:
    """Activations travel in model parallelism, gradients in data parallelism."""
    data, model = case.call(f)
    more_data, more_model = case.replace(batch=2 * case.kwargs["batch"]).call(f)
    same(more_data["communication"], data["communication"], "data-parallel traffic of twice the batch")
    same(more_model["communication"], 2 * model["communication"], "model-parallel traffic of twice the batch")
