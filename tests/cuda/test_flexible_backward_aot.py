"""Hopper backward kernels with functions of the user's, compiled ahead of time: no spills to speak of."""

from __future__ import annotations

from typing import Any

import pytest

from cuda_backend.attention.variant_hopper import SHARED_LIMIT
from tests.cuda.ahead import answer

PROGRAM = """
import json, re, sys
from cuda_backend.attention.flexible_backward_hopper import build_flexible_backward, flexible_signature
from cuda_backend.attention.ruled_masks import ruled_functions
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_backward_hopper import choose_backward
from tests.cuda.ahead import measured
from tests.cuda.flexible_backward_forms import functions

TILES = " in tiles"
name, width, deterministic, kind = json.loads(sys.argv[1])
variant = choose_backward(kind, width, width, False, deterministic=deterministic)
mods = Mods() if name == "none" else functions(name.removesuffix(TILES))
variant = variant._replace(mods=ruled_functions(mods, (32, 48)) if name.endswith(TILES) else mods)
signature = flexible_signature(variant.mods)
found, ptx = measured(build_flexible_backward, variant, signature, variant.threads)
print(json.dumps(found | {
    "shared": variant.shared_bytes,
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
    found: dict[str, Any] = answer(PROGRAM, case)
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


@pytest.mark.aot
@pytest.mark.parametrize("name", ["sliding", "ALiBi"])
def test_masks_that_obey_tiles(name: str) -> None:
    """A block mask of other tiles than the kernel's: states in the loop that asks for bits."""
    clean(compiled(f"{name} in tiles", 64, False, "f16"), 24 if name == "ALiBi" else 0)


@pytest.mark.aot_full
@pytest.mark.parametrize("case", FULL)
def test_all_forms(case: Any) -> None:
    """With ALiBi two to four numbers that a step does not touch lie in memory, once for each tile of keys."""
    clean(compiled(*case), 16 if case[:2] == ("ALiBi", 64) else 0)
