"""Functions of the user's compiled into the portable kernels, without a GPU; errors name their lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cuda.ahead import answer

pytestmark = pytest.mark.aot
FULL = pytest.mark.aot_full

PROGRAM = """
import json, sys
from cuda_backend import aot
from cuda_backend.attention import backward_portable as portable, forward_portable, states_portable
from cuda_backend.attention.user_device import Mods, blamed
from cuda_backend.attention.variant_backward import BackwardVariant
from cuda_backend.attention.variant_portable import Features, Variant, choose
from refimpl.attention import samples_flexible as samples
from refimpl.attention.user_functions import as_mod
from refimpl.errors import OptionError
import numpy as np

mask, score, kind, D = json.loads(sys.argv[1])
shape = dict(B=1, Tq=12, Tk=12, Hkv=1, group=2, D=4, Dv=4)
case = samples.sample_flexible(np.random.default_rng(0), mask=mask, score=score, **shape)
case = case.replace(**eval(sys.argv[2]))
def mod(name, *leading):
    return as_mod(name, case.kwargs[name], leading) if name in case.kwargs else None
aux = tuple(("float32" if x.dtype.kind == "f" else x.dtype.name, x.ndim) for x in case.kwargs.get("aux", ()))
mods = Mods(mod("mask_mod"), mod("score_mod", "score"), mod("score_mod_vjp", "gradient", "score"), aux)
sizes = dict(block_sizes=None, sram=None, capacity=227 * 256)
def variant(form):
    return choose(kind, D, D, Features(mods=mods), form=form, **sizes)
forward, backward = variant(Variant), variant(BackwardVariant)
states = states_portable.StatesVariant(mods, 128, 176, 256)
found = {}
try:
    with blamed(mods):
        for name, function, signature in (
            ("forward", forward_portable.source(forward), forward_portable.signature(forward)),
            ("queries", portable.queries_source(backward), portable.queries_signature(backward)),
            ("keys", portable.keys_source(backward), portable.keys_signature(backward)),
            ("states", states_portable.source(states), states_portable.signature(states)),
        ):
            ptx = aot.compile_ptx(function, signature, aot.HOPPER)
            found[name] = aot.resources(ptx, aot.HOPPER)._asdict()
except OptionError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def compiled(*arguments: Any, replaced: str = "{}", folder: Path | None = None) -> dict[str, Any]:
    found: dict[str, Any] = answer(PROGRAM, arguments, replaced, folder=folder)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("documents", "alibi", "float16", 64), marks=FULL),
        ("branching", "branching", "bfloat16", 128),
        pytest.param(("global", "softcap", "float32", 64), marks=FULL),
    ],
)
def test_functions_compile_and_nothing_spills(arguments: Any) -> None:
    found = compiled(*arguments)
    assert set(found) == {"forward", "queries", "keys", "states"}, found.get("error")
    for name, used in found.items():
        assert used["spill_bytes"] == 0, name
        assert used["local_bytes"] == 0, name
        assert 8 < used["registers"] <= 255


@pytest.mark.parametrize(
    "replaced",
    [
        "dict(mask_mod=samples.mods.ranges(), aux=(np.zeros(4, np.int32), np.zeros(4, np.int32)))",
        pytest.param(
            "dict(mask_mod=samples.mods.both(samples.mods.causal, samples.mods.documents()),"
            " aux=(np.zeros((1, 4), int),))",
            marks=FULL,
        ),
        pytest.param(
            "dict(mask_mod=samples.mods.given(True, False), aux=(np.ones((1, 1, 4, 4), bool),))", marks=FULL
        ),
    ],
)
def test_packed_sequences_and_given_masks_compile_and_nothing_spills(replaced: str) -> None:
    found = compiled("none", "softcap", "float16", 128, replaced=replaced)
    assert set(found) == {"forward", "queries", "keys", "states"}, found.get("error")
    for name, used in found.items():
        assert used["spill_bytes"] == used["local_bytes"] == 0, name


def test_an_error_names_the_line_of_the_function(tmp_path: Path) -> None:
    source = "def window(b, h, i, j):\n    near = abs(i - j) < 4\n    return near.nonsense\n"
    path = tmp_path / "users_masks.py"
    path.write_text(source)
    replaced = "dict(mask_mod=__import__('users_masks').window)"
    found = compiled("none", "none", "float32", 16, replaced=replaced, folder=tmp_path)
    assert found["error"].startswith(f"mask_mod: does not compile for the GPU; {path}, line 3: "), found


RANGES = """
import json, sys
from cuda_backend import aot
from cuda_backend.attention import ranges_portable as ranges

found = {}
for causal in ("", "top_left", "bottom_right"):
    variant = ranges.RangesVariant(causal, "int32", "int64", 128)
    ptx = aot.compile_ptx(ranges.source(variant), ranges.signature(variant), aot.HOPPER)
    found[causal] = aot.resources(ptx, aot.HOPPER)._asdict()
print(json.dumps(found))
"""


def test_ranges_of_keys_compile() -> None:
    for used in answer(RANGES, None).values():
        assert used["spill_bytes"] == used["local_bytes"] == 0
