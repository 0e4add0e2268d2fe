"""The kernels of decoding compiled ahead of time, without a GPU: nothing spills.

``pytest -s -m aot tests/cuda/test_decode_aot.py`` prints registers and instructions of some.
"""

from __future__ import annotations

import sys

import pytest

from tests.cuda.ahead import answer

PROGRAM = """
import json, sys
from cuda_backend import aot
from cuda_backend.attention import decode_portable as portable

kind, D, rows, paged = json.loads(sys.argv[1])
variant = portable.DecodeVariant(kind, D, D, rows, 64, 128, paged)
found = {}
for name, function, signature in (
    ("parts", portable.source(variant), portable.signature(variant)),
    ("merge", portable.merge_source(kind), portable.merge_signature(kind)),
):
    found[name] = aot.resources(aot.compile_ptx(function, signature, aot.HOPPER), aot.HOPPER)._asdict()
print(json.dumps(found))
"""


@pytest.mark.aot
@pytest.mark.parametrize("arguments", [("bfloat16", 128, 8, True), ("float32", 64, 1, False)])
def test_nothing_spills(arguments: tuple[object, ...]) -> None:
    found = answer(PROGRAM, arguments)
    assert set(found) == {"parts", "merge"}
    for name, used in found.items():
        assert used["spill_bytes"] == 0, name
        assert used["local_bytes"] == 0, name
        assert 8 < used["registers"] <= 255


AMPERE_PROGRAM = """
import json, re, sys
from cuda_backend import aot
from cuda_backend._numba import cuda
from cuda_backend.attention import decode_ampere
from cuda_backend.attention.decode_variant_ampere import KEYS, choose

found = []
for fields, memory, capability in json.loads(sys.argv[1]):
    capability = tuple(capability)
    variant = choose(*fields, memory, capability >= (9, 0))
    function, how = decode_ampere.build(variant), {"launch_bounds": (variant.threads, variant.blocks)}
    with aot.pretended(capability):
        ptx, _ = cuda.compile(
            function, decode_ampere.SIGNATURE, cc=capability, device=False, abi="numba", **how
        )
    found.append(aot.resources(ptx, capability)._asdict() | {
        "threads": variant.threads * variant.blocks,
        "tiles": variant.keys // KEYS,
        "early": [ptx.count("griddepcontrol." + what) for what in ("launch_dependents", "wait")],
        "hints": len(re.findall(r"prefetch.global.L2", ptx)),
        "copies": len(re.findall(r"cp.async.cg.shared.global", ptx)),
        "products": len(re.findall(r"mma.sync.aligned.m16n8k16", ptx)),
        "fragments": len(re.findall(r"ldmatrix", ptx)),
        "turned": len(re.findall(r"movmatrix", ptx)),
        "barriers": len(re.findall(r"barrier.sync|bar.sync", ptx)),
    })
print(json.dumps(found))
"""
H200, A100 = (232_448, [9, 0, "a"]), (166_912, [8, 0])
FIELDS = [
    (("f16", 128, 128, 4, False), H200),
    (("bf16", 128, 128, 16, True), H200),
    (("f16", 256, 256, 8, True), A100),
    (("f16", 96, 80, 1, False), H200),
]


@pytest.mark.aot
def test_tensor_cores() -> None:
    """Copies of 16 bytes and fragments by fours; each fragment of K and V is used by one product a column."""
    cases = [(fields, *machine) for fields, machine in FIELDS]
    found = answer(AMPERE_PROGRAM, cases)
    for (fields, machine), used in zip(FIELDS, found, strict=True):
        sys.stdout.write(f"{fields}: {used}\n")
        _, D, Dv, rows, paged = fields
        blocks, columns = used["tiles"] * (D + Dv) // 16, 2 if rows > 8 else 1  # of 16 by 16, of 8 queries
        assert used["spill_bytes"] == used["local_bytes"] == 0
        assert used["registers"] * used["threads"] <= 65536
        assert used["tiles"] == (2 if max(D, Dv) <= 128 and not paged else 1)
        assert used["fragments"] == blocks
        assert used["products"] == columns * blocks
        assert used["turned"] == 2 * columns * used["tiles"]
        assert used["copies"] % blocks == 0
        assert used["early"] == ([1, 1] if machine is H200 else [0, 0])
        assert used["hints"] == (2 * (D + Dv) // 64 if machine is H200 and not paged and D % 64 == 0 else 0)
        assert used["barriers"] == 5  # before and after the sums of warps, and around the last block's part
