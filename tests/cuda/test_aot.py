"""Portable kernels compiled ahead of time, without a GPU: no register spills, nothing in local memory."""

from __future__ import annotations

import pytest

from tests.cuda.ahead import answer

PROGRAM = """
import json, sys
from cuda_backend import aot
from cuda_backend.attention.forward_portable import signature, source
from cuda_backend.attention.variant_portable import Features, choose

kind, D, Dv, features, capability = json.loads(sys.argv[1])
variant = choose(kind, D, Dv, Features(**features), block_sizes=None, sram=None, capacity=160 * 1024 // 4)
ptx = aot.compile_ptx(source(variant), signature(variant), tuple(capability))
print(json.dumps(aot.resources(ptx, tuple(capability))._asdict()))
"""
ALL = {
    "causal": "bottom_right", "mask": True, "bias": "float32", "alibi": True, "softcap": True,
    "q_lengths": "int64", "k_lengths": "int32", "dropout": "philox", "lse": True,
}  # fmt: skip
AMPERE, HOPPER = (8, 0), (9, 0, "a")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("kind", "D", "Dv", "features", "capability"),
    [
        ("float32", 64, 64, {}, AMPERE),
        ("float16", 128, 128, {"causal": "top_left", "lse": True}, HOPPER),
        ("float16", 128, 64, ALL, AMPERE),
        ("bfloat16", 80, 80, {"dropout": "mask"}, HOPPER),
        ("bfloat16", 256, 256, ALL, HOPPER),
    ],
)
def test_nothing_spills(kind: str, D: int, Dv: int, features: dict[str, object], capability: object) -> None:
    found = answer(PROGRAM, [kind, D, Dv, features, capability])
    assert found["spill_bytes"] == 0
    assert found["local_bytes"] == 0, "an array that belongs in registers lies in local memory"
    assert 32 < found["registers"] <= 255
