"""The order of Roller et al.'s Table 3 on a toy: token hashes, then the previous token, dense, positions.

A character model (a sum of embeddings of the last four characters, one hash layer around a skip, a softmax)
is trained on the corpus of `tests/models` for 200 steps.  It shows an order, not sizes: in the paper a
transformer's hidden state knows the context far better, so that the differences are smaller.  The mean of two
seeds is judged: of four, one has the previous token a hair before the balanced hash, and all have the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl.moe.hash_context import position_hash, previous_hash
from refimpl.moe.hash_layers import hash_layer, hash_layer_vjp
from refimpl.moe.hash_tables import balanced_table, random_table
from refimpl.objectives.language_modeling import next_token_loss, next_token_loss_vjp
from refimpl.parallel import AdamW, adamw_step
from refimpl.transformer.embedding import embedding, embedding_vjp
from tests.models.train_decoder import corpus

V, EXPERTS, WIDTH, HIDDEN, LENGTH = 128, 8, 16, 16, 32
CONTEXT, BATCH, STEPS = 4, 8, 200
OPTIMIZER = AdamW(lr=1e-2, betas=(0.9, 0.99))

Hash = Callable[[Any], Any]


def hashes(seed: int, train: Any) -> dict[str, tuple[int, Hash]]:
    """Each row of the table: how many experts, and the expert of every token of a batch."""
    rng = np.random.default_rng(seed)
    random = random_table(rng.random(V), num_experts=EXPERTS)
    balanced = balanced_table(np.bincount(train, minlength=V), num_experts=EXPERTS)
    places = random_table(rng.random(LENGTH), num_experts=EXPERTS)
    return {
        "random": (EXPERTS, lambda tokens: random[tokens]),
        "balanced": (EXPERTS, lambda tokens: balanced[tokens]),
        "previous": (EXPERTS, lambda tokens: previous_hash(tokens, random, first_token=0)),
        "position": (EXPERTS, lambda tokens: position_hash(tokens, places)),
        "dense": (1, np.zeros_like),
    }


def initial(seed: int, experts: int) -> dict[str, Any]:
    """All experts begin alike, so that all models do."""
    rng = np.random.default_rng(seed)
    shapes = {"embeddings": (CONTEXT * V, WIDTH), "w_in": (1, WIDTH, HIDDEN), "w_out": (1, HIDDEN, WIDTH)}
    params = {name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}
    params["head"] = rng.standard_normal((WIDTH, V)) / 4
    return {name: np.repeat(w, experts, axis=0) if w.ndim == 3 else w for name, w in params.items()}


def rows(tokens: Any) -> list[Any]:
    """Rows of the embeddings for each place's last characters, 0 standing before the first."""
    padded = np.pad(tokens, ((0, 0), (CONTEXT - 1, 0)))
    ends = range(CONTEXT - 1, -1, -1)
    return [c * V + padded[:, end : end + LENGTH].ravel() for c, end in enumerate(ends)]


def forward(params: dict[str, Any], tokens: Any, expert: Any) -> tuple[Any, Any, Any]:
    """Hidden states before and after the layer, and logits."""
    h = sum(embedding(params["embeddings"], row) for row in rows(tokens))
    y = h + hash_layer(h, params["w_in"], params["w_out"], experts=expert.ravel())
    return h, y, (y @ params["head"]).reshape(*tokens.shape, V)


def gradients(params: dict[str, Any], tokens: Any, expert: Any) -> dict[str, Any]:
    h, y, logits = forward(params, tokens, expert)
    dlogits = next_token_loss_vjp(logits, tokens, 1.0).dlogits.reshape(-1, V)
    dy = dlogits @ params["head"].T
    back = hash_layer_vjp(h, params["w_in"], params["w_out"], dy, experts=expert.ravel())
    dh = dy + back.dx
    tables = [embedding_vjp(params["embeddings"], row, dh).dtable for row in rows(tokens)]
    return {"embeddings": sum(tables), "w_in": back.dw_in, "w_out": back.dw_out, "head": y.T @ dlogits}


def perplexity(seed: int, experts: int, hashed: Hash, train: Any, test: Any) -> float:
    """Train one model and return its perplexity on the held-out text."""
    rng, params = np.random.default_rng(seed), initial(seed, experts)
    moments = {name: (np.zeros(w.size), np.zeros(w.size)) for name, w in params.items()}
    for step in range(1, STEPS + 1):
        starts = rng.integers(0, len(train) - LENGTH, BATCH)
        tokens = train[starts[:, None] + np.arange(LENGTH)]
        for name, gradient in gradients(params, tokens, hashed(tokens)).items():
            done = adamw_step(
                params[name].ravel(), gradient.ravel(), *moments[name], step=step, optimizer=OPTIMIZER
            )
            params[name] = done.parameters.reshape(params[name].shape)
            moments[name] = done.momentum, done.variance
    windows = test[: len(test) // LENGTH * LENGTH].reshape(-1, LENGTH)
    loss = next_token_loss(forward(params, windows, hashed(windows))[2], windows)
    return float(np.exp(loss))


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    train, test = corpus()
    runs = [
        {row: perplexity(seed, *how, train, test) for row, how in hashes(seed, train).items()}
        for seed in range(2)
    ]
    return {row: float(np.exp(np.mean([np.log(run[row]) for run in runs]))) for row in runs[0]}


def test_order_of_the_table(found: dict[str, float]) -> None:
    assert found["balanced"] < found["previous"] < found["dense"] <= found["position"], found


def test_random_is_nearly_balanced(found: dict[str, float]) -> None:
    assert abs(found["random"] - found["balanced"]) < 0.25 * (found["dense"] - found["balanced"]), found
