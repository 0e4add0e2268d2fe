"""Attention in int8 in Numba's simulator: codes of the definition, outputs under the policy, mistakes."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import poisoned_outputs
from cuda_backend.attention import int8_call, int8_portable
from refimpl.attention import key_mean, quantize_token_blocks
from refimpl.errors import OptionError, UnsupportedError
from refimpl.testing import check
from tests.cuda.int8_attention_judge import case_of, int8_difference
from tests.cuda.judge import DTYPES

pytestmark = pytest.mark.cudasim


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_codes_equal_the_definitions(dtype: str) -> None:
    q, k, v = case_of(dtype).args
    with poisoned_outputs():
        call = int8_call.prepare("test", q, k, v, False, None, True, (4, 3), None, width=16)
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
