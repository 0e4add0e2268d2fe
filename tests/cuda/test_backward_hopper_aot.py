"""Hopper backward kernels compiled ahead of time, without a GPU: no spills, no serialised wgmma."""

from __future__ import annotations

from typing import Any

import pytest

from cuda_backend.attention.variant_hopper import SHARED_LIMIT
from tests.cuda.ahead import answer
from tests.cuda.every_other import every_other

PROGRAM = """
import json, re, sys
from cuda_backend.attention import around_backward_hopper as around
from cuda_backend.attention.backward_hopper import SIGNATURE, build_backward
from cuda_backend.attention.variant_backward_hopper import choose_backward
from cuda_backend.attention.variant_wide_backward_hopper import choose_wide_backward
from cuda_backend.attention.wide_backward_hopper import build_wide_backward
from tests.cuda.ahead import measured

kind, width, causal, deterministic, changes = json.loads(sys.argv[1])
width, value_width = width if isinstance(width, list) else (width, width)
wide = max(width, value_width) > 128
choose = choose_wide_backward if wide else choose_backward
variant = choose(kind, width, value_width, causal, deterministic=deterministic)._replace(**changes)
kernels = {
    "main": (build_wide_backward if wide else build_backward, SIGNATURE, variant.threads),
    "prepare": (around.build_prepare, around.PREPARE_SIGNATURE, around.THREADS),
    "finish": (around.build_finish, around.FINISH_SIGNATURE, 128 * variant.shares),
}
found = {"shared": variant.shared_bytes}
for name, (build, signature, threads) in kernels.items():
    found[name], ptx = measured(build, variant, signature, threads)
    found[name] |= {
        "block": re.findall(r"[.]param [.]align (\\d+) [.]b8 \\w+\\[(\\d+)\\]", ptx),
        "products": len(re.findall("wgmma.mma_async", ptx)),
        "reductions": len(re.findall("cp.reduce.async.bulk", ptx)),
        "added": len(re.findall("red[.]relaxed[.]gpu[.]global[.]add[.]v4[.]f32", ptx)),
        "stores": len(re.findall("stmatrix", ptx)),
    }
print(json.dumps(found))
"""

# (kind, D, causal, deterministic): products of a step (S, dP, dV, dQ, dK), stores of dS, shared bytes.
RECORDED = {
    ("f16", 64, True, False): (4 + 4 + 8 + 8 + 8, 8, 199_808),
    ("bf16", 128, False, False): (8 + 8 + 4 + 8 + 4, 4, 198_784),
    ("f16", 128, True, True): (8 + 8 + 4 + 8 + 4, 4, 198_784),
}
# The same of wide heads, and how often 16 bytes are added to dQ in place of copies.
WIDE = {
    ("f16", (256, 256), True, False): (16 + 16 + 4 + 2 * 4 + 4, 4, 32, 223_336),
    ("bf16", (192, 128), False, True): (12 + 8 + 4 + 2 * 4 + 4, 4, 24, 149_608),
    ("bf16", (136, 200), True, True): (12 + 16 + 4 + 2 * 4 + 4, 4, 24, 198_760),
}
TURNED, EARLY = {"swapped": True}, {"early_dv": True}
FULL = [
    (kind, width, causal, deterministic, changes)
    for kind in ("f16", "bf16")
    for width in (64, 128)
    for causal in (False, True)
    for deterministic in (False, True)
    for changes in ({}, *([TURNED, EARLY] if width == 128 else []))
] + [
    (kind, widths, causal, deterministic, {})
    for kind in ("f16", "bf16")
    for widths in ((256, 256), (192, 192), (192, 128), (128, 256))
    for causal in (False, True)
    for deterministic in (False, True)
]


def compiled(*case: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer(PROGRAM, case)
    return found


def clean(found: dict[str, Any]) -> None:
    for name in ("main", "prepare", "finish"):
        assert found[name]["spills"] == found[name]["stack"] == 0, name
        assert found[name]["warnings"] == [], name
    assert found["main"]["registers"] == 168, "24 and 240 after setmaxnreg"
    assert found["shared"] <= SHARED_LIMIT, "more than a block may have on sm_90"


@pytest.mark.aot
@pytest.mark.parametrize("case", every_other(RECORDED))
def test_resources_are_as_recorded(case: Any) -> None:
    found = compiled(*case, {})
    clean(found)
    main = found["main"]
    assert main["block"] == [["64", "768"]], "descriptors among the parameters"
    assert (main["products"], main["stores"], found["shared"]) == RECORDED[case]
    assert main["reductions"] == 2, "one for each consumer"
    assert found["prepare"]["registers"] <= 64
    assert found["finish"]["registers"] <= 80


@pytest.mark.aot
@pytest.mark.parametrize("case", every_other(WIDE))
def test_resources_of_wide_heads(case: Any) -> None:
    found = compiled(*case, {})
    clean(found)
    main = found["main"]
    assert main["block"] == [["64", "768"]], "descriptors among the parameters"
    assert (main["products"], main["stores"], main["added"], found["shared"]) == WIDE[case]
    assert main["reductions"] == 0, "registers are added, not shared memory"


@pytest.mark.aot
@pytest.mark.parametrize(("width", "most"), [(64, 400), (128, 150), (256, 100)])
def test_dropout_spills_little(width: int, most: int) -> None:
    """Philox needs registers beside the accumulators: a few are spilled, no array lies in local memory.

    At 128 they are 140 bytes, in stores and loads, since the consumer also walks lists (they were 32).
    """
    found = compiled("f16", width, True, False, {"dropout": True})["main"]
    assert found["warnings"] == []
    assert found["spills"] <= most
    assert found["stack"] <= found["spills"]


@pytest.mark.aot_full
@pytest.mark.parametrize("case", FULL)
def test_nothing_spills_and_nothing_waits(case: Any) -> None:
    clean(compiled(*case))
