"""Oracles of the cost models: loops that enumerate every load and store, and step-by-step arithmetic."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle

NAMES = ("elements_read", "elements_written", "bytes_read", "bytes_written")


class Counting:
    """Counts rows as they are moved; knows nothing of formulas."""

    def __init__(self) -> None:
        self.counts = Counter(dict.fromkeys(NAMES, 0))

    def read(self, elements: int, size: int) -> None:
        self.counts["elements_read"] += elements
        self.counts["bytes_read"] += elements * size

    def write(self, elements: int, size: int) -> None:
        self.counts["elements_written"] += elements
        self.counts["bytes_written"] += elements * size


def cut(length: int, block: int) -> list[int]:
    pieces = []
    while length > 0:
        pieces.append(min(block, length))
        length -= block
    return pieces


def flash1_forward(c: Counting, Tq: int, Tk: int, D: int, Dv: int, Br: int, Bc: int, e: int, a: int, s: int,
                   initialize: bool) -> None:  # fmt: skip
    columns = cut(Tk, Bc)
    if initialize:
        c.write(Tq * Dv, a if columns else e)
        c.write(2 * Tq, s)
    elif not columns:
        c.write(Tq * Dv, e)
    for j, cols in enumerate(columns):
        c.read(cols * D, e)
        c.read(cols * Dv, e)
        for rows in cut(Tq, Br):
            c.read(rows * D, e)
            c.read(rows * Dv, a)
            c.read(rows, s)
            c.read(rows, s)
            c.write(rows * Dv, e if j == len(columns) - 1 else a)
            c.write(rows, s)
            c.write(rows, s)


def flash1_backward(c: Counting, Tq: int, Tk: int, D: int, Dv: int, Br: int, Bc: int, e: int, a: int, s: int,
                    initialize: bool) -> None:  # fmt: skip
    if initialize:
        c.write(Tq * D, a)
        c.write(Tk * D, e)
        c.write(Tk * Dv, e)
    for cols in cut(Tk, Bc):
        c.read(cols * D, e)
        c.read(cols * Dv, e)
        for rows in cut(Tq, Br):
            for width, size in ((D, e), (Dv, e), (Dv, e), (D, a), (1, s), (1, s)):  # Q O dO dQ l m
                c.read(rows * width, size)
            c.write(rows * D, a)
        c.write(cols * D, e)
        c.write(cols * Dv, e)


def flash2_forward(c: Counting, Tq: int, Tk: int, D: int, Dv: int, Br: int, Bc: int, e: int, a: int, s: int,
                   initialize: bool) -> None:  # fmt: skip
    for rows in cut(Tq, Br):
        c.read(rows * D, e)
        for cols in cut(Tk, Bc):
            c.read(cols * D, e)
            c.read(cols * Dv, e)
        c.write(rows * Dv, e)
        c.write(rows, s)


def flash2_backward(c: Counting, Tq: int, Tk: int, D: int, Dv: int, Br: int, Bc: int, e: int, a: int, s: int,
                    initialize: bool) -> None:  # fmt: skip
    for rows in cut(Tq, Br):  # rowsum(dO * O)
        c.read(rows * Dv, e)
        c.read(rows * Dv, e)
        c.write(rows, s)
    if initialize:
        c.write(Tq * D, a)
    for cols in cut(Tk, Bc):
        c.read(cols * D, e)
        c.read(cols * Dv, e)
        for rows in cut(Tq, Br):
            for width, size in ((D, e), (Dv, e), (D, a), (1, s), (1, s)):  # Q dO dQ lse rowsum
                c.read(rows * width, size)
            c.write(rows * D, a)
        c.write(cols * D, e)
        c.write(cols * Dv, e)


COUNTERS = {
    ("flash1", "forward"): flash1_forward,
    ("flash1", "backward"): flash1_backward,
    ("flash2", "forward"): flash2_forward,
    ("flash2", "backward"): flash2_backward,
}


def standard(c: Counting, Tq: int, Tk: int, D: int, Dv: int, e: int, direction: str) -> None:
    """Algorithms 0 and 3, matrix by matrix."""
    q, k, v, o, s = Tq * D, Tk * D, Tk * Dv, Tq * Dv, Tq * Tk
    forward = [((q, k), s), ((s,), s), ((s, v), o)]
    backward = [((s, o), v), ((o, v), s), ((s, s), s), ((s, k), q), ((s, q), k)]
    for reads, written in forward if direction == "forward" else backward:
        for elements in reads:
            c.read(elements, e)
        c.write(written, e)


@oracle("cost.attention_io")
def counted_attention_io(
    *, algorithm: str, direction: str, Tq: int, Tk: int, D: int, Dv: int, H: int, B: int, sram: int = 0,
    count_initialization: bool = False, accumulator_itemsize: int = 2,
) -> Any:  # fmt: skip
    """Bytes moved, counted tile by tile."""
    counting = Counting()
    for way in ("forward", "backward") if direction == "both" else (direction,):
        for _ in range(B * H):
            if algorithm == "standard":
                standard(counting, Tq, Tk, D, Dv, 2, way)
                continue
            columns = -(-sram // (4 * D))
            blocks = min(columns, D), columns
            COUNTERS[algorithm, way](
                counting, Tq, Tk, D, Dv, *blocks, 2, accumulator_itemsize, 4, count_initialization
            )
    return np.asarray(counting.counts["bytes_read"] + counting.counts["bytes_written"], dtype=object)


@oracle("cost.data_vs_model_parallel")
def summed_comparison(
    *, parameters: int, ranks: int, batch: int, sequence: int, hidden: int, layers: int
) -> Any:  # fmt: skip
    """The lecture's table: copies, bytes and elements sent, added up weight by weight and layer by layer."""
    states = 2 + 2 + 4 + 4 + 4  # parameters, gradients, master copy, momentum, variance
    sent = sum(2 * 4 * batch * sequence * hidden for _ in range(layers))  # 4 all-reduces, 2 each
    rows = (ranks, states * parameters, 2 * parameters), (1, Fraction(states * parameters, ranks), sent)
    names = ("copies", "memory", "communication")
    return {
        f"{kind} {name}": np.asarray(value, dtype=object)
        for kind, row in zip(("data", "model"), rows, strict=True)
        for name, value in zip(names, row, strict=True)
    }


def owned(units: list[int], ranks: int) -> list[int]:
    """The elements of a shard, one after the other: every unit is dealt out until all ranks have as many."""
    shard = []
    for unit in units:
        element = 0
        while element < unit or element % ranks:
            if element % ranks == 0:
                shard.append(element)
            element += 1
    return shard


@oracle("cost.zero_memory.partitioned")
def listed_states(
    *, units: list[int], ranks: int, stage: int, model_itemsize: int, state_itemsize: int
) -> Any:  # fmt: skip
    """Bytes of one rank, element by element of what it keeps."""
    everything, shard = [None] * sum(units), owned(units, ranks)
    kept = 0
    for size, divided_from in ((model_itemsize, 3), (model_itemsize, 2), *((state_itemsize, 1),) * 3):
        for _ in shard if stage >= divided_from else everything:
            kept += size
    return np.asarray(kept, dtype=object)


@oracle("cost.zero_communication.partitioned")
def sent_in_rings(*, units: list[int], ranks: int, stage: int, micro_batches: int, itemsize: int) -> Any:
    """Bytes of one rank, hop by hop of every ring, along a step as it goes."""
    hop = len(owned(units, ranks)) * itemsize
    rings = []
    for _ in range(micro_batches):
        if stage == 3:
            rings += ["forward", "backward"]
        if stage >= 2:
            rings.append("gradients")
    if stage < 2:
        rings.append("gradients")
    if stage < 3:
        rings.append("parameters")
    return np.asarray(sum(hop for _ in rings for _ in range(1, ranks)), dtype=object)


@oracle("cost.zero_communication")
def sent_for_each_parameter(
    *, parameters: int, ranks: int, stage: int, convention: str, micro_batches: int
) -> Any:  # fmt: skip
    """The same walk through a step, for one parameter and then for all."""
    moved = Fraction(0)
    for batch in range(micro_batches):
        last = batch == micro_batches - 1
        moved += 3 if stage == 3 else int(stage == 2) + int(last) * (1 if stage == 2 else 2)
    return np.asarray(
        moved * parameters * (Fraction(ranks - 1, ranks) if convention == "ring" else 1), object
    )


@oracle("cost.zero_memory")
def sixteen_bytes_each(*, parameters: int, ranks: int, stage: int) -> Any:
    """Bytes of one parameter and its states, each over the ranks if the stage divides it."""
    each = sum(
        Fraction(size, ranks if stage >= first else 1)
        for size, first in ((2, 3), (2, 2), (4, 1), (4, 1), (4, 1))
    )
    return np.asarray(each * parameters, object)


@oracle("cost.zero_r")
def kept_chunks(
    *, hidden: int, batch: int, sequence: int, layers: int, model_parallel: int, parameters: int, buffer: int,
    checkpoints: str,
) -> Any:  # fmt: skip
    """Rank 0 never has less than another: its part of each layer's hidden states, and the buffer."""
    kept = 0
    for _ in range(layers):
        states = batch * sequence * hidden
        if checkpoints == "partitioned":
            states = len(range(0, states, model_parallel))
        kept += 0 if checkpoints == "offloaded" else 2 * states
    return np.asarray(kept + 4 * sorted((parameters, buffer))[0], dtype=object)
