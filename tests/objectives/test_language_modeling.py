"""Next-token and instruction losses: PyTorch's values and gradients, packing, dtypes, errors, and mutants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.objectives import (
    instruction_loss,
    instruction_loss_vjp,
    log_softmax,
    next_token_loss,
    next_token_loss_vjp,
    response_mask,
)
from refimpl.testing import check

registry.load()
RNG = np.random.default_rng(11)
LOGITS = RNG.standard_normal((2, 5, 7))
TOKENS = RNG.integers(0, 7, (2, 5))
RESPONSE = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], bool)


def test_gradient_is_that_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    labels = np.where(RESPONSE, TOKENS, -100)[:, 1:]
    z = torch.tensor(LOGITS, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        z[:, :-1].reshape(-1, 7), torch.tensor(labels.reshape(-1)), ignore_index=-100
    )
    loss.backward()
    found = instruction_loss_vjp(LOGITS, TOKENS, RESPONSE, 1.0).dlogits
    assert instruction_loss(LOGITS, TOKENS, RESPONSE) == pytest.approx(float(loss.detach()), rel=1e-14)
    np.testing.assert_allclose(found, z.grad.numpy(), atol=1e-15)


def test_gradient_rows_sum_to_zero_and_prompts_have_none() -> None:
    dlogits = instruction_loss_vjp(LOGITS, TOKENS, RESPONSE, 3.0).dlogits
    np.testing.assert_allclose(dlogits.sum(axis=-1), 0, atol=1e-15)
    predicts = np.zeros(RESPONSE.shape, bool)
    predicts[:, :-1] = RESPONSE[:, 1:]
    assert np.all(dlogits[~predicts] == 0)
    assert np.all(np.any(dlogits[predicts] != 0, axis=-1))


def test_ranks_that_add_sums_have_the_loss_of_the_batch() -> None:
    ranks = [[x[b : b + 1] for x in (LOGITS, TOKENS, RESPONSE)] for b in (0, 1)]
    sums = [instruction_loss(*rank, reduction="sum") for rank in ranks]
    assert sum(sums) / 4 == pytest.approx(instruction_loss(LOGITS, TOKENS, RESPONSE), rel=1e-14)
    means = instruction_loss(LOGITS, TOKENS, RESPONSE, reduction="sequence")
    assert means == pytest.approx((sums[0] / 3 + sums[1]) / 2, rel=1e-14)
    assert means != pytest.approx(sum(sums) / 4, rel=1e-3)


def test_nothing_to_predict_costs_nothing() -> None:
    for shape in ((0, 4), (2, 0), (2, 1)):
        logits, tokens = np.zeros((*shape, 3)), np.zeros(shape, int)
        assert next_token_loss(logits, tokens) == 0
        assert not next_token_loss_vjp(logits, tokens, 1.0).dlogits.any()
    assert instruction_loss(LOGITS, TOKENS, np.zeros_like(RESPONSE)) == 0


def test_labels_without_weight_may_be_anything() -> None:
    tokens = np.where(RESPONSE, TOKENS, -100)
    assert instruction_loss(LOGITS, tokens, RESPONSE) == instruction_loss(LOGITS, TOKENS, RESPONSE)
    logits = LOGITS.copy()
    logits[0, 0] = np.nan  # predicts a prompt token
    assert instruction_loss(logits, TOKENS, RESPONSE) == instruction_loss(LOGITS, TOKENS, RESPONSE)
    assert np.all(np.isfinite(instruction_loss_vjp(logits, TOKENS, RESPONSE, 1.0).dlogits))


def test_a_class_of_no_probability_costs_infinity() -> None:
    logits = np.array([[[0.0, -np.inf], [0.0, 0.0]]])
    assert next_token_loss(logits, np.array([[0, 1]])) == math.inf
    assert next_token_loss(logits, np.array([[0, 0]])) == 0
    assert np.isnan(log_softmax(np.full(3, -np.inf))).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_low_precision_is_summed_wide(dtype: str) -> None:
    kind = (
        np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    )
    logits = LOGITS.astype(kind)
    exact = next_token_loss(logits.astype(np.float64), TOKENS)
    assert next_token_loss(logits, TOKENS) == pytest.approx(exact, rel=1e-6)
    assert next_token_loss_vjp(logits, TOKENS, 1.0).dlogits.dtype == kind
    assert check("objectives.next_token", next_token_loss, dtypes=[dtype], examples=3).ok


def test_real_weights() -> None:
    weights = np.array([[9.0, 0.5, 0.0, 1.25, 2.0], [9.0, 0.0, 0.0, 0.0, 0.25]])
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=-1, keepdims=True)
    costs = [[-math.log(p[b, t - 1, TOKENS[b, t]]) for t in range(1, 5)] for b in range(2)]
    expected = sum(np.dot(w[1:], c) for w, c in zip(weights, costs, strict=True)) / 4.0
    assert next_token_loss(LOGITS, TOKENS, weights=weights) == pytest.approx(expected, rel=1e-14)


def test_response_mask_and_padding() -> None:
    lengths = np.array([2, 0, 3]), np.array([1, 2, 0])
    right = response_mask(*lengths, length=4).astype(int).tolist()
    assert right == [[0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    left = response_mask(*lengths, length=4, padding="left").astype(int).tolist()
    assert left == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: next_token_loss(LOGITS, TOKENS[:, :4]), ShapeError, "tokens: axis T must equal"),
        (lambda: next_token_loss(LOGITS[0], TOKENS), ShapeError, "logits: expected 3 axes"),
        (lambda: next_token_loss(np.zeros((1, 2, 0)), np.zeros((1, 2), int)), ShapeError, "vocabulary"),
        (lambda: next_token_loss(LOGITS, TOKENS + 0.5), DTypeError, "tokens: expected integers"),
        (lambda: next_token_loss(LOGITS, TOKENS + 7), OptionError, r"labels: expected ids in \[0, 7\)"),
        (lambda: next_token_loss(LOGITS, TOKENS, weights=-np.ones((2, 5))), OptionError, "expected finite"),
        (lambda: next_token_loss(LOGITS, TOKENS, weights=np.ones(5)), ShapeError, "weights: expected 2 axes"),
        (lambda: next_token_loss(LOGITS, TOKENS, weights=np.full((2, 5), "a")), DTypeError, "weights"),
        (lambda: next_token_loss(LOGITS, TOKENS, reduction="mean"), OptionError, "reduction: expected"),  # type: ignore[arg-type]
        (lambda: instruction_loss(LOGITS, TOKENS, RESPONSE * 1), DTypeError, "response: expected bool"),
        (lambda: response_mask(np.array([3]), np.array([2]), length=4), OptionError, "between 0 and 4"),
        (lambda: response_mask(np.array([3]), np.array([1, 1]), length=4), ShapeError, "response_lengths"),
        (lambda: response_mask(np.array([1]), np.array([1]), length=4, padding="up"), OptionError, "padding"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def _loss(logits: Any, tokens: Any, weights: Any, ids: Any, reduction: str, wrong: str) -> float:
    """The loss in plain NumPy, with one mistake."""
    w = np.ones(tokens.shape) if weights is None else np.asarray(weights, np.float64)
    z, labels, w = logits[:, :-1], tokens[:, 1:], w[:, :-1] if wrong == "mask on inputs" else w[:, 1:]
    if ids is not None and wrong != "across documents":
        w = np.where(ids[:, 1:] == ids[:, :-1], w, 0)
    if wrong == "not shifted":
        z, labels = logits[:, :-1], tokens[:, :-1]
    if wrong == "weights as mask":
        w = (w != 0) * 1.0
    top = 0 if wrong == "no maximum" else z.max(axis=-1, keepdims=True, initial=-np.inf)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        log_p = z - top - np.log(np.exp(z - top).sum(axis=-1, keepdims=True))
        if wrong == "base two":
            log_p = log_p / np.log(2)
        cost = -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
        cost = np.where(w != 0, cost, 0)
    total = float((cost * w).sum())
    if wrong == "sign":
        total = -total
    reduction = {"mean of means": {"token": "sequence"}}.get(wrong, {}).get(reduction, reduction)
    if reduction == "sum":
        return total
    if reduction == "token":
        n = float(cost.size if wrong == "all counted" else w.sum())
        return total / n if n else 0.0
    rows = w.sum(axis=1)
    if not rows.any():
        return 0.0
    return float(((cost * w).sum(axis=1)[rows > 0] / rows[rows > 0]).mean()) * (-1 if wrong == "sign" else 1)


MISTAKES = (
    "mask on inputs", "across documents", "not shifted", "no maximum", "base two", "sign", "mean of means",
    "all counted", "weights as mask",
)  # fmt: skip


def _next_token(wrong: str) -> Callable[..., Any]:
    def f(
        logits: Any,
        tokens: Any,
        /,
        *,
        weights: Any = None,
        document_ids: Any = None,
        reduction: str = "token",
    ) -> Any:
        return _loss(logits, tokens, weights, document_ids, reduction, wrong)

    return f


def _instruction(wrong: str) -> Callable[..., Any]:
    def f(
        logits: Any, tokens: Any, response: Any, /, *, document_ids: Any = None, reduction: str = "token"
    ) -> Any:
        return _loss(logits, tokens, response, document_ids, reduction, wrong)

    return f


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistake_is_caught_by_laws(wrong: str) -> None:
    failed = {o.check for o in check("objectives.next_token", _next_token(wrong), examples=12).failed}
    assert failed - {"reference"}, f"{wrong} survived the laws"


@pytest.mark.parametrize(
    "wrong", ["mask on inputs", "across documents", "not shifted", "all counted", "mean of means"]
)
def test_mistaken_mask_is_caught_by_laws(wrong: str) -> None:
    failed = {o.check for o in check("objectives.instruction", _instruction(wrong), examples=12).failed}
    assert failed - {"reference"}, f"{wrong} survived the laws"


def test_the_unbroken_ones_pass() -> None:
    assert check("objectives.next_token", _next_token("nothing"), examples=6).ok
    assert check("objectives.instruction", _instruction("nothing"), examples=6).ok
