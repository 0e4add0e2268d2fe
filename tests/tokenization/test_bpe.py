"""Byte-pair encoding: known texts, GPT-2's split against tokenizers, errors, and mutants that laws catch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refimpl import registry
from refimpl.errors import DTypeError, LawViolation, OptionError, ShapeError
from refimpl.testing import check, draw
from refimpl.tokenization import chunks_of, decode, encode, split_gpt2, token_bytes, train_bpe
from refimpl.tokenization.bpe import _merge

registry.load()


def test_the_example_of_wikipedia() -> None:
    # aaabdaaabac: Z = aa, Y = ab, X = ZY; between equals, ab is seen before Za.
    merges = train_bpe("aaabdaaabac", merges=3, ties="lowest")
    assert token_bytes(merges)[256:] == [b"aa", b"ab", b"aaab"]
    assert decode(encode("aaabdaaabac", merges), merges) == b"aaabdaaabac"
    assert encode("aaabdaaabac", merges).tolist() == [258, ord("d"), 258, ord("a"), ord("c")]


def test_the_example_of_the_paper() -> None:
    # Sennrich et al., section 3.2: low 5, lower 2, newest 6, widest 3; es, est, and then the end of a word.
    words = ["low_"] * 5 + ["lower_"] * 2 + ["newest_"] * 6 + ["widest_"] * 3
    merges = train_bpe(words, merges=10, ties="first")
    spelled = [token.decode() for token in token_bytes(merges)[256:]]
    assert spelled[:5] == ["es", "est", "est_", "lo", "low"]
    assert [bytes([b]).decode() if b < 256 else spelled[b - 256] for b in encode("lowest_", merges)] == [
        "low",
        "est_",
    ]


def test_lowest_rank_first_is_not_longest_match() -> None:
    merges = np.array([[98, 99], [97, 98], [257, 99]])  # bc, ab, abc: the last can never be used
    assert encode("abc", merges).tolist() == [97, 256]


def test_runs() -> None:
    merges = train_bpe("aaaa", merges=5)
    assert merges.tolist() == [[97, 97], [256, 256]]
    assert encode("aaaaa", merges).tolist() == [257, 97]
    # "aaa" counts the pair aa twice, so it outnumbers the one bc of equal length that occurs once.
    assert train_bpe(["bc", "aaa"], merges=1, ties="first").tolist() == [[97, 97]]


def test_the_same_bytes_twice_are_two_tokens() -> None:
    merges = np.array([[97, 98], [98, 99], [256, 99], [97, 257]])  # ab+c and a+bc
    assert token_bytes(merges)[258:] == [b"abc", b"abc"]
    assert decode(np.array([258, 259]), merges) == b"abcabc"


@given(st.binary(max_size=30), st.integers(0, 6))
def test_any_bytes_come_back(data: bytes, merges: int) -> None:
    for split in ("none", "gpt2"):
        learned = train_bpe(data, merges=merges, split=split)
        assert decode(encode(data, learned, split=split), learned) == data


# Letters, numbers that are no digits, marks, separators, contractions in either case.
GLYPHS = " \t\n\r\x0b\x1c\x85\xa0\u2003\u2028\u3000'’srtvemld SVE aZéß½²Ⅷ٣中ा́_-!€😀"


@given(st.text(st.sampled_from(GLYPHS), max_size=14))
@example("we'll  go to  B2!")
@example(" 's")
@example("a\u0301b \u0301")
@example("'S'VE")
@example("\x1ca \x1c ")
def test_split_is_that_of_gpt2(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    expected = [text[a:b] for _, (a, b) in level.pre_tokenize_str(text)]
    assert split_gpt2(text) == expected
    assert "".join(split_gpt2(text)) == text


def test_the_split_costs_tokens_but_keeps_words_apart() -> None:
    text = "the cat. the cat. the cat."
    apart = train_bpe(text, merges=20, split="gpt2")
    assert all(b". " not in token for token in token_bytes(apart))
    assert any(b". " in token for token in token_bytes(train_bpe(text, merges=20)))


def test_compression_grows_with_the_vocabulary() -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    merges = train_bpe(text, merges=40, split="gpt2")
    sizes = [len(encode(text, merges[:n], split="gpt2")) for n in (0, 10, 40)]
    assert sizes[0] == len(text.encode()) > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: train_bpe(3, merges=1), DTypeError, "text: expected str"),  # type: ignore[arg-type]
        (lambda: train_bpe(["a", 3], merges=1), DTypeError, "text: expected str"),  # type: ignore[list-item]
        (lambda: train_bpe("a", merges=-1), OptionError, "merges: expected at least 0"),
        (lambda: train_bpe("a", merges=1.0), DTypeError, "merges: expected a whole number"),  # type: ignore[arg-type]
        (lambda: train_bpe("a", merges=1, min_count=0), OptionError, "min_count"),
        (lambda: train_bpe("a", merges=1, ties="any"), OptionError, "ties: expected"),  # type: ignore[arg-type]
        (lambda: chunks_of("a", split="words"), OptionError, "split: expected"),  # type: ignore[arg-type]
        (lambda: encode("a", np.array([[256, 97]])), OptionError, "row 0 must name tokens below 256"),
        (lambda: encode("a", np.array([1, 2])), ShapeError, "merges: expected shape"),
        (lambda: encode("a", np.array([[0.5, 1]])), DTypeError, "merges: expected integers"),
        (lambda: decode(np.array([256]), np.zeros((0, 2), int)), OptionError, r"ids in \[0, 256\), got 256"),
        (lambda: decode(np.array([0.5]), np.zeros((0, 2), int)), DTypeError, "tokens: expected integers"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def broken_laws(name: str, f: Callable[..., Any], count: int = 40) -> set[str]:
    """Laws are run whatever the reference says of `f`: the number of tokens is part of the answer."""
    record = registry.get(name)
    assert record.sample is not None
    broken = set()
    for seed in range(count):
        case = record.sample(np.random.default_rng(seed), **draw(record, seed))
        for law in registry.laws_of(name):
            try:
                law.function(f, case, None)
            except LawViolation:
                broken.add(law.name)
    return broken


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {}


def mutant(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        MUTANTS[f.__name__] = (name, f)
        return f

    return register


def _train(text: Any, merges: int, ties: str, least: int, wrong: str, split: str = "none") -> Any:
    chunks = chunks_of(b"".join(text) if wrong == "chunks joined" else text, split=split)
    words = [(list(word), 1 if wrong == "unweighted" else n) for word, n in Counter(chunks).items()]
    learned: list[tuple[int, int]] = []
    while len(learned) < merges:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words:
            last: Any = None
            for index, pair in enumerate(pairwise(word)):
                if wrong == "no overlap" and pair == last == (word[index - 1], word[index]):
                    last = None
                    continue
                pairs[pair] += count
                last = pair
        if not pairs or max(pairs.values()) < least + (wrong == "stops early"):
            break
        equals = [pair for pair, count in pairs.items() if count == max(pairs.values())]
        first = (ties == "first") != (wrong == "ties swapped")
        best = equals[0] if first else max(equals) if wrong == "highest" else min(equals)
        new = 256 + len(learned) + (wrong == "ids from 257")
        words = [(_merge(word, best, new), count) for word, count in words]
        learned.append(best)
    return np.array(learned, np.int64).reshape(-1, 2)


def _trained(wrong: str) -> Callable[..., Any]:
    def f(text: Any, /, *, merges: int, split: str = "none", ties: str = "lowest", min_count: int = 1) -> Any:
        return _train(text, merges, ties, min_count, wrong, split)

    return f


TRAINING = (
    "chunks joined",
    "unweighted",
    "no overlap",
    "stops early",
    "ties swapped",
    "highest",
    "ids from 257",
)


@pytest.mark.parametrize("wrong", TRAINING)
def test_wrong_training_is_caught_by_laws(wrong: str) -> None:
    assert broken_laws("tokenization.bpe", _trained(wrong)), f"{wrong} survived the laws"


def test_right_training_passes() -> None:
    assert check("tokenization.bpe", _trained("nothing"), examples=6).ok


@mutant("tokenization.bpe.encode")
def longest_match(text: Any, merges: Any, /, *, split: Any = "none") -> Any:
    spelled = token_bytes(merges)
    order = sorted(range(len(spelled)), key=lambda token: -len(spelled[token]))
    found = []
    for chunk in chunks_of(text, split=split):
        rest = chunk
        while rest:
            found.append(next(token for token in order if rest.startswith(spelled[token])))
            rest = rest[len(spelled[found[-1]]) :]
    return np.array(found, np.int64)


@mutant("tokenization.bpe.encode")
def leftmost_pair_first(text: Any, merges: Any, /, *, split: Any = "none") -> Any:
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges.tolist())}
    found: list[int] = []
    for chunk in chunks_of(text, split=split):
        word = list(chunk)
        while any(pair in ranks for pair in pairwise(word)):
            pair = next(pair for pair in pairwise(word) if pair in ranks)
            word = _merge(word, pair, 256 + ranks[pair])
        found += word
    return np.array(found, np.int64)


@mutant("tokenization.bpe.encode")
def one_merge_only(text: Any, merges: Any, /, *, split: Any = "none") -> Any:
    return encode(text, merges[:1], split=split)


@mutant("tokenization.bpe.encode")
def over_chunk_ends(text: Any, merges: Any, /, *, split: Any = "none") -> Any:
    return encode(b"".join(text), merges, split=split)


@mutant("tokenization.bpe.encode")
def rank_as_id(text: Any, merges: Any, /, *, split: Any = "none") -> Any:
    tokens = encode(text, merges, split=split)
    return np.where(tokens >= 256, tokens - 256, tokens)


@mutant("tokenization.bpe.encode")
def characters_dropped(text: Any, merges: Any, /, *, split: Any = "none") -> Any:
    return encode([chunk.decode().encode("ascii", "ignore") for chunk in text], merges, split=split)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    assert broken_laws(*MUTANTS[name]), f"{name} survived the laws"
