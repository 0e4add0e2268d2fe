"""The trained decoders of `tests/models`: what they learned, decoding through caches, a draft's help."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest

from memsim.speculative import expected_tokens
from refimpl.decoding.sampling import autoregressive, sampling_law
from refimpl.decoding.speculative_loop import speculative_decoding
from refimpl.transformer import decoder_logits, decoder_shapes, decoder_step
from tests.models.decoders import CONFIGS, HERE, load, text_of, tokens_of
from tests.models.train_decoder import corpus, held_out_loss, train

PROMPT = "Q: How many bytes are 12 billion weights in float16?\nA:"
STEPS, DRAFTS = 200, 4


def model(name: str) -> Any:
    params, config = load(name)
    return partial(decoder_step, params, config=config)


@pytest.fixture(scope="module")
def greedy() -> Any:
    return autoregressive(model("decoder"), tokens_of(PROMPT), steps=STEPS, temperature=0.0).tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_small_and_fit_their_configuration(name: str) -> None:
    params, config = load(name)
    assert {key: array.shape for key, array in params.items()} == decoder_shapes(config)
    assert all(array.dtype == np.float32 for array in params.values())
    assert (HERE / f"{name}.safetensors").stat().st_size < 600_000


@pytest.mark.parametrize(("name", "most"), [("decoder", 0.65), ("draft", 0.65)])
def test_held_out_text_is_predicted(name: str, most: float) -> None:
    """Uniform bytes cost log 256 = 5.5 nats, letters by their frequency about 3."""
    params, config = load(name)
    assert held_out_loss(params, config, corpus()[1]) < most


def test_training_lowers_the_loss_and_follows_from_the_seed() -> None:
    first = train(CONFIGS["draft"], steps=8, length=32)
    assert first.after < first.before - 0.2
    assert train(CONFIGS["draft"], steps=2, length=32).losses == first.losses[:2]
    assert train(CONFIGS["draft"], steps=1, seed=8, length=32).losses != first.losses[:1]


def test_the_decoder_writes_in_the_manner_of_its_text(greedy: Any) -> None:
    answer = text_of(greedy).removeprefix(PROMPT)
    assert re.match(r" \d+ times 2 is \d+, so \d+ billion bytes\.\n\nQ: ", answer), answer


def test_greedy_steps_are_the_arguments_of_the_full_pass(greedy: Any) -> None:
    """One full pass over the result predicts each of its tokens: steps through the cache lost nothing."""
    params, config = load("decoder", np.float64)
    logits = decoder_logits(params, greedy, config=config)[0, -STEPS - 1 : -1]
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), greedy[0, -STEPS:])


def test_greedy_speculation_is_greedy_decoding_token_for_token(greedy: Any) -> None:
    run = speculative_decoding(
        model("decoder"), model("draft"), tokens_of(PROMPT), steps=STEPS, K=DRAFTS, temperature=0.0
    )
    np.testing.assert_array_equal(run.tokens, greedy)
    assert run.calls < STEPS / 2, f"{run.calls} calls of the target, acceptance {run.acceptance:.3f}"
    # The formula takes acceptances as independent with one rate; those of a text come in runs.
    predicted = float(expected_tokens(alpha=run.acceptance, gamma=DRAFTS).total)
    assert STEPS / run.calls == pytest.approx(predicted, rel=0.15)


def test_sampled_speculation_accepts_as_often_as_the_laws_overlap() -> None:
    """Over one sampled text the share of accepted drafts is near the mean of sum min(draft, target)."""
    run = speculative_decoding(
        model("decoder"), model("draft"), tokens_of(PROMPT), steps=STEPS, K=DRAFTS, temperature=0.8, rng=1
    )
    spread = np.sqrt(np.sum(run.rates * (1 - run.rates))) / len(run.rates)
    assert abs(run.acceptance - np.mean(run.rates)) < 4 * spread
    params, config = load("decoder")
    laws = sampling_law(decoder_logits(params, run.tokens, config=config), temperature=0.8)
    drawn = np.take_along_axis(laws[0, :-1], run.tokens[0, 1:, None], axis=-1)[-STEPS:, 0]
    assert drawn.min() > 0
