"""Ahead-of-time compiles: PTX and ptxas for a GPU that is not there, to count registers and spills."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cuda_backend._numba import SIMULATOR, cuda, pretended
from refimpl.errors import BackendUnavailableError

__all__ = ["AMPERE", "HOPPER", "Resources", "compile_ptx", "resources"]

ComputeCapability = tuple[int, int] | tuple[int, int, str]

AMPERE: ComputeCapability = (8, 0)
HOPPER: ComputeCapability = (9, 0, "a")


class Resources(NamedTuple):
    """What ptxas says of a kernel.

    Attributes
    ----------
    registers
        Per thread.
    spill_bytes
        Stored to and loaded from local memory for want of registers, per thread.
    local_bytes
        Local memory of a thread (its stack frame): arrays that did not fit into registers.
    """

    registers: int
    spill_bytes: int
    local_bytes: int


def compile_ptx(function: Callable[..., Any], signature: Any, capability: ComputeCapability) -> str:
    """Return the PTX of a kernel for `capability`; no GPU is needed.

    Raises
    ------
    BackendUnavailableError
        In the simulator, which compiles nothing.
    """
    if SIMULATOR:
        raise BackendUnavailableError("aot: the simulator compiles nothing; unset NUMBA_ENABLE_CUDASIM")
    with pretended(capability):
        ptx, _ = cuda.compile(function, signature, cc=capability, device=False, abi="numba", output="ptx")
    return str(ptx)


def resources(ptx: str, capability: ComputeCapability) -> Resources:
    """Return what ptxas says of the one kernel in `ptx`.

    Raises
    ------
    BackendUnavailableError
        If there is no ptxas (package nvidia-cuda-nvcc, or a CUDA toolkit on the path).
    RuntimeError
        If ptxas refuses `ptx`.
    """
    architecture = "sm_" + "".join(str(part) for part in capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [str(_ptxas()), "-v", f"-arch={architecture}", "-o", str(path.with_suffix(".cubin"))]
        run = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"ptxas -arch={architecture}: {run.stderr.strip()}")

    def number(pattern: str) -> int:
        found = re.search(pattern, run.stderr)
        if found is None:
            raise RuntimeError(f"ptxas: no {pattern!r} in {run.stderr!r}")
        return int(found[1])

    return Resources(
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        local_bytes=number(r"(\d+) bytes stack frame"),
    )


def _ptxas() -> Path:
    """Return the path of ptxas: that of package nvidia-cuda-nvcc, which is as new as NVVM, or one on PATH."""
    spec = find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(root).glob("*/bin/ptxas*")):
            return found
    on_path = shutil.which("ptxas")
    if on_path is None:
        raise BackendUnavailableError("aot: no ptxas; install nvidia-cuda-nvcc")
    return Path(on_path)
