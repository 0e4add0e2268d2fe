"""Speculative sampling: the output law, exactly and by draws; the lecture's example; mutants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from refimpl.decoding.laws_speculative import exact_output_law, product_law
from refimpl.decoding.sampling import autoregressive, inverse_cdf, sampling_law
from refimpl.decoding.speculative import Speculated, acceptance_rate, residual, speculative
from refimpl.decoding.speculative_loop import speculative_decoding, uncached
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.testing import check

Sampler = Callable[..., Any]


def random_tables(rng: np.random.Generator, V: int, length: int) -> list[Any]:
    """Next-token probabilities after every prefix of up to `length - 1` tokens, some of them 0."""
    tables = []
    for k in range(length):
        table = rng.dirichlet(np.full(V, 0.7), (V,) * k)
        table[rng.random(table.shape) < 0.2] = 0.0
        table[..., 0] += 1e-3
        tables.append(table / table.sum(axis=-1, keepdims=True))
    return tables


def analytic_law(draft: list[Any], target: list[Any], accept: Sampler, rest: Sampler) -> Any:
    """The law of K + 1 tokens from acceptance probabilities and residuals, added up prefix by prefix."""
    K, V = len(draft), target[0].shape[-1]
    mass = np.zeros((V,) * (K + 1))

    def continued(prefix: tuple[int, ...], weight: float) -> None:
        if len(prefix) == K + 1:
            mass[prefix] += weight
            return
        for token in range(V):
            if target[len(prefix)][prefix][token]:
                continued((*prefix, token), weight * target[len(prefix)][prefix][token])

    def drafted(prefix: tuple[int, ...], weight: float) -> None:
        k = len(prefix)
        if k == K:
            continued(prefix, weight)
            return
        d, t = draft[k][prefix], target[k][prefix]
        for token in range(V):
            if d[token]:
                stands = accept(d[token], t[token])
                drafted((*prefix, token), weight * d[token] * stands)
                fallen = weight * d[token] * (1 - stands)
                if fallen > 0:
                    for other, share in enumerate(rest(d, t)):
                        if share:
                            continued((*prefix, other), fallen * share)

    drafted((), 1.0)
    return mass


def ratio(d: float, t: float) -> float:
    return min(1.0, t / d)


@pytest.mark.parametrize(("V", "K"), [(2, 1), (3, 2), (5, 1), (5, 2), (2, 3), (5, 3)])
def test_the_output_law_is_the_target_for_any_tables(V: int, K: int) -> None:
    """Acceptance by min(1, t/d) and our residual: enumerated over all prefixes, within 1e-12."""
    rng = np.random.default_rng([V, K])
    draft, target = random_tables(rng, V, K), random_tables(rng, V, K + 1)
    found = analytic_law(draft, target, ratio, residual)
    np.testing.assert_allclose(found, product_law(target), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "accept", "rest"),
    [
        ("q over p", lambda d, t: min(1.0, d / t) if t else 1.0, residual),
        ("from the target, not the residual", ratio, lambda d, t: t),
        ("residual not normalised", ratio, lambda d, t: np.maximum(t - d, 0)),
        ("residual reversed", ratio, lambda d, t: residual(t, d)),
        ("always accepted", lambda d, t: 1.0, residual),
    ],
)
def test_the_enumeration_tells_wrong_rules(name: str, accept: Sampler, rest: Sampler) -> None:
    rng = np.random.default_rng(3)
    draft, target = random_tables(rng, 3, 2), random_tables(rng, 3, 3)
    assert np.abs(analytic_law(draft, target, accept, rest) - product_law(target)).max() > 1e-3


@pytest.mark.parametrize(("V", "K", "parts"), [(5, 1, 4), (5, 2, 3), (3, 3, 3), (5, 3, 3)])
def test_the_code_itself_has_the_target_law(V: int, K: int, parts: int) -> None:
    """Every draft, every cell of the draws: the code that samples, integrated without error."""
    rng = np.random.default_rng([V, K, parts])
    draft, target = (
        [rng.multinomial(parts, np.full(V, 1 / V), (V,) * k) / parts for k in range(n)] for n in (K, K + 1)
    )
    found = exact_output_law(speculative, draft, target, parts=parts)
    np.testing.assert_allclose(found, product_law(target), rtol=0, atol=1e-12)


def test_acceptance_and_residual_make_the_target() -> None:
    """min(t, d) + (1 - β) residual = t, token by token; β = 1 - total variation; measured on the code."""
    rng = np.random.default_rng(0)
    draft, target = rng.dirichlet(np.ones(6), (2, 50))
    beta = acceptance_rate(draft, target)
    np.testing.assert_allclose(
        np.minimum(draft, target) + (1 - beta)[:, None] * residual(draft, target), target, atol=1e-15
    )
    np.testing.assert_allclose(beta, 1 - np.abs(draft - target).sum(axis=1) / 2, atol=1e-15)
    d, t = np.repeat(draft[:1], 20_000, axis=0), np.repeat(target[:1], 20_000, axis=0)
    x = inverse_cdf(d, rng.random(20_000))
    found = speculative(x[:, None], d[:, None], np.stack([t, t], axis=1), rng=1)
    assert abs(found.accepted.mean() - beta[0]) < 4 * np.sqrt(beta[0] * (1 - beta[0]) / 20_000)


def test_the_example_of_the_lecture() -> None:
    """dogs love chasing after cars: acceptances 1, 1, 8/9, 3/8, 1; 4.556 tokens; all five with 1/3."""
    p, q = np.array([0.8, 0.7, 0.9, 0.8, 0.7]), np.array([0.9, 0.8, 0.8, 0.3, 0.8])
    draft = np.stack([p, 1 - p], axis=1)
    target = np.concatenate([np.stack([q, 1 - q], axis=1), [[0.5, 0.5]]])
    u = np.random.default_rng(0).random((200_000, 6))
    rows = (np.broadcast_to(a, (len(u), *a.shape)) for a in (np.zeros(5, np.int64), draft, target))
    accepted = speculative(*rows, uniforms=u).accepted
    chances = np.cumprod([1, 1, 8 / 9, 3 / 8, 1])
    assert chances[-1] == pytest.approx(1 / 3)
    assert 1 + chances.sum() == pytest.approx(4.556, abs=5e-4)
    np.testing.assert_allclose([(accepted > k).mean() for k in range(5)], chances, atol=0.005)
    assert accepted.mean() + 1 == pytest.approx(4.556, abs=0.02)
    at_the_edge = np.array([[0.99, 0.99, 0.8888, 0.375, 0.99, 0.0]])
    assert (
        speculative(*(a[None] for a in (np.zeros(5, int), draft, target)), uniforms=at_the_edge).accepted == 3
    )


def test_a_draw_of_zero_accepts_nothing_that_the_target_never_gives() -> None:
    """Leviathan's "reject if r > p/q" keeps such a token when r = 0."""
    draft, target = np.array([[[0.5, 0.5]]]), np.array([[[0.0, 1.0], [1.0, 0.0]]])
    tokens, accepted = speculative(np.array([[0]]), draft, target, uniforms=np.zeros((1, 2)))
    assert (tokens.tolist(), accepted.tolist()) == ([[1, -1]], [0])


# The loop


def tables_model(tables: Any) -> Any:
    """A model of the last two tokens, as a function of whole texts."""

    def logits(tokens: Any) -> Any:
        before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
        with np.errstate(divide="ignore"):
            return np.log(tables[before, tokens])

    return uncached(logits)


def two_models(seed: int, V: int = 3) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    target = rng.dirichlet(np.ones(V), (V, V))
    draft = 0.5 * target + 0.5 * rng.dirichlet(np.ones(V), (V, V))
    return tables_model(target), tables_model(draft), target


@pytest.mark.parametrize("K", [0, 1, 3])
def test_drawn_texts_follow_the_target(K: int) -> None:
    """Chi-square over all sequences of three tokens at a fixed seed, and it tells a wrong target."""
    target, draft, tables = two_models(5)
    rng = np.random.default_rng(7)
    runs = 400
    counts = np.zeros((3,) * 3)
    for _ in range(runs):
        run = speculative_decoding(target, draft, np.array([[1]]), steps=3, K=K, rng=rng)
        counts[tuple(run.tokens[0, 1:])] += 1
    a, b, c = np.indices((3,) * 3)
    wanted = tables[0, 1, a] * tables[1, a, b] * tables[a, b, c]
    kept = runs * wanted > 4
    groups = [np.append(table[kept], table[~kept].sum()) for table in (counts, runs * wanted)]
    assert chisquare(*groups).pvalue > 1e-3
    wrong = np.append((runs * np.transpose(wanted, (1, 0, 2)))[kept], 0)
    wrong[-1] = runs - wrong.sum()
    assert chisquare(groups[0], wrong).pvalue < 1e-6


def test_filters_apply_to_both_models() -> None:
    """With top-k 2 no third token appears, and the law is that of filtered plain decoding."""
    target, draft, tables = two_models(6, V=4)
    law = sampling_law(np.log(tables), temperature=0.7, top_k=2)
    counts, rng = np.zeros(4), np.random.default_rng(0)
    for _ in range(400):
        run = speculative_decoding(
            target, draft, np.array([[2]]), steps=1 + 1, K=1, temperature=0.7, top_k=2, rng=rng
        )
        counts[run.tokens[0, 1]] += 1
    allowed = law[0, 2] > 0
    assert counts[~allowed].sum() == 0
    assert chisquare(counts[allowed], 400 * law[0, 2][allowed]).pvalue > 1e-3


@pytest.mark.parametrize("K", [1, 2, 4])
def test_greedy_is_greedy_decoding(K: int) -> None:
    target, draft, _ = two_models(8, V=6)
    plain = autoregressive(target, np.array([[3, 1]]), steps=40, temperature=0.0)
    run = speculative_decoding(target, draft, np.array([[3, 1]]), steps=40, K=K, temperature=0.0)
    np.testing.assert_array_equal(run.tokens, plain.tokens)
    assert run.calls < plain.calls
    assert (run.accepted + 1).sum() == 40
    assert set(run.rates) <= {0.0, 1.0}


def test_caches_hold_what_was_read_and_nothing_else() -> None:
    """Each round starts from a prefix of the final text in both caches, and reads no token twice."""
    target, draft, _ = two_models(9, V=4)
    starts: dict[str, list[Any]] = {"target": [], "draft": []}
    read = []
    drafting = False  # within a round the draft's cache holds drafts that may yet fall

    def spied(name: str, model: Any) -> Any:
        def call(tokens: Any, cache: Any) -> Any:
            nonlocal drafting
            if cache is not None and not (name == "draft" and drafting):
                starts[name].append(cache[0].copy())
            drafting = name == "draft"
            if name == "target":
                read.append(tokens.shape[1])
            return model(tokens, cache)

        return call

    run = speculative_decoding(
        spied("target", target), spied("draft", draft), np.array([[0, 1]]), steps=30, K=3, rng=4
    )
    for name, held in starts.items():
        assert len(held) > 5
        for text in held:
            np.testing.assert_array_equal(text, run.tokens[0, : len(text)], err_msg=name)
    assert len(read) == run.calls
    assert sum(read) == 2 + (run.drafted + 1).sum() - 1  # the prompt once, then each round's token and drafts
    assert run.accepted.min() < run.drafted.max()  # some were rejected


def test_given_draws_decide() -> None:
    target, draft, _ = two_models(10)
    u = np.random.default_rng(1).random((12, 7))
    runs = [
        speculative_decoding(target, draft, np.array([[0]]), steps=12, K=3, uniforms=u).tokens for _ in "ab"
    ]
    np.testing.assert_array_equal(*runs)
    other = speculative_decoding(
        target, draft, np.array([[0]]), steps=12, K=3, uniforms=1 - 2**-53 - u
    ).tokens
    assert (other != runs[0]).any()


# Mutants and errors


def _parts(
    drafted: Any, draft: Any, target: Any, u: Any, *, accept: Sampler, rest: Sampler, bonus: Sampler
) -> Speculated:
    B, K, _ = draft.shape
    tokens, accepted = np.full((B, K + 1), -1), np.zeros(B, int)
    for b in range(B):
        n = 0
        while n < K and accept(u[b, n], draft[b, n, drafted[b, n]], target[b, n, drafted[b, n]]):
            n += 1
        law = bonus(target[b], n) if n == K else rest(draft[b, n], target[b, n])
        tokens[b, :n], accepted[b] = drafted[b, :n], n
        if law is not None:
            tokens[b, n] = inverse_cdf(law, np.array(u[b, K]))
    return Speculated(tokens, accepted)


RULES = {
    "right": {},
    "rejects from the target": {"rest": lambda d, t: t},
    "rejects from the draft": {"rest": lambda d, t: d},
    "no bonus token": {"bonus": lambda t, n: None},
    "bonus from the position before": {"bonus": lambda t, n: t[max(n - 1, 0)]},
    "accepts with q over p": {"accept": lambda u, d, t: u * t < d},
    "accepts at a draw of the ratio": {"accept": lambda u, d, t: u * d <= t},
    "never accepts": {"accept": lambda u, d, t: False},
    "greedy acceptance": {"accept": lambda u, d, t: d <= t},
}


@pytest.mark.parametrize("name", RULES)
def test_mutants_are_caught(name: str) -> None:
    rules = {
        "accept": lambda u, d, t: u * d < t,
        "rest": residual,
        "bonus": lambda t, n: t[n],
        **RULES[name],
    }

    def mutant(drafted: Any, draft: Any, target: Any, /, *, uniforms: Any) -> Speculated:
        return _parts(drafted, draft, target, uniforms, **rules)

    report = check("decoding.speculative", mutant, examples=4, edges=False)
    assert report.ok == (name == "right")
    if name != "right":
        assert {outcome.check for outcome in report.failed} - {"reference"}, "no law caught it"


ROUND = np.array([[0]]), np.array([[[0.5, 0.5]]]), np.array([[[0.5, 0.5], [0.5, 0.5]]])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({0: np.array([[2]])}, OptionError, "drafted: expected numbers in [0, 2)"),
        ({0: np.array([[-1]])}, OptionError, "drafted"),
        ({0: np.array([[0.5]])}, DTypeError, "drafted"),
        ({0: np.array([[0, 1]])}, ShapeError, "drafted: axis K"),
        ({1: np.array([[[0.0, 1.0]]])}, OptionError, "drafted[0, 0]: the draft gives token 0 probability 0"),
        ({1: np.array([[[0.5, 0.7]]])}, OptionError, "draft: expected probabilities"),
        ({1: np.array([[[np.nan, 0.7]]])}, OptionError, "draft: expected probabilities"),
        ({2: np.array([[[1.5, -0.5], [0.5, 0.5]]])}, OptionError, "target: expected probabilities"),
        ({2: np.array([[[0.5, 0.5]]])}, ShapeError, "target: expected one position more"),
        ({"uniforms": np.array([[0.5]])}, ShapeError, "uniforms: expected shape (1, 2)"),
        ({"uniforms": np.array([[0.5, 1.0]])}, OptionError, "uniforms: expected numbers in [0, 1)"),
    ],
)
def test_bad_input_is_one_clear_error(changed: dict[Any, Any], error: type[Exception], message: str) -> None:
    args = [changed.get(index, array) for index, array in enumerate(ROUND)]
    with pytest.raises(error) as caught:
        speculative(*args, uniforms=changed.get("uniforms", np.array([[0.5, 0.5]])))
    assert message in str(caught.value)


def test_the_loop_refuses_what_it_cannot_do() -> None:
    target, draft, _ = two_models(1)
    for prompt in (np.zeros((2, 3), int), np.zeros((1, 0), int), np.zeros(3, int)):
        with pytest.raises(ShapeError, match="prompt"):
            speculative_decoding(target, draft, prompt, steps=2)
    with pytest.raises(ShapeError, match="uniforms"):
        speculative_decoding(target, draft, np.array([[0]]), steps=2, K=1, uniforms=np.zeros((2, 4)))
    with pytest.raises(OptionError, match="K"):
        speculative_decoding(target, draft, np.array([[0]]), steps=2, K=-1)
