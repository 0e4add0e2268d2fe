"""Decoding layers against their records: the weight of a case is stored, put in order, then used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import cuda_backend
from cuda_backend.weight_only import plan
from cuda_backend.weight_only.variant import Stream, Wide
from refimpl.quant import nf4_quantize, quantize_groups
from refimpl.quant.weight_only import sample_weight_only
from refimpl.registry import Case
from refimpl.tolerances import cast
from tests.cuda.judge import DTYPES, difference

TECHNIQUES = {"int8": "quant.weight_only_int8", "nf4": "quant.weight_only_nf4"}


# How a layer in NF4 is made to take each kernel: names of `cuda_backend.weight_only.plan`, and what is put
# there.
KERNELS: dict[str, tuple[str, Any]] = {
    "stream": ("choose_nf4_hopper", lambda kind, M, *_: Stream(kind, 2 if M <= 2 else 4 if M <= 4 else 8)),
    "wide": ("choose_nf4_hopper", lambda kind, M, *_: Wide(kind, 8 if M <= 8 else 16)),
    "portable": ("for_hopper", lambda: False),
}


@contextmanager
def taking(kernel: str) -> Iterator[None]:
    """Let layers in NF4 take a kernel of `KERNELS`."""
    name, chosen = KERNELS[kernel]
    usual = getattr(plan, name)
    setattr(plan, name, chosen)
    plan.plan_of.cache_clear()
    try:
        yield
    finally:
        setattr(plan, name, usual)
        plan.plan_of.cache_clear()


def moved(stored: Any, transfer: Any) -> Any:
    """Return a stored weight, its arrays moved."""
    return type(stored)(*(transfer(part) if hasattr(part, "dtype") else part for part in stored))


def decoding(weight: str, transfer: Any = lambda array: array) -> Any:
    """Return the decoding layer as a function of the reference's signature; `transfer` moves arrays."""

    def int8(x: Any, w: Any, /, *, bias: Any = None, group_size: int = 128) -> Any:
        stored = moved(quantize_groups(w, group_size=group_size), transfer)
        prepared = cuda_backend.prepare_int8_groups(stored, group_size=group_size)
        return cuda_backend.int8_linear_decode(transfer(x), prepared, bias=_moved(bias))

    def nf4(x: Any, w: Any, /, *, bias: Any = None, block_size: int = 64, scale_block_size: int = 256) -> Any:
        stored = nf4_quantize(w, block_size=block_size, scale_block_size=scale_block_size)
        prepared = cuda_backend.prepare_nf4(moved(stored, transfer))
        return cuda_backend.nf4_linear_decode(transfer(x), prepared, bias=_moved(bias))

    def _moved(bias: Any) -> Any:
        return None if bias is None else transfer(bias)

    return {"int8": int8, "nf4": nf4}[weight]


def case_of(weight: str, dtype: str, seed: int = 0, **axes: Any) -> Case:
    """Return a call with arrays of `dtype`; sizes of groups are among `axes`."""
    given = {"bias": True, "values": "normal", **axes}
    return cast(sample_weight_only(np.random.default_rng(seed), **given), DTYPES[dtype])


def decoding_difference(weight: str, case: Case, dtype: str, f: Any = None) -> str | None:
    """Return how the decoding layer differs from its record."""
    return difference(f or decoding(weight), case, dtype, technique=TECHNIQUES[weight])
