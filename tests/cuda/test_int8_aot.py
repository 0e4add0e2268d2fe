"""Portable int8 kernels compiled ahead of time: no spills, dp4a, IEEE division, codes without contraction."""

from __future__ import annotations

import pytest

from tests.cuda.ahead import answer

PROGRAM = """
import json, sys
from cuda_backend import aot
from cuda_backend.int8 import gemm_portable, quantize_portable
from cuda_backend.int8.variant_portable import Variant

capability = tuple(json.loads(sys.argv[1]))
GEMM = {
    "int32 of words": Variant("codes", "int32"),
    "int32 of bytes": Variant("codes", "int32", a_words=False, b_words=False),
    "fused float16": Variant("codes", "float16", True, "released"),
    "fused bfloat16": Variant("codes", "bfloat16", True, "paper", BM=32, BN=64),
    "epilogue": Variant("product", "float32", True),
    "outliers": Variant("output", "float16", outliers="released"),
}
found = {}

def judge(name, function, signature):
    ptx = aot.compile_ptx(function, signature, capability)
    lines = {line.split()[0] for line in ptx.splitlines() if line.strip()}
    found[name] = aot.resources(ptx, capability)._asdict() | {"instructions": sorted(lines)}

for name, variant in GEMM.items():
    judge(name, gemm_portable.source(variant), gemm_portable.signature(variant))
for kind, width, aside in (("float16", 4, "cells"), ("float32", 2, "columns"), ("bfloat16", 1, "")):
    variant = quantize_portable.variant_for(kind, width, aside)
    for kernel, function in quantize_portable.sources(variant).items():
        judge(f"{kernel} {kind}", function, quantize_portable.signatures(variant)[kernel])
print(json.dumps(found))
"""
MOST_REGISTERS = 255


@pytest.mark.aot
@pytest.mark.parametrize("capability", [(8, 0), (9, 0, "a")], ids=["sm_80", "sm_90a"])
def test_nothing_spills(capability: object) -> None:
    found = answer(PROGRAM, capability)
    for name, kernel in found.items():
        assert kernel["spill_bytes"] == 0, name
        assert kernel["local_bytes"] == 0, f"{name}: numbers that belong in registers lie in local memory"
        assert kernel["registers"] <= MOST_REGISTERS, name
    for name, kernel in found.items():
        instructions = set(kernel["instructions"])
        if name.startswith(("int32", "fused")):
            assert "dp4a.s32.s32" in instructions, name
        divisions = {each for each in instructions if each.startswith("div") and ".f32" in each}
        assert divisions <= {"div.rn.f32"}, name
        if name.startswith("quantize"):
            assert divisions, name
            # A contracted product would be a code too high or too low where it ties.
            assert not {each for each in instructions if each.startswith("fma")}, name
            assert {"mul.rn.f32", "cvt.rni.s32.f32"} <= instructions, name
