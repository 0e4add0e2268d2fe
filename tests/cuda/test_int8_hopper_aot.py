"""Hopper int8 kernels compiled ahead of time, without a GPU: no spills, no serialised wgmma, known registers.

``pytest -s -m aot tests/cuda/test_int8_hopper_aot.py`` prints registers and shared memory of each.
"""

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
from types import SimpleNamespace
from cuda_backend import aot
from cuda_backend._numba import cuda
from cuda_backend.int8 import gemm_hopper, gemm_narrow_hopper, outliers_hopper, pack_hopper, quantize_hopper
from cuda_backend.int8 import layer_few_hopper
from cuda_backend.int8.variant_hopper import Few, Narrow, Wide
from numba.cuda.cudadrv.driver import _Linker

MODULES = {"wide": (gemm_hopper, Wide), "narrow": (gemm_narrow_hopper, Narrow),
           "few": (layer_few_hopper, Few),
           "outliers": (outliers_hopper, outliers_hopper.Variant), "pack": (pack_hopper, pack_hopper.Variant),
           "quantize": (quantize_hopper, quantize_hopper.choose)}
found = []
for name, *fields in json.loads(sys.argv[1]):
    module, make = MODULES[name]
    variant = make(*fields)
    threads = getattr(variant, "threads", 256)
    bounds = threads, getattr(variant, "resident", 1)
    how = dict(cc=aot.HOPPER, device=False, abi="numba", launch_bounds=bounds)
    linker = SimpleNamespace(info_log="")
    with aot.pretended(aot.HOPPER):
        kernel = module.build(variant)
        ptx, _ = cuda.compile(kernel, module.SIGNATURE, **how)
        if len(sys.argv) > 2 and name in ("wide", "narrow", "few"):  # as the JIT makes machine code
            linker = _Linker(cc=aot.HOPPER, lto=True)
            linker.add_ltoir(cuda.compile(kernel, module.SIGNATURE, output="ltoir", **how)[0])
            linker.complete()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [str(aot._ptxas()), "-v", "-arch=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    said = run.stdout + run.stderr + linker.info_log
    number = lambda pattern: int(re.search(pattern, said)[1])
    found.append({
        "registers": number(r"Used (\\d+) registers"),
        "spills": number(r"(\\d+) bytes spill stores") + number(r"(\\d+) bytes spill loads"),
        "stack": number(r"(\\d+) bytes stack frame"),
        "warnings": [line for line in said.splitlines() if re.search("arning|serializ|Potential", line)],
        "int8": len(re.findall("wgmma.mma_async[^;]*s32.s8.s8", ptx)),
        "float": len(re.findall("wgmma.mma_async[^;]*f32", ptx)),
        "shared": getattr(variant, "shared_bytes", 0) + sum(map(int, re.findall(r"(\\d+) bytes smem", said))),
        "threads": threads,
    })
print(json.dumps(found))
"""

# Kernel and fields of its variant; all others are compiled by ``-m aot_full``.
RECORDED = [
    ("wide", "float16", "released", True, 256),
    ("wide", "bfloat16", "paper", False, 128),
    ("wide", "int32", "released", True, 256),
    ("wide", "float16", "released", True, 256, True),
    ("wide", "bfloat16", "paper", False, 128, True),
    ("wide", "float16", "released", True, 256, True, True),
    ("wide", "float16", "released", True, 256, False, True),
    ("few", "float16", 16, 4, 8, True),
    ("few", "bfloat16", 1, 2, 128, True),
    ("narrow", "bfloat16", "paper", 64, 4),
    ("narrow", "float16", "released", 16, 4, True, True),
    ("narrow", "float16", "released", 64, 4, True, True),
    ("narrow", "bfloat16", "paper", 64, 4, True),
    ("outliers",),
    ("quantize", "float16", "cells", True, 8192),
    ("quantize", "bfloat16", "columns", False, 28_672),
    ("quantize", "float16", "mark", True, 131_072),
    ("pack",),
]
KINDS, WIDTHS = ("float16", "bfloat16"), (100, 1024, 4096, 8192, 28_672, 65_536, 100_000)
FULL = [
    *[("wide", kind, outliers, aligned, block_n, beside, halves)
      for kind in KINDS for outliers in ("released", "paper") for aligned in (True, False)
      for block_n in (128, 256) for beside in (True, False) for halves in (True, False)],
    *[("few", kind, rows, blocks, room, rows * room > 64)
      for kind in KINDS for rows in (1, 2, 4, 8, 16) for blocks in (1, 8)
      for room in (2, 8, 32, 128) if rows * room <= 128],
    *[("wide", "int32", "released", aligned, block_n) for aligned in (True, False) for block_n in (128, 256)],
    *[("narrow", kind, "released", tokens, blocks) for kind in (*KINDS, "int32")
      for tokens in (8, 16, 32, 64) for blocks in (1, 2, 4, 8)],
    *[("narrow", kind, outliers, tokens, blocks, True, alone)
      for kind in KINDS for outliers in ("released", "paper")
      for tokens in (8, 16, 32, 64) for blocks in (1, 2, 4, 8) for alone in (False, True)],
    *[("quantize", kind, aside, aligned, width) for kind in KINDS for aligned in (True, False)
      for aside in ("", "cells", "mark", "columns") for width in WIDTHS],
]  # fmt: skip
REGISTERS = 64 * 1024


def compiled(cases: list[tuple[object, ...]], *more: str) -> list[dict[str, object]]:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(cases), *more]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: list[dict[str, object]] = json.loads(run.stdout)
    return found


def judge(case: tuple[object, ...], found: dict[str, object]) -> None:
    assert found["spills"] == found["stack"] == 0, case
    assert found["warnings"] == [], case
    registers, threads, shared = (int(str(found[key])) for key in ("registers", "threads", "shared"))
    shares = {"few": not case[-1], "narrow": case[6:] != (True,)}  # whether it leaves room for a second block
    blocks = 2 if shares.get(str(case[0])) else 1
    assert blocks * threads * -(-registers // 8) * 8 <= REGISTERS, case
    assert blocks * (shared + 1024) <= 233_472, case  # 228 KiB of a multiprocessor, 1 KiB a block is reserved


@pytest.mark.aot
def test_nothing_spills_and_nothing_waits() -> None:
    found = compiled(list(RECORDED), "linked")
    for case, each in zip(RECORDED, found, strict=True):
        print(*case, {key: value for key, value in each.items() if key != "warnings"})  # noqa: T201
        judge(case, each)
    wide, *_ = found
    assert wide["registers"] == 168
    assert int(str(wide["int8"])) % 4 == 0, "four steps of 32 codes in a stage"
    assert found[3]["float"], "outliers go through tensor cores too"
    assert not wide["float"]
    assert not found[2]["float"]
    assert found[3]["registers"] == found[4]["registers"] == 168


@pytest.mark.aot_full
@pytest.mark.parametrize("part", range(8))
def test_all_variants(part: int) -> None:
    cases = FULL[part::8]
    for case, each in zip(cases, compiled(list(cases)), strict=True):
        judge(case, each)
