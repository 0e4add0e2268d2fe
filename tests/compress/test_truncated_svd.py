"""Truncated SVD: what its factors save, degenerate matrices, number formats, refusals, and mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from refimpl import registry
from refimpl.compress import break_even_rank, truncated_svd, truncated_svd_vjp
from refimpl.errors import DTypeError, OptionError, ShapeError
from tests.survivors import laws_that_catch

registry.load()


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("n", range(1, 9))
def test_break_even_rank_by_counting(m: int, n: int) -> None:
    saving = [k for k in range(1, m * n + 1) if k * (m + n) < m * n]
    assert break_even_rank(m, n) == max(saving, default=0)


def test_storage_of_the_factors() -> None:
    for m, n in ((12, 12), (9, 30)):
        x, k = np.random.default_rng(0).standard_normal((m, n)), break_even_rank(m, n)
        assert sum(part.size for part in truncated_svd(x, rank=k)) < x.size
        assert sum(part.size for part in truncated_svd(x, rank=k + 1)) >= x.size


def test_a_matrix_of_rank_two_is_its_two_factors() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 5))
    left, right = truncated_svd(x, rank=2)
    np.testing.assert_allclose(left @ right.T, x, atol=1e-14)


@pytest.mark.parametrize("size", [1e150, 1e-150])
def test_squares_that_overflow_or_vanish(size: float) -> None:
    x = np.random.default_rng(3).standard_normal((5, 4))
    left, right = truncated_svd(size * x, rank=4)
    np.testing.assert_allclose(left @ right.T / size, x, atol=1e-14)


def test_nothing_and_ties() -> None:
    assert not any(np.any(part) for part in truncated_svd(np.zeros((3, 4)), rank=2))
    left, right = truncated_svd(np.eye(4), rank=4)
    np.testing.assert_allclose(left @ right.T, np.eye(4), atol=1e-15)
    left, _ = truncated_svd(np.array([[-1.0, -1.0], [-1.0, -1.0]]), rank=1)
    assert left[0, 0] > 0  # of equal entries the first


@pytest.mark.parametrize(("m", "n"), [(5, 4), (3, 6), (4, 4)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradient_of_a_loss_of_the_product_by_autograd(m: int, n: int, rank: int) -> None:
    """PyTorch differentiates its own SVD, whose signs are others: of the product nothing of them is left."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(10 * m + n + rank)
    x, dy = rng.standard_normal((2, m, n))
    matrix = torch.tensor(x, requires_grad=True)
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    ((u[:, :rank] * values[:rank]) @ vt[:rank]).backward(torch.from_numpy(dy))
    left, right = truncated_svd(x, rank=rank)
    found = truncated_svd_vjp(x, dy @ right, dy.T @ left, rank=rank).dx
    np.testing.assert_allclose(found, matrix.grad.numpy(), atol=1e-12)


def test_gradients_where_values_that_are_left_out_are_equal_or_zero() -> None:
    x, one = np.diag([4.0, 1.0, 1.0, 0.0, 0.0]), np.eye(5)[:, :1]
    found = truncated_svd_vjp(x, one, 0 * one, rank=1).dx
    assert found[0, 0] == 0.25
    assert np.count_nonzero(found) == 1
    with np.errstate(all="ignore"):
        assert not np.isfinite(truncated_svd_vjp(np.eye(2), *np.ones((2, 2, 1)), rank=1).dx).all()


def test_gradients_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeError, match="dright: axis"):
        truncated_svd_vjp(np.eye(3), np.ones((3, 2)), np.ones((4, 2)), rank=2)
    with pytest.raises(ShapeError, match="dleft: expected 2 columns, the rank"):
        truncated_svd_vjp(np.eye(3), np.ones((3, 1)), np.ones((3, 1)), rank=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_format_of_the_matrix_is_kept(dtype: Any) -> None:
    x = np.random.default_rng(2).standard_normal((5, 4)).astype(dtype)
    left, right = truncated_svd(x, rank=4)
    assert left.dtype == right.dtype == x.dtype
    product = left.astype(np.float64) @ right.astype(np.float64).T
    step = 2.0 ** -{"float32": 23, "float16": 10, "bfloat16": 7}[x.dtype.name]
    np.testing.assert_allclose(product, x.astype(np.float64), atol=8 * step)


@pytest.mark.parametrize(
    ("error", "x", "rank"),
    [
        (ShapeError, np.ones(3), 1),
        (OptionError, np.ones((3, 2)), 3),
        (OptionError, np.ones((3, 2)), -1),
        (DTypeError, np.ones((3, 2)), 1.0),
        (DTypeError, np.ones((3, 2), complex), 1),
        (OptionError, np.array([[np.nan]]), 1),
    ],
)
def test_refusals(error: type[Exception], x: Any, rank: Any) -> None:
    with pytest.raises(error):
        truncated_svd(x, rank=rank)


def _one_sided(x: Any, /, *, rank: int) -> Any:
    left, right = truncated_svd(x, rank=rank)
    lengths = np.sqrt(np.linalg.norm(left, axis=0))
    return left * lengths, right / np.where(lengths == 0, 1, lengths)


def _smallest(x: Any, /, *, rank: int) -> Any:
    left, right = truncated_svd(x, rank=min(x.shape))
    return left[:, min(x.shape) - rank :][:, ::-1], right[:, min(x.shape) - rank :][:, ::-1]


def _not_rooted(x: Any, /, *, rank: int) -> Any:
    left, right = truncated_svd(x, rank=rank)
    return left * np.linalg.norm(left, axis=0), right * np.linalg.norm(right, axis=0)


def _one_short(x: Any, /, *, rank: int) -> Any:
    left, right = (part.copy() for part in truncated_svd(x, rank=rank))
    if rank:
        left[:, -1] = right[:, -1] = 0
    return left, right


def _centered(x: Any, /, *, rank: int) -> Any:
    return truncated_svd(x - x.mean(axis=0) if x.size else x, rank=rank)


def _signs_open(x: Any, /, *, rank: int) -> Any:
    left, right = truncated_svd(x, rank=rank)
    return -left, -right


def _signs_apart(x: Any, /, *, rank: int) -> Any:
    left, right = truncated_svd(x, rank=rank)
    return np.abs(left), right


@pytest.mark.parametrize(
    "f", [_one_sided, _smallest, _not_rooted, _one_short, _centered, _signs_open, _signs_apart]
)
def test_mutant_is_caught_by_laws(f: Callable[..., Any]) -> None:
    assert laws_that_catch("compress.truncated_svd", f)
