"""Mistakes in decoding: each changes one thing between the stored weight and the output, and must be seen."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest

from cuda_backend.weight_only import decode, plan, prepared, stream_nf4, wide_nf4
from tests.cuda.weight_only_judge import case_of, decoding_difference, taking

pytestmark = pytest.mark.cudasim


def _swapped(order: Any, first: int, second: int) -> Any:
    within = list(order.within)
    within[first], within[second] = within[second], within[first]
    return order._replace(within=tuple(within))


def _rotated(order: Any) -> Any:
    features = list(order.features)
    features[3], features[4] = 1, 2
    return order._replace(features=tuple(features))


MISTAKES = {
    "steps and lanes exchanged": ("int8", prepared, "int8_order", lambda f, *a: _swapped(f(*a), 5, 6)),
    "rows interleaved": ("int8", prepared, "int8_order", lambda f, *a: _rotated(f(*a))),
    "codes with their sign": ("int8", prepared, "moved", lambda f, *a, flip=0, **k: f(*a, **k)),
    "scales of the first group": (
        "int8", prepared, "scale_order", lambda f, *a: f(*a)._replace(within=(0,) * 8),
    ),
    "nibbles exchanged": (
        "nf4", plan, "pair_table", lambda f, *a: f(*a) >> np.uint32(16) | f(*a) << np.uint32(16),
    ),
    "pairs and lanes exchanged": (
        "nf4", prepared, "nf4_order", lambda f, *a: _swapped(f(*a), 5, 6),
    ),
    "absmax of the next block": (
        "nf4", prepared, "absmax_order", lambda f, *a: f(*a)._replace(within=(0,) * 5 + (4, 0, 0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, module, name, change = MISTAKES[mistake]
    case = case_of(weight, "float16", M=2, K=512, N=16)
    right = getattr(module, name)
    assert decoding_difference(weight, case, "float16") is None
    with monkeypatch.context() as patch:
        patch.setattr(module, name, functools.partial(change, right))
        plan._tables.cache_clear()
        plan.plan_of.cache_clear()
        assert decoding_difference(weight, case, "float16") is not None
    plan._tables.cache_clear()
    plan.plan_of.cache_clear()


# What stands in the source of a kernel, and what is put in its place.
IN_THE_KERNEL = {
    "sums of one warp": ("portable", "for w in range(WARPS)", "for w in range(1)"),
    "tokens exchanged": ("portable", "2 * (owner & 3) + (i & 1)", "2 * (owner & 3) + 1 - (i & 1)"),
    "rows exchanged": ("int8", "8 * ((i >> 1) & 1)", "8 * (1 - (i >> 1) & 1)"),
    "no offset of absmax": ("portable", ".view(np.float32) + offset", ".view(np.float32)"),
    "scale of the other row": ("int8", "uint32(extra[4 * slot + i]).v", "uint32(extra[4 * slot + 1 - i]).v"),
    "sums kept for the next tile": ("int8", "total[i] = float32(0.0)\n                        cuda", "cuda"),
    "chunk of the next warp": ("portable", "int32(2 * CHUNK * chunk)", "int32(2 * CHUNK * (chunk ^ 1))"),
    "columns of one block": ("stream", "if column == i else", "if column == 0 else"),
    "absmax of another column": ("stream", "8 * e + 16 * group +", "8 * e + 8 * group +"),
    "parts of the next tile": ("stream", "w * parts + tile -", "w * parts + 1 + tile -"),
    "a tile's end forgotten": ("stream", "if chunk == chunks or unit == end", "if unit == end"),
    "tile ahead stays": ("stream", "tile_ahead += int32(1)", "tile_ahead += int32(0)"),
    "first warp alone": ("stream", "in range(source, last + 1)", "in range(source, source + 1)"),
    "halves of a piece exchanged": ("stream", "(q >> 3) ^ (q >> 4)", "(q >> 4)"),
    "scales of the same item": ("wide", "outers[i] = outers_ahead[i]", "outers[i] = outers[i]"),
    "half of a chunk repeated": ("wide", "base, lane, step & 1, offset", "base, lane, 0, offset"),
    "the last part not in the ring": ("wide", "if own == machine.quotient(last, steps)", "if own < 0"),
    "tiles of the first four": ("wide", "TILES * four + lane", "lane"),
    "the first stage alone": ("wide", "STAGE_BYTES * slot)\n            machine", "0)\n            machine"),
}
MODULES = {"portable": decode, "int8": decode, "stream": stream_nf4, "wide": wide_nf4}
# Several tiles for each of two blocks, or one group of four of them.
SIZES = {
    "portable": {"M": 3, "K": 512, "N": 65, "scale_block_size": 4},
    "int8": {"M": 3, "K": 256, "N": 65},
    "stream": {"M": 3, "K": 512, "N": 81, "scale_block_size": 4},
    "wide": {"M": 3, "K": 768, "N": 65, "scale_block_size": 4},
}


@pytest.mark.parametrize("mistake", IN_THE_KERNEL)
def test_mistakes_in_the_kernel_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, right, wrong = IN_THE_KERNEL[mistake]
    weight, module = "int8" if kernel == "int8" else "nf4", MODULES[kernel]
    text = inspect.getsource(module.build)
    changed = text.replace(right, wrong)
    assert changed != text
    space = dict(vars(module))
    exec(compile(changed, str(module.__file__), "exec"), space)
    case = case_of(weight, "float16", **SIZES[kernel])
    with taking("portable" if kernel == "int8" else kernel):
        monkeypatch.setattr(module, "build", space["build"])
        assert decoding_difference(weight, case, "float16") is not None
