"""Hopper kernels compiled ahead of time, without a GPU: no spills, no serialised wgmma, known registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cuda_backend.attention.variant_hopper import SHARED_LIMIT

# Tests run with the simulator on, which compiles nothing: another process compiles.
PROGRAM = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
from cuda_backend import aot
from cuda_backend._numba import cuda
from cuda_backend.attention import forward_dropout_hopper, forward_hopper
from cuda_backend.attention.variant_hopper import choose, choose_dropout
from numba.cuda.cudadrv.driver import _Linker

kind, width, value_width, causal, rows = json.loads(sys.argv[1])
if rows == "dropout":
    variant = choose_dropout(kind, width, value_width, causal)
    build, SIGNATURE = forward_dropout_hopper.build_dropout, forward_dropout_hopper.SIGNATURE
else:
    variant = choose(kind, width, value_width, causal, rows=rows)
    build, SIGNATURE = forward_hopper.build, forward_hopper.SIGNATURE
how = dict(cc=aot.HOPPER, device=False, abi="numba", launch_bounds=(variant.threads, 1))
with aot.pretended(aot.HOPPER):
    kernel = build(variant)
    ptx, _ = cuda.compile(kernel, SIGNATURE, **how)
    code, _ = cuda.compile(kernel, SIGNATURE, output="ltoir", **how)
# As the JIT makes machine code: from PTX the linker would compile for other compilation units too, and then
# it ignores setmaxnreg and serialises.
linker = _Linker(cc=aot.HOPPER, lto=True)
linker.add_ltoir(code)
linker.complete()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "kernel.ptx")
    path.write_text(ptx)
    command = [str(aot._ptxas()), "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
said = run.stdout + run.stderr + linker.info_log
number = lambda pattern: int(re.search(pattern, said)[1])
print(json.dumps({
    "registers": number(r"Used (\\d+) registers"),
    "spills": number(r"(\\d+) bytes spill stores") + number(r"(\\d+) bytes spill loads"),
    "stack": number(r"(\\d+) bytes stack frame"),
    "warnings": [line for line in said.splitlines() if re.search("arning|serializ|Potential", line)],
    "block": re.findall(r"[.]param [.]align (\\d+) [.]b8 \\w+\\[(\\d+)\\]", ptx),
    "products": len(re.findall("wgmma.mma_async", ptx)),
    "shared": variant.shared_bytes,
}))
"""

FEW, MANY, DROPOUT = 512, 1 << 20, "dropout"  # query rows; or the kernel with dropout
# (kind, D, Dv, causal, rows): registers at entry; products in the first step, twice in the loop, in the last
# step; bytes of shared memory.
RECORDED = {
    ("f16", 64, 64, True, MANY): (128, 4 + 4 + 8 + 8, 181_504),
    ("f16", 64, 64, False, FEW): (168, 4 + 4 + 8 + 8, 165_120),
    ("bf16", 128, 128, False, MANY): (168, 8 + 8 + 8 + 8, 197_888),
    ("bf16", 192, 128, True, MANY): (168, 12 + 12 + 8 + 8, 214_272),
    ("f16", 256, 256, False, MANY): (168, 16 + 16 + 5 + 5, 230_656),
    ("f16", 64, 64, True, DROPOUT): (168, 4 + 4 + 6 + 6, 132_352),
    ("bf16", 128, 128, True, DROPOUT): (168, 8 + 8 + 6 + 6, 165_120),
}
FULL = [
    (kind, width, value_width, causal, rows)
    for kind in ("f16", "bf16")
    for width, value_width in ((64, 64), (128, 128), (64, 128), (128, 64), (192, 128), (192, 192), (256, 256))
    for causal in (False, True)
    for rows in ((MANY, FEW, DROPOUT) if width == value_width == 64 else (MANY, DROPOUT))
]
Case = tuple[str, int, int, bool, int | str]


def compiled(case: Case) -> dict[str, object]:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(case)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, object] = json.loads(run.stdout)
    return found


@pytest.mark.aot
@pytest.mark.parametrize("case", RECORDED)
def test_resources_are_as_recorded(case: Case) -> None:
    found = compiled(case)
    assert found["spills"] == found["stack"] == 0
    assert found["warnings"] == []
    assert found["block"] == [["64", "384"]], "descriptors among the parameters"
    assert (found["registers"], found["products"], found["shared"]) == RECORDED[case]
    assert int(str(found["shared"])) <= SHARED_LIMIT, "more than a block may have on sm_90"


@pytest.mark.aot_full
@pytest.mark.parametrize("case", FULL)
def test_nothing_spills_and_nothing_waits(case: Case) -> None:
    found = compiled(case)
    assert found["spills"] == found["stack"] == 0
    assert found["warnings"] == []
