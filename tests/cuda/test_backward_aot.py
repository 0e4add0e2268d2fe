"""Portable backward kernels compiled ahead of time, without a GPU: no spills, nothing in local memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cuda.ahead import answer

PROGRAM = """
import json, sys
from cuda_backend import aot
from cuda_backend.attention import backward_portable, bias_portable
from cuda_backend.attention.variant_backward import BackwardVariant
from cuda_backend.attention.variant_portable import Features, choose

kind, D, Dv, features, capability, kilobytes = json.loads(sys.argv[1])
capability = tuple(capability)
sizes = {"block_sizes": None, "sram": None, "capacity": kilobytes * 256}
variant = choose(kind, D, Dv, Features(**features), form=BackwardVariant, **sizes)
kernels = {
    "queries": (backward_portable.queries_source(variant), backward_portable.queries_signature(variant)),
    "keys": (backward_portable.keys_source(variant), backward_portable.keys_signature(variant)),
    "bias": (bias_portable.source(kind), bias_portable.signature(kind)),
}
found = {}
for name, (source, signature) in kernels.items():
    ptx = aot.compile_ptx(source, signature, capability)
    found[name] = aot.resources(ptx, capability)._asdict()
print(json.dumps({"tiles": [variant.Br, variant.Bc], "threads": variant.threads, **found}))
"""
ALL = {
    "causal": "bottom_right", "mask": True, "bias": "float32", "alibi": True, "softcap": True,
    "q_lengths": "int64", "k_lengths": "int32", "dropout": "philox",
}  # fmt: skip
AMPERE, HOPPER, KILOBYTES = (8, 0), (9, 0, "a"), {(8, 0): 163, (9, 0, "a"): 227}
FULL = pytest.mark.aot_full
REGISTERS = 65536  # of a multiprocessor: what a block may have


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kind", "D", "Dv", "features", "capability", "tiles"),
    [
        ("float32", 64, 64, {}, HOPPER, [64, 64]),
        ("float16", 128, 128, ALL, AMPERE, [64, 64]),
        ("bfloat16", 256, 256, ALL, HOPPER, [64, 32]),
        pytest.param("float32", 64, 64, {}, AMPERE, [64, 64], marks=FULL),
        pytest.param("float16", 128, 128, {"causal": "top_left"}, HOPPER, [64, 64], marks=FULL),
        pytest.param("bfloat16", 80, 64, {"dropout": "mask"}, HOPPER, [64, 64], marks=FULL),
    ],
)
def test_nothing_spills(
    kind: str,
    D: int,
    Dv: int,
    features: dict[str, object],
    capability: Any,
    tiles: list[int],
) -> None:
    found = answer(PROGRAM, [kind, D, Dv, features, capability, KILOBYTES[capability]])
    assert found.pop("tiles") == tiles
    threads = found.pop("threads")
    assert set(found) == {"queries", "keys", "bias"}
    for name, used in found.items():
        assert used["spill_bytes"] == 0, name
        assert used["local_bytes"] == 0, f"{name}: an array that belongs in registers lies in local memory"
        assert 8 < used["registers"] <= 255
        assert used["registers"] * threads <= REGISTERS, name
