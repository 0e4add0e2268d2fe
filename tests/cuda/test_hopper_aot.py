"""Hopper kernels compiled ahead of time, without a GPU: no spills, no serialised wgmma, known registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Tests run with the simulator on, which compiles nothing: another process compiles.
PROGRAM = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
from cuda_backend import aot
from cuda_backend._numba import cuda
from cuda_backend.attention.forward_hopper import SIGNATURE, build
from cuda_backend.attention.variant_hopper import choose

variant = choose(*json.loads(sys.argv[1]))
with aot.pretended(aot.HOPPER):
    ptx, _ = cuda.compile(build(variant), SIGNATURE, cc=aot.HOPPER, device=False, abi="numba",
                          launch_bounds=(variant.threads, 1))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "kernel.ptx")
    path.write_text(ptx)
    command = [str(aot._ptxas()), "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
said = run.stdout + run.stderr
number = lambda pattern: int(re.search(pattern, said)[1])
print(json.dumps({
    "registers": number(r"Used (\\d+) registers"),
    "spills": number(r"(\\d+) bytes spill stores") + number(r"(\\d+) bytes spill loads"),
    "stack": number(r"(\\d+) bytes stack frame"),
    "warnings": [line for line in said.splitlines() if "arning" in line or "serializ" in line],
    "products": len(re.findall("wgmma.mma_async", ptx)),
    "shared": variant.shared_bytes,
}))
"""

# (kind, D, Dv, causal): registers at entry; products in the first step, twice in the loop, in the last step.
RECORDED = {
    ("f16", 64, 64, True): (128, 4 + 4 + 8 + 8),
    ("bf16", 128, 128, False): (168, 8 + 8 + 8 + 8),
    ("bf16", 192, 128, True): (168, 12 + 12 + 8 + 8),
    ("f16", 256, 256, False): (168, 16 + 16 + 5 + 5),
}
FULL = [
    (kind, width, value_width, causal)
    for kind in ("f16", "bf16")
    for width, value_width in ((64, 64), (128, 128), (64, 128), (128, 64), (192, 128), (192, 192), (256, 256))
    for causal in (False, True)
]


def compiled(case: tuple[str, int, int, bool]) -> dict[str, object]:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(case)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, object] = json.loads(run.stdout)
    return found


@pytest.mark.aot
@pytest.mark.parametrize("case", RECORDED)
def test_resources_are_as_recorded(case: tuple[str, int, int, bool]) -> None:
    found = compiled(case)
    assert found["spills"] == found["stack"] == 0
    assert found["warnings"] == []
    assert (found["registers"], found["products"]) == RECORDED[case]
    assert int(str(found["shared"])) <= 232_448, "more than a block may have on sm_90"


@pytest.mark.aot_full
@pytest.mark.parametrize("case", FULL)
def test_nothing_spills_and_nothing_waits(case: tuple[str, int, int, bool]) -> None:
    found = compiled(case)
    assert found["spills"] == found["stack"] == 0
    assert found["warnings"] == []
