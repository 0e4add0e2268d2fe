"""Byte-level byte-pair encoding: tokens are bytes, and merges of two tokens learned from frequent pairs.

Token ids 0 to 255 are the bytes, id 256 + i is the i-th merge.  Every text has an encoding, so there is no
unknown token.

>>> merges = train_bpe("aaabdaaabac", merges=3)
>>> encode("aaabdaaabac", merges)
array([258, 100, 258,  97,  99])
>>> decode(encode("aaabdaaabac", merges), merges)
b'aaabdaaabac'
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import IntArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.tokenization.split import Split, Text, chunks_of
from refimpl.validation import as_array, whole

__all__ = ["BYTES", "decode", "encode", "encode_in_learned_order", "token_bytes", "train_bpe"]

BYTES = 256
_SOURCE = Source("Sennrich et al. 2016", "arXiv:1508.07909", "section 3.2, Algorithm 1")
_ALPHABETS = {"letters": "abc", "run": "a", "words": "ab ab'c1 .s", "unicode": "é€a\u3000½²\n"}


def _text(rng: np.random.Generator, chunks: int, length: int, alphabet: str) -> list[bytes]:
    characters = list(_ALPHABETS[alphabet])
    sizes = rng.integers(length // 2, length + 1, chunks)
    return ["".join(rng.choice(characters, size)).encode() for size in sizes]


def _sample_train(
    rng: np.random.Generator, *, chunks: int, length: int, alphabet: str, **options: Any
) -> Case:
    return Case((_text(rng, chunks, length, alphabet),), options)


def _sample_encode(
    rng: np.random.Generator, *, chunks: int, length: int, merges: int, alphabet: str, **options: Any
) -> Case:
    learned = train_bpe(_text(rng, chunks, length, alphabet), merges=merges)
    return Case((_text(rng, chunks, length, alphabet), learned), options)


_AXES = {"chunks": (0, 5), "length": (0, 16), "merges": (0, 9)}
_EDGES: tuple[Mapping[str, Any], ...] = (
    {"chunks": 0, "merges": 3},
    {"chunks": 1, "length": 1, "merges": 3},
    {"chunks": 4, "length": 12, "merges": 0},
    {"chunks": 3, "length": 12, "merges": 9, "alphabet": "run"},
    {"chunks": 5, "length": 16, "merges": 9, "alphabet": "letters", "split": "none"},
    {"chunks": 3, "length": 12, "merges": 9, "alphabet": "words", "split": "gpt2"},
    {"chunks": 3, "length": 9, "merges": 9, "alphabet": "unicode", "split": "gpt2"},
)


@technique(
    "tokenization.bpe",
    entries=(1,),
    kind="function",
    source=_SOURCE,
    axes=_AXES,
    options={
        "alphabet": tuple(_ALPHABETS),
        "split": ("none", "gpt2"),
        "ties": ("lowest", "first"),
        "min_count": (1, 2),
    },
    edges=_EDGES,
    sample=_sample_train,
    exact=True,
)
def train_bpe(
    text: Text,
    /,
    *,
    merges: int,
    split: Split = "none",
    ties: Literal["lowest", "first"] = "lowest",
    min_count: int = 1,
) -> IntArray:
    """Return the merges learned from `text`: again and again the most frequent pair of neighbours.

    Parameters
    ----------
    text : str, bytes, or a sequence of them
        Strings stand for their UTF-8 bytes.  No pair reaches over two items of a sequence.
    merges : int
        How many to learn; fewer are returned when no pair is left.
    split : {"none", "gpt2"}
        Cut the text into words first, which no merge crosses (`refimpl.tokenization.split_gpt2`).
    ties : {"lowest", "first"}
        Among equally frequent pairs, the one of the lowest ids, as in tokenizers, or the one seen first in
        the text, as in minbpe.  subword-nmt takes the highest string.
    min_count : int
        Pairs that occur less often are not merged; subword-nmt and many trainers say 2.

    Returns
    -------
    ndarray of int64, shape (merges, 2)
        Row i holds the pair that token ``256 + i`` stands for.

    Raises
    ------
    DTypeError
        If `text` is no text, or a number is not whole.
    OptionError
        If an option is unknown or out of range.

    Notes
    -----
    **Special cases**

    - A run such as "aaa" counts the pair twice, though only one of the two can be merged: pairs are counted
      where they stand, and merged from left to right.
    - Two merges may spell the same bytes, ab+c and a+bc.  They stay two tokens, as in minbpe; subword-nmt and
      tokenizers take them for one.

    References
    ----------
    .. [1] Sennrich et al., 2016, arXiv:1508.07909, Algorithm 1: words weighted by frequency.
    .. [2] Radford et al., 2019, "Language models are unsupervised multitask learners", section 2.2: bytes.

    Examples
    --------
    >>> train_bpe("low low lower", merges=2)
    array([[108, 111],
           [256, 119]])
    """
    wanted, least = whole("merges", merges, least=0), whole("min_count", min_count)
    if ties not in ("lowest", "first"):
        raise OptionError(f"ties: expected 'lowest' or 'first', got {ties!r}")
    words = [(list(chunk), count) for chunk, count in Counter(chunks_of(text, split=split)).items()]
    learned: list[tuple[int, int]] = []
    while len(learned) < wanted:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs or max(pairs.values()) < least:
            break
        most = max(pairs.values())
        frequent = [pair for pair, count in pairs.items() if count == most]  # in the order of the text
        best = min(frequent) if ties == "lowest" else frequent[0]
        words = [(_merge(word, best, BYTES + len(learned)), count) for word, count in words]
        learned.append(best)
    return np.array(learned, np.int64).reshape(len(learned), 2)


@technique(
    "tokenization.bpe.encode",
    entries=(1,),
    kind="function",
    source=_SOURCE,
    axes=_AXES,
    options={"alphabet": tuple(_ALPHABETS), "split": ("none", "gpt2")},
    edges=_EDGES,
    sample=_sample_encode,
    exact=True,
)
def encode(text: Text, merges: IntArray, /, *, split: Split = "none") -> IntArray:
    """Return the tokens of `text`: in every chunk, merge the pair learned first until none is left.

    Parameters
    ----------
    text : str, bytes, or a sequence of them
        As for `train_bpe`.
    merges : ndarray of int, shape (merges, 2)
        What `train_bpe` returned.
    split : {"none", "gpt2"}
        As in training.

    Returns
    -------
    ndarray of int64, shape (tokens,)
        Ids below ``256 + len(merges)``.

    Raises
    ------
    DTypeError
        If `text` is no text, or `merges` holds no integers.
    ShapeError
        If `merges` is no list of pairs.
    OptionError
        If a merge names a token that is not there yet, or `split` is unknown.

    Notes
    -----
    The lowest rank goes first, never the longest token: with the merges ab, bc, "abc" is [ab, c] even if a
    later merge spells bc+d.  Byte-level text needs no unknown token; what a token spells may be no UTF-8.

    References
    ----------
    .. [1] Sennrich et al., 2016, arXiv:1508.07909, section 3.2.
    .. [2] openai/gpt-2 @9b63575, src/encoder.py, ``Encoder.bpe``: the pair of lowest rank first.

    Examples
    --------
    >>> encode("abcab", np.array([[98, 99], [97, 98]]))
    array([ 97, 256, 257])
    """
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(_pairs(merges))))}  # the first wins
    tokens: list[int] = []
    for chunk in chunks_of(text, split=split):
        word = list(chunk)
        while True:
            found = {ranks[pair] for pair in pairwise(word) if pair in ranks}
            if not found:
                break
            rank = min(found)
            word = _merge(word, tuple(merges[rank]), BYTES + rank)
        tokens += word
    return np.array(tokens, np.int64)


@implements("tokenization.bpe.encode", backend="numpy")
def encode_in_learned_order(text: Text, merges: IntArray, /, *, split: Split = "none") -> IntArray:
    """Return the tokens of `text`, by applying all merges one after the other, as training did.

    The same as `encode`, because a merge makes only pairs that were learned after it.

    Parameters
    ----------
    text, merges, split
        As for `encode`.

    Returns
    -------
    ndarray of int64, shape (tokens,)

    Raises
    ------
    DTypeError, ShapeError, OptionError
        As `encode`.

    Examples
    --------
    >>> encode_in_learned_order("abcab", np.array([[98, 99], [97, 98]]))
    array([ 97, 256, 257])
    """
    words = [list(chunk) for chunk in chunks_of(text, split=split)]
    for rank, pair in enumerate(_pairs(merges)):
        words = [_merge(word, pair, BYTES + rank) for word in words]
    return np.array([token for word in words for token in word], np.int64)


def decode(tokens: IntArray, merges: IntArray, /) -> bytes:
    """Return the bytes that `tokens` spell; they need be no UTF-8 where a token cuts a character.

    Parameters
    ----------
    tokens : ndarray of int, shape (tokens,)
        Ids below ``256 + len(merges)``.
    merges : ndarray of int, shape (merges, 2)
        What `train_bpe` returned.

    Returns
    -------
    bytes

    Raises
    ------
    OptionError
        If an id is unknown.
    DTypeError, ShapeError
        If something is no integer, or no list of pairs.

    Examples
    --------
    >>> decode(np.array([226, 256]), np.array([[130, 172]])).decode()
    '€'
    """
    spelled = token_bytes(merges)
    ids = as_array("tokens", tokens)
    if ids.size and ids.dtype.kind not in "iu":
        raise DTypeError(f"tokens: expected integers, got {ids.dtype}")
    for token in ids.ravel().tolist():
        if not 0 <= token < len(spelled):
            raise OptionError(f"tokens: expected ids in [0, {len(spelled)}), got {token}")
    return b"".join(spelled[token] for token in ids.ravel().tolist())


def token_bytes(merges: IntArray, /) -> list[bytes]:
    """Return what every token spells, in order of id.

    Examples
    --------
    >>> token_bytes(np.array([[104, 105], [256, 33]]))[-2:]
    [b'hi', b'hi!']
    """
    spelled = [bytes([value]) for value in range(BYTES)]
    for left, right in _pairs(merges):
        spelled.append(spelled[left] + spelled[right])
    return spelled


def _merge(word: list[int], pair: tuple[int, ...], token: int) -> list[int]:
    """Return `word` with every occurrence of `pair` replaced by `token`, from left to right."""
    merged: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and word[i] == pair[0] and word[i + 1] == pair[1]:
            merged.append(token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def _pairs(merges: IntArray) -> list[tuple[int, int]]:
    """Return the merges as pairs, each made of tokens that exist when it is learned."""
    array = as_array("merges", merges)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ShapeError(f"merges: expected shape (merges, 2), got {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise DTypeError(f"merges: expected integers, got {array.dtype}")
    pairs = []
    for rank, (left, right) in enumerate(array.tolist()):
        if not (0 <= left < BYTES + rank and 0 <= right < BYTES + rank):
            raise OptionError(f"merges: row {rank} must name tokens below {BYTES + rank}, got {left, right}")
        pairs.append((int(left), int(right)))
    return pairs
