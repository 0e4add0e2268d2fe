"""The HBM traffic of a call of a reference, from the shapes and dtypes of its arguments and from its options.

Each price equals, counter by counter, what the reference moves through `refimpl.memory.Memory`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.attention_io import attention_traffic
from refimpl.numerics import wide_dtype
from refimpl.registry import Case, prices

__all__ = ["block_sparse_flash", "flash", "flash_backward", "standard", "standard_backward"]


def _workload(case: Case) -> dict[str, Any]:
    """Return lengths, heads and item sizes of a call ``f(q, k, v, ...)``; q is [B, Tq, Hq, D]."""
    q, k, v = (np.asarray(array) for array in case.args[:3])
    B, Tq, H, D = q.shape
    return {
        "B": B, "Tq": Tq, "H": H, "D": D, "Tk": k.shape[1], "Dv": v.shape[3],
        "itemsize": q.dtype.itemsize,
        "statistics_itemsize": wide_dtype(q.dtype).itemsize,
    }  # fmt: skip


def _tiles(case: Case) -> dict[str, Any]:
    """Return the options that say how a tiled reference cuts its arrays, and whether filling them counts."""
    from refimpl.attention.flash import DEFAULT_BLOCKS

    sram, sizes = case.kwargs.get("sram"), case.kwargs.get("block_sizes")
    return {
        "sram": sram,
        "block_sizes": DEFAULT_BLOCKS if sram is None and sizes is None else sizes,
        "count_initialization": bool(case.kwargs.get("count_initialization", False)),
    }


def _accumulated(case: Case) -> dict[str, Any]:
    """Return the size of an element of O while it is accumulated: that of the wide dtype by default."""
    accumulator = case.kwargs.get("accumulator")
    dtype = wide_dtype(np.asarray(case.args[0]).dtype) if accumulator is None else np.dtype(accumulator)
    return {"accumulator_itemsize": dtype.itemsize}


@prices("attention.standard", counts="hbm")
def standard(case: Case) -> dict[str, int]:
    """Return the four counters of ``standard_attention(q, k, v, ...)``: Algorithm 0."""
    return attention_traffic(algorithm="standard", **_workload(case))


@prices("attention.standard_backward", counts="hbm")
def standard_backward(case: Case) -> dict[str, int]:
    """Return the four counters of ``standard_attention_vjp(q, k, v, do, ...)``: Algorithm 3."""
    return attention_traffic(algorithm="standard", direction="backward", **_workload(case))


@prices("attention.flash", counts="hbm")
def flash(case: Case) -> dict[str, int]:
    """Return the four counters of ``flash_attention(q, k, v, ...)``: Algorithm 1.

    Without an `accumulator` of its own the reference keeps O in HBM in the wide dtype.
    """
    return attention_traffic(algorithm="flash1", **_accumulated(case), **_tiles(case), **_workload(case))


@prices("attention.flash_backward", counts="hbm")
def flash_backward(case: Case) -> dict[str, int]:
    """Return the four counters of ``flash_attention_vjp(q, k, v, o, lse, do, ...)``: Algorithm 4.

    The reference reads one statistic of a row, the log-sum-exp, and keeps dQ in the dtype of q.
    """
    return attention_traffic(
        algorithm="flash1", direction="backward", row_statistics=1, **_tiles(case), **_workload(case)
    )


@prices("attention.block_sparse_flash", counts="hbm")
def block_sparse_flash(case: Case) -> dict[str, int]:
    """Return the four counters of ``block_sparse_flash(q, k, v, block_mask=..., ...)``: Algorithm 5."""
    return attention_traffic(
        algorithm="block_sparse",
        block_mask=case.kwargs.get("block_mask"),
        **_accumulated(case),
        **_tiles(case),
        **_workload(case),
    )
