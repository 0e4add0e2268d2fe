"""Parallel verification and rollback: mutants, errors, and the caches of a decoder in the whole loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import refimpl.decoding.speculative_loop as loop
from refimpl.decoding.sampling import autoregressive
from refimpl.decoding.speculative_loop import speculative_decoding, uncached
from refimpl.decoding.verification import Verified, rollback, verification
from refimpl.errors import OptionError, ShapeError
from refimpl.testing import check
from refimpl.transformer import DecoderConfig, decoder_logits, decoder_step, initial_decoder, truncate

CONFIG = DecoderConfig(vocabulary=6, width=16, num_heads=2, layers=2, hidden=24)
SMALL = DecoderConfig(vocabulary=6, width=8, num_heads=2, layers=1, hidden=16)


def mutant(kind: str) -> Any:
    def f(prefix: Any, drafted: Any, following: Any, /, *, params: Any, config: Any, accepted: int) -> Any:
        past = decoder_step(params, prefix[:, :-1], config=config)[1] if prefix.shape[1] > 1 else None
        read = np.concatenate([prefix[:, -1:], drafted], axis=1)
        logits, cache = decoder_step(
            params, read, None if kind == "forgets the prefix" else past, config=config
        )
        length = prefix.shape[1] + accepted
        keep = {
            "cache not rolled back": prefix.shape[1] + drafted.shape[1],
            "rolled back to the prefix": prefix.shape[1],
            "rolled back one too far": length - 1,
        }.get(kind, length)
        if kind != "forgets the prefix":
            cache = truncate(cache, keep)
        if kind == "keys of one layer kept":
            cache = (*cache[:-1], type(cache[-1])(np.roll(cache[-1].k, 1, axis=1), cache[-1].v))
        resumed, _ = decoder_step(params, following, cache, config=config)
        return Verified(np.roll(logits, 1, axis=1) if kind == "rows shifted" else logits, resumed)

    return f


@pytest.mark.parametrize(
    "kind",
    [
        "right",
        "cache not rolled back",
        "rolled back to the prefix",
        "rolled back one too far",
        "forgets the prefix",
        "keys of one layer kept",
        "rows shifted",
    ],
)
def test_mutants_are_caught(kind: str) -> None:
    fixed = {"T": 2, "K": 2, "t": 1, "layers": 1}
    report = check("decoding.verification", mutant(kind), examples=4, edges=False, axes=fixed)
    assert report.ok == (kind == "right")


def models(seed: int) -> dict[str, Any]:
    """A target, and a draft that is the target with noise: it is often right."""
    rng = np.random.default_rng(seed)
    target = {name: 1.5 * array for name, array in initial_decoder(CONFIG, rng).items()}
    noisy = {name: array + 0.08 * rng.standard_normal(array.shape) for name, array in target.items()}
    return {"target": target, "draft": noisy}


def cached(params: Any) -> Any:
    return partial(decoder_step, params, config=CONFIG)


def whole(params: Any) -> Any:
    return uncached(lambda tokens: decoder_logits(params, tokens, config=CONFIG))


def test_caches_change_nothing_in_the_loop() -> None:
    """The same draws through caches that are rolled back and through no caches give the same text."""
    params = models(0)
    u = np.random.default_rng(1).random((40, 7))
    prompt = np.array([[1, 2, 3]])
    runs = [
        speculative_decoding(
            make(params["target"]), make(params["draft"]), prompt, steps=40, K=3, uniforms=u, temperature=0.8
        )
        for make in (cached, whole)
    ]
    np.testing.assert_array_equal(runs[0].tokens, runs[1].tokens)
    np.testing.assert_allclose(runs[0].rates, runs[1].rates, atol=1e-9)
    assert 0 < runs[0].acceptance < 1


def test_greedy_through_caches_and_a_loop_that_forgets_to_roll_back(monkeypatch: Any) -> None:
    params = models(3)
    prompt = np.array([[4, 0]])
    plain = autoregressive(cached(params["target"]), prompt, steps=50, temperature=0.0).tokens

    def run() -> Any:
        pair = (cached(params[name]) for name in ("target", "draft"))
        return speculative_decoding(*pair, prompt, steps=50, K=3, temperature=0.0)

    found = run()
    np.testing.assert_array_equal(found.tokens, plain)
    assert 0 < found.acceptance < 1
    monkeypatch.setattr(loop, "rollback", lambda cache, length: cache)
    assert (run().tokens != plain).any()


def test_rollback_is_a_view_of_what_was_read_first() -> None:
    tokens = np.array([[1, 2, 3, 4]])
    _, cache = decoder_step(models(0)["target"], tokens, config=CONFIG)
    short = rollback(cache, 2)
    assert all(np.shares_memory(a.k, b.k) for a, b in zip(short, cache, strict=True))
    np.testing.assert_array_equal(rollback(tokens, 3), tokens[:, :3])
    assert rollback(None, 5) is None
    for value in (tokens, cache):
        with pytest.raises(ShapeError, match="cannot keep 5 tokens of 4"):
            rollback(value, 5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: np.zeros((1, 0), int)}, ShapeError, "prefix: expected at least one token"),
        ({0: np.zeros((2, 2), int)}, ShapeError, "axis B"),
        ({1: np.array([[6]])}, OptionError, "drafted: expected numbers in [0, 6)"),
        ({"accepted": 2}, OptionError, "accepted: expected at most 1"),
        ({"accepted": -1}, OptionError, "accepted"),
    ],
)
def test_bad_input_is_one_clear_error(changed: Any, error: type[Exception], message: str) -> None:
    params = initial_decoder(SMALL, np.random.default_rng(0))
    args = [
        changed.get(i, tokens)
        for i, tokens in enumerate((np.array([[1, 2]]), np.array([[3]]), np.array([[4]])))
    ]
    with pytest.raises(error) as caught:
        verification(*args, params=params, config=SMALL, accepted=changed.get("accepted", 0))
    assert message in str(caught.value)
