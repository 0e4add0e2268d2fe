"""Attention in int8: what smoothing is for, and mistakes that the laws must catch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.attention import int8_attention, key_mean, quantize_token_blocks, scaled_dot_product_attention
from refimpl.errors import OptionError
from tests.survivors import laws_that_catch

registry.load()


def _attention(
    q: Any, k: Any, v: Any, causal: Any, scale: Any, smooth: bool, blocks: Any, wrong: str
) -> Any:  # fmt: skip
    """Attention in int8 by the dense one, with one mistake."""
    rows, columns = blocks
    mean = key_mean(k) if smooth and wrong != "not smoothed" else None
    if wrong == "mean over features" and smooth:
        mean = np.broadcast_to(k.mean(axis=3).mean(axis=1)[..., None], (k.shape[0], *k.shape[2:]))
    if wrong == "first key for the mean" and smooth and k.shape[1]:
        mean = k[:, 0] * (np.arange(k.shape[2]) == 0)[None, :, None]

    def restored(x: Any, block: int, taken: Any) -> Any:
        codes, steps = quantize_token_blocks(x, block=block, mean=taken)
        codes = codes.astype(np.float64)
        if wrong == "unsigned codes":
            codes = np.where(codes < 0, codes + 256, codes)
        if wrong == "last feature dropped":
            codes[..., -1] = 0
        spread = np.repeat(steps, block, axis=2)[:, :, : x.shape[1]].transpose(0, 2, 1)[..., None]
        if wrong == "scales of the first block" and x.shape[1]:
            spread = np.broadcast_to(spread[:, :1], spread.shape)
        return codes * spread * (127 / 128 if wrong == "128" else 1)

    queries, keys = restored(q, rows, None), restored(k, columns, mean)
    if wrong == "codes truncated":
        _, steps = quantize_token_blocks(k, block=columns, mean=mean)
        spread = np.repeat(steps, columns, axis=2)[:, :, : k.shape[1]].transpose(0, 2, 1)[..., None]
        shifted = k if mean is None else k - mean[:, None]
        keys = np.trunc(np.divide(shifted, spread, out=np.zeros_like(shifted), where=spread > 0)) * spread
    if wrong == "values smoothed too":
        v = v - v.mean(axis=1, keepdims=True) if v.shape[1] else v
    if wrong == "scale forgotten":
        scale = 1.0
    return scaled_dot_product_attention(queries, keys, v, causal=causal, scale=scale)


MISTAKES = (
    "not smoothed", "mean over features", "first key for the mean", "unsigned codes", "last feature dropped",
    "scales of the first block", "128", "codes truncated", "values smoothed too", "scale forgotten",
)  # fmt: skip


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_caught(wrong: str) -> None:
    def f(
        q: Any, k: Any, v: Any, /, *, causal: Any = False, scale: Any = None, smooth: bool = True,
        block_sizes: Any = (64, 128),
    ) -> Any:  # fmt: skip
        return _attention(q, k, v, causal, scale, smooth, block_sizes, wrong)

    assert laws_that_catch("attention.int8", f)


def test_the_right_one_obeys_the_laws() -> None:
    def f(
        q: Any, k: Any, v: Any, /, *, causal: Any = False, scale: Any = None, smooth: bool = True,
        block_sizes: Any = (64, 128),
    ) -> Any:  # fmt: skip
        return _attention(q, k, v, causal, scale, smooth, block_sizes, "")

    assert not laws_that_catch("attention.int8", f, seeds=12)


def test_smoothing_is_what_keeps_the_error_small() -> None:
    """Keys that share a vector ten times as large as their differences."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 96, 2, 64)) for _ in range(3))
    k = k + 10 * rng.standard_normal((1, 1, 2, 64))
    truth = scaled_dot_product_attention(q, k, v)
    rough, smoothed = (np.abs(int8_attention(q, k, v, smooth=s) - truth).max() for s in (False, True))
    assert smoothed < 0.02
    assert rough > 5 * smoothed


def test_numbers_without_a_code_are_refused() -> None:
    x = np.ones((1, 2, 1, 4))
    with pytest.raises(OptionError, match="NaN and infinity have no code"):
        int8_attention(x, x * np.nan, x)
