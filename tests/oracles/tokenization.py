"""Oracles of byte-pair encoding: the tokenizers library, and the paper's algorithm on strings."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def pieces(text: Any, split: str) -> list[bytes]:
    """Cut by tokenizers' byte-level pre-tokeniser, which has GPT-2's pattern."""
    if split == "none":
        return [item for item in text if item]
    level = library("tokenizers").pre_tokenizers.ByteLevel(add_prefix_space=False)
    spans = ((item, level.pre_tokenize_str(item.decode())) for item in text)
    return [item.decode()[a:b].encode() for item, found in spans for _, (a, b) in found]


def paper_merges(words: list[bytes], wanted: int, ties: str, least: int) -> list[tuple[int, int]]:
    """Algorithm 1 of Sennrich et al.: a vocabulary of spaced symbols, and a regular expression to merge."""
    vocabulary: dict[str, int] = defaultdict(int)
    for word in words:
        vocabulary[" ".join(map(str, word))] += 1
    learned: list[tuple[int, int]] = []
    for token in range(256, 256 + wanted):
        statistics: dict[tuple[int, int], int] = defaultdict(int)
        for word_symbols, frequency in vocabulary.items():
            symbols = [int(s) for s in word_symbols.split()]
            for index in range(len(symbols) - 1):
                statistics[symbols[index], symbols[index + 1]] += frequency
        ordered = list(statistics) if ties == "first" else sorted(statistics)
        best = max(ordered, key=statistics.__getitem__, default=None)  # max keeps the first of equals
        if best is None or statistics[best] < least:
            break
        bigram = re.compile(rf"(?<!\S){best[0]} {best[1]}(?!\S)")
        vocabulary = {bigram.sub(str(token), word): count for word, count in vocabulary.items()}
        learned.append(best)
    return learned


@oracle("tokenization.bpe")
def sennrich_bpe(
    text: Any, /, *, merges: int, split: str = "none", ties: str = "lowest", min_count: int = 1
) -> Any:
    """The paper's listing, with this project's tie rules."""
    learned = paper_merges(pieces(text, split), merges, ties, min_count)
    return np.array(learned, np.int64).reshape(len(learned), 2)


def _byte_characters() -> dict[int, str]:
    """GPT-2's characters for bytes: printable ones stand for themselves, others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {
        value: chr(256 + index) for index, value in enumerate(others)
    }


@oracle("tokenization.bpe")
def tokenizers_bpe(
    text: Any, /, *, merges: int, split: str = "none", ties: str = "lowest", min_count: int = 1
) -> Any:
    """tokenizers' BpeTrainer: pairs of lowest ids win."""
    if ties != "lowest" or any(set(item) - set(range(33, 127)) for item in text) or not any(text):
        raise NotImplementedError("its ids follow the order of bytes for printable ASCII only")
    tokenizers = library("tokenizers")
    characters = _byte_characters()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=min_count,
        show_progress=False,
        initial_alphabet=list(characters.values()),
    )
    words = pieces(text, split)
    tokenizer.train_from_iterator(["".join(characters[b] for b in word) for word in words], trainer)
    state = __import__("json").loads(tokenizer.to_str())["model"]
    back = {character: value for value, character in characters.items()}
    ids = {text: back[text] for text in back} | {
        "".join(pair): 256 + rank for rank, pair in enumerate(state["merges"])
    }
    if len(ids) < 256 + len(state["merges"]):
        raise NotImplementedError("two merges spell the same token, which tokenizers takes for one")
    learned = [(ids[left], ids[right]) for left, right in state["merges"]]
    return np.array(learned, np.int64).reshape(len(learned), 2)


@oracle("tokenization.bpe.encode")
def tokenizers_encode(text: Any, merges: Any, /, *, split: str = "none") -> Any:
    """tokenizers' BPE model, given the same merges."""
    tokenizers = library("tokenizers")
    characters = _byte_characters()
    spelled = [characters[value] for value in range(256)]
    pairs = []
    for left, right in merges.tolist():
        pairs.append((spelled[left], spelled[right]))
        spelled.append(spelled[left] + spelled[right])
    if len(set(spelled)) < len(spelled):
        raise NotImplementedError("two merges spell the same token, which tokenizers takes for one")
    vocabulary = {word: index for index, word in enumerate(spelled)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    found: list[int] = []
    for word in pieces(text, split):
        found += model.encode("".join(characters[b] for b in word)).ids
    return np.array(found, np.int64)


@oracle("tokenization.bpe.encode")
def string_encode(text: Any, merges: Any, /, *, split: str = "none") -> Any:
    """Replacing one string by another, merge after merge; characters stand for tokens."""
    found: list[int] = []
    for word in pieces(text, split):
        line = "".join(chr(0x4000 + byte) for byte in word)
        for rank, (left, right) in enumerate(merges.tolist()):
            line = line.replace(chr(0x4000 + left) + chr(0x4000 + right), chr(0x4000 + 256 + rank))
        found += [ord(character) - 0x4000 for character in line]
    return np.array(found, np.int64)
