"""Hopper kernels compiled ahead of time, without a GPU: no spills, no serialised wgmma, known registers."""

from __future__ import annotations

import pytest

from cuda_backend.attention.variant_hopper import SHARED_LIMIT
from tests.cuda.ahead import answer
from tests.cuda.every_other import every_other

PROGRAM = """
import json, re, sys
from cuda_backend.attention import forward_dropout_hopper, forward_hopper
from cuda_backend.attention.variant_hopper import choose, choose_dropout
from tests.cuda.ahead import measured

kind, width, value_width, causal, rows = json.loads(sys.argv[1])
if rows == "dropout":
    variant = choose_dropout(kind, width, value_width, causal)
    build, SIGNATURE = forward_dropout_hopper.build_dropout, forward_dropout_hopper.SIGNATURE
else:
    variant = choose(kind, width, value_width, causal, rows=rows)
    build, SIGNATURE = forward_hopper.build, forward_hopper.SIGNATURE
found, ptx = measured(build, variant, SIGNATURE, variant.threads)
print(json.dumps(found | {
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
    found: dict[str, object] = answer(PROGRAM, case)
    return found


@pytest.mark.aot
@pytest.mark.parametrize("case", every_other(RECORDED))
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
