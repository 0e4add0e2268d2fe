"""Kernels for quantised weights compiled ahead of time: no spills, wide loads, few instructions a weight.

``pytest -s -m aot tests/cuda/test_weight_only_aot.py`` prints registers and instructions of each.
"""

from __future__ import annotations

import pytest

from tests.cuda.ahead import answer

PROGRAM = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
from types import SimpleNamespace
from cuda_backend import aot
from cuda_backend._numba import cuda
from cuda_backend.weight_only import decode, pack, product_portable, stream_nf4, wide_nf4
from cuda_backend.weight_only.variant import Stream, Variant, Wide

found = []
for kernel, fields, capability in json.loads(sys.argv[1]):
    capability = tuple(capability)
    decoding = {"decode": (decode, Variant), "stream": (stream_nf4, Stream), "wide": (wide_nf4, Wide)}
    if kernel in decoding:
        module, kind = decoding[kernel]
        variant = kind(*fields)
        function, signature = module.build(variant), module.SIGNATURE
        how = {"launch_bounds": (variant.threads, variant.blocks)}
    elif kernel == "pack":
        variant, how = SimpleNamespace(threads=pack.THREADS), {}
        function, signature = pack.mover(*fields), pack.signature(*fields)
    else:
        variant, how = product_portable.Variant(*fields), {}
        function, signature = product_portable.source(variant), product_portable.signature(variant)
    with aot.pretended(capability):
        ptx, _ = cuda.compile(function, signature, cc=capability, device=False, abi="numba", **how)
    found.append(aot.resources(ptx, capability)._asdict() | {
        "threads": variant.threads,
        "waits": len(re.findall("griddepcontrol.wait", ptx)),
        "bulk": len(re.findall("cp.async.bulk.shared", ptx)),
        "vectors": len(re.findall(r"ld.global.v4.b32", ptx)),
        "products": len(re.findall(r"mma.sync.aligned.m16n8k16", ptx)),
        "look_ups": len(re.findall(r"prmt.b32 a,", ptx)),
        "permutes": len(re.findall(r"prmt.b32", ptx)) - len(re.findall(r"prmt.b32 a,", ptx)),
    })
print(json.dumps(found))
"""
Case = tuple[str, tuple[object, ...], list[object]]
HOPPER: list[object] = [9, 0, "a"]
AMPERE: list[object] = [8, 0]
# Kernel, fields of its variant, capability: registers; vectors asked for, products and look-ups in the code,
# which holds the loop's body once for each of two chunks in flight.
DECODE: dict[tuple[object, ...], tuple[int, int, int, int]] = {
    ("decode", "nf4", "bf16", 16, True, True, 2, True): (128, 16, 64, 128),
    ("decode", "nf4", "f16", 8, False, True): (128, 16, 32, 128),
    ("decode", "nf4", "f16", 16, False, False): (128, 16, 32, 128),
    ("decode", "int8", "f16", 8, False, True, 2, True): (128, 16, 16, 0),
    ("decode", "int8", "bf16", 16, True, False, 2, True): (128, 16, 32, 0),
    ("decode", "int8", "bf16", 8, False, True, 2, True): (128, 16, 16, 0),
    ("stream", "f16", 2): (128, 16, 32, 128),
    ("stream", "bf16", 4): (128, 16, 32, 128),
    ("stream", "bf16", 8): (128, 16, 32, 128),
    # The loop's body once, of half a chunk for each of four tiles, brought by the copy engine.
    ("wide", "f16", 8): (255, 0, 32, 128),
    ("wide", "bf16", 16): (255, 0, 64, 128),
}
PRODUCT: list[tuple[object, ...]] = [
    ("int8", "float16", "float16", "float16", False, False, True),
    ("int8", "bfloat16", "bfloat16", "bfloat16", True),
    ("nf4", "float16", "float16", "float16", False, True),
    ("nf4", "float32", "float32", "float32", False, True, True),
    ("float", "float32", "bfloat16", "bfloat16"),
]


def compiled(cases: list[Case]) -> list[dict[str, int]]:
    found: list[dict[str, int]] = answer(PROGRAM, cases)
    return found


@pytest.mark.aot
def test_decoding() -> None:
    cases: list[Case] = [(str(kernel), tuple(fields), HOPPER) for kernel, *fields in DECODE]
    for (fields, (most, vectors, products, look_ups)), found in zip(
        DECODE.items(), compiled(cases), strict=True
    ):
        print(*fields, found)  # noqa: T201
        assert found["spill_bytes"] == found["local_bytes"] == 0, fields
        assert found["registers"] <= most, fields
        # Two copies of the loop's body, and of what asks for the first chunks; four vectors each.
        assert found["vectors"] == vectors, fields
        assert found["products"] == products, fields
        assert found["look_ups"] == look_ups, "one look-up for two weights"
        assert found["waits"] == (fields[0] != "decode" or len(fields) == 8), fields
        assert (found["bulk"] > 0) == (fields[0] == "wide"), fields
        if not look_ups:
            assert 64 <= found["permutes"] <= 66, "one placing of bytes for two weights"


@pytest.mark.aot
def test_decoding_on_ampere() -> None:
    fields: tuple[object, ...] = ("nf4", "f16", 8, False, True)
    (found,) = compiled([("decode", fields, AMPERE)])
    assert found["spill_bytes"] == found["local_bytes"] == 0


@pytest.mark.aot
@pytest.mark.parametrize("capability", [AMPERE, HOPPER], ids=["sm_80", "sm_90a"])
def test_products(capability: list[object]) -> None:
    units: list[Case] = [("pack", (unit,), capability) for unit in ("uint8", "uint16", "uint32")]
    for each in compiled(units):
        assert each["spill_bytes"] == each["local_bytes"] == 0
    for fields, found in zip(
        PRODUCT, compiled([("product", fields, capability) for fields in PRODUCT]), strict=True
    ):
        print(*fields, found)  # noqa: T201
        assert found["spill_bytes"] == found["local_bytes"] == 0, fields
        assert found["registers"] <= 255, fields
