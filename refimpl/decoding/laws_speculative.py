"""Laws of speculative sampling: whoever computes it, the output follows the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.decoding.samples_speculative import draw_rows, pair_of_laws
from refimpl.errors import LawViolation
from refimpl.numerics import Array, FloatArray, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

__all__ = ["exact_output_law", "product_law"]

Sampler = Callable[..., Any]


def _call(f: Sampler, case: Case) -> tuple[Array, Array]:
    """Return tokens [B, K + 1] and the number of accepted drafts [B], if they are of that kind at all."""
    tokens, accepted = (np.asarray(part) for part in case.call(f))
    B, K = case.args[0].shape
    require(tokens.shape == (B, K + 1) and accepted.shape == (B,), "expected tokens [B, K + 1], accepted [B]")
    require((accepted >= 0) & (accepted <= K), f"accepted: expected 0 to {K}, got {accepted}")
    return tokens.astype(np.int64), accepted.astype(np.int64)


def exact_output_law(
    f: Sampler,
    draft: Sequence[FloatArray],
    target: Sequence[FloatArray],
    *,
    parts: int,
    dtype: Any = np.float64,
) -> FloatArray:
    """Return the exact law of K + 1 tokens that `f` and then the target give, by enumeration.

    Parameters
    ----------
    f : callable
        As `speculative`.
    draft, target : sequence of ndarray, item k of shape (V,) * k + (V,)
        Next-token probabilities after each of the V**k prefixes; K of the draft's, K + 1 of the target's.
        Multiples of 1/parts: every threshold that a uniform may meet, t/d or a cumulated residual, is then a
        multiple of 1/lcm(1..parts), and one draw in the middle of each such step is an exact integral.
    parts : int
        The denominator.
    dtype : dtype
        In which `f` is given the probabilities and draws.

    Returns
    -------
    ndarray of float64, shape (V,) * (K + 1)
        Probability of each sequence.  A round that ends early is continued by the target.
    """
    K, V = len(draft), len(target[0])
    steps = math.lcm(*range(1, parts + 1))
    paths = np.indices((V,) * K).reshape(K, -1).T
    rows = [[table[tuple(paths[:, :k].T)] for k, table in enumerate(tables)] for tables in (draft, target)]
    given, wanted = (
        np.stack([np.broadcast_to(row, (len(paths), V)) for row in side], axis=1) for side in rows
    )
    weight = np.prod(np.take_along_axis(given, paths[..., None], axis=2)[..., 0], axis=1)
    possible = np.flatnonzero(weight)
    grid = (2 * np.indices((steps,) * (K + 1)).reshape(K + 1, -1).T + 1) / (2 * steps)
    each = np.repeat(possible, len(grid))
    case = Case(
        (paths[each], given[each].astype(dtype), wanted[each].astype(dtype)),
        {"uniforms": np.tile(grid, (len(possible), 1)).astype(dtype)},
    )
    tokens, accepted = _call(f, case)
    weight = weight[each] / len(grid)
    mass = np.zeros(())
    for length in range(1, K + 2):
        mass = mass[..., None] * target[length - 1]
        ended = accepted == length - 1
        output = tokens[ended, :length]
        require((output >= 0) & (output < V), "a token is missing or outside the vocabulary")
        np.add.at(mass, tuple(output.T), weight[ended])
    return mass


def product_law(tables: Sequence[FloatArray]) -> FloatArray:
    """Return the law of sequences from next-token probabilities as `exact_output_law` takes them.

    >>> product_law([np.array([0.5, 0.5]), np.array([[1.0, 0.0], [0.5, 0.5]])])
    array([[0.5 , 0.  ],
           [0.25, 0.25]])
    """
    mass = np.ones(())
    for table in tables:
        mass = mass[..., None] * table
    return mass


@law("decoding.speculative")
def the_output_follows_the_target(f: Sampler, case: Case, close: Close) -> None:  # noqa: ARG001
    """Over all drafts and all draws, sequences have the target's probabilities, exactly."""
    B, K, V = case.args[1].shape
    rng = np.random.default_rng([B, K, V, int(np.sum(case.args[0]))])
    K, V, parts = min(max(K, 1), 2), min(V, 3), 3
    draft, target = (
        [rng.multinomial(parts, np.full(V, 1 / V), (V,) * k) / parts for k in range(n)] for n in (K, K + 1)
    )
    found = exact_output_law(f, draft, target, parts=parts, dtype=case.args[1].dtype)
    wanted = product_law(target)
    error = np.abs(found - wanted)
    if not error.max() <= 1e-12:
        where = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
        raise LawViolation(
            f"tokens {list(where)} come with probability {found[where]:.6g}, "
            f"the target gives them {wanted[where]:.6g}"
        )


@law("decoding.speculative")
def equal_models_accept_everything(f: Sampler, case: Case, close: Close) -> None:  # noqa: ARG001
    """A draft equal to the target is always accepted."""
    drafted, draft, target = case.args
    same = np.concatenate([draft, target[:, -1:]], axis=1)
    _, accepted = _call(f, case.replace(drafted, draft, same))
    require(accepted == drafted.shape[1], "a draft equal to the target was rejected")


@law("decoding.speculative")
def disjoint_models_accept_nothing(f: Sampler, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token to which the target gives probability 0 never stands, even at a draw of 0."""
    drafted, draft, target = case.args
    if not draft.size or draft.shape[2] < 2:
        return
    apart, elsewhere = pair_of_laws(np.random.default_rng(0), target.shape, "disjoint")
    tokens = draw_rows(np.random.default_rng(1), apart[:, :-1])
    given = case.replace(tokens, apart[:, :-1].astype(draft.dtype), elsewhere.astype(target.dtype))
    zeros = np.zeros((len(drafted), drafted.shape[1] + 1), draft.dtype)
    for draws in (given, given.without("rng").replace(uniforms=zeros)):
        out, accepted = _call(f, draws)
        require(accepted == 0, "a token stands that the target never gives")
        reached = np.take_along_axis(elsewhere[:, 0], out[:, :1], axis=1)
        require(reached > 0, "the token after a rejection is one that the target never gives")


@law("decoding.speculative")
def accepted_drafts_come_first(f: Sampler, case: Case, close: Close) -> None:  # noqa: ARG001
    """The output is the accepted drafts, one token more that the target can give, and nothing after it."""
    drafted, _, target = case.args
    tokens, accepted = _call(f, case)
    place = np.arange(tokens.shape[1])
    kept = place[:-1] < accepted[:, None]
    require((tokens[:, :-1] == drafted) | ~kept, "an accepted draft is not in its place")
    require((tokens == -1) | (place <= accepted[:, None]), "a token stands after the last one")
    here = np.arange(len(tokens)), accepted
    require(tokens[here] >= 0, "the token after the accepted drafts is missing")
    require(widen(target)[(*here, tokens[here])] > 0, "the last token is one that the target never gives")


@law("decoding.speculative")
def nothing_after_a_rejection_matters(f: Sampler, case: Case, close: Close) -> None:  # noqa: ARG001
    """Drafts after the first rejection, and what both models say of them, do not change the output."""
    drafted, draft, target = case.args
    tokens, accepted = _call(f, case)
    later = np.arange(target.shape[1]) > accepted[:, None]
    other = np.full_like(target, 1 / target.shape[2]) if target.size else target
    moved = (
        np.where(later[:, :-1], 0, drafted),
        np.where(later[:, :-1, None], other[:, :-1], draft),
        np.where(later[..., None], other, target),
    )
    again, same = _call(f, case.replace(*moved))
    require(
        (again == tokens).all() and (same == accepted).all(), "what follows a rejection changed the output"
    )
