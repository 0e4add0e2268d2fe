"""Hopper backward kernels with functions of the user's, compiled ahead of time: no spills to speak of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from cuda_backend.attention.variant_hopper import SHARED_LIMIT

# Tests run with the simulator on, which compiles nothing: another process compiles, as the JIT does.
PROGRAM = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
from cuda_backend import aot
from cuda_backend._numba import cuda
from cuda_backend.attention.flexible_backward_hopper import build_flexible_backward, flexible_signature
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_backward_hopper import choose_backward
from numba.cuda.cudadrv.driver import _Linker
from tests.cuda.flexible_backward_forms import functions

name, width, deterministic, kind = json.loads(sys.argv[1])
variant = choose_backward(kind, width, width, False, deterministic=deterministic)
variant = variant._replace(mods=Mods() if name == "none" else functions(name))
how = dict(cc=aot.HOPPER, device=False, abi="numba", launch_bounds=(variant.threads, 1))
with aot.pretended(aot.HOPPER):
    kernel, signature = build_flexible_backward(variant), flexible_signature(variant.mods)
    ptx, _ = cuda.compile(kernel, signature, **how)
    code, _ = cuda.compile(kernel, signature, output="ltoir", **how)
linker = _Linker(cc=aot.HOPPER, lto=True)
linker.add_ltoir(code)
linker.complete()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "kernel.ptx")
    path.write_text(ptx)
    command = [str(aot._ptxas()), "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
said = run.stdout + run.stderr + linker.info_log
number = lambda pattern: max(int(found) for found in re.findall(pattern, said))
print(json.dumps({
    "shared": variant.shared_bytes,
    "registers": number(r"Used (\\d+) registers"),
    "stack": number(r"(\\d+) bytes stack frame"),
    "warnings": [line for line in said.splitlines() if re.search("arning|serializ|Potential", line)],
    "addresses": len(re.findall(r"[.]param [.]u64", ptx)) == variant.addresses,
    "doubles": len(re.findall(r"[.]f64", ptx)),
}))
"""
FULL = [
    (name, width, deterministic, kind)
    for name in ("none", "sliding", "BigBird", "documents", "packed", "ALiBi", "softcap", "sinks")
    for width in (64, 128)
    for deterministic in (False, True)
    for kind in ("f16", "bf16")
]


def compiled(*case: Any) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(case)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def clean(found: dict[str, Any], most: int) -> None:
    assert found["warnings"] == []
    assert found["addresses"], "as many as the plan packs"
    assert found["registers"] == 168, "24 and 240 after setmaxnreg"
    assert found["stack"] <= most
    assert found["shared"] <= SHARED_LIMIT, "more than a block may have on sm_90"
    assert found["doubles"] <= 2, "arithmetic is in float32"


@pytest.mark.aot
@pytest.mark.parametrize(
    "case", [("documents", 64, False, "f16"), ("BigBird", 128, True, "bf16"), ("softcap", 64, False, "f16")]
)
def test_nothing_spills(case: Any) -> None:
    clean(compiled(*case), 0)


@pytest.mark.aot_full
@pytest.mark.parametrize("case", FULL)
def test_all_forms(case: Any) -> None:
    """With ALiBi two to four numbers that a step does not touch lie in memory, once for each tile of keys."""
    clean(compiled(*case), 16 if case[:2] == ("ALiBi", 64) else 0)
