"""What a Hopper launch with functions of the user's hands to the driver, which here only remembers; lists."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.arrays import View
from cuda_backend.attention import call_flexible_hopper, plan_flexible_hopper, plan_hopper, remembered
from cuda_backend.attention.lists_hopper import ALL, NOTHING, ROWS, key_lists, resized
from cuda_backend.attention.user_device import Mods
from refimpl.attention import block_mask, mods
from refimpl.attention.block_mask import DEAD, FULL, BlockMask
from refimpl.attention.user_functions import as_mod
from refimpl.errors import BackendUnavailableError, UnsupportedError

COUNTER, WORDS = 0xC0, 0xB0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    """Launches: the variant, the words of all arguments behind the descriptors, and what was copied."""
    found: list[SimpleNamespace] = []
    copied: dict[int, Any] = {}

    def view(name: str, array: Any, _stream: int) -> View:
        if isinstance(array, View):
            return array
        copied[0x10000 * (len(copied) + 1)] = array
        return View(array.shape, array.strides, array.dtype.name, 0x10000 * len(copied), array)

    def launch(config: Any, function: Any, pointers: int, _extra: int) -> tuple[int]:
        kinds: list[Any] = [ctypes.c_uint64] * 6 + [ctypes.c_float] * 2 + [ctypes.c_int32] * 6
        kinds += [ctypes.c_int64] * sum(5 + 2 * ndim for _, ndim in function.mods.aux or (("float32", 1),))
        places = (ctypes.c_void_p * (1 + len(kinds))).from_address(pointers)
        values = [kind.from_address(at or 0).value for kind, at in zip(kinds, places[1:], strict=True)]
        found.append(SimpleNamespace(variant=function, blocks=config[0], values=values, copied=dict(copied)))
        return (0,)

    def words(_mods: Any, _arrays: Any, partial: Any, *_: Any) -> View:
        return View((partial.shape[0], 128, 2), (1024, 8, 4), "uint32", WORDS, None)

    driver = SimpleNamespace(cuLaunchKernelEx=launch, cuStreamSynchronize=lambda _: (0,))
    device = SimpleNamespace(compute_capability=(9, 0), MULTIPROCESSOR_COUNT=132)
    cuda = SimpleNamespace(get_current_device=lambda: device)
    counter = SimpleNamespace(address=lambda: COUNTER)
    for name, value in {
        "driver": driver, "cuda": cuda, "encoder": lambda *_: None, "view": view,
        "encode_together": lambda *_: lambda _: None, "tile_counters": lambda *_: counter,
        "early_config": lambda *numbers: numbers, "mask_words": words,
        "_function": lambda variant, _: variant,
    }.items():  # fmt: skip
        monkeypatch.setattr(plan_flexible_hopper, name, value)
    monkeypatch.setattr(plan_hopper, "cuda", cuda)

    def empty(shape: Any, dtype: str, _like: Any, _stream: int) -> Any:
        out = dense(*shape, dtype=dtype, address=0x7000 if len(shape) == 4 else 0x8000)
        return out, lambda: np.zeros(shape)

    for name, value in {
        "view": view, "empty": empty, "current_device": lambda: 0, "wait_for": lambda *_: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(call_flexible_hopper, name, value)
    plan_flexible_hopper.make_flexible_plan.cache_clear()
    remembered._answers.clear()
    yield found
    plan_flexible_hopper.make_flexible_plan.cache_clear()
    remembered._answers.clear()


def dense(*shape: int, dtype: str = "float16", address: int = 1 << 20) -> View:
    size = 4 if dtype == "float32" else 2
    strides = tuple(size * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return View(shape, strides, dtype, address, None)


def call(
    *arrays: View, mask: Any = None, score: Any = None, aux: tuple[Any, ...] = (), **options: Any
) -> Any:
    views = tuple(View(x.shape, x.strides, x.dtype.name, 0x9000, x) for x in aux)
    given = Mods(
        None if mask is None else as_mod("mask_mod", mask),
        None if score is None else as_mod("score_mod", score, ("score",)),
        None,
        tuple((x.dtype, len(x.shape)) for x in views),
    )
    others = {"scale": None, "return_lse": False, "stream": 0, **options}
    return call_flexible_hopper.flexible_attention_hopper(
        *arrays, mods=given, arrays=views, aux=aux, **others
    )


def test_arguments_are_those_of_the_signature(launched: list[SimpleNamespace]) -> None:
    q, k = dense(2, 300, 8, 128), dense(2, 700, 2, 128)
    slopes = np.ones(8, np.float32)
    call(q, k, k, score=mods.alibi(), aux=(slopes,), scale=0.25, return_lse=True)
    (found,) = launched
    out, lse, counter, work, steps, masks, scale, factor, *rest = found.values
    assert (out, lse, counter) == (0x7000, 0x8000, COUNTER)
    assert (scale, factor) == pytest.approx((0.25, np.log2(np.e)), rel=1e-7)
    assert rest[:6] == [3 * 16, 8, 4, 300, 700, 128]
    assert rest[6:] == [0, 0, 8, 4, 0x9000, 8, 4], "an array as Numba takes it"
    assert found.variant.ragged
    assert found.blocks == 48
    assert found.copied[work].shape == (48, 4)
    assert found.copied[steps].shape == (3 * 6 + 1, 4), "one list for all heads"
    assert masks == 0, "without a mask nothing is read"


def test_without_a_score_the_softmax_scales(launched: list[SimpleNamespace]) -> None:
    x = dense(1, 256, 4, 64)
    call(x, x, x, mask=mods.causal, scale=0.5)
    (found,) = launched
    assert found.values[7] == pytest.approx(0.5 * np.log2(np.e), rel=1e-7)
    assert found.values[1] == 0
    assert found.values[5] == WORDS
    assert found.variant.words
    assert found.variant.mods == Mods(), "one kernel for all masks"
    assert not found.variant.ragged


def test_lists_are_made_once_for_a_mask_and_what_it_reads(launched: list[SimpleNamespace]) -> None:
    x = dense(1, 256, 4, 64)
    for radius in (5, 5, 6):
        call(x, x, x, mask=mods.sliding(radius))
    works = [found.values[3] for found in launched]
    assert works[0] == works[1] != works[2]
    numbers = np.zeros((1, 256), np.int32)
    for document in (0, 0, 1):
        numbers[0, 9] = document
        call(x, x, x, mask=mods.documents(), aux=(numbers,))
    works = [found.values[3] for found in launched[3:]]
    assert works[0] == works[1] != works[2], "arrays have changed"


def test_tiles_are_those_that_take_least_time(launched: list[SimpleNamespace]) -> None:
    """Rows of 192 are better used than those of 128, unless few are left of a tile or few tiles there are."""
    many, few = dense(4, 4096, 16, 64), dense(1, 384, 4, 64)
    call(many, many, many, mask=mods.causal)
    call(few, few, few, mask=mods.causal)
    checked = np.eye(32, dtype=np.uint8)[None, None] * np.uint8(FULL)
    blocks = BlockMask(checked, (128, 128), (4096, 4096))
    call(many, many, many, mask=mods.causal, blocks=blocks)
    assert [found.variant.tiles.block_m for found in launched] == [192, 128, 128]
    assert [found.values[8] for found in launched] == [64 * 22, 4 * 3, 64 * 32]


@pytest.mark.parametrize(
    ("arrays", "options", "said"),
    [
        ((dense(1, 9, 2, 64), dense(1, 9, 2, 64), dense(1, 9, 2, 264)), {}, "Dv is 264"),
        ([dense(1, 9, 2, 64, dtype="float32")] * 3, {}, "inputs are float32"),
        ([dense(1, 9, 2, 64)] * 3, {"scale": -1.0}, "scale is -1.0"),
        ([dense(1, 9, 2, 64, address=8)] * 3, {}, "multiple of 16 bytes"),
    ],
)  # fmt: skip
def test_refusals(launched: list[SimpleNamespace], arrays: Any, options: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        call(*arrays, **options)
    assert not launched


def test_a_score_lets_the_scale_be_negative(launched: list[SimpleNamespace]) -> None:
    x = dense(1, 9, 2, 64)
    call(x, x, x, score=mods.softcap(2.0), scale=-1.0)
    assert launched[0].values[6] == -1.0


@pytest.mark.cudasim
def test_the_tier_is_named_or_refused() -> None:
    x = np.ones((1, 4, 2, 8), np.float16)
    f = cuda_backend.flexible_attention
    assert np.array_equal(f(x, x, x, mask_mod=mods.causal, tier="auto"), f(x, x, x, mask_mod=mods.causal))
    with pytest.raises(BackendUnavailableError, match="simulates CUDA"):
        f(x, x, x, tier="hopper")
    with pytest.raises(BackendUnavailableError, match="simulates CUDA"):
        cuda_backend.flexible_attention_vjp(x, x, x, x, np.zeros((1, 2, 4), np.float32), x, tier="hopper")
    with pytest.raises(UnsupportedError, match="no block_sizes"):
        f(x, x, x, tier="hopper", block_sizes=(4, 4))


@pytest.mark.parametrize("consumers", [2, 3])
def test_lists_name_what_is_left(consumers: int) -> None:
    """Every live tile once, from last to first; its bits; longest lists first within a section."""
    B, H, T, keys = 2, 3, 700, 128

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (abs(i - j - 64 * h) <= 150) & (i // 64 != 3 + b)

    states = block_mask(mask, B, H, T, T, block_sizes=(ROWS, keys)).states
    work, steps, partial = key_lists(states, consumers, B, H, 2, ragged=True)
    rows = -(-T // (ROWS * consumers))
    assert sorted(map(tuple, work[:, :2].tolist())) == sorted(itertools.product(range(rows), range(B * H)))
    for block, head, start, count in work.tolist():
        b, h = divmod(head, H)
        own = states[b, h, block * consumers : (block + 1) * consumers]
        wanted = np.flatnonzero((own != DEAD).any(0))[::-1]
        found = steps[start : start + count]
        assert found[:, 0].tolist() == wanted.tolist()
        for w, line in enumerate(own):
            for tile, seen in zip(wanted.tolist(), found[:, 1 + w].tolist(), strict=True):
                if line[tile] == DEAD:
                    assert seen == NOTHING
                elif line[tile] == FULL and tile < states.shape[3] - 1:
                    assert seen == ALL
                else:
                    assert partial[seen].tolist() == [b, h, block * consumers + w, tile]
    counts = work[:, 3].reshape(-1, 2 * rows)
    assert (np.diff(counts, axis=1) <= 0).all()
    assert len(steps) == start_of_nothing(work) + 1


def start_of_nothing(work: Any) -> int:
    return int((work[:, 2] + work[:, 3]).max())


def test_sizes_of_tiles_follow_from_others() -> None:
    """States of larger and of smaller tiles than the kernel's, against those that it would evaluate."""
    mask = mods.sliding(70)
    fine = block_mask(mask, 1, 1, 300, 300, block_sizes=(32, 64))
    own = block_mask(mask, 1, 1, 300, 300, block_sizes=(64, 128)).states
    assert np.array_equal(resized(fine, (64, 128)), own)
    coarse = resized(block_mask(mask, 1, 1, 300, 300, block_sizes=(128, 256)), (64, 128))
    assert coarse.shape == own.shape
    assert ((coarse == own) | (coarse == 1)).all(), "partial is always right"
