"""The whole loop of speculative decoding: draft K tokens, verify them in one pass, roll both caches back.

The counterpart of `refimpl.decoding.autoregressive`: the same text for the same law, in fewer calls of the
target.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refimpl.decoding.sampling import Model, inverse_cdf, sampling_law
from refimpl.decoding.speculative import acceptance_rate, speculative
from refimpl.decoding.verification import rollback
from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray
from refimpl.validation import floating, whole

__all__ = ["SpeculativelyGenerated", "speculative_decoding", "uncached"]


class SpeculativelyGenerated(NamedTuple):
    """What a run gives, and what happened in each round.

    `tokens` (1, T + steps) is the prompt with its continuation; `drafted` and `accepted` (rounds,) count the
    drafts of each round and those that stood; `rates` has for each draft that was put to the test the chance
    that one stands at its place, the sum of min(draft, target).
    """

    tokens: IntArray
    drafted: IntArray
    accepted: IntArray
    rates: FloatArray

    @property
    def calls(self) -> int:
        """Calls of the target, one a round."""
        return len(self.drafted)

    @property
    def acceptance(self) -> float:
        """Of the drafts that were put to the test, those up to the first that fell, the share that stood."""
        tested = np.minimum(self.accepted + 1, self.drafted).sum()
        return float(self.accepted.sum() / tested) if tested else float("nan")


def uncached(function: Callable[[IntArray], FloatArray], /) -> Model:
    """Return a model from a function of whole texts; its cache is the text.

    Parameters
    ----------
    function : callable
        ``function(tokens [B, T]) -> logits [B, T, V]``; logarithms of probabilities are logits.

    Returns
    -------
    callable
        ``model(tokens, cache) -> (logits, cache)``.

    Examples
    --------
    >>> model = uncached(lambda tokens: np.cumsum(tokens, axis=1)[..., None] * np.ones(2))
    >>> logits, cache = model(np.array([[1, 2]]), None)
    >>> model(np.array([[3]]), cache)[0]
    array([[[6., 6.]]])
    """

    def model(tokens: IntArray, cache: Any) -> tuple[FloatArray, Any]:
        text = tokens if cache is None else np.concatenate([cache, tokens], axis=1)
        return function(text)[:, text.shape[1] - tokens.shape[1] :], text

    return model


def speculative_decoding(
    target: Model,
    draft: Model,
    prompt: IntArray,
    /,
    *,
    steps: int,
    K: int = 4,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    uniforms: FloatArray | None = None,
    rng: np.random.Generator | int | None = None,
) -> SpeculativelyGenerated:
    """Return a prompt continued by `steps` tokens of the target's law, with the help of a draft model.

    Parameters
    ----------
    target, draft : callable
        ``model(tokens, cache) -> (logits, cache)``, as for `autoregressive`; `uncached` makes one from a
        function of whole texts.  Both have one vocabulary.
    prompt : ndarray of int, shape (1, T)
        At least one token.  One sequence: rows of a batch would accept different numbers of drafts.
    steps : int
        How many tokens to generate.
    K : int
        Drafts a round; 0 is plain decoding.  The last rounds draft fewer, so that no token is thrown away.
    temperature, top_k, top_p
        As for `sampling_law`, applied to both models; temperature 0 is greedy and gives the tokens of greedy
        decoding.
    uniforms : ndarray of float, shape (steps, 2 K + 1), optional
        Draws in [0, 1), a row a round: K for drafting, then K for acceptance and one for the last token, at
        the places that the round uses.
    rng : numpy.random.Generator or int, optional
        Where the draws come from otherwise.

    Returns
    -------
    SpeculativelyGenerated

    Raises
    ------
    ShapeError
        If the prompt is not one sequence of at least one token, or the draws have another shape.
    OptionError
        As for `sampling_law` and `speculative`; if both `uniforms` and `rng` are given.

    Notes
    -----
    After a round with n accepted drafts both caches keep the text without its last token: the target's loses
    K - n tokens.  If all were accepted, the draft's lacks the last draft, which it never read.

    References
    ----------
    .. [1] Leviathan et al., 2023, arXiv:2211.17192, Algorithm 1.
    .. [2] Chen et al., 2023, arXiv:2302.01318, Algorithm 2.

    Examples
    --------
    A draft that always agrees: 9 tokens in two calls of the target.

    >>> def following(tokens, cache):
    ...     return 9.0 * np.eye(3)[(tokens + 1) % 3], cache
    >>> run = speculative_decoding(following, following, np.array([[0]]), steps=9, K=4, temperature=0.0)
    >>> run.tokens[0, 1:].tolist(), run.calls, run.accepted.tolist()
    ([1, 2, 0, 1, 2, 0, 1, 2, 0], 2, [4, 3])
    """
    text = np.asarray(prompt)
    if text.ndim != 2 or text.shape[0] != 1 or text.shape[1] == 0:
        raise ShapeError(f"prompt: expected shape (1, T) with T of at least 1, got {text.shape}")
    rounds = _rounds(uniforms, rng, whole("steps", steps, 0), whole("K", K, 0))
    law = partial(sampling_law, temperature=temperature, top_k=top_k, top_p=top_p)
    end = text.shape[1] + steps
    caches: dict[str, Any] = {"target": None, "draft": None}
    read = {"target": 0, "draft": 0}  # how much of the text each cache holds
    drafted, accepted, rates = [], [], []
    while text.shape[1] < end:
        u = next(rounds)
        length = text.shape[1]
        k = min(K, end - length - 1)
        tokens, laws = text[:, :0], []
        new = text[:, read["draft"] :]
        for i in range(k):
            logits, caches["draft"] = draft(new, caches["draft"])
            laws.append(law(logits[:, -1]))
            new = inverse_cdf(laws[-1], u[i : i + 1])[:, None]
            tokens = np.concatenate([tokens, new], axis=1)
        logits, caches["target"] = target(
            np.concatenate([text[:, read["target"] :], tokens], axis=1), caches["target"]
        )
        wanted = law(logits[:, -(k + 1) :])
        given = np.stack(laws, axis=1) if laws else wanted[:, :0]
        result = speculative(tokens, given, wanted, uniforms=u[None, [*range(K, K + k), 2 * K]])
        n = int(result.accepted[0])
        text = np.concatenate([text, result.tokens[:, : n + 1]], axis=1)
        read = {"target": length + n, "draft": length + min(n, k - 1) if k else read["draft"]}
        caches = {name: rollback(cache, read[name]) for name, cache in caches.items()}
        drafted.append(k)
        accepted.append(n)
        rates.append(acceptance_rate(given, wanted[:, :k])[0, : n + 1])
    return SpeculativelyGenerated(
        text, np.array(drafted, np.int64), np.array(accepted, np.int64), np.concatenate([*rates, np.zeros(0)])
    )


def _rounds(uniforms: FloatArray | None, rng: np.random.Generator | int | None, steps: int, K: int) -> Any:
    """Return the draws of one round after the other."""
    shape = steps, 2 * K + 1
    if uniforms is None:
        source = np.random.default_rng(rng)
        return (source.random(shape[1]) for _ in range(steps))
    if rng is not None:
        raise OptionError("uniforms, rng: expected one of the two, got both")
    (given,) = floating(uniforms=uniforms)
    if given.shape != shape:
        raise ShapeError(f"uniforms: expected shape {shape}, got {given.shape}")
    return iter(given)
