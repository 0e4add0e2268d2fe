"""NF4, double quantisation, QLoRA and codebooks that are wrong in one way: the laws must catch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import DTypeError, OptionError
from refimpl.quant.codebook import codebook, codebook_dequantize, codebook_dequantize_vjp, linear_centroids
from refimpl.quant.double_quantization import double, dynamic_map
from refimpl.quant.nf4 import (
    LEVELS,
    NF4,
    nf4,
    nf4_dequantize,
    normal_float_levels,
    pack_nibbles,
    unpack_nibbles,
)
from refimpl.quant.optimal_codebook import optimal_codebook
from refimpl.quant.qlora import qlora_linear
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


def _with_codes(x: Any, block_size: int, change: Callable[[Any, Any], Any]) -> Any:
    stored = nf4(x, block_size=block_size)
    codes = unpack_nibbles(stored.codes, x.size)
    scale = np.repeat(stored.absmax, block_size)[: x.size]
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(scale > 0, x.reshape(-1) / scale, 0)
    return NF4(pack_nibbles(change(codes, scaled)), stored.absmax)


@mutant("quant.nf4")
def ties_go_up(x: Any, /, *, block_size: int = 64) -> Any:
    middle = (LEVELS[:-1].astype(float) + LEVELS[1:]) / 2
    return _with_codes(x, block_size, lambda codes, s: np.searchsorted(middle, s, side="right"))


@mutant("quant.nf4")
def uniform_levels(x: Any, /, *, block_size: int = 64) -> Any:
    return _with_codes(x, block_size, lambda codes, s: np.clip(np.rint(7.5 * s + 7.5), 0, 15))


@mutant("quant.nf4")
def symmetric_levels(x: Any, /, *, block_size: int = 64) -> Any:
    """Equation 4 read literally: 15 levels, the positive ones those of the negative side."""
    levels = np.concatenate([LEVELS[:8], -LEVELS[6::-1]]).astype(float)
    middle = (levels[:-1] + levels[1:]) / 2
    return _with_codes(x, block_size, lambda codes, s: np.searchsorted(middle, s))


@mutant("quant.nf4")
def last_block_shares_the_scale_before(x: Any, /, *, block_size: int = 64) -> Any:
    stored = nf4(x, block_size=block_size)
    if stored.absmax.size > 1 and x.size % block_size:
        stored.absmax[-1] = stored.absmax[-2]
    return stored


@mutant("quant.nf4")
def nibbles_swapped(x: Any, /, *, block_size: int = 64) -> Any:
    stored = nf4(x, block_size=block_size)
    return NF4((stored.codes >> 4) | (stored.codes << 4), stored.absmax)


@mutant("quant.nf4")
def scale_of_the_signed_maximum(x: Any, /, *, block_size: int = 64) -> Any:
    return NF4(nf4(x, block_size=block_size).codes, nf4(np.maximum(x, 0), block_size=block_size).absmax)


@mutant("quant.double")
def mean_not_subtracted(absmax: Any, /, *, block_size: int = 256) -> Any:
    q = double(np.concatenate([absmax, -absmax]), block_size=block_size)
    return q._replace(codes=q.codes[: absmax.size], scale=q.scale[: -(-absmax.size // block_size)])


@mutant("quant.double")
def mean_lost(absmax: Any, /, *, block_size: int = 256) -> Any:
    q = double(absmax, block_size=block_size)
    return q._replace(offset=q.offset * 0)


@mutant("quant.double")
def linear_map(absmax: Any, /, *, block_size: int = 256) -> Any:
    q = double(absmax, block_size=block_size)
    values = dynamic_map()[q.codes]
    return q._replace(codes=np.clip(np.rint(127.5 * values + 127.5), 0, 255).astype(np.uint8))


@mutant("quant.double")
def one_scale_for_all(absmax: Any, /, *, block_size: int = 256) -> Any:
    q = double(absmax, block_size=block_size)
    return q._replace(scale=np.full_like(q.scale, q.scale.max(initial=0)))


@mutant("quant.qlora")
def base_not_quantised(x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: float, **blocks: Any) -> Any:
    return x @ weight + lora_alpha / max(a.shape[1], 1) * (x @ a @ b)


@mutant("quant.qlora")
def factor_forgotten(x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: float, **blocks: Any) -> Any:
    return qlora_linear(x, a, b, weight, **blocks)


@mutant("quant.qlora")
def update_quantised_too(x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: float, **blocks: Any) -> Any:
    zero = np.zeros_like
    return qlora_linear(x, zero(a), zero(b), weight + lora_alpha / max(a.shape[1], 1) * (a @ b), **blocks)


@mutant("quant.codebook")
def medians_for_means(x: Any, initial: Any, /, *, iterations: int = 50) -> Any:
    codes, centroids = codebook(x, initial, iterations=iterations)
    if iterations:
        for index in np.unique(codes):
            centroids[index] = np.median(x[codes == index], axis=0)
    return codes, centroids


@mutant("quant.codebook")
def empty_clusters_go_to_zero(x: Any, initial: Any, /, *, iterations: int = 50) -> Any:
    codes, centroids = codebook(x, initial, iterations=iterations)
    if iterations:
        centroids[np.bincount(codes, minlength=len(initial)) == 0] = 0.0
    return codes, centroids


@mutant("quant.codebook")
def codes_of_the_round_before(x: Any, initial: Any, /, *, iterations: int = 50) -> Any:
    late = codebook(x, initial, iterations=iterations)
    return codebook(x, initial, iterations=0).codes, late.centroids


@mutant("quant.codebook")
def distance_along_the_first_axis(x: Any, initial: Any, /, *, iterations: int = 50) -> Any:
    flat = codebook(x[:, :1], initial[:, :1], iterations=0)
    return flat.codes, codebook(x, initial, iterations=iterations).centroids


@mutant("quant.codebook.optimal")
def k_means_from_a_grid(x: Any, /, *, k: int) -> Any:
    return codebook(x[:, None], linear_centroids(x, k=k)).centroids


@mutant("quant.codebook.optimal")
def quantiles(x: Any, /, *, k: int) -> Any:
    return np.quantile(x, (np.arange(k) + 0.5) / k)[:, None]


@mutant("quant.codebook.optimal")
def copies_counted_once(x: Any, /, *, k: int) -> Any:
    return optimal_codebook(np.unique(x), k=k)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


def test_the_published_levels() -> None:
    recipe = normal_float_levels()
    assert recipe.shape == (16,)
    assert np.abs(recipe - LEVELS).max() < 1.2e-7  # section 9 of the published numbers
    other = normal_float_levels(1 - 1 / 32)
    assert np.abs(other - LEVELS).max() > 1e-3


def test_equation_4_to_the_letter_is_another_data_type() -> None:
    """Means of neighbouring quantiles i / 17 and (i + 1) / 17: 15 symmetric levels, not the 16 released."""
    from scipy.stats import norm

    quantiles = norm.ppf(np.arange(18) / 17)
    levels = (quantiles[:-1] + quantiles[1:]) / 2
    finite = levels[np.isfinite(levels)]
    assert finite.size == 15
    np.testing.assert_allclose(finite, -finite[::-1], atol=1e-15)
    assert np.abs(finite / finite.max() - LEVELS[:-1]).max() > 0.05


def test_normal_weights_lose_less_than_on_a_uniform_grid() -> None:
    """The mean squared error on N(0, 1) in blocks of 64, against four-bit absmax: 0.00845 and 0.01158."""
    x = np.random.default_rng(0).standard_normal((4096, 64))
    error = np.mean((nf4_dequantize(*nf4(x), shape=x.shape) - x) ** 2)
    absmax = np.abs(x).max(axis=1, keepdims=True)
    uniform = np.mean((np.rint(x * (7 / absmax)) * (absmax / 7) - x) ** 2)
    assert abs(error / 0.00845 - 1) < 0.02
    assert abs(uniform / 0.01158 - 1) < 0.02


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_no_size_of_numbers_overflows_a_codebook(size: float) -> None:
    x = size * np.array([3.0, 1.0, -1.0, 2.9, -1.1, 1.1])
    np.testing.assert_allclose(
        optimal_codebook(x, k=3)[:, 0], size * np.array([-1.05, 1.05, 2.95]), rtol=1e-14
    )
    codes, centroids = codebook(x[:, None], linear_centroids(x, k=3))
    assert codes.tolist() == [2, 1, 0, 2, 0, 1]
    np.testing.assert_allclose(centroids[:, 0], size * np.array([-1.05, 1.05, 2.95]), rtol=1e-14)
    widest = linear_centroids(np.array([-1.7e308, 1.7e308]), k=3)
    assert widest[:, 0].tolist() == [-1.7e308, 0.0, 1.7e308]


def test_codes_and_scales_that_fit_nothing_are_refused() -> None:
    with pytest.raises(DTypeError, match="codes: expected integers"):
        codebook_dequantize(np.array([0.5]), np.ones((2, 1)))
    with pytest.raises(OptionError, match="x: expected finite"):
        linear_centroids(np.array([np.inf]), k=2)
    with pytest.raises(OptionError, match="sum of the scales overflows"):
        double(np.full(3, 1e308))
    with pytest.raises(DTypeError, match="offset: expected a number"):
        normal_float_levels("a")  # type: ignore[arg-type]


def test_gradients_of_centroids_by_autograd() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    codes, centroids, dy = (
        rng.integers(0, 3, (4, 5)),
        rng.standard_normal((3, 2)),
        rng.standard_normal((4, 5, 2)),
    )
    table = torch.from_numpy(centroids).requires_grad_()
    restored = table[torch.from_numpy(codes)]
    np.testing.assert_array_equal(codebook_dequantize(codes, centroids), restored.detach().numpy())
    restored.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(codebook_dequantize_vjp(codes, centroids, dy), table.grad.numpy(), atol=1e-14)


def test_a_picture_in_sixteen_colors() -> None:
    """A drawn picture of many colours: 4 bits a pixel, and closer than 16 colours on a grid."""
    y, x = np.mgrid[0:32, 0:32] / 31.0
    disc = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1
    picture = np.stack([x, np.where(disc, 0.9, y), np.where(disc, 0.2, 1 - x)], axis=2)
    pixels = picture.reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 256
    grid = np.array([[r, g, b] for r in (0.1, 0.4, 0.6, 0.9) for g in (0.25, 0.75) for b in (0.25, 0.75)])
    start = codebook(pixels, grid, iterations=0)
    best = codebook(pixels, grid)
    before, after = (np.mean((codebook_dequantize(*found) - pixels) ** 2) for found in (start, best))
    assert after < 0.6 * before
    assert best.codes.max() < 16
    packed = np.packbits(best.codes[:, None] >> np.arange(4) & 1)
    assert 8 * packed.nbytes == 4 * len(pixels)


def test_spare_centroids_repeat_the_last() -> None:
    assert optimal_codebook(np.array([3.0, 1.0, 3.0]), k=4)[:, 0].tolist() == [1.0, 3.0, 3.0, 3.0]
