"""Speculative sampling: a draft proposes, the target disposes, and the output follows the target exactly.

The letters clash: Leviathan et al. write p for the target and q for the draft, Chen et al. and the lecture's
algorithm slides p for the draft and q for the target, and the M_q of the lecture's table of results is
Leviathan's draft.  Here the two are called by their names.

=================  ================  ===========  =========
here               Leviathan et al.  Chen et al.  lecture
=================  ================  ===========  =========
draft              M_q, q(x)         p(.|.)       M_p, p(x)
target             M_p, p(x)         q(.|.)       M_q, q(x)
K drafted tokens   gamma             K            K
=================  ================  ===========  =========
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.decoding.samples_speculative import EDGES, sample_round
from refimpl.decoding.sampling import inverse_cdf
from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, widen
from refimpl.registry import Source, technique
from refimpl.transformer.embedding import indices
from refimpl.validation import bind_axes, floating

__all__ = ["NO_TOKEN", "Speculated", "acceptance_rate", "residual", "speculative"]

NO_TOKEN = -1


class Speculated(NamedTuple):
    """What a round gives: its tokens [B, K + 1], -1 where there is none, and how many drafts stand [B]."""

    tokens: IntArray
    accepted: IntArray


@technique(
    "decoding.speculative",
    entries=(102,),
    kind="function",
    source=Source("Leviathan et al. 2023", "arXiv:2211.17192", "Algorithm 1, section 2.3"),
    axes={"B": (1, 4), "K": (1, 4), "V": (1, 5)},
    options={"models": ("near", "same", "disjoint", "sparse", "greedy", "quarters")},
    edges=EDGES,
    sample=sample_round,
    exact=True,
)
def speculative(
    drafted: IntArray,
    draft: FloatArray,
    target: FloatArray,
    /,
    *,
    uniforms: FloatArray | None = None,
    rng: np.random.Generator | int | None = None,
) -> Speculated:
    """Accept drafted tokens from the left, and draw one more: from the residual, or from the target's next.

    Parameters
    ----------
    drafted : ndarray of int, shape (B, K)
        Tokens that were drawn from the draft model, one after the other.
    draft : ndarray of float, shape (B, K, V)
        The probabilities that each of them was drawn from.
    target : ndarray of float, shape (B, K + 1, V)
        The target's probabilities at the same K positions and the one after them.  Temperature, top-k and
        nucleus belong into both before this (`sampling_law`); at temperature 0 both are one-hot, and a draft
        stands where both have the same greatest logit.
    uniforms : ndarray of float, shape (B, K + 1), optional
        Draws in [0, 1): one a drafted token, and one for the last token of the round.
    rng : numpy.random.Generator or int, optional
        Draws the uniforms, if they are not given.

    Returns
    -------
    Speculated
        `tokens` holds the ``accepted`` leading drafts, the one more, and -1 after it: 1 to K + 1 tokens.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit.
    OptionError
        If probabilities are negative, not finite or do not sum to 1 (within 0.01: they may be bfloat16); if a
        token is outside the vocabulary or the draft gives it probability 0; if a uniform is outside [0, 1).

    Notes
    -----
    Draft x stands iff ``u draft(x) < target(x)``, which is u < target(x) / draft(x) without the division.
    (Leviathan's "reject if r > p/q" keeps a token of target probability 0 when r = 0.)  The token after the
    first rejection comes from ``max(0, target - draft)`` of that position, normalised; after K accepted ones
    from the target itself.  The arithmetic is done in float64.

    **Special cases**

    - Where the draft equals the target all drafts stand; where they share no token none does.
    - Rounding may leave no residual where a draft was rejected: then the target is drawn from.
    - K = 0 draws from the target.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, Algorithm 1.
    .. [2] Chen et al., 2023, arXiv:2302.01318, Algorithm 2.

    Examples
    --------
    Token 0 was drawn with probability 0.8, the target gives it 0.3: it stands with probability 3/8.

    >>> draft, target = np.array([[[0.8, 0.2]]]), np.array([[[0.3, 0.7], [1.0, 0.0]]])
    >>> speculative(np.array([[0]]), draft, target, uniforms=np.array([[0.37, 0.9]]))
    Speculated(tokens=array([[0, 0]]), accepted=array([1]))
    >>> speculative(np.array([[0]]), draft, target, uniforms=np.array([[0.38, 0.9]]))
    Speculated(tokens=array([[ 1, -1]]), accepted=array([0]))
    """
    drafted, draft, target = _round(drafted, draft, target)
    B, K, _ = draft.shape
    u = _uniforms(uniforms, rng, (B, K + 1))
    chosen = drafted[..., None]
    d, t = (np.take_along_axis(rows, chosen, axis=2)[..., 0] for rows in (draft, target[:, :K]))
    if not (d > 0).all():
        b, k = (int(i) for i in np.argwhere(~(d > 0))[0])
        raise OptionError(f"drafted[{b}, {k}]: the draft gives token {drafted[b, k]} probability 0")
    accepted = np.cumprod(u[:, :K] * d < t, axis=1, dtype=np.int64).sum(axis=1)
    # The draft has no opinion on the position after its last token: there the residual is the target itself.
    open_draft = np.concatenate([draft, np.zeros_like(target[:, :1])], axis=1)
    here = np.arange(B), accepted
    last = inverse_cdf(residual(open_draft[here], target[here]), u[:, K])
    tokens = np.concatenate([drafted, np.full((B, 1), NO_TOKEN)], axis=1)
    tokens[np.arange(K + 1) > accepted[:, None]] = NO_TOKEN
    tokens[here] = last
    return Speculated(tokens, accepted)


def residual(draft: FloatArray, target: FloatArray, /) -> FloatArray:
    """Return ``max(0, target - draft)``, normalised: the law of the token after a rejection.

    Parameters
    ----------
    draft, target : ndarray of float, shape (..., V)
        Probabilities.

    Returns
    -------
    ndarray of float64, shape (..., V)
        Where there is no residual, because target and draft are equal but for rounding, the target.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, section 2.3.  Chen et al. write ``(q - p)_+`` and define
       it as normalised; the lecture's slide leaves that out.

    Examples
    --------
    >>> residual(np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25]))
    array([0., 0., 1.])
    """
    draft, target = (widen(a).astype(np.float64) for a in floating(draft=draft, target=target))
    rest = np.maximum(target - draft, 0.0)
    mass = rest.sum(axis=-1, keepdims=True)
    rest, mass = (
        np.where(mass > 0, rest, target),
        np.where(mass > 0, mass, target.sum(axis=-1, keepdims=True)),
    )
    share: FloatArray = rest / mass
    return share


def acceptance_rate(draft: FloatArray, target: FloatArray, /) -> FloatArray:
    """Return the probability that a token drawn from `draft` stands: ``sum min(target, draft)``.

    Parameters
    ----------
    draft, target : ndarray of float, shape (..., V)
        Probabilities.

    Returns
    -------
    ndarray of float64, shape (...)
        1 minus the total variation distance.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, theorem 3.5 and corollary 3.6.

    Examples
    --------
    >>> acceptance_rate(np.array([0.8, 0.2]), np.array([0.3, 0.7]))
    array(0.5)
    """
    draft, target = (widen(a).astype(np.float64) for a in floating(draft=draft, target=target))
    return np.asarray(np.minimum(draft, target).sum(axis=-1))


def _round(
    drafted: IntArray, draft: FloatArray, target: FloatArray
) -> tuple[IntArray, FloatArray, FloatArray]:
    draft, target = (widen(a).astype(np.float64) for a in floating(draft=draft, target=target))
    size = bind_axes({"draft": (draft, "B K V"), "target": (target, "B K+1 V")})
    if size["K+1"] != size["K"] + 1:
        raise ShapeError(
            f"target: expected one position more than the draft's {size['K']}, got shape {target.shape}"
        )
    tokens = indices("drafted", drafted, size["V"])
    bind_axes({"draft": (draft, "B K V"), "drafted": (tokens, "B K")})
    for name, rows in (("draft", draft), ("target", target)):
        if rows.size and not ((rows >= 0).all() and np.allclose(rows.sum(axis=-1), 1.0, rtol=0, atol=1e-2)):
            raise OptionError(f"{name}: expected probabilities, numbers from 0 on with sum 1 in every row")
    return tokens.astype(np.int64), draft, target


def _uniforms(
    uniforms: FloatArray | None, rng: np.random.Generator | int | None, shape: tuple[int, int]
) -> FloatArray:
    if uniforms is None:
        return np.random.default_rng(rng).random(shape)
    (u,) = floating(uniforms=uniforms)
    if u.shape != shape:
        raise ShapeError(f"uniforms: expected shape {shape}, got {u.shape}")
    u = widen(u).astype(np.float64)
    if not ((u >= 0) & (u < 1)).all():
        raise OptionError("uniforms: expected numbers in [0, 1)")
    return u
