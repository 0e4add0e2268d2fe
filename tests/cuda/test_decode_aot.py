"""The kernels of decoding compiled ahead of time, without a GPU: nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

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
@pytest.mark.parametrize(
    "arguments", [("float16", 128, 8, False), ("bfloat16", 128, 8, True), ("float32", 64, 1, False)]
)
def test_nothing_spills(arguments: tuple[object, ...]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert set(found) == {"parts", "merge"}
    for name, used in found.items():
        assert used["spill_bytes"] == 0, name
        assert used["local_bytes"] == 0, name
        assert 8 < used["registers"] <= 255
