"""Prunings that are wrong in one way: the laws must catch each; and a Lagrangian that finds its target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.prune import (
    compacted_heads,
    constrained,
    dynamic_batch_loading,
    dynamic_batch_loading_released,
    evaluation_mask,
    hard_concrete,
    hard_concrete_vjp,
    magnitude,
    magnitude_global,
    masked_ffn,
    masked_heads,
    masked_width,
    n_m,
    open_probability,
    open_probability_vjp,
    target_at,
    target_structure,
    target_structure_vjp,
)
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("prune.constrained")
def magnitude_alone(weights: Any, hessian: Any, /, *, keep: int) -> Any:
    return magnitude(weights, keep=keep)


@mutant("prune.constrained")
def weight_not_squared(weights: Any, hessian: Any, /, *, keep: int) -> Any:
    return constrained(np.sqrt(np.abs(weights)), hessian, keep=keep)


@mutant("prune.constrained")
def strictly_fewer(weights: Any, hessian: Any, /, *, keep: int) -> Any:
    """As the lecture's < would have it."""
    return constrained(weights, hessian, keep=max(keep - 1, 0))


@mutant("prune.magnitude")
def by_value(weights: Any, /, *, keep: int) -> Any:
    return magnitude(weights - weights.min(initial=0), keep=keep)


@mutant("prune.magnitude")
def by_threshold(weights: Any, /, *, keep: int) -> Any:
    size = np.abs(weights)
    return size >= np.sort(size.reshape(-1))[::-1][keep - 1] if keep else size > size.max(initial=0)


@mutant("prune.magnitude")
def last_of_equals(weights: Any, /, *, keep: int) -> Any:
    return magnitude(weights.reshape(-1)[::-1], keep=keep)[::-1].reshape(weights.shape)


@mutant("prune.magnitude.n_m")
def along_columns(weights: Any, /, *, n: int, m: int) -> Any:
    if weights.shape[0] % m:
        return magnitude(weights, keep=weights.size * n // m)
    return n_m(weights.T, n=n, m=m).T


@mutant("prune.magnitude.n_m")
def n_go(weights: Any, /, *, n: int, m: int) -> Any:
    return ~n_m(weights, n=n, m=m)


@mutant("prune.structured")
def input_masked(x: Any, w_1: Any, w_2: Any, keep: Any, /, **options: Any) -> Any:
    """The bias of a removed unit lives on."""
    return masked_ffn(x, w_1 * keep, w_2, np.ones_like(keep), **options)


@mutant("prune.structured")
def last_bias_lost(x: Any, w_1: Any, w_2: Any, keep: Any, /, *, b_1: Any = None, b_2: Any = None) -> Any:
    return masked_ffn(x, w_1, w_2, keep, b_1=b_1)


@mutant("prune.structured.heads")
def interleaved_heads(x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, keep: Any, /, *, causal: bool) -> Any:
    rows = np.tile(keep, len(w_o) // len(keep))
    return masked_heads(x, w_q, w_k, w_v, w_o * rows[:, None], np.ones_like(keep), causal=causal)


@mutant("prune.structured.heads")
def values_kept(x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, keep: Any, /, *, causal: bool) -> Any:
    """Scores masked instead of outputs: a removed head still averages its values."""
    rows = np.repeat(keep, len(w_o) // len(keep))
    return masked_heads(x, w_q * rows, w_k, w_v, w_o, np.ones_like(keep), causal=causal)


@mutant("prune.structured.width")
def mean_over_all_features(x: Any, gamma: Any, weight: Any, keep: Any, /) -> Any:
    return masked_width(x * keep, gamma * keep, weight, np.ones_like(keep))


@mutant("prune.structured.width")
def norm_not_masked(x: Any, gamma: Any, weight: Any, keep: Any, /) -> Any:
    return masked_width(x, gamma * keep, weight, np.ones_like(keep))


@mutant("prune.hard_concrete")
def not_stretched(log_alpha: Any, u: Any, /, *, convention: Any) -> Any:
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / (1 + np.exp(-1.5 * (np.log(u) - np.log1p(-u) + log_alpha)))


@mutant("prune.hard_concrete")
def temperature_forgotten(log_alpha: Any, u: Any, /, *, convention: Any) -> Any:
    with np.errstate(divide="ignore", over="ignore"):
        s = 1 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + log_alpha)))
    return np.clip(1.2 * s - 0.1, 0, 1)


@mutant("prune.hard_concrete")
def draw_mirrored(log_alpha: Any, u: Any, /, *, convention: Any) -> Any:
    return hard_concrete(log_alpha, 1 - u, convention=convention)


@mutant("prune.hard_concrete.open")
def plain_sigmoid(log_alpha: Any, /, *, convention: Any) -> Any:
    return 1 / (1 + np.exp(-np.clip(log_alpha, -500, 500)))


@mutant("prune.hard_concrete.open")
def closed_instead(log_alpha: Any, /, *, convention: Any) -> Any:
    return 1 - open_probability(log_alpha, convention=convention)


@mutant("prune.target_structure")
def square_alone(sparsity: Any, first: Any, second: Any, /, *, target: Any) -> Any:
    return target_structure(sparsity, first * 0, second, target=target)


@mutant("prune.target_structure")
def half_the_square(sparsity: Any, first: Any, second: Any, /, *, target: Any) -> Any:
    return target_structure(sparsity, first, second / 2, target=target)


@mutant("prune.dynamic_batch_loading")
def lags_not_clipped(weights: Any, loss: Any, reference: Any, /) -> Any:
    moved = weights * np.exp(loss - reference)
    return moved / moved.sum()


@mutant("prune.dynamic_batch_loading")
def shares_forgotten(weights: Any, loss: Any, reference: Any, /) -> Any:
    return dynamic_batch_loading(np.full_like(weights, 1 / weights.size), loss, reference)


@mutant("prune.dynamic_batch_loading.released")
def not_mixed(weights: Any, loss: Any, reference: Any, /) -> Any:
    return lags_not_clipped(weights, loss, reference)


@mutant("prune.dynamic_batch_loading.released")
def lags_clipped(weights: Any, loss: Any, reference: Any, /) -> Any:
    return dynamic_batch_loading_released(weights, np.maximum(loss, reference), reference)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


def test_the_lagrangian_meets_its_target() -> None:
    """Least loss ``Σ c_i p_i`` under a mean open share of 1/2: the multiplier rises until half are closed.

    With costs of closing ±1 the optimum closes exactly the masks that cost nothing to close.
    """
    worth = np.array([1.0, 1.0, -1.0, -1.0])  # what an open mask lowers the loss by
    log_alpha, first, second = np.full(4, 2.0), np.zeros(1), np.zeros(1)
    for step in range(4000):
        target = np.array([target_at(step, final=0.5, warmup=800)])
        p = open_probability(log_alpha)
        sparsity = np.array([1 - p.mean()])
        gradients = target_structure_vjp(sparsity, first, second, np.ones(1), target=target)
        dp = -worth - gradients.sparsity / 4
        log_alpha = log_alpha - 0.05 * open_probability_vjp(log_alpha, dp).log_alpha
        first, second = first + 0.05 * gradients.first, second + 0.05 * gradients.second
    p = open_probability(log_alpha)
    assert abs((1 - p.mean()) - 0.5) < 0.02
    assert np.all(p[:2] > 0.9)
    assert np.all(p[2:] < 0.1)
    assert list(evaluation_mask(log_alpha, closed=2) > 0) == [True, True, False, False]


def test_a_clamped_mask_can_come_back() -> None:
    """The released code clamps log alpha in place; autograd has a slope at the limit that it is left at."""
    torch = pytest.importorskip("torch")
    parameter = torch.tensor([5.0, -7.0, 1.0], dtype=torch.float64, requires_grad=True)
    parameter.data.clamp_(min=np.log(1e-2), max=np.log(1e2))
    edge = np.log(0.1 / 1.2) - np.log(1.1 / 1.2)
    closed = torch.sigmoid(edge * (2 / 3) - parameter)
    (1 - closed).sum().backward()
    clamped = parameter.detach().numpy()
    ours = open_probability_vjp(clamped, np.ones(3), convention="released").log_alpha
    assert np.all(ours > 0)
    np.testing.assert_allclose(ours, parameter.grad.numpy(), rtol=1e-12)
    beyond = open_probability_vjp(np.array([5.0]), np.ones(1), convention="released").log_alpha
    assert beyond == 0
    u = np.array([0.004, 0.996])
    z = hard_concrete_vjp(clamped[:2], u, np.ones(2), convention="released").log_alpha
    assert np.all(z > 0)


def test_global_pruning_looks_across_layers() -> None:
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((4, 5)), 10 * rng.standard_normal((3, 2))]
    masks = magnitude_global(layers, keep=8)
    assert sum(int(mask.sum()) for mask in masks) == 8
    assert masks[1].sum() >= 5
    torch = pytest.importorskip("torch")
    prune = pytest.importorskip("torch.nn.utils.prune")
    modules = [torch.nn.Linear(w.shape[1], w.shape[0], dtype=torch.float64) for w in layers]
    for module, w in zip(modules, layers, strict=True):
        module.weight.data = torch.from_numpy(w.copy())
    prune.global_unstructured(
        [(module, "weight") for module in modules], pruning_method=prune.L1Unstructured, amount=18
    )
    for module, mask in zip(modules, masks, strict=True):
        np.testing.assert_array_equal(module.weight_mask.numpy().astype(bool), mask)


def test_log_shares_add_up_over_steps() -> None:
    rng = np.random.default_rng(0)
    weights, reference, lag = np.full(5, 0.2), np.ones(5), rng.random((2, 5))
    twice = dynamic_batch_loading(
        dynamic_batch_loading(weights, reference + lag[0], reference), reference + lag[1], reference
    )
    once = dynamic_batch_loading(weights, reference + lag.sum(axis=0), reference)
    np.testing.assert_allclose(twice, once, atol=1e-15)


def test_bad_input_is_refused() -> None:
    ones = np.ones
    with pytest.raises(OptionError, match="keep: expected at most the 2"):
        constrained(ones(2), ones(2), keep=3)
    with pytest.raises(OptionError, match="hessian: expected finite"):
        constrained(ones(2), -ones(2), keep=1)
    with pytest.raises(ShapeError, match="m = 4 must divide"):
        n_m(ones((2, 6)))
    with pytest.raises(OptionError, match="n: expected at most"):
        n_m(ones((2, 4)), n=5)
    with pytest.raises(DTypeError, match="keep: expected booleans"):
        masked_ffn(ones((1, 2)), ones((2, 2)), ones((2, 2)), ones(2))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="at least one feature"):
        masked_width(ones((1, 2)), ones(2), ones((2, 1)), np.zeros(2, bool))
    with pytest.raises(OptionError, match="u: expected draws"):
        hard_concrete(ones(1), 2 * ones(1))
    with pytest.raises(OptionError, match="closed: expected at most 1"):
        evaluation_mask(ones(1), closed=2)
    with pytest.raises(OptionError, match="weights: expected shares"):
        dynamic_batch_loading(np.zeros(2), ones(2), ones(2))
    with pytest.raises(OptionError, match="weights: expected finite"):
        constrained(np.array([np.inf, 1.0]), np.array([0.0, 1.0]), keep=1)
    with pytest.raises(OptionError, match="log_alpha: expected finite"):
        hard_concrete(np.array([np.nan]), np.array([0.5]))
    with pytest.raises(ShapeError, match="dz: axis n must equal"):
        hard_concrete_vjp(ones(1), np.array([0.5]), ones(2))
    with pytest.raises(ShapeError, match="dpenalty: axis n must equal"):
        target_structure_vjp(ones(1), ones(1), ones(1), ones(2), target=ones(1))


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_no_size_of_weights_overflows_a_choice(size: float) -> None:
    kept = constrained(size * np.array([1.0, 3.0, 2.0]), np.ones(3), keep=1)
    assert kept.tolist() == [False, True, False]


def test_what_a_removed_feature_holds_may_be_nan() -> None:
    x, keep = np.array([[3.0, np.nan]]), np.array([True, False])
    assert masked_width(x, np.ones(2), np.eye(2), keep)[0, 0] == pytest.approx(1.0)
    weight = np.eye(2)
    full = compacted_heads(np.ones((1, 1, 2)), weight, weight, weight, weight, [True, False])  # type: ignore[arg-type]
    assert full.tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("closed", [0, 2, 5])
def test_the_evaluation_mask_of_the_released_code(closed: int) -> None:
    """Its steps in PyTorch: a clamped parameter, a sigmoid, the smallest set to 0."""
    torch = pytest.importorskip("torch")
    log_alpha = np.array([6.0, -1.0, 0.3, -7.0, 2.0])
    parameter = torch.from_numpy(log_alpha.copy()).clamp_(np.log(1e-2), np.log(1e2))
    mask = torch.sigmoid(parameter / (2 / 3) * 0.8)
    if closed:
        mask[torch.topk(mask, k=closed, largest=False).indices] = 0.0
    np.testing.assert_allclose(evaluation_mask(log_alpha, closed=closed), mask.numpy(), rtol=1e-14)
