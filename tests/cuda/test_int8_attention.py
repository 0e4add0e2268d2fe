"""Attention in int8 in Numba's simulator: codes of the definition, outputs under the policy, mistakes."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest

from cuda_backend import int8_attention_hopper
from cuda_backend._numba import cuda
from cuda_backend.arrays import poisoned_outputs
from cuda_backend.attention import int8_call, int8_codes_call_hopper, int8_codes_hopper, int8_portable
from cuda_backend.launch import simulation
from refimpl.attention import key_mean, quantize_token_blocks
from refimpl.errors import BackendUnavailableError, OptionError, UnsupportedError
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


def _hopper_codes(
    q: Any, k: Any, kind: str, smooth: bool, build: Any = int8_codes_hopper.build
) -> tuple[list[Any], list[Any]]:
    """Return codes and scales of queries and of keys by the Hopper kernel, played block after block.

    A block that waits for what no block before it has done raises.
    """
    part, half, width = int8_codes_hopper.PART, int8_codes_hopper.HALF, int8_codes_hopper.WIDTH
    lines, blocks = k.shape[0] * k.shape[2], -(-k.shape[1] // part)
    sums = np.full((lines, blocks + 1, width), np.nan, np.float32)
    counters = np.zeros(lines, np.uint32)
    numbers, codes, scales = [], [], []
    for x, tokens in ((q, half), (k, part)):
        B, T, H, _ = x.shape
        parts = -(-T // part)
        numbers += [H, T, parts, B * H * parts, *(step // 16 for step in x.strides[:3])]
        codes.append(np.full((B, T, H, width), 99, np.int8))
        scales.append(np.full((B, H, -(-T // tokens)), np.nan, np.float32))
    q_items, numbers[10] = numbers[3], lines
    count, of_phases = int8_codes_call_hopper.phases(lines, blocks, k.shape[1], q_items, smooth)
    arrays = [q, k, sums, counters, codes[0], scales[0], codes[1], scales[1]]
    values: list[Any] = [np.uint64(array.ctypes.data) for array in arrays]
    values += map(np.int32, (*of_phases, q.shape[3] // 8, *numbers))
    with simulation():
        cuda.jit(build(int8_codes_hopper.Variant(kind, smooth)))[count, int8_codes_hopper.THREADS](*values)
    assert not counters.any(), "counters are 0 for the next launch"
    return codes, scales


def _hopper_arrays(kind: str) -> tuple[Any, Any]:
    """Return queries and keys with ragged blocks, and one of zeros."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 150, 2, 128)), rng.standard_normal((1, 200, 2, 128))
    k += 2 * rng.standard_normal((1, 1, 2, 128))
    q[:, :64, 1] = 0
    dtype = DTYPES[FORMATS[kind]]
    return round_to(q, dtype), round_to(k, dtype)


def _codes_difference(found: Any, x: Any, block: int, mean: Any) -> str | None:
    codes, scale = found
    expected = quantize_token_blocks(widen(x), block=block, mean=mean)
    moved = np.abs(codes[..., : x.shape[3]].astype(int) - expected.codes)
    # The mean is summed in another order: a code may move by one where a number lies at a tie.
    if moved.max() > (mean is not None) or np.mean(moved) >= 0.01:
        return f"codes differ by up to {moved.max()}"
    if codes[..., x.shape[3] :].any():
        return "the width is not filled with zeros"
    expected_scale = np.where(expected.scale == 0, 1, expected.scale)
    return None if np.allclose(scale, expected_scale, rtol=1e-6, atol=0) else "scales differ"


@pytest.mark.parametrize(("kind", "smooth", "phase_bytes"), [("f16", True, 0), ("bf16", False, 4 << 20)])
def test_codes_of_the_hopper_kernel(
    kind: str, smooth: bool, phase_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code, played: heads in phases or at once, ragged blocks, one of zeros, infinity and NaN."""
    monkeypatch.setattr(int8_codes_call_hopper, "PHASE_BYTES", phase_bytes)
    q, k = _hopper_arrays(kind)
    if not smooth:
        q, k = (np.ascontiguousarray(x[..., :40]) for x in (q, k))
        q[0, 70, 0, 3], q[0, 149, 1, 39] = np.inf, np.nan
    k = k if smooth else k[:, :100, :1]
    codes, scales = _hopper_codes(q, k, kind, smooth)
    mean = key_mean(widen(k)) if smooth else None
    assert _codes_difference((codes[1], scales[1]), k, 128, mean) is None
    if not smooth:
        assert not codes[0][0, 64:128, 0].any(), "infinity has code 0, and beside it all others have"
        assert not codes[0][0, 128:, 1].any(), "and so it is with NaN"
        q[0, 64:128, 0], q[0, 128:, 1] = 0, 0
        scales[0][0, 0, 1] = 1  # of the infinity
    assert _codes_difference((codes[0], scales[0]), q, 64, None) is None


# What stands in the source of the Hopper kernel, and what is put in its place.
CODES_MISTAKES = {
    "mean of a part less": (
        "range(0, parts, GROUPS * BATCH)",
        "range(0, parts - GROUPS * BATCH, GROUPS * BATCH)",
    ),
    "tokens behind the last are added": ("* i < tokens:", "* i < 1 << 30:"),
    "least numbers are forgotten": ("for pair in (most[j], least[j])", "for pair in (most[j], most[j])"),
    "scale of the other half": ("told[OWN * own + i]", "told[OWN * (SCALES - 1 - own) + i]"),
    "the counter stays": ("counter, int32(2 * parts))", "counter, int32(2 * parts + 1))"),
    "scale of the first half": ("SCALES * part + own", "SCALES * part"),
}


@pytest.mark.parametrize("mistake", CODES_MISTAKES)
def test_mistakes_in_the_hopper_codes_are_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_codes_call_hopper, "PHASE_BYTES", 0)
    text = inspect.getsource(int8_codes_hopper)
    assert text.count(CODES_MISTAKES[mistake][0]) == 1
    space: dict[str, Any] = {"__name__": "changed"}
    exec(compile(text.replace(*CODES_MISTAKES[mistake]), int8_codes_hopper.__file__, "exec"), space)
    q, k = _hopper_arrays("f16")
    q, k = q[:, :90, :1], k[:, :, :1]
    try:
        codes, scales = _hopper_codes(q.copy(), k.copy(), "f16", True, space["build"])
    except (AssertionError, RuntimeError):
        return
    found = [
        _codes_difference((codes[0], scales[0]), q, 64, None),
        _codes_difference((codes[1], scales[1]), k, 128, key_mean(widen(k))),
    ]
    assert found != [None, None]


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


def test_the_hopper_kernel_refuses_the_simulator() -> None:
    x = np.ones((1, 4, 2, 8), np.float16)
    with pytest.raises(BackendUnavailableError, match="simulates CUDA"):
        int8_attention_hopper(x, x, x)


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
