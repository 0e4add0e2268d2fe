"""Losses of routers: released implementations, Monte Carlo, worked numbers, low precision, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import moe
from refimpl.errors import DTypeError, OptionError, ShapeError, UnknownNameError
from tests.oracles import library


def softmax(x: Any) -> Any:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def routed(seed: int, T: int, E: int, K: int) -> tuple[Any, Any, Any]:
    logits = np.random.default_rng(seed).standard_normal((T, E))
    return logits, softmax(logits), np.argsort(-logits, axis=1, kind="stable")[:, :K]


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_mixtral_in_transformers_counts_all_choices(K: int, padded: bool) -> None:
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits, p, chosen = routed(K, 24, 5, K)
    counted = np.random.default_rng(9).random(24) < 0.6 if padded else None
    mask = None if counted is None else torch.tensor(counted.reshape(2, 12).astype(np.int64))
    found = mixtral.load_balancing_loss_func((torch.tensor(logits),), 5, K, mask)
    ours = moe.balance_loss(p, chosen, normalization="flaxformer", counted=counted)
    assert ours == pytest.approx(float(found), rel=1e-6)  # it counts in float32


def test_the_gradient_of_mixtrals_loss_is_pytorchs() -> None:
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits, p, chosen = routed(3, 16, 6, 2)
    z = torch.tensor(logits, requires_grad=True)
    mixtral.load_balancing_loss_func((z,), 6, 2).backward()
    dp = moe.balance_loss_vjp(p, chosen, 1.0, normalization="flaxformer").dprobabilities
    ours = p * (dp - (p * dp).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, z.grad.numpy(), rtol=1e-5, atol=1e-9)


def test_deepseek_divides_flaxformers_loss_by_its_choices() -> None:
    _, p, chosen = routed(4, 30, 8, 3)
    all_choices = moe.balance_loss(p, chosen, normalization="flaxformer")
    assert moe.expert_balance_loss(p, chosen) == pytest.approx(all_choices / 3, rel=1e-14)


def test_gshards_code_is_e_squared_times_its_algorithm() -> None:
    _, p, chosen = routed(5, 30, 8, 2)
    printed = moe.balance_loss(p, chosen, normalization="gshard")
    assert moe.balance_loss(p, chosen, normalization="switch") == pytest.approx(64 * printed, rel=1e-14)


def test_the_balance_loss_can_be_below_one() -> None:
    p = np.array([[0.51, 0.49]] * 3 + [[0.0, 1.0]] * 2)
    chosen = np.array([[0], [0], [0], [1], [1]])
    assert moe.balance_loss(p, chosen) == pytest.approx(2 * (0.6 * 0.306 + 0.4 * 0.694), rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_probabilities_are_those_of_drawing_one_noise_again(k: int) -> None:
    rng = np.random.default_rng(k)
    T, E, draws = 4, 5, 40_000
    clean = rng.standard_normal((T, E))
    std = 0.3 + rng.random((T, E))
    noisy = clean + std * rng.standard_normal((T, E))
    P = moe.load_probabilities(clean, noisy, std, k=k)
    for e in range(E):
        again = clean[:, e] + std[:, e] * rng.standard_normal((draws, T))
        others = np.delete(noisy, e, axis=1)
        ahead = (others[None] > again[:, :, None]).sum(axis=2)
        share = np.mean(ahead < k, axis=0)
        # Five standard errors of a share.
        assert np.all(np.abs(share - P[:, e]) < 5 * np.sqrt(0.25 / draws))


def test_loads_sum_to_k_for_each_token_in_expectation() -> None:
    rng = np.random.default_rng(0)
    clean, std, k, draws = rng.standard_normal(6), 0.5 + rng.random(6), 2, 20_000
    many = np.broadcast_to(clean, (draws, 6))
    noisy = many + std * rng.standard_normal((draws, 6))
    P = moe.load_probabilities(many, noisy, np.broadcast_to(std, (draws, 6)), k=k)
    counts = np.bincount(np.argsort(-noisy, axis=1)[:, :k].reshape(-1), minlength=6) / draws
    assert P.sum(axis=1).mean() == pytest.approx(k, abs=0.02)
    np.testing.assert_allclose(P.mean(axis=0), counts, atol=0.02)  # each expert's share too
    assert P.min() >= 0
    assert P.max() <= 1


def test_vmoe_differs_for_selected_experts_alone() -> None:
    rng = np.random.default_rng(1)
    clean = rng.standard_normal((6, 5))
    noisy, std = clean + 0.3 * rng.standard_normal((6, 5)), np.full((6, 5), 0.3)
    ours, vmoe = (moe.load_probabilities(clean, noisy, std, k=2, threshold=t) for t in ("shazeer", "vmoe"))
    selected = np.argsort(np.argsort(-noisy, axis=1), axis=1) < 2
    assert np.array_equal(ours == vmoe, ~selected)
    assert np.all(ours[selected] > vmoe[selected])


def test_the_unbiased_variance_costs_e_over_e_less_one() -> None:
    gates = softmax(np.random.default_rng(2).standard_normal((9, 4)))
    biased, port = (moe.importance_loss(gates, variation=kind) for kind in ("shazeer", "davidmrau"))
    assert port == pytest.approx(biased * 4 / 3, rel=1e-9)


def test_z_loss_and_its_gradient_by_scipy() -> None:
    special = library("scipy.special")
    logits = 3 * np.random.default_rng(3).standard_normal((7, 5))
    lse = special.logsumexp(logits, axis=1)
    assert moe.z_loss(logits) == pytest.approx(np.mean(lse**2), rel=1e-14)
    expected = 2 * lse[:, None] * special.softmax(logits, axis=1) / 7
    np.testing.assert_allclose(moe.z_loss_vjp(logits, 1.0).dlogits, expected, rtol=1e-12)


def test_an_excluded_expert_has_no_part_in_the_z_loss() -> None:
    logits = np.array([[1.0, 2.0, -np.inf]])
    assert moe.z_loss(logits) == pytest.approx(moe.z_loss(logits[:, :2]), rel=1e-15)
    assert moe.z_loss_vjp(logits, 1.0).dlogits[0, 2] == 0


def test_a_coefficient_decays_where_nothing_is_dropped() -> None:
    found = np.array([0.01])
    for _ in range(100):
        found = moe.adapt_coefficient(found, np.zeros(1))
    assert found[0] == pytest.approx(0.01 * 0.99**100, rel=1e-12)
    assert moe.adapt_coefficient(np.array([0.0]), np.array([1.0]))[0] == pytest.approx(0.0001, rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_low_precision_in_low_precision_gradients_out(dtype: Any) -> None:
    logits, p, chosen = routed(6, 12, 4, 2)
    low, gates = logits.astype(dtype), p.astype(dtype)
    assert moe.z_loss_vjp(low, 1.0).dlogits.dtype == dtype
    assert moe.balance_loss_vjp(gates, chosen, 1.0).dprobabilities.dtype == dtype
    assert moe.importance_loss_vjp(gates, 1.0).dgates.dtype == dtype
    assert moe.normalize_logits(low).dtype == dtype
    # Sums are in float32 at least: the loss is that of the rounded inputs.
    assert moe.z_loss(low) == pytest.approx(moe.z_loss(low.astype(np.float64)), rel=1e-6)
    assert moe.importance_loss(gates) == pytest.approx(
        moe.importance_loss(gates.astype(np.float64)), rel=1e-6
    )


HALF, ONE = np.full((2, 2), 0.5), np.array([[0], [1]])
DEVICES = np.array([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moe.importance_loss(np.ones(3)), ShapeError, "gates: expected 2 axes"),
        (lambda: moe.importance_loss(np.ones((2, 0))), ShapeError, "an expert"),
        (lambda: moe.importance_loss(HALF, variation="cv"), OptionError, "variation"),  # type: ignore[arg-type]
        (lambda: moe.importance_loss(HALF > 1), DTypeError, "gates"),
        (lambda: moe.uniformity_loss(HALF[0]), ShapeError, "gates: expected 2 axes"),
        (lambda: moe.load_loss(HALF, HALF, HALF, k=3), OptionError, "k: expected at most E=2"),
        (lambda: moe.load_loss(HALF, HALF, HALF, k=0), OptionError, "k: expected at least 1"),
        (lambda: moe.load_loss(HALF, HALF, 0 * HALF, k=1), OptionError, "noise_std"),
        (lambda: moe.load_loss(HALF, HALF[:1], HALF, k=1), ShapeError, "noisy: axis T"),
        (lambda: moe.load_loss(HALF, HALF, HALF, k=1, threshold="k"), OptionError, "threshold"),  # type: ignore[arg-type]
        (lambda: moe.load_loss(*[np.ones((2, 0))] * 3, k=1), ShapeError, "at least 1 expert"),
        (lambda: moe.balance_loss(HALF, ONE[:1]), ShapeError, "selected: axis T"),
        (lambda: moe.balance_loss(HALF, ONE + 1), OptionError, r"experts in \[0, 2\)"),
        (lambda: moe.balance_loss(HALF, np.array([[0, 0], [1, 0]])), OptionError, "twice"),
        (lambda: moe.balance_loss(HALF, ONE / 2), DTypeError, "whole numbers"),
        (lambda: moe.balance_loss(HALF, ONE, groups=3), ShapeError, "groups: must divide"),
        (lambda: moe.balance_loss(HALF, ONE, normalization="moe"), OptionError, "normalization"),  # type: ignore[arg-type]
        (lambda: moe.balance_loss(HALF, ONE, counted=np.ones(3, bool)), ShapeError, "counted"),
        (lambda: moe.balance_loss(HALF, ONE, counted=np.ones(2)), DTypeError, "counted"),
        (lambda: moe.balance_loss(HALF, ONE[:, :0]), ShapeError, "1 choice"),
        (lambda: moe.device_balance_loss(HALF, ONE, device_of=DEVICES[:1]), ShapeError, "device_of"),
        (lambda: moe.device_balance_loss(HALF, ONE, device_of=DEVICES / 2), DTypeError, "device_of"),
        (
            lambda: moe.communication_balance_loss(HALF, ONE, device_of=DEVICES, device_limit=0),
            OptionError,
            "device_limit",
        ),
        (lambda: moe.z_loss(HALF[0]), ShapeError, "logits: expected 2 axes"),
        (lambda: moe.z_loss(HALF, padding="masked"), OptionError, "padding"),  # type: ignore[arg-type]
        (lambda: moe.mutual_information_loss(HALF, marginal="eps"), OptionError, "marginal"),  # type: ignore[arg-type]
        (lambda: moe.task_information_loss(HALF, DEVICES / 2), DTypeError, "tasks"),
        (lambda: moe.task_information_loss(HALF, DEVICES[:1]), ShapeError, "tasks"),
        (
            lambda: moe.task_information_loss(HALF, DEVICES, task_weights="all"),  # type: ignore[arg-type]
            OptionError,
            "task_weights",
        ),
        (lambda: moe.normalize_logits(HALF, temperature=np.inf), OptionError, "temperature"),
        (lambda: moe.normalize_logits_vjp(HALF, HALF[:1]), ShapeError, "dnormalized"),
        (lambda: moe.adapt_coefficient(HALF[0], 3 * HALF[0]), OptionError, "drop_rate"),
        (lambda: moe.adapt_coefficient(HALF[0], HALF[0], momentum=1.0), OptionError, "momentum"),
        (lambda: moe.loss_coefficients(model="deepseekmoe"), UnknownNameError, "did you mean"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
