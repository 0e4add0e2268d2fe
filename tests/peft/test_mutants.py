"""Fine-tuning methods that are wrong in one way: the laws must catch each; and what they count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.peft import (
    adapter,
    adapter_fusion,
    composed_factors,
    composed_update,
    gated_lora,
    lora_embedding,
    lora_fused_linear,
    lora_init,
    lora_linear,
    lora_linear_vjp,
    lora_merge,
    lora_merge_vjp,
    lora_unmerge,
    prefix_attention,
    prefix_from_embedding,
    retrieve,
    retrieved_weights,
    soft_prompt,
    soft_prompt_labels,
)
from tests.survivors import Mutants

registry.load()

MUTANTS = Mutants()
mutant = MUTANTS.of


@mutant("peft.full")
def update_halved(x: Any, delta: Any, weight: Any, /) -> Any:
    return x @ (weight + delta / 2)


@mutant("peft.lora")
def factor_forgotten(x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: Any, **options: Any) -> Any:
    """The lecture's slide."""
    return lora_linear(x, a, b, weight, **options)


@mutant("peft.lora")
def factor_is_alpha(x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: Any, **options: Any) -> Any:
    return lora_linear(x, a, b, weight, lora_alpha=lora_alpha * max(a.shape[1], 1), **options)


@mutant("peft.lora")
def dropout_on_the_base_too(
    x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: Any, dropout_mask: Any = None
) -> Any:
    return lora_linear(x if dropout_mask is None else x * dropout_mask, a, b, weight, lora_alpha=lora_alpha)


@mutant("peft.lora")
def factors_normalized(x: Any, a: Any, b: Any, weight: Any, /, **options: Any) -> Any:
    return lora_linear(x, a / np.maximum(np.abs(a).max(initial=0), 1), b, weight, **options)


@mutant("peft.lora.merge")
def merged_twice(a: Any, b: Any, weight: Any, /, *, lora_alpha: Any) -> Any:
    return lora_merge(a, b, lora_merge(a, b, weight), lora_alpha=lora_alpha)


@mutant("peft.lora.merge")
def merged_in_half_precision(a: Any, b: Any, weight: Any, /, *, lora_alpha: Any) -> Any:
    return lora_merge(a, b, weight, lora_alpha=lora_alpha).astype(np.float16).astype(weight.dtype)


@mutant("peft.lora.embedding")
def rows_of_b_alone(a: Any, b: Any, table: Any, tokens: Any, /, *, lora_alpha: Any) -> Any:
    return lora_embedding(a * 0 + 1, b, table, tokens, lora_alpha=lora_alpha)


@mutant("peft.lora.fused")
def parts_shifted(x: Any, a: Any, b: Any, weight: Any, /, *, enabled: Any, **options: Any) -> Any:
    return lora_fused_linear(x, a, b, weight, enabled=(*enabled[1:], enabled[0]), **options)


@mutant("peft.lora.fused")
def factor_over_the_whole_rank(
    x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: Any, enabled: Any
) -> Any:
    return lora_fused_linear(x, a, b, weight, enabled=enabled, lora_alpha=lora_alpha / max(len(a), 1))


@mutant("peft.adapter")
def residual_forgotten(x: Any, *rest: Any, activation: Any) -> Any:
    return adapter(x, *rest, activation=activation) - x


@mutant("peft.adapter")
def bias_twice(x: Any, w_down: Any, b_down: Any, w_up: Any, b_up: Any, /, *, activation: Any) -> Any:
    return adapter(x, w_down, b_down, w_up, 2 * b_up, activation=activation)


@mutant("peft.prefix")
def mask_over_the_prefix(q: Any, k: Any, v: Any, pk: Any, pv: Any, /, *, causal: Any) -> Any:
    return prefix_attention(q, k, v, pk[: q.shape[1]], pv[: q.shape[1]], causal=causal)


@mutant("peft.prefix")
def prefix_after_the_text(q: Any, k: Any, v: Any, pk: Any, pv: Any, /, *, causal: Any) -> Any:
    whole = prefix_attention(q, k, v, pk, pv, causal=causal)
    return whole if causal is False else prefix_attention(q, k, v, pk[:0], pv[:0], causal=causal)


@mutant("peft.prefix")
def masses_halved(q: Any, k: Any, v: Any, pk: Any, pv: Any, /, *, causal: Any) -> Any:
    text = prefix_attention(q, k, v, pk[:0], pv[:0], causal=causal)
    return (text + prefix_attention(q, k[:, :0], v[:, :0], pk, pv)) / 2


@mutant("peft.prefix.reparametrized")
def no_tanh(e: Any, w_1: Any, b_1: Any, w_2: Any, b_2: Any, /) -> Any:
    return np.maximum(e @ w_1 + b_1, 0) @ w_2 + b_2


@mutant("peft.soft_prompt")
def prompt_at_the_end(prompt: Any, embedded: Any, /) -> Any:
    P = len(prompt)
    return np.roll(soft_prompt(prompt, embedded), -P, axis=1)


@mutant("peft.composition")
def sum_of_factors(weights: Any, a: Any, b: Any, /) -> Any:
    return composed_factors(weights, a, b)


@mutant("peft.composition.lorahub")
def sum_of_updates(weights: Any, a: Any, b: Any, /) -> Any:
    return composed_update(weights, a, b)


@mutant("peft.composition")
def weights_normalized(weights: Any, a: Any, b: Any, /) -> Any:
    total = weights.sum()
    return composed_update(weights / (total if total else 1), a, b)


@mutant("peft.composition.gated")
def gates_of_the_first_token(x: Any, gates: Any, a: Any, b: Any, weight: Any, /) -> Any:
    return gated_lora(x, gates[:, ::-1], a, b, weight)


@mutant("peft.composition.gated")
def base_gated_too(x: Any, gates: Any, a: Any, b: Any, weight: Any, /) -> Any:
    base = gated_lora(x, gates * 0, a, b, weight)
    return gated_lora(x, gates, a, b, weight) + base * (gates.sum(axis=1, keepdims=True) - 1)


@mutant("peft.composition.fusion")
def unnormalized(x: Any, adapted: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    return adapter_fusion(x, adapted, w_q, w_k, w_v) * len(adapted)


@mutant("peft.composition.fusion")
def hard_choice(x: Any, adapted: Any, w_q: Any, w_k: Any, w_v: Any, /) -> Any:
    return adapter_fusion(1e6 * x + 1e-3, adapted, w_q + 1e-3, w_k, w_v)


@mutant("peft.retrieval")
def dot_products(query: Any, keys: Any, /, *, k: int, excluded: Any = None) -> Any:
    scores = keys @ query if excluded is None else np.where(excluded, -np.inf, keys @ query)
    order = np.argsort(-scores, kind="stable")[:k]
    return order, scores[order]


@mutant("peft.retrieval")
def last_of_equals(query: Any, keys: Any, /, *, k: int, excluded: Any = None) -> Any:
    flipped = None if excluded is None else excluded[::-1]
    found = retrieve(query, keys[::-1], k=k, excluded=flipped)
    return len(keys) - 1 - found.modules, found.scores


@mutant("peft.retrieval")
def own_module_kept(query: Any, keys: Any, /, *, k: int, excluded: Any = None) -> Any:
    return retrieve(query, keys, k=k)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


def test_the_first_step_moves_b_alone() -> None:
    rng = np.random.default_rng(0)
    a, b = lora_init(6, 4, 2, rng=1)
    x, weight, dy = rng.standard_normal((5, 6)), rng.standard_normal((6, 4)), rng.standard_normal((5, 4))
    gradients = lora_linear_vjp(x, a, b, weight, dy, lora_alpha=4)
    assert not gradients.lora_a.any()
    assert gradients.lora_b.all()
    assert len(gradients) == 3  # there is none for the weight


@pytest.mark.parametrize("start", ["paper", "released", "embedding"])
def test_training_starts_at_the_base(start: Any) -> None:
    a, b = lora_init(50, 40, 8, start=start, rng=0)
    assert not (a @ b).any()
    assert (a if start == "embedding" else b).any() is np.False_
    spread = {"paper": 8**-0.5, "released": 50**-0.5 / 3**0.5, "embedding": 1.0}[start]
    assert abs((b if start == "embedding" else a).std() / spread - 1) < 0.15


def test_merge_and_unmerge() -> None:
    rng = np.random.default_rng(0)
    a, b, weight = rng.standard_normal((30, 4)), rng.standard_normal((4, 20)), rng.standard_normal((30, 20))
    back = lora_unmerge(a, b, lora_merge(a, b, weight, lora_alpha=8), lora_alpha=8)
    np.testing.assert_allclose(back, weight, rtol=0, atol=1e-14)
    halves = [array.astype(np.float16) for array in (a, b, weight)]
    back = lora_unmerge(*halves[:2], lora_merge(*halves, lora_alpha=8), lora_alpha=8)
    assert np.any(back != halves[2])  # float16 does not come back bit for bit


def test_averaged_outputs_are_averaged_parameters() -> None:
    rng = np.random.default_rng(0)
    query, keys, x = rng.standard_normal(5), rng.standard_normal((6, 5)), rng.standard_normal((3, 4))
    a, b, weight = rng.standard_normal((6, 4, 2)), rng.standard_normal((6, 2, 3)), rng.standard_normal((4, 3))
    found = retrieve(query, keys, k=3)
    shares = retrieved_weights(found.scores, temperature=0.5)
    by_output = gated_lora(x, np.tile(shares, (3, 1)), a[found.modules], b[found.modules], weight)
    update = composed_update(shares, a[found.modules], b[found.modules])
    np.testing.assert_allclose(by_output, x @ (weight + update), atol=1e-13)


def test_bad_input_is_refused() -> None:
    ones = np.ones
    with pytest.raises(ShapeError, match="lora_a: axis K must equal"):
        lora_linear(ones((2, 3)), ones((4, 1)), ones((1, 3)), ones((3, 3)))
    with pytest.raises(OptionError, match="lora_alpha: expected a finite number"):
        lora_linear(ones((2, 3)), ones((3, 1)), ones((1, 3)), ones((3, 3)), lora_alpha=float("nan"))
    with pytest.raises(OptionError, match="start: expected 'paper'"):
        lora_init(2, 2, 1, start="other")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="enabled: expected 1 adapted parts"):
        lora_fused_linear(ones((1, 2)), ones((1, 2, 1)), ones((1, 1, 2)), ones((2, 4)), enabled=(True, True))
    with pytest.raises(OptionError, match="k: expected at most the 1 modules"):
        retrieve(ones(2), ones((2, 2)), k=2, excluded=np.array([True, False]))
    with pytest.raises(OptionError, match="causal: True needs Tq == Tk"):
        prefix_attention(
            *(ones((1, n, 1, 2)) for n in (2, 3, 3)), ones((1, 1, 2)), ones((1, 1, 2)), causal=True
        )
    with pytest.raises(ShapeError, match="w_down, w_up: expected"):
        adapter(ones((1, 2)), ones((2, 1)), ones(1), ones((1, 3)), ones(3))
    with pytest.raises(DTypeError, match="labels: expected integers"):
        soft_prompt_labels(ones((1, 2)), length=1)  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        prefix_from_embedding(ones((1, 2)), ones((3, 1)), ones(1), ones((1, 1)), ones(1))


def test_what_is_not_finite_or_does_not_fit_is_refused() -> None:
    ones = np.ones
    with pytest.raises(OptionError, match="query, keys: expected finite"):
        retrieve(np.array([np.nan, 1.0]), ones((2, 2)), k=1)
    with pytest.raises(ShapeError, match="dweight: axis N must equal"):
        lora_merge_vjp(ones((2, 1)), ones((1, 2)), ones((2, 2)), ones((2, 3)))
    labels = soft_prompt_labels(np.array([[7]], np.uint8), length=1)
    assert labels.tolist() == [[-100, 7]]


def test_a_low_temperature_prefers_the_best_module() -> None:
    scores = np.array([0.5, 0.25])
    cold = np.exp(scores / 0.125) / np.exp(scores / 0.125).sum()
    np.testing.assert_allclose(retrieved_weights(scores, temperature=0.125), cold, rtol=1e-14)
