"""Attention in int8 compiled ahead of time: no spills, no serialised wgmma, no conversions of scores."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.ahead import answer

PROGRAM = """
import json, re, sys
from cuda_backend import aot
from cuda_backend._numba import cuda
from cuda_backend.attention import int8_codes_hopper, int8_codes_portable, int8_portable
from cuda_backend.attention.int8_forward_hopper import SIGNATURE, build, choose
from tests.cuda.ahead import measured

found = []
for case in json.loads(sys.argv[1]):
    variant = choose(*case)
    numbers, ptx = measured(build, variant, SIGNATURE, variant.threads)
    found.append(numbers | {
        "codes": len(re.findall("wgmma.mma_async[^;]*s32.s8.s8", ptx)),
        "floats": len(re.findall("wgmma.mma_async[^;]*f32", ptx)),
        "conversions": len(re.findall(r"cvt.rn.f32.s32", ptx)),
        "shared": variant.shared_bytes,
    })
codes = int8_codes_hopper
for kind, smooth in (("f16", True), ("bf16", True), ("f16", False)):
    how = dict(cc=aot.HOPPER, device=False, abi="numba", launch_bounds=(codes.THREADS, codes.RESIDENT))
    with aot.pretended(aot.HOPPER):
        ptx, _ = cuda.compile(codes.build(codes.Variant(kind, smooth)), codes.SIGNATURE, **how)
    found.append(aot.resources(ptx, aot.HOPPER)._asdict())
for capability in (aot.AMPERE, aot.HOPPER):
    for kind in ("float16",):
        portable = int8_portable.Variant(kind, 32, 128, True)
        ptx = aot.compile_ptx(int8_portable.source(portable), int8_portable.signature(portable), capability)
        found.append(aot.resources(ptx, capability)._asdict() | {"dp4a": "dp4a.s32.s32" in ptx})
        parts = zip(int8_codes_portable.sources(kind), int8_codes_portable.signatures(kind), strict=True)
        for function, signature in parts:
            ptx = aot.compile_ptx(function, signature, capability)
            found.append(aot.resources(ptx, capability)._asdict())
print(json.dumps(found))
"""
CASES = [  # kind, width of values, causal
    ("f16", 128, False),
    ("bf16", 128, True),
    ("f16", 64, True),
]


@pytest.mark.aot
def test_nothing_spills_and_nothing_waits() -> None:
    found = answer(PROGRAM, CASES)
    for case, each in zip(CASES, found, strict=False):
        print(*case, each)  # noqa: T201
        assert each["spills"] == each["stack"] == 0, case
        assert each["warnings"] == [], case
        assert each["registers"] == 168, case
        assert each["codes"] == 2 * 4, "four steps of 32 codes, in the first step and in the loop"
        assert each["floats"] == 2 * 8, case
        assert each["conversions"] == 0, "scores are float32 as they are"
        assert each["shared"] <= 232_448, case
    for each in found[len(CASES) : len(CASES) + 3]:
        assert each["registers"] <= 64, "four blocks of codes on a multiprocessor"
    for each in found[len(CASES) :]:
        assert each["spill_bytes"] == each["local_bytes"] == 0, each
        assert each.get("dp4a", True)


def test_the_exponent_without_a_conversion() -> None:
    """``exp2(s c - (MIDDLE c + max))`` in float32 against the scores, as the kernel's file claims."""
    middle = np.float32(3.0 * 2**22)
    rng = np.random.default_rng(0)
    for size in (1e-6, 1e-5, 1e-4):
        c = np.float32(size)
        codes = rng.integers(-(2**21), 2**21, 10_000)
        scores = (middle + codes.astype(np.float32)).astype(np.float32)
        assert np.array_equal(scores.view(np.int32), 0x4B400000 + codes)
        top = np.float32((scores.max() - middle) * c)
        shift = np.float32(np.float64(middle) * c + top)  # one rounding, as an FMA has
        exponents = (scores.astype(np.float64) * c - np.float64(shift)).astype(np.float32)
        exact = codes * np.float64(c) - np.float64(top)
        # Of the constant, half a unit of it; of the exponent itself, half a unit.
        allowed = c / 2 + np.spacing(top) + np.spacing(np.abs(exponents))
        assert (np.abs(exponents - exact) <= allowed).all()
