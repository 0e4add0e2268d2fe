"""What a call of a selective scan or of a Mamba block moves, computes and carries, from its shapes alone.

Each price equals, counter by counter, what the reference counts in `refimpl.memory.Memory`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.formula import evaluate
from memsim.prices.moves import counted
from memsim.prices.ssm_schedules import mamba_moves, scan_moves
from memsim.ssm import mamba_flops, mamba_state, scan_flops
from memsim.units import Number
from refimpl.numerics import wide_dtype
from refimpl.registry import Case, prices

__all__ = ["scan_values"]

_FORMS = "refimpl.ssm.scan_forms"


def scan_values(case: Case) -> dict[str, Number]:
    """Return sizes, item sizes, and what a call of a scan has, by the letters of `memsim.ssm`."""
    u, _, A, *_ = (np.asarray(array) for array in case.args)
    B, T, D = u.shape
    return {
        "B": B, "T": T, "D": D, "N": A.shape[1],
        **_items(u.dtype, case.kwargs.get("initial_state")),
        **_given(case, z="z", d="D", b="delta_bias", i="initial_state"),
        "f": int(bool(case.kwargs.get("return_state"))),
    }  # fmt: skip


def _block_sizes(case: Case) -> dict[str, int]:
    weights = {name: np.shape(case.kwargs[name]) for name in ("w_conv", "w_dt", "A_log")}
    B, T, M = np.shape(case.args[0])
    (D, k), R, N = weights["w_conv"], weights["w_dt"][0], weights["A_log"][1]
    return {"B": B, "T": T, "M": M, "D": D, "N": N, "R": R, "k": k}


def _items(dtype: np.dtype[Any], state: Any) -> dict[str, int]:
    wide = wide_dtype(dtype).itemsize
    return {"e": dtype.itemsize, "w": wide, "s": wide if state is None else np.asarray(state).dtype.itemsize}


def _given(case: Case, **letters: str) -> dict[str, int]:
    return {letter: int(case.kwargs.get(name) is not None) for letter, name in letters.items()}


@prices("ssm.selective_scan", counts="hbm")
def scan(case: Case) -> dict[str, int]:
    """Return the four counters of ``selective_scan(u, delta, A, B, C, ...)``."""
    return counted(scan_moves("fused"), scan_values(case))


@prices("ssm.selective_scan", counts="hbm", of=f"{_FORMS}:selective_scan_chunked")
def chunked_scan(case: Case) -> dict[str, int]:
    """Return the four counters of ``selective_scan_chunked(...)``: those of the loop."""
    return scan(case)


@prices("ssm.selective_scan", counts="hbm", of=f"{_FORMS}:selective_scan_associative")
def associative_scan(case: Case) -> dict[str, int]:
    """Return the four counters of ``selective_scan_associative(...)``, every step in HBM."""
    return counted(scan_moves("materialized"), scan_values(case))


@prices("ssm.selective_scan", counts="flops")
def scan_operations(case: Case) -> dict[str, int]:
    """Return the operations of ``selective_scan(...)``."""
    values = scan_values(case)
    return {"flops": int(scan_flops(**{name: int(values[name]) for name in "BTDN"}).total)}


@prices("ssm.selective_scan", counts="state")
def scan_state(case: Case) -> dict[str, int]:
    """Return the elements that ``selective_scan(...)`` carries from token to token."""
    values = scan_values(case)
    return {"state_elements": int(evaluate("B*D*N", values))}


@prices("ssm.mamba_block", counts="hbm")
def block(case: Case) -> dict[str, int]:
    """Return the four counters of ``mamba_block(x, ...)``."""
    values = {
        **_block_sizes(case),
        **_items(np.asarray(case.args[0]).dtype, case.kwargs.get("scan_state")),
        **_given(case, i="scan_state", c="b_conv", p="b_in", q="b_out"),
        "z": 1, "d": 1, "b": 1, "f": int(bool(case.kwargs.get("return_state"))),
    }  # fmt: skip
    return counted(mamba_moves(), values)


@prices("ssm.mamba_block", counts="flops")
def block_operations(case: Case) -> dict[str, int]:
    """Return the operations of ``mamba_block(...)``."""
    return {"flops": int(mamba_flops(**_block_sizes(case)).total)}


@prices("ssm.mamba_block", counts="state")
def block_state(case: Case) -> dict[str, int]:
    """Return the elements that ``mamba_block(...)`` carries: of the scan and of the convolution."""
    sizes = _block_sizes(case)
    return {"state_elements": int(mamba_state(**{name: sizes[name] for name in "BDNk"}).total)}
