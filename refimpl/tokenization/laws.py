"""Laws of byte-pair encoding: of what is learned, and of how it is applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from refimpl.numerics import IntArray
from refimpl.registry import Case, law
from refimpl.testing import require
from refimpl.tokenization.split import chunks_of

Words = list[tuple[int, ...]]


def _words(case: Case) -> Words:
    return [tuple(chunk) for chunk in chunks_of(case.args[0], split=case.kwargs.get("split", "none"))]


def _applied(words: Words, pair: tuple[int, int], token: int) -> Words:
    """Return the words with one merge applied from left to right: a stack takes tokens one by one."""
    found = []
    for word in words:
        stack: list[int] = []
        for item in word:
            if stack and (stack[-1], item) == pair:
                stack[-1] = token  # not yet the left half of anything: it is new
            else:
                stack.append(item)
        found.append(tuple(stack))
    return found


def _adjacent(words: Words) -> Counter[tuple[int, int]]:
    return Counter(pair for word in words for pair in pairwise(word))


def _learned(f: Callable[..., Any], case: Case) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in np.asarray(case.call(f)).tolist()]


@law("tokenization.bpe")
def every_merge_is_the_most_frequent_pair(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Each merge joins a pair that no other pair outnumbers, after those before it were applied."""
    words = _words(case)
    for rank, pair in enumerate(_learned(f, case)):
        counts = _adjacent(words)
        most = max(counts.values(), default=0)
        require(0 < counts[pair] == most, f"merge {rank}, {pair}, occurs {counts[pair]} times, not {most}")
        require(most >= case.kwargs["min_count"], f"merge {rank} occurs only {most} times")
        words = _applied(words, pair, 256 + rank)


@law("tokenization.bpe")
def ties_go_as_they_say(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Of equally frequent pairs the lowest ids win, or the first in the text."""
    words = _words(case)
    for rank, pair in enumerate(_learned(f, case)):
        counts = _adjacent(words)
        equals = [other for other, count in counts.items() if count == counts[pair]]
        best = min(equals, default=None) if case.kwargs["ties"] == "lowest" else next(iter(equals), None)
        require(pair == best, f"merge {rank} joins {pair}, of equals {equals}")
        words = _applied(words, pair, 256 + rank)


@law("tokenization.bpe")
def fewer_merges_are_a_prefix(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Asking for fewer merges gives the first of them, and asking for none gives none."""
    learned = _learned(f, case)
    for count in (0, len(learned) // 2):
        found = _learned(f, case.replace(merges=count))
        require(found == learned[:count], f"the first {count} merges became {found}")


@law("tokenization.bpe")
def training_stops_only_when_nothing_is_left(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """As many merges are learned as were asked for, unless no pair is frequent enough."""
    words, learned = _words(case), _learned(f, case)
    for rank, pair in enumerate(learned):
        words = _applied(words, pair, 256 + rank)
    left = max(_adjacent(words).values(), default=0)
    stopped = len(learned) < case.kwargs["merges"]
    require(not stopped or left < case.kwargs["min_count"], f"stopped though a pair occurs {left} times")
    require(len(learned) <= case.kwargs["merges"], f"{len(learned)} merges, {case.kwargs['merges']} asked")


@law("tokenization.bpe")
def a_text_read_twice_teaches_the_same(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Two copies of a text, side by side as chunks, give the merges of one: only proportions count."""
    twice = case.replace([*case.args[0], *case.args[0]], min_count=2 * case.kwargs["min_count"])
    require(_learned(f, twice) == _learned(f, case), "the merges of two copies of the text differ")


# Encoding (tokenization.bpe.encode)


def _tokens(f: Callable[..., Any], case: Case) -> list[int]:
    found: list[int] = np.asarray(case.call(f)).tolist()
    return found


def _spelled(merges: IntArray) -> list[bytes]:
    spelled = [bytes([value]) for value in range(256)]
    spelled_by = merges.tolist()
    for left, right in spelled_by:
        spelled.append(spelled[left] + spelled[right])
    return spelled


@law("tokenization.bpe.encode")
def tokens_spell_the_text(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """What the tokens spell, joined, is the text, byte for byte."""
    spelled = _spelled(case.args[1])
    text = b"".join(spelled[token] for token in _tokens(f, case))
    require(text == b"".join(case.args[0]), f"{case.args[0]} is spelled {text!r}")


@law("tokenization.bpe.encode")
def without_merges_tokens_are_bytes(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Before anything is learned every byte is a token."""
    tokens = _tokens(f, case.replace(case.args[0], case.args[1][:0]))
    require(tokens == list(b"".join(case.args[0])), f"without merges: {tokens}")


@law("tokenization.bpe.encode")
def merges_apply_in_the_order_learned(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """The tokens are those that replaying the training leaves: lowest rank first, not longest match."""
    words = _words(case)
    for rank, (left, right) in enumerate(case.args[1].tolist()):
        words = _applied(words, (left, right), 256 + rank)
    expected = [token for word in words for token in word]
    require(_tokens(f, case) == expected, f"expected {expected}, got {_tokens(f, case)}")


@law("tokenization.bpe.encode")
def more_merges_never_lengthen(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """Each further merge leaves the number of tokens or lowers it."""
    text, merges = case.args
    sizes = [len(_tokens(f, case.replace(text, merges[:count]))) for count in range(len(merges) + 1)]
    require(sizes == sorted(sizes, reverse=True), f"tokens by number of merges: {sizes}")


@law("tokenization.bpe.encode")
def chunks_are_encoded_apart(f: Callable[..., Any], case: Case, close: object) -> None:  # noqa: ARG001
    """No token reaches over two chunks: the tokens of all are those of each, one after the other."""
    text, merges = case.args
    apart = [token for chunk in text for token in _tokens(f, case.replace([chunk], merges))]
    require(_tokens(f, case) == apart, f"the chunks apart give {apart}")
