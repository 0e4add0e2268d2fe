"""What lightweight and dynamic convolution cost: HBM traffic and FLOPs, linear in the length, and state.

Each price equals, counter by counter, what the reference counts as it runs.
"""

from __future__ import annotations

import numpy as np

from refimpl.registry import Case, prices

__all__ = [
    "dynamic_flops",
    "dynamic_hbm",
    "dynamic_state",
    "lightweight_flops",
    "lightweight_hbm",
    "lightweight_state",
]


@prices("attention.lightweight_convolution", counts="hbm")
def lightweight_hbm(case: Case) -> dict[str, int]:
    """Return the four counters: tokens and kernels are read once, outputs written once."""
    x, w = (np.asarray(array) for array in case.args)
    read = x.size + w.size
    return {
        "elements_read": read,
        "elements_written": x.size,
        "bytes_read": read * x.itemsize,
        "bytes_written": x.size * x.itemsize,
    }


@prices("attention.dynamic_convolution", counts="hbm")
def dynamic_hbm(case: Case) -> dict[str, int]:
    """Return the four counters: the kernels are predicted on chip, their projection is read once."""
    return lightweight_hbm(case)


@prices("attention.lightweight_convolution", counts="flops")
def lightweight_flops(case: Case) -> dict[str, int]:
    """Return ``2 B T D K``: a multiply-add for each tap of each channel."""
    x, w = (np.asarray(array) for array in case.args)
    return {"flops": 2 * x.size * w.shape[-1]}


@prices("attention.dynamic_convolution", counts="flops")
def dynamic_flops(case: Case) -> dict[str, int]:
    """Return ``2 B T D K (H + 1)``: H heads of K taps are predicted from D channels, then used."""
    x, w = (np.asarray(array) for array in case.args)
    return {"flops": 2 * x.size * w.shape[2] * (w.shape[1] + 1)}


@prices("attention.lightweight_convolution", counts="state")
def lightweight_state(case: Case) -> dict[str, int]:
    """Return the elements of the last K - 1 tokens, which a causal one carries on: no length in it."""
    x, w = (np.asarray(array) for array in case.args)
    kept = (w.shape[-1] - 1) * x.shape[0] * x.shape[2] if case.kwargs.get("causal") else 0
    return {"state_elements": kept}


@prices("attention.dynamic_convolution", counts="state")
def dynamic_state(case: Case) -> dict[str, int]:
    """Return the elements of the last K - 1 tokens of a causal one, as of a lightweight one."""
    return lightweight_state(case)
