"""Attention in int8 in Numba's simulator: codes of the definition, outputs under the policy, mistakes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest

from cuda_backend._numba import cuda
from cuda_backend.arrays import poisoned_outputs
from cuda_backend.attention import int8_call, int8_codes_hopper, int8_portable
from cuda_backend.launch import simulation
from refimpl.attention import key_mean, quantize_token_blocks
from refimpl.errors import OptionError, UnsupportedError
from refimpl.numerics import round_to, widen
from refimpl.testing import check
from tests.cuda.int8_attention_judge import case_of, int8_difference
from tests.cuda.judge import DTYPES

pytestmark = pytest.mark.cudasim

FORMATS = {"f16": "float16", "bf16": "bfloat16"}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_codes_equal_the_definitions(dtype: str) -> None:
    q, k, v = case_of(dtype).args
    coded = functools.partial(int8_call.portable_codes, width=16)
    with poisoned_outputs():
        call = int8_call.prepare("test", q, k, v, False, None, True, (4, 3), None, coded=coded)
    mean = key_mean(k)
    for codes, x, block, taken in ((call.queries, q, 4, None), (call.keys, k, 3, mean)):
        expected = quantize_token_blocks(x, block=block, mean=taken)
        found = codes.words.owner.view(np.int8)
        assert found.shape[3] == 16
        assert not found[..., x.shape[3] :].any(), "the width is filled with zeros"
        # The mean is summed in another order: a code may move by one where a number lies at a tie.
        moved = np.abs(found[..., : x.shape[3]].astype(int) - expected.codes)
        assert moved.max() <= (taken is not None)
        assert np.mean(moved) < 0.01
        np.testing.assert_allclose(codes.scale.owner, expected.scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "tokens", "smooth", "kind"),
    [((1, 300, 2, 40), 128, True, "f16"), ((1, 130, 2, 128), 64, False, "bf16")],
)
def test_codes_of_the_hopper_kernels(shape: tuple[int, ...], tokens: int, smooth: bool, kind: str) -> None:
    """Their code, played: blocks of keys and of queries, ragged, one of zeros and one with an infinity."""
    B, T, H, D = shape
    rng = np.random.default_rng(0)
    x = round_to(rng.standard_normal(shape) + 2 * rng.standard_normal((1, 1, H, D)), DTYPES[FORMATS[kind]])
    if not smooth:
        x[:, :tokens, 0] = 0
    parts, blocks = -(-T // int8_codes_hopper.PART), -(-T // tokens)
    sums, scale = np.full((B, H, parts, 128), np.nan, np.float32), np.full((B, H, blocks), np.nan, np.float32)
    codes = np.full((B, T, H, 128), 99, np.int8)

    def run(kernel: Any, blocks: int, arrays: list[Any], *numbers: int) -> None:
        values = [*(np.uint64(array.ctypes.data) for array in arrays), *map(np.int32, numbers)]
        with simulation():
            cuda.jit(kernel)[blocks, int8_codes_hopper.THREADS](*values)

    steps = [step // 16 for step in x.strides[:3]]
    variant = int8_codes_hopper.Codes(kind, tokens, smooth)
    build_sums, build_codes = int8_codes_hopper.build_sums, int8_codes_hopper.build_codes
    run(build_sums(kind), B * H * parts, [x, sums], H, T, parts, D // 8, *steps)
    run(build_codes(variant), B * H * blocks, [x, sums, codes, scale], H, T, parts, D // 8, blocks, *steps)
    wide = widen(x)
    expected = quantize_token_blocks(wide, block=tokens, mean=key_mean(wide) if smooth else None)
    moved = np.abs(codes[..., :D].astype(int) - expected.codes)
    assert moved.max() <= smooth
    assert np.mean(moved) < 0.01
    assert not codes[..., D:].any(), "the width is filled with zeros"
    np.testing.assert_allclose(scale, np.where(expected.scale == 0, 1, expected.scale), rtol=1e-6)
    x[0, 1, 1, 3] = np.inf
    run(build_codes(variant._replace(smooth=False)), B * H * blocks, [x, sums, codes, scale], H, T, parts,
        D // 8, blocks, *steps)  # fmt: skip
    assert not codes[0, :tokens, 1].any(), "infinity has code 0, and beside it all others have"


def test_zeros_have_scale_one() -> None:
    """So that a masked score, -inf, times the scale is no NaN."""
    x = np.zeros((1, 4, 1, 4), np.float32)
    call = int8_call.prepare("test", x, x, x, False, None, True, (2, 2), None)
    assert (call.keys.scale.owner == 1).all()
    assert not int8_call.int8_attention(x, x, x).any()


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("smooth", [True, False])
def test_outputs(smooth: bool, causal: Any) -> None:
    for seed, dtype in enumerate(sorted(DTYPES)):
        case = case_of(dtype, seed, causal=causal, smooth=smooth, offset=smooth)
        assert int8_difference(int8_call.int8_attention, case, dtype) is None


def test_odd_shapes() -> None:
    for changes in ({"Tq": 0}, {"Tk": 0}, {"B": 0}, {"Tq": 12, "Tk": 5, "causal": "bottom_right"}, {"D": 1}):
        case = case_of("float32", **changes)
        assert int8_difference(int8_call.int8_attention, case, "float32") is None


def test_refusals() -> None:
    q, k, v = case_of("float32").args
    with pytest.raises(OptionError, match="NaN and infinity have no code"):
        int8_call.int8_attention(q, k * np.nan, v)
    with pytest.raises(UnsupportedError, match=r"scale is -1\.0"):
        int8_call.int8_attention(q, k, v, scale=-1.0)
    with pytest.raises(UnsupportedError, match="inputs are float64"):
        int8_call.int8_attention(*(a.astype(np.float64) for a in (q, k, v)))


# What stands in the source of the kernel, and what is put in its place.
MISTAKES = {
    "scale of another block": ("(j // k_block)", "(1 - j // k_block % 2)"),
    "scale of the first block": ("(i // q_block)", "(0 * i)"),
    "diagonal": ("j <= i + offset", "j < i + offset"),
    "last word": ("for w in range(WORDS)", "for w in range(WORDS - 1)"),
    "no rescaling": ("o[a * CHANNELS + n] *= shrink", "o[a * CHANNELS + n] *= 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's source with one change: outputs must leave the policy."""
    text = inspect.getsource(int8_portable.source)
    assert text.count(MISTAKES[mistake][0]) == 1
    changed = text.replace(*MISTAKES[mistake])
    space = dict(vars(int8_portable))
    exec(compile(changed, int8_portable.__file__, "exec"), space)
    case = case_of("float32", causal="bottom_right" if mistake == "diagonal" else False)
    assert int8_difference(int8_call.int8_attention, case, "float32") is None
    with monkeypatch.context() as patch:
        patch.setattr(int8_portable, "source", space["source"])
        int8_portable.build.cache_clear()
        assert int8_difference(int8_call.int8_attention, case, "float32") is not None
    int8_portable.build.cache_clear()


def test_laws() -> None:
    report = check(
        "attention.int8",
        int8_call.int8_attention,
        backend="cudasim",
        examples=1,
        edges=False,
        dtypes=["float16"],
    )
    assert not report.failed, report.failed[0]
