"""Kernels compiled without a GPU by another process: the simulator, which is on in tests, compiles nothing.

A test writes a program, which `answer` runs; a program asks `measured` what a Hopper kernel compiles into.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["answer", "measured"]


def answer(program: str, argument: Any, *words: str, folder: Path | None = None) -> Any:
    """Return what a program prints as JSON; it gets an argument as JSON, and words; `folder` has modules."""
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    command = [sys.executable, "-c", program, json.dumps(argument), *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def measured(
    build: Callable[[Any], Any], variant: Any, signature: Any, threads: int
) -> tuple[dict[str, Any], str]:
    """Return what a Hopper kernel compiles into, the worst that either compiler says of it, and its PTX.

    ptxas says how many registers it takes.  Machine code is made as the JIT makes it, too, out of LTO-IR:
    from PTX the linker would compile for other compilation units, and then it ignores setmaxnreg and
    serialises.
    """
    from numba.cuda.cudadrv import driver

    from cuda_backend import aot
    from cuda_backend._numba import cuda, pretended

    own_driver: Any = driver
    how = {"cc": aot.HOPPER, "device": False, "abi": "numba", "launch_bounds": (threads, 1)}
    with pretended(aot.HOPPER):
        kernel = build(variant)
        ptx, _ = cuda.compile(kernel, signature, **how)
        code, _ = cuda.compile(kernel, signature, output="ltoir", **how)
    linker = own_driver._Linker(cc=aot.HOPPER, lto=True)
    linker.add_ltoir(code)
    linker.complete()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [str(aot._ptxas()), "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    said = run.stdout + run.stderr + linker.info_log

    def most(pattern: str) -> int:
        return max(int(found) for found in re.findall(pattern, said))

    return {
        "registers": most(r"Used (\d+) registers"),
        "spills": most(r"(\d+) bytes spill stores") + most(r"(\d+) bytes spill loads"),
        "stack": most(r"(\d+) bytes stack frame"),
        "warnings": [line for line in said.splitlines() if re.search("arning|serializ|Potential", line)],
    }, ptx
