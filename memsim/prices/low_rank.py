"""What low-rank attention costs: HBM traffic and FLOPs, linear in the length at a fixed rank.

Each price equals, counter by counter, what the reference counts as it runs.
"""

from __future__ import annotations

import numpy as np

from refimpl.registry import Case, prices

__all__ = ["flops", "hbm"]


@prices("attention.low_rank", counts="hbm")
def hbm(case: Case) -> dict[str, int]:
    """Return the four counters: projected keys and values stay on chip, each head reads its projections."""
    q, k, v, e, _ = (np.asarray(array) for array in case.args)
    (B, Tq, Hq, D), (_, Tk, Hkv, Dv), R = q.shape, v.shape, e.shape[1]
    read = B * (Hkv * Tk * (D + Dv + 2 * R) + Hq * Tq * D)
    mask = B * Hkv * Tk if case.kwargs.get("key_mask") is not None else 0
    written = B * Hq * Tq * Dv
    return {
        "elements_read": read + mask,
        "elements_written": written,
        "bytes_read": read * k.itemsize + mask,
        "bytes_written": written * k.itemsize,
    }


@prices("attention.low_rank", counts="flops")
def flops(case: Case) -> dict[str, int]:
    """Return ``2 R (D + Dv)`` for each key, which is projected, and for each query."""
    q, _, v, e, _ = (np.asarray(array) for array in case.args)
    (B, Tq, Hq, D), (_, Tk, Hkv, Dv), R = q.shape, v.shape, e.shape[1]
    return {"flops": 2 * B * R * (Hkv * Tk + Hq * Tq) * (D + Dv)}
