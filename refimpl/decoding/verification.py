"""Parallel verification: one pass of the target scores every draft, and the cache forgets the rejected ones.

A target with a cache of T - 1 tokens reads the last token and the K drafts at once; causality makes row i of
its logits what a pass over the first i drafts alone would give.  After n drafts were accepted, what the cache
holds of the others must go, or every later token attends to tokens that are not in the text.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.transformer.config import DecoderConfig, initial_decoder
from refimpl.transformer.embedding import indices
from refimpl.transformer.kv_cache import KVCache, truncate
from refimpl.transformer.model import DecoderParams, decoder_logits, decoder_step
from refimpl.validation import bind_axes, whole

__all__ = ["Verified", "rollback", "verification", "verification_token_by_token", "verification_uncached"]


class Verified(NamedTuple):
    """Logits of the verifying pass [B, K + 1, V], and of the tokens read after the rollback [B, t, V]."""

    logits: FloatArray
    resumed: FloatArray


def rollback(cache: Any, length: int, /) -> Any:
    """Return `cache` as it was after `length` tokens.

    Parameters
    ----------
    cache : tuple of LayerCache, ndarray of tokens (B, T), or None
        What a model keeps: keys and values, the tokens themselves, or nothing.
    length : int
        Tokens to keep.

    Returns
    -------
    Of the same kind
        Views; nothing is copied.

    Raises
    ------
    ShapeError
        If it holds fewer tokens.

    Examples
    --------
    >>> rollback(np.array([[5, 6, 7]]), 2)
    array([[5, 6]])
    """
    if cache is None:
        return None
    if isinstance(cache, np.ndarray):
        if cache.shape[1] < whole("length", length, 0):
            raise ShapeError(f"cache: cannot keep {length} tokens of {cache.shape[1]}")
        return cache[:, :length]
    return truncate(cache, length)


def _sample(rng: np.random.Generator, *, T: int, K: int, t: int, V: int, layers: int, positions: str) -> Case:
    make: dict[str, Any] = {} if positions == "rope" else {"positions": positions, "norm": "layer_norm"}
    config = DecoderConfig(
        vocabulary=V, width=4, num_heads=2, num_kv_heads=1, layers=layers, hidden=6, **make
    )
    tokens = (rng.integers(0, V, (2, size)) for size in (T, K, t))
    params = {name: 2.0 * array for name, array in initial_decoder(config, rng).items()}
    return Case(tuple(tokens), {"params": params, "config": config, "accepted": int(rng.integers(0, K + 1))})


def _terms(case: Case) -> tuple[int, Verified]:
    """Return the length of a chain of sums through the layers, and the sizes of the terms of a logit."""
    found = case.call(verification)
    table = np.abs(case.kwargs["params"]["embedding"])
    sizes = 2.0 * np.sqrt(table.shape[1]) * table.sum(axis=1)  # a normalised state is about √M in length
    return 16, Verified(*(np.abs(rows) + sizes for rows in found))


@technique(
    "decoding.verification",
    entries=(104,),
    kind="function",
    source=Source(
        "Chen et al. 2023", "arXiv:2302.01318", "section 'Modified rejection sampling', Algorithm 2"
    ),
    axes={"T": (1, 4), "K": (0, 3), "t": (1, 2), "V": (2, 5), "layers": (1, 2)},
    options={"positions": ("rope", "learned", "alibi")},
    edges=(
        {"T": 1, "K": 3, "t": 1, "layers": 2, "positions": "rope"},
        {"T": 3, "K": 0, "t": 2, "layers": 1, "positions": "alibi"},
        {"T": 4, "K": 3, "t": 2, "layers": 1, "positions": "learned"},
    ),
    sample=_sample,
    terms=_terms,
)
def verification(
    prefix: IntArray,
    drafted: IntArray,
    following: IntArray,
    /,
    *,
    params: DecoderParams,
    config: DecoderConfig,
    accepted: int,
) -> Verified:
    """Score all drafts in one pass over the cache, roll it back to the accepted ones, and read on.

    Parameters
    ----------
    prefix : ndarray of int, shape (B, T)
        The text so far, at least one token; all but the last are in the cache.
    drafted : ndarray of int, shape (B, K)
        Tokens to verify.
    following : ndarray of int, shape (B, t)
        What follows the accepted drafts: the token drawn in their place, perhaps with further drafts.
    params, config
        The target, as for `decoder_step`.
    accepted : int
        How many of the drafts stand, 0 to K; the same for every row.

    Returns
    -------
    Verified
        Logits after the last token of the prefix and after each draft, and after each of `following`, which
        see the prefix, the accepted drafts and each other: nothing of a rejected draft.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `decoder_step`; if the prefix is empty, or more drafts are accepted than there are.

    Notes
    -----
    The verifying pass costs K + 1 tokens of arithmetic and one reading of the weights.  That it takes the
    time of one token ("does not increase compute time at all", says the lecture) is so only as long as the
    weights' traffic is the bottleneck, and never of the energy.

    References
    ----------
    .. [1] Chen et al., 2023, arXiv:2302.01318, Algorithm 2: "In parallel, compute K + 1 sets of logits".
    .. [2] Leviathan et al., 2023, arXiv:2211.17192, Algorithm 1: "Run M_p in parallel".

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=5, width=8, num_heads=2, layers=1, hidden=16)
    >>> params = initial_decoder(config, np.random.default_rng(0))
    >>> text, drafts, following = np.array([[1, 2]]), np.array([[3, 4, 0]]), np.array([[2]])
    >>> seen = verification(text, drafts, following, params=params, config=config, accepted=1)
    >>> [rows.shape for rows in seen]
    [(1, 4, 5), (1, 1, 5)]
    >>> np.allclose(seen.resumed, decoder_logits(params, np.array([[1, 2, 3, 2]]), config=config)[:, -1:])
    True
    """
    prefix, drafted, following = _tokens(prefix, drafted, following, config, accepted)
    past: KVCache | None = None
    if prefix.shape[1] > 1:
        _, past = decoder_step(params, prefix[:, :-1], config=config)
    logits, cache = decoder_step(
        params, np.concatenate([prefix[:, -1:], drafted], axis=1), past, config=config
    )
    resumed, _ = decoder_step(params, following, rollback(cache, prefix.shape[1] + accepted), config=config)
    return Verified(logits, resumed)


@implements("decoding.verification", backend="numpy", tier="sequential")
def verification_token_by_token(
    prefix: IntArray,
    drafted: IntArray,
    following: IntArray,
    /,
    *,
    params: DecoderParams,
    config: DecoderConfig,
    accepted: int,
) -> Verified:
    """Return `verification` in K + 1 passes, one token each; the cache of each pass is kept for the rollback.

    Parameters
    ----------
    prefix, drafted, following, params, config, accepted
        As for `verification`.

    Returns
    -------
    Verified
        Equal to that of `verification`.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=5, width=8, num_heads=2, layers=1, hidden=16)
    >>> params = initial_decoder(config, np.random.default_rng(0))
    >>> case = np.array([[1, 2]]), np.array([[3, 4, 0]]), np.array([[2]])
    >>> options = dict(params=params, config=config, accepted=1)
    >>> np.allclose(verification_token_by_token(*case, **options)[0], verification(*case, **options)[0])
    True
    """
    prefix, drafted, following = _tokens(prefix, drafted, following, config, accepted)
    logits, cache = decoder_step(params, prefix, config=config)
    rows, caches = [logits[:, -1:]], [cache]
    for i in range(drafted.shape[1]):
        logits, cache = decoder_step(params, drafted[:, i : i + 1], cache, config=config)
        rows.append(logits)
        caches.append(cache)
    resumed, _ = decoder_step(params, following, caches[accepted], config=config)
    return Verified(np.concatenate(rows, axis=1), resumed)


@implements("decoding.verification", backend="numpy", tier="no cache")
def verification_uncached(
    prefix: IntArray,
    drafted: IntArray,
    following: IntArray,
    /,
    *,
    params: DecoderParams,
    config: DecoderConfig,
    accepted: int,
) -> Verified:
    """Return `verification` from the texts alone: the whole of each is read, and no cache is kept.

    Parameters
    ----------
    prefix, drafted, following, params, config, accepted
        As for `verification`.

    Returns
    -------
    Verified
        Equal to that of `verification`.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=5, width=8, num_heads=2, layers=1, hidden=16)
    >>> params = initial_decoder(config, np.random.default_rng(0))
    >>> case = np.array([[1, 2]]), np.array([[3, 4, 0]]), np.array([[2]])
    >>> verification_uncached(*case, params=params, config=config, accepted=3).resumed.shape
    (1, 1, 5)
    """
    prefix, drafted, following = _tokens(prefix, drafted, following, config, accepted)
    verified = decoder_logits(params, np.concatenate([prefix, drafted], axis=1), config=config)
    text = np.concatenate([prefix, drafted[:, :accepted], following], axis=1)
    resumed = decoder_logits(params, text, config=config)
    return Verified(verified[:, prefix.shape[1] - 1 :], resumed[:, text.shape[1] - following.shape[1] :])


def _tokens(
    prefix: IntArray, drafted: IntArray, following: IntArray, config: DecoderConfig, accepted: int
) -> tuple[IntArray, IntArray, IntArray]:
    given = {"prefix": prefix, "drafted": drafted, "following": following}
    found = {name: indices(name, tokens, config.vocabulary) for name, tokens in given.items()}
    size = bind_axes({name: (tokens, f"B {name}") for name, tokens in found.items()})
    if size["prefix"] == 0:
        raise ShapeError("prefix: expected at least one token, after which the first draft is scored")
    if whole("accepted", accepted, 0) > size["drafted"]:
        raise OptionError(
            f"accepted: expected at most {size['drafted']}, as many as are drafted; got {accepted}"
        )
    return found["prefix"], found["drafted"], found["following"]
