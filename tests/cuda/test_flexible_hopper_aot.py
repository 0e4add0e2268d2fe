"""Hopper kernels with functions of the user's, compiled without a GPU: no spills, no serialised wgmma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cuda_backend.attention.lists_hopper import STEP_BYTES
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant, candidates
from cuda_backend.attention.variant_hopper import SHARED_LIMIT
from tests.cuda.ahead import answer
from tests.cuda.every_other import every_other

PROGRAM = """
import json, re, sys
import numpy as np
from cuda_backend.attention.forward_flexible_hopper import build, signature
from cuda_backend.attention.traced import folds
from cuda_backend.attention.user_device import Mods, blamed
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant, candidates
from refimpl.attention import samples_flexible as samples
from refimpl.attention.user_functions import as_mod
from refimpl.errors import OptionError
from tests.cuda.ahead import measured

kind, D, Dv, which, mask, score, ragged, words = json.loads(sys.argv[1])
shape = dict(B=1, Tq=12, Tk=12, Hkv=1, group=2, D=4, Dv=4)
case = samples.sample_flexible(np.random.default_rng(0), mask=mask, score=score, **shape)
case = case.replace(**eval(sys.argv[2]))
def mod(name, *leading):
    return as_mod(name, case.kwargs[name], leading) if name in case.kwargs else None
aux = tuple(("float32" if x.dtype.kind == "f" else x.dtype.name, x.ndim) for x in case.kwargs.get("aux", ()))
mods = Mods(mod("mask_mod"), mod("score_mod", "score"), None, aux)
if words:
    mods = mods._replace(mask=None, aux=aux if score == "alibi" else ())
variant = FlexibleVariant(candidates(kind, D, Dv)[which][0], mods, ragged, words, folds(mods.score, mods.aux))
try:
    with blamed(mods):
        found, ptx = measured(build, variant, signature(variant), variant.tiles.threads)
except OptionError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
print(json.dumps(found | {
    "doubles": len(re.findall(r"[.]f64", ptx)),
    "wide": len(re.findall(r"setp[.]..[.][su]64|cvt.rn.f32.s64", ptx)),
}))
"""

WIDTHS = ((64, 64, 0), (64, 64, 1), (128, 128, 0))
# (kind, D, Dv, which tiles, mask, score, ragged, words)
CASES = [
    ("f16", 64, 64, 1, "sliding", "none", False, True),
    ("f16", 64, 64, 1, "bigbird", "softcap", False, False),  # asked beside the product: else it spills
    ("f16", 64, 64, 1, "sliding", "alibi", False, True),
    ("f16", 128, 128, 0, "documents", "alibi", True, True),
    ("bf16", 128, 128, 0, "causal", "softcap", True, False),
]
FULL = [
    (kind, *width, mask, score, ragged, words)
    for kind in ("f16", "bf16")
    for width in WIDTHS
    for mask in ("none", "sliding", "bigbird", "documents", "groups")
    for score in ("none", "alibi", "softcap")
    for ragged in (False, True)
    for words in ((False, True) if mask == "sliding" else (False,))
] + [
    ("f16", D, Dv, 0, "sliding", "alibi", True, words)
    for words in (False, True)
    for D, Dv in ((192, 128), (192, 192), (256, 256))
]
Case = tuple[str, int, int, int, str, str, bool, bool]


def compiled(case: Case, replaced: str = "{}", folder: Path | None = None) -> dict[str, Any]:
    found: dict[str, Any] = answer(PROGRAM, case, replaced, folder=folder)
    return found


@pytest.mark.aot
@pytest.mark.parametrize("case", every_other(CASES))
def test_functions_compile_into_registers(case: Case) -> None:
    found = compiled(case)
    assert found["spills"] == found["stack"] == 0
    assert found["warnings"] == []
    assert found["registers"] == (128 if case[3] else 168)
    assert found["doubles"] == 0
    assert found["wide"] < 32, "scores are asked in 32 bits; the kernel itself compares some addresses"


@pytest.mark.aot_full
@pytest.mark.parametrize("case", FULL)
def test_next_to_nothing_spills_and_nothing_waits(case: Case) -> None:
    found = compiled(case)
    # Groups with a softcap in tiles of 192 rows: up to six words of a tile of query rows are no registers.
    assert found["stack"] <= (24 if case[3] == 1 and case[4:6] == ("groups", "softcap") else 0)
    assert found["warnings"] == []


@pytest.mark.aot
def test_an_error_names_the_line_of_the_function(tmp_path: Path) -> None:
    source = "def window(b, h, i, j):\n    near = abs(i - j) < 4\n    return near.nonsense\n"
    path = tmp_path / "hopper_masks.py"
    path.write_text(source)
    replaced = "dict(mask_mod=__import__('hopper_masks').window)"
    found = compiled(("f16", 64, 64, 0, "none", "none", False, False), replaced, tmp_path)
    assert found["error"].startswith(f"mask_mod: does not compile for the GPU; {path}, line 3: "), found


@pytest.mark.parametrize("width", [(40, 64), (64, 128), (128, 128), (192, 128), (256, 256)])
def test_words_fit_behind_the_barriers(width: tuple[int, int]) -> None:
    from cuda_backend.attention.user_device import Mods

    for tiles, _ in candidates("f16", *width):
        variant = FlexibleVariant(tiles, Mods(), ragged=False)
        assert variant.work_slot >= tiles.places.tile_slot
        assert variant.step_slot + STEP_BYTES * tiles.stages <= tiles.shared_bytes - 1024 <= SHARED_LIMIT
