"""Laws of sampling."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, FloatArray, in_float64, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]
LAW, DRAW = "decoding.sampling.law", "decoding.sampling"
GRID = 64  # evenly spaced draws, by which a law is read off exactly to 1 / GRID


def _softmax(logits: Array, temperature: float = 1.0) -> FloatArray:
    wide = in_float64(logits)
    with np.errstate(over="ignore"):
        weights = np.exp((wide - wide.max(axis=-1, keepdims=True)) / temperature)
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _entropy(law: FloatArray) -> FloatArray:
    return np.asarray(-np.sum(law * np.log(np.where(law > 0, law, 1.0)), axis=-1))


@law(LAW)
def neutral_settings_give_the_models_law(f: Function, case: Case, close: Close) -> None:
    """Temperature 1, every k of at least V and p = 1 give softmax of the logits."""
    (logits,) = case.args
    for options in ({}, {"top_k": logits.shape[-1] + 3, "top_p": 1.0, "temperature": 1.0}):
        plain = Case((logits,), options)
        close.on(plain)(plain.call(f), _softmax(logits), "neutral settings", factor=4.0)


@law(LAW)
def temperature_zero_is_greedy(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """At temperature 0 the first of the largest logits has probability 1."""
    greedy = case.replace(temperature=0.0)
    expected = np.zeros(case.args[0].shape)
    np.put_along_axis(expected, np.argmax(in_float64(case.args[0]), axis=-1)[..., None], 1.0, axis=-1)
    if not np.array_equal(in_float64(greedy.call(f)), expected):
        raise LawViolation("temperature 0 is not the first of the largest logits")


@law(LAW)
def rows_sum_to_one(f: Function, case: Case, close: Close) -> None:
    """Probabilities are not negative and sum to 1, and a token whose logit is -inf has none."""
    law = in_float64(case.call(f))
    close.on(case)(law.sum(axis=-1), np.ones(law.shape[:-1]), "sums of the rows", factor=4.0)
    if np.any(law < 0) or np.any(law[np.isneginf(in_float64(case.args[0]))] > 0):
        raise LawViolation("a probability is negative, or a forbidden token has one")


@law(LAW)
def a_constant_changes_nothing(f: Function, case: Case, close: Close) -> None:
    """Adding 1 to all logits changes nothing."""
    (logits,) = case.args
    moved = case.replace(round_to(widen(logits) + np.float32(1.0), logits.dtype))
    close.on(moved)(moved.call(f), case.call(f), "logits plus 1")


@law(LAW)
def top_k_keeps_the_k_most_probable(f: Function, case: Case, close: Close) -> None:
    """Top-k keeps k tokens, of equal ones the first, and their probabilities in proportion."""
    logits = in_float64(case.args[0])
    k = case.kwargs.get("top_k") or 2
    filtered = case.without("top_p").replace(top_k=k, temperature=1.0)
    ranks = np.argsort(np.argsort(-logits, axis=-1, kind="stable"), axis=-1)
    expected = np.where(ranks < k, _softmax(logits), 0.0)
    expected = expected / expected.sum(axis=-1, keepdims=True)
    law = in_float64(filtered.call(f))
    if np.any((law > 0) & (ranks >= k)):
        raise LawViolation(f"a token is kept that is not among the first {k}")
    close.on(filtered)(law, expected, f"top {k}", factor=4.0)


@law(LAW)
def nucleus_is_the_smallest_of_its_mass(f: Function, case: Case, close: Close) -> None:
    """What the nucleus of the tempered law keeps has mass p, and less without its least probable token."""
    p, temperature = case.kwargs.get("top_p", 1.0), case.kwargs.get("temperature", 1.0) or 1.0
    filtered = case.without("top_k").replace(temperature=temperature, top_p=p)
    (logits,) = case.args
    plain, law = _softmax(logits, temperature), in_float64(filtered.call(f))
    mass = np.where(law > 0, plain, 0.0)
    room = 4 * close.on(Case((logits,), {"temperature": temperature})).tolerance
    if np.any(mass.sum(axis=-1) < p - room):
        raise LawViolation(f"the nucleus has mass {mass.sum(axis=-1).min()}, expected at least {p}")
    least = np.min(mass, axis=-1, where=law > 0, initial=np.inf)
    several = np.count_nonzero(law, axis=-1) > 1
    if p < 1 and np.any(several & (mass.sum(axis=-1) - least >= p + room)):
        raise LawViolation("the nucleus holds a token that its mass does not need")
    left_out = np.max(plain, axis=-1, where=law == 0, initial=0.0)
    if np.any(left_out > least + room):
        raise LawViolation("the nucleus leaves out a token more probable than one that it keeps")


@law(LAW)
def cold_laws_are_surer(f: Function, case: Case, close: Close) -> None:
    """The entropy does not rise as the temperature falls, and the ratio of probabilities is its power."""
    case = case.without("top_k", "top_p")
    laws = [in_float64(case.replace(temperature=t).call(f)) for t in (0.5, 1.0, 2.0)]
    room = 64 * close.on(case.replace(temperature=1.0)).tolerance
    if any(np.any(_entropy(cold) > _entropy(warm) + room) for cold, warm in pairwise(laws)):
        raise LawViolation("the entropy rises as the temperature falls")
    again = np.square(laws[1])
    with np.errstate(invalid="ignore"):
        again = again / again.sum(axis=-1, keepdims=True)
    close.on(case.replace(temperature=0.5))(laws[0], again, "temperature 1/2 against squares", factor=8.0)


def _counts(case: Case, f: Function) -> Array:
    """Return how often each token is drawn by GRID evenly spaced draws."""
    logits = case.args[0]
    V = logits.shape[-1]
    grid = (np.arange(GRID) + 0.5) / GRID
    wide = case.replace(np.broadcast_to(logits[..., None, :], (*logits.shape[:-1], GRID, V)).copy())
    drawn = np.asarray(wide.replace(uniforms=np.broadcast_to(grid, (*logits.shape[:-1], GRID))).call(f))
    if np.any(np.diff(drawn, axis=-1) < 0):
        raise LawViolation("tokens fall as the draws rise: this is no inverse of the cumulated law")
    return np.asarray(np.sum(drawn[..., None] == np.arange(V), axis=-2))


@law(DRAW)
def draws_follow_the_law(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Evenly spaced draws give each token in proportion to its probability, within one."""
    from refimpl.decoding.sampling import sampling_law

    law = in_float64(case.without("uniforms", "rng").call(sampling_law))
    counts = _counts(case, f)
    if np.any(np.abs(counts - GRID * law) > 1 + 1e-6):
        raise LawViolation(f"of {GRID} even draws {counts.tolist()}, expected about {(GRID * law).tolist()}")


@law(DRAW)
def impossible_tokens_are_not_drawn(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token of probability 0 is not drawn, not by the draw 0 and not by the last one below 1."""
    from refimpl.decoding.sampling import sampling_law

    law = in_float64(case.without("uniforms", "rng").call(sampling_law))
    for u in (0.0, np.nextafter(1.0, 0.0)):
        drawn = np.asarray(case.replace(uniforms=np.full(law.shape[:-1], u)).call(f))
        if np.any(np.take_along_axis(law, drawn[..., None], axis=-1) <= 0):
            raise LawViolation(f"the draw {u} gives a token of probability 0")


@law(DRAW)
def greedy_takes_the_first_of_the_largest(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """At temperature 0 the draws do not matter."""
    drawn = np.asarray(case.replace(temperature=0.0).call(f))
    if not np.array_equal(drawn, np.argmax(in_float64(case.args[0]), axis=-1)):
        raise LawViolation("temperature 0 does not take the first of the largest logits")
