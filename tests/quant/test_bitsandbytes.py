"""Double quantisation against bitsandbytes' CPU build.

Its map is made in float32 throughout and differs from ours by up to 6e-8, and its CPU kernel finds codes to a
resolution of 2**-16 of the scale: measured on 100,000 numbers, none whose code differs is further than 1.3e-5
from the midpoint of two levels.  There its level is as near to the number as ours, to that resolution.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from refimpl.quant.double_quantization import double, double_dequantize, dynamic_map
from refimpl.quant.qlora import qlora_dequantize, qlora_quantize

torch = pytest.importorskip("torch")
GAP, RESOLUTION = 6e-8, 2.0**-16


@pytest.fixture(scope="module")
def functional() -> Any:
    with warnings.catch_warnings():  # about kernels that a machine without a GPU has not
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        import bitsandbytes.functional

        return bitsandbytes.functional


def test_the_map(functional: Any) -> None:
    theirs = functional.create_dynamic_map(signed=True).numpy()
    assert theirs.shape == (256,)
    apart = np.abs(theirs - dynamic_map())
    assert apart.max() <= GAP
    assert (apart > 0).sum() > 10  # it is not the same table


@pytest.mark.parametrize("n", [1, 5, 256, 700, 1024])
@pytest.mark.parametrize("block_size", [64, 256])
def test_codes_and_what_they_stand_for(functional: Any, n: int, block_size: int) -> None:
    absmax = np.abs(np.random.default_rng(n).standard_normal((n, 64))).max(axis=1).astype(np.float32)
    codes, scale, offset = double(absmax, block_size=block_size)
    centered = absmax - offset
    found, state = functional.quantize_blockwise(torch.from_numpy(centered), blocksize=block_size)
    np.testing.assert_array_equal(state.absmax.numpy(), scale)
    theirs = functional.dequantize_blockwise(found, state).numpy()
    ours = double_dequantize(codes, scale, offset, block_size=block_size) - offset
    spread = np.repeat(scale, block_size)[:n]
    rounding = 4 * np.finfo(np.float32).eps * np.abs(absmax)
    farther = np.abs(theirs - centered) - np.abs(ours - centered)
    assert (np.abs(farther) <= 2 * (GAP + RESOLUTION) * spread + rounding).all()
    same = (found.numpy() == codes) | (spread == 0)  # of a block of zeros they say -0.99 times 0
    assert (np.abs(theirs - ours)[same] <= GAP * spread[same] + rounding[same]).all()
    assert same.mean() >= 0.99


def test_a_weight_with_its_scales_quantised(functional: Any) -> None:
    """``quantize_4bit`` with ``compress_statistics``, as QLoRA stores it."""
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    packed, state = functional.quantize_4bit(
        torch.from_numpy(w), quant_type="nf4", blocksize=64, compress_statistics=True
    )
    ours = qlora_quantize(w)
    np.testing.assert_array_equal(ours.codes, packed.numpy().reshape(-1))
    np.testing.assert_allclose(ours.offset, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.scale, state.state2.absmax.numpy(), rtol=1e-5)
    same = ours.absmax_codes == state.absmax.numpy()
    assert same.mean() >= 0.999
    theirs = functional.dequantize_4bit(packed, state).numpy().reshape(-1, 64)
    blocks = qlora_dequantize(ours).reshape(-1, 64)
    np.testing.assert_allclose(blocks[same], theirs[same], atol=2e-6)
