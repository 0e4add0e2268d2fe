"""The encoder of `frugal apply` is BERT's, its techniques do what they say, and costs are what is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cli.applied.structure as structure
import cli.applied.techniques as techniques
import cli.applied.weights as weights
from cli.applied.measure import compare, rank_correlation
from cli.applied.model import MATRICES, Layer, Model, dense
from cli.applied.structure import (
    adapted,
    fewer_heads,
    fewer_neurons,
    inputs_of,
    int8_products,
    merged,
    shared,
    windowed,
)
from cli.applied.techniques import APPLICABLE, find
from memsim.compression import nf4_bits
from memsim.flops import attention_flops
from refimpl import registry
from refimpl.transformer.bert import bert_config, bert_encoder, bert_params, bert_traces
from tests.transformer.test_bert import TINY, tiny_tensors

TEXTS = [np.array(row) for row in ([1, 5, 3, 10, 2], [4, 4], [7, 0, 9, 2, 2, 3, 1, 8, 6], [5])]


def params(dtype: Any = np.float64) -> Any:
    tensors = {name: 0.4 * array.astype(dtype) for name, array in tiny_tensors().items()}
    return bert_params(tensors, bert_config(TINY))


def model(dtype: Any = np.float64) -> Model:
    config, every = bert_config(TINY), params(dtype)
    layers = []
    for index in range(config.layers):
        own = {
            n.removeprefix(f"layers.{index}."): a
            for n, a in every.items()
            if n.startswith(f"layers.{index}.")
        }
        matrices = {name: dense(own.pop(name)) for name in MATRICES}
        layers.append(Layer(own, matrices, config))
    return Model({n: a for n, a in every.items() if not n.startswith("layers")}, config, tuple(layers))


def test_the_encoder_is_that_of_bert() -> None:
    config = bert_config(TINY)
    for ids in TEXTS:
        found = model().states(ids)
        assert len(found) == 3
        traces = list(bert_traces(params(), ids[None], config=config))
        np.testing.assert_allclose(found[1], traces[1].inputs["w_q"][0], atol=1e-13)
        np.testing.assert_allclose(found[2], bert_encoder(params(), ids[None], config=config)[0], atol=1e-13)
        inputs = inputs_of(model().layers[1], [found[1]])
        for name in MATRICES:
            np.testing.assert_allclose(inputs[name], traces[1].inputs[name][0], atol=1e-13)


def test_operations_are_those_of_the_matrices_and_of_attention() -> None:
    lengths = [5, 2]
    by_hand = 2 * 7 * (4 * 12 * 12 + 2 * 12 * 20)
    scores = sum(int(attention_flops(Tq=T, D=4, H=3).total) for T in lengths)
    assert model().cost(lengths).flops == 2 * (by_hand + scores)


def test_what_the_model_stores_is_the_checkpoint() -> None:
    cost = model(np.float32).cost([1])
    assert cost.parameters == sum(array.size for array in tiny_tensors().values())
    assert cost.nbytes == 4 * cost.parameters
    vectors = 2 * (4 * 12 + 20 + 12 + 4 * 12)
    assert model().block_cost([1]).parameters == vectors + 2 * (4 * 144 + 2 * 240)


# What matrices become


@pytest.fixture
def w() -> Any:
    return np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)


def test_stored_bytes(w: Any) -> None:
    n = w.size
    x = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    assert weights.int8(w).nbytes == n + 4 * 128
    both = np.vstack([w, w])
    assert weights.nf4(both).nbytes == both.size * nf4_bits().total / 8 + 4  # and the offset
    assert weights.codebook16(w).nbytes == n / 2 + 16 * 4
    assert weights.gptq4(w, x).nbytes == n / 2 + 4 * 128
    assert weights.largest_half(w).nbytes == 4 * n / 2 + n / 8
    assert weights.two_of_four(w).nbytes == 4 * n / 2 + n / 2 * 2 / 8
    rank = 21  # 42 (64 + 128) < 64 * 128 <= 43 (64 + 128)
    assert weights.half_rank(w).nbytes == 4 * rank * (64 + 128)
    odd = w[:3, :3]
    assert weights.largest_half(odd).nbytes == 4 * 4 + 2
    assert weights.codebook16(odd).nbytes == 5 + 16 * 4


def test_values_are_near_and_on_their_grids(w: Any) -> None:
    x = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    off = {
        f.__name__: float(np.linalg.norm(f(w).values - w) / np.linalg.norm(w))
        for f in (weights.int8, weights.nf4, weights.codebook16, weights.half_rank)
    }
    assert off["int8"] < 0.01 < off["nf4"] < 0.12
    assert off["codebook16"] < 0.12
    assert len(np.unique(weights.codebook16(w).values)) <= 16
    steps = weights.gptq4(w, x).values / (np.abs(w).max(axis=0) / 7)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    assert np.linalg.matrix_rank(weights.half_rank(w).values.astype(float), tol=1e-3) == 21
    values = np.linalg.svd(w, compute_uv=False)
    assert off["half_rank"] == pytest.approx(np.sqrt(np.sum(values[21:] ** 2) / np.sum(values**2)), rel=1e-4)


def test_sparse_weights(w: Any) -> None:
    half, two = weights.largest_half(w), weights.two_of_four(w)
    for sparse in (half, two):
        kept = sparse.values != 0
        assert kept.sum() == sparse.parameters == sparse.multiply_adds == w.size // 2
        np.testing.assert_array_equal(sparse.values[kept], w[kept])
    assert np.abs(w[half.values == 0]).max() <= np.abs(w[half.values != 0]).min()
    groups = (two.values != 0).reshape(16, 4, 128)  # along the inputs, which a product sums over
    assert (groups.sum(axis=1) == 2).all()


# What blocks become


def _alike(one: Model, other: Model, atol: float = 1e-12) -> None:
    for ids in TEXTS:
        for a, b in zip(one.states(ids), other.states(ids), strict=True):
            np.testing.assert_allclose(a, b, atol=atol)


def _with(given: Model, change: Any) -> Model:
    """The model with other dense matrices, computed by plain blocks."""
    layers = []
    for layer in given.layers:
        values = {name: matrix.values.copy() for name, matrix in layer.matrices.items()}
        vectors = {name: vector.copy() for name, vector in layer.vectors.items()}
        change(layer, values, vectors)
        layers.append(Layer(vectors, {name: dense(a) for name, a in values.items()}, layer.config))
    return given.with_layers(layers)


def test_heads_are_left_out_with_their_biases() -> None:
    found = fewer_heads(model(), TEXTS)

    def silence(layer: Any, values: Any, vectors: Any) -> None:
        assert layer.keep.sum() == 2
        values["w_o"][np.repeat(~layer.keep, 4)] = 0

    _alike(found, _with(found, silence))
    cost, before = found.block_cost([3]), model().block_cost([3])
    assert before.parameters - cost.parameters == 2 * (4 * 12 * 4 + 3 * 4)
    assert before.flops - cost.flops == 2 * (2 * 3 * 4 * 12 * 4 + 2 * 2 * 9 * 4)


def test_the_least_head_goes() -> None:
    small = model()

    def weaken(layer: Any, values: Any, vectors: Any) -> None:
        values["w_o"][4:8] *= 1e-3

    found: Any = fewer_heads(_with(small, weaken), TEXTS)
    assert all(layer.keep.tolist() == [True, False, True] for layer in found.layers)


def test_neurons_are_left_out() -> None:
    def weaken(layer: Any, values: Any, vectors: Any) -> None:
        values["w_2"][:5] *= 1e-3

    whole = _with(model(), weaken)
    found: Any = fewer_neurons(whole, TEXTS)
    assert all(layer.keep.tolist() == [False] * 5 + [True] * 15 for layer in found.layers)

    def silence(layer: Any, values: Any, vectors: Any) -> None:
        values["w_2"][:5] = 0

    _alike(found, _with(whole, silence))
    cost, before = found.block_cost([3]), whole.block_cost([3])
    assert before.parameters - cost.parameters == 2 * (5 * 24 + 5)
    assert cost.nbytes == 8 * cost.parameters
    assert found.layers[0].stored_weights()["w_1"].shape == (12, 15)


def test_int8_products_are_near() -> None:
    wide = model(np.float32)
    moved = compare(wide, int8_products(wide), TEXTS)
    assert 1e-4 < moved.errors[-1] < 0.05
    assert moved.cosine_least > 0.999
    exact = _with(int8_products(wide), lambda *_: None)  # int8 weights alone: activations matter too
    assert compare(exact, int8_products(wide), TEXTS).errors[0] > 1e-4


def test_windows(monkeypatch: Any) -> None:
    for radius in (1, 20):
        monkeypatch.setattr(structure, "RADIUS", radius)
        found = windowed(model())
        near = {T: np.abs(np.subtract.outer(np.arange(T), np.arange(T))) <= radius for T in range(1, 10)}

        class Masked(Layer):
            def attend(self, q: Any, k: Any, v: Any, near: Any = near) -> Any:
                scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(q.shape[-1])
                scores = np.where(near[q.shape[1]], scores, -np.inf)
                scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
                return np.einsum("bhij,bjhd->bihd", scores / scores.sum(axis=-1, keepdims=True), v)

        masked = [Masked(layer.vectors, layer.matrices, layer.config) for layer in model().layers]
        _alike(found, model().with_layers(masked))
        assert found.layers[0].pairs(9) == near[9].sum()
    _alike(found, model())


def test_a_shared_block_is_stored_once_and_computes_twice() -> None:
    found = shared(model())
    first = model().layers[0]
    _alike(found, model().with_layers([first, first]))
    before = model()
    assert found.block_cost([3]).nbytes * 2 == before.block_cost([3]).nbytes
    assert found.cost([3]).flops == before.cost([3]).flops
    assert shared(before.with_layers(before.layers[:1])).layers == before.layers[:1]


def test_a_merged_adapter_is_the_adapter() -> None:
    one, other = adapted(model()), merged(model())
    _alike(one, other)
    assert compare(model(), other, TEXTS).errors[-1] > 1e-3  # it does something
    before, after = one.block_cost([3]), other.block_cost([3])
    factors = 2 * 2 * (12 * 8 + 8 * 12)
    assert before.parameters - after.parameters == factors
    assert before.flops - after.flops == 2 * 3 * factors
    assert after == model().block_cost([3])


# What it costs


def test_nothing_moves_where_nothing_is_done() -> None:
    moved = compare(model(), model(), TEXTS)
    assert moved.cosine_least == pytest.approx(1, abs=1e-14)
    assert moved.errors == [0.0, 0.0]
    assert moved.rank_correlation == pytest.approx(1)


def test_errors_are_relative_to_all_tokens() -> None:
    """States after the last layer, doubled, are as far off as they are large."""

    class Doubled(Layer):
        def __call__(self, x: Any) -> Any:
            return 2 * super().__call__(x)

    first, last = model().layers
    doubled = Doubled(last.vectors, last.matrices, last.config)
    moved = compare(model(), model().with_layers([first, doubled]), TEXTS)
    assert moved.errors == [0.0, pytest.approx(1.0)]
    assert moved.cosine_mean == pytest.approx(1.0)


def test_cosines_are_of_the_embeddings_of_each_text() -> None:
    other = fewer_heads(model(), TEXTS)

    def embedding(given: Model, ids: Any) -> Any:
        total = sum(given.states(ids)[-1])  # over the tokens
        return total / np.sqrt(total @ total)

    cosines = [float(embedding(model(), ids) @ embedding(other, ids)) for ids in TEXTS]
    moved = compare(model(), other, TEXTS)
    assert moved.cosine_mean == pytest.approx(sum(cosines) / len(cosines))
    assert moved.cosine_least == pytest.approx(min(cosines))
    assert moved.cosine_least < moved.cosine_mean - 1e-5  # texts differ


def test_rank_correlation_by_hand() -> None:
    """Similarities 0.8, 0.6, 0.96 (ranks 2, 1, 3) against cos 10, 90, 80 degrees (ranks 3, 1, 2)."""
    old = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
    angles = np.radians([0, 10, 90])
    new = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert rank_correlation(old, new) == pytest.approx(1 - 6 * (1 + 0 + 1) / (3 * 8))
    assert rank_correlation(old[:2], new[:2]) is None


def test_gptq_looks_at_what_the_quantised_blocks_before_give(monkeypatch: Any) -> None:
    seen: list[Any] = []

    def spy(w: Any, inputs: Any) -> Any:
        seen.append(inputs)
        return weights.gptq4(w, inputs)

    monkeypatch.setattr(techniques, "gptq4", spy)
    _, found = find("gptq").apply(model(), TEXTS)
    states = [model().states(ids)[0] for ids in TEXTS]
    np.testing.assert_allclose(seen[0], np.concatenate(states), atol=1e-12)
    after = np.concatenate([found.layers[0](x) for x in states])
    np.testing.assert_allclose(seen[len(MATRICES)], after, atol=1e-12)
    before = np.concatenate([model().layers[0](x) for x in states])
    assert np.abs(after - before).max() > 1e-3


def test_names_are_registered_and_aliases_unique() -> None:
    registry.load()
    names = [name for one in APPLICABLE for name in (one.name, *one.with_)]
    assert set(names) <= set(registry.TECHNIQUES)
    keys = [key for one in APPLICABLE for key in (one.name, *one.aliases)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("one", APPLICABLE, ids=lambda one: one.name)
def test_no_technique_changes_the_model_that_it_is_given(one: Any) -> None:
    given = model(np.float32)
    before = given.states(TEXTS[0])
    one.apply(given, TEXTS)
    for a, b in zip(before, given.states(TEXTS[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert replace(given).cost([3]) == model(np.float32).cost([3])
