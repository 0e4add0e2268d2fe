"""Sampling: exact laws by enumeration, draws by chi-square, the plain loop, mutants, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from refimpl.decoding.sampling import autoregressive, inverse_cdf, sampling, sampling_law
from refimpl.errors import DTypeError, OptionError, ShapeError
from tests.survivors import Mutants

LAW, DRAW = "decoding.sampling.law", "decoding.sampling"
MUTANTS = Mutants()
mutant = MUTANTS.of


def _filtered(logits: Any, keep: Any) -> Any:
    return sampling_law(np.where(keep, logits, -np.inf))


@mutant(LAW)
def crossing_token_dropped(logits: Any, /, *, top_p: float = 1.0, **options: Any) -> Any:
    law = sampling_law(logits, **options)
    order = np.argsort(-law, axis=-1, kind="stable")
    mass = np.cumsum(np.take_along_axis(law, order, axis=-1), axis=-1)
    inside = mass <= top_p + 1e-12
    inside[..., 0] = True
    keep = np.zeros(law.shape, bool)
    np.put_along_axis(keep, order, inside, axis=-1)
    return np.where(keep, law, 0) / np.where(keep, law, 0).sum(axis=-1, keepdims=True)


@mutant(LAW)
def temperature_after_the_nucleus(
    logits: Any, /, *, temperature: float = 1.0, top_p: float = 1.0, **options: Any
) -> Any:
    with np.errstate(divide="ignore"):
        kept = np.log(sampling_law(logits, top_p=top_p, **options))
    return sampling_law(kept, temperature=temperature)


@mutant(LAW)
def ties_at_the_edge_all_kept(logits: Any, /, *, top_k: int | None = None, **options: Any) -> Any:
    if top_k is not None and top_k < logits.shape[-1]:
        edge = np.sort(logits, axis=-1)[..., -top_k][..., None]
        logits = np.where(logits >= edge, logits, -np.inf)
    return sampling_law(logits, **options)


@mutant(LAW)
def greedy_takes_the_last(logits: Any, /, *, temperature: float = 1.0, **options: Any) -> Any:
    if temperature:
        return sampling_law(logits, temperature=temperature, **options)
    return sampling_law(logits[..., ::-1], temperature=0.0, **options)[..., ::-1]


@mutant(LAW)
def not_renormalized(logits: Any, /, **options: Any) -> Any:
    law, plain = sampling_law(logits, **options), sampling_law(logits)
    return np.where(law > 0, plain, 0) if options.get("temperature") == 1.0 else law


@mutant(LAW)
def temperature_multiplies(logits: Any, /, *, temperature: float = 1.0, **options: Any) -> Any:
    return sampling_law(logits, temperature=1 / temperature if temperature else 0.0, **options)


@mutant(LAW)
def one_too_many(logits: Any, /, *, top_k: int | None = None, **options: Any) -> Any:
    return sampling_law(logits, top_k=None if top_k is None else top_k + 1, **options)


def _drawn(logits: Any, options: dict[str, Any], side: str) -> Any:
    u = options.pop("uniforms")
    law = sampling_law(logits, **options)
    rows = zip(np.cumsum(law, axis=-1).reshape(-1, law.shape[-1]), u.ravel(), strict=True)
    found = [min(int(np.searchsorted(row, x, side)), len(row) - 1) for row, x in rows]
    return np.array(found, np.int64).reshape(u.shape)


@mutant(DRAW)
def zero_draws_the_impossible(logits: Any, /, **options: Any) -> Any:
    return _drawn(logits, options, "left")


@mutant(DRAW)
def last_token_takes_the_rest(logits: Any, /, **options: Any) -> Any:
    u = options.pop("uniforms")
    return _drawn(logits, {**options, "uniforms": np.minimum(1.0, u * (1 + 2e-16))}, "right")


@mutant(DRAW)
def always_greedy(logits: Any, /, **options: Any) -> Any:
    return np.argmax(logits, axis=-1)


@mutant(DRAW)
def draws_turned_around(logits: Any, /, *, uniforms: Any, **options: Any) -> Any:
    return sampling(logits, uniforms=np.nextafter(1.0, 0.0) - uniforms, **options)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    MUTANTS.assert_caught(name)


LOGITS = np.log(np.array([0.35, 0.05, 0.2, 0.3, 0.1]))
SETTINGS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [0.35, 0.05, 0.2, 0.3, 0.1]),
    ({"top_k": 2}, [35 / 65, 0, 0, 30 / 65, 0]),
    ({"top_p": 0.6}, [35 / 65, 0, 0, 30 / 65, 0]),
    ({"top_p": 0.7}, [35 / 85, 0, 20 / 85, 30 / 85, 0]),
    ({"top_k": 3, "top_p": 0.75}, [35 / 65, 0, 0, 30 / 65, 0]),  # of what top-k leaves: 65 / 85 reaches 0.75
    ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
    ({"temperature": 0.5, "top_k": 2}, [35**2 / (35**2 + 30**2), 0, 0, 30**2 / (35**2 + 30**2), 0]),
]


@pytest.mark.parametrize(("options", "law"), SETTINGS)
def test_laws_worked_out_by_hand(options: dict[str, Any], law: list[float]) -> None:
    np.testing.assert_allclose(sampling_law(LOGITS, **options), law, rtol=1e-12)


@pytest.mark.parametrize(("options", "law"), [pair for pair in SETTINGS if "temperature" not in pair[0]])
def test_draws_of_a_generator_follow_the_law(options: dict[str, Any], law: list[float]) -> None:
    drawn = sampling(np.broadcast_to(LOGITS, (4000, 5)), rng=11, **options)
    counts = np.bincount(drawn, minlength=5)
    possible = np.array(law) > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], 4000 * np.array(law)[possible]).pvalue > 1e-3
    wrong = np.roll(np.array(law)[possible], 1)  # the test can fail
    assert chisquare(counts[possible], 4000 * wrong).pvalue < 1e-6


def chain(V: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """A Markov chain as a model: its table of laws, and the model, whose cache counts what it has read."""
    table = rng.dirichlet(np.ones(V), V)
    return table, lambda tokens, cache: (np.log(table[tokens]), (cache or 0) + tokens.shape[1])


def test_two_tokens_of_the_loop_follow_the_product_of_laws() -> None:
    """Draws on a grid read off the joint law of two tokens, every cell to within its border."""
    table, model = chain(3, np.random.default_rng(2))
    grid = (np.arange(200) + 0.5) / 200
    uniforms = np.stack(np.meshgrid(grid, grid, indexing="ij")).reshape(2, -1)
    prompt = np.full((uniforms.shape[1], 1), 1)
    tokens = autoregressive(model, prompt, steps=2, uniforms=uniforms).tokens[:, 1:]
    found = np.zeros((3, 3))
    np.add.at(found, tuple(tokens.T), 1 / len(tokens))
    np.testing.assert_allclose(found, table[1][:, None] * table, atol=2 / 200)


def test_the_loop_reads_each_token_once() -> None:
    _, model = chain(4, np.random.default_rng(0))
    read = []

    def counting(tokens: Any, cache: Any) -> Any:
        read.append(tokens.shape[1])
        return model(tokens, cache)

    made = autoregressive(counting, np.array([[0, 1, 2]]), steps=5, rng=3)
    assert made.tokens.shape == (1, 8)
    assert made.calls == 5
    assert read == [3, 1, 1, 1, 1]


def test_the_same_draws_give_the_same_tokens() -> None:
    _, model = chain(4, np.random.default_rng(0))
    prompt, draws = np.array([[0], [3]]), np.random.default_rng(9).random((6, 2))
    once = autoregressive(model, prompt, steps=6, uniforms=draws).tokens
    np.testing.assert_array_equal(once, autoregressive(model, prompt, steps=6, rng=9).tokens)
    np.testing.assert_array_equal(autoregressive(model, prompt, steps=0, rng=0).tokens, prompt)


def test_what_is_refused() -> None:
    _, model = chain(4, np.random.default_rng(0))
    calls: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: sampling_law(LOGITS, temperature=-1.0), OptionError, "temperature: expected"),
        (lambda: sampling_law(LOGITS, top_p=1.5), OptionError, r"top_p: expected a number in \[0, 1\]"),
        (lambda: sampling_law(LOGITS, top_k=0), OptionError, "top_k: expected at least 1"),
        (lambda: sampling_law(LOGITS, top_k=2.0), DTypeError, "top_k: expected a whole number"),
        (lambda: sampling_law(np.zeros((2, 0))), ShapeError, "at least one token"),
        (lambda: sampling_law(np.array([0.0, np.nan])), OptionError, "no NaN"),
        (lambda: sampling_law(np.full(3, -np.inf)), OptionError, "finite in every row"),
        (lambda: sampling_law(np.array([0.0, np.inf])), OptionError, "finite in every row"),
        (lambda: sampling(LOGITS, uniforms=np.zeros(2)), ShapeError, r"uniforms: expected shape \(\)"),
        (lambda: sampling(LOGITS, uniforms=np.zeros(()), rng=0), OptionError, "expected one of the two"),
        (lambda: inverse_cdf(np.ones(2) / 2, np.array(1.0)), OptionError, r"numbers in \[0, 1\)"),
        (lambda: inverse_cdf(np.ones(2) / 2, np.array(np.nan)), OptionError, r"numbers in \[0, 1\)"),
        (lambda: inverse_cdf(np.ones((2, 2)) / 2, np.zeros(3)), ShapeError, "does not broadcast"),
        (lambda: autoregressive(model, np.zeros((1, 0), int), steps=1), ShapeError, "T of at least 1"),
        (lambda: autoregressive(model, np.zeros((1, 1), int), steps=-1), OptionError, "steps"),
        (lambda: autoregressive(model, np.zeros((1, 1), int), steps=2, uniforms=np.zeros((1, 1))), ShapeError,
         r"uniforms: expected shape \(2, 1\)"),
    ]  # fmt: skip
    for call, error, says in calls:
        with pytest.raises(error, match=says):
            call()


def test_the_order_of_filters_matters() -> None:
    """A low temperature first makes the nucleus smaller."""
    cold = sampling_law(LOGITS, temperature=0.25, top_p=0.6)
    assert np.count_nonzero(cold) == 1
    assert np.count_nonzero(sampling_law(LOGITS, top_p=0.6)) == 2
