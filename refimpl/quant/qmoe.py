"""QMoE's code: ternary weights in less than one bit each, by a fixed dictionary of sequences.

Most ternary weights are 0.  Sequences of pairs of weights, the 2**16 most probable ones under that share of
zeros, have 16-bit codewords: a codeword stands for 2 to 28 weights.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from typing import NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import IntArray
from refimpl.objectives.cross_entropy import token_ids
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, whole

__all__ = ["QMoE", "pair_dictionary", "qmoe", "qmoe_decode"]

# The share of zeros in the paper's quantised experts, and its longest sequence, 14 pairs.
ZEROS, MAX_PAIRS = 0.885, 14
Sequence = tuple[int, ...]


class QMoE(NamedTuple):
    """Codewords of all rows, one after another, and where each row starts [rows + 1]."""

    codewords: IntArray
    row_starts: IntArray


@functools.lru_cache(maxsize=8)
def pair_dictionary(
    bits: int = 16, zeros: float = ZEROS, max_pairs: int = MAX_PAIRS
) -> tuple[tuple[Sequence, ...], dict[Sequence, int]]:
    """Return the sequences of pairs that codewords stand for, most probable first, and their numbers.

    Parameters
    ----------
    bits : int
        Of a codeword, 4 to 16.
    zeros : float
        Probability of a zero weight; -1 and 1 share the rest.
    max_pairs : int
        Longest sequence.

    Returns
    -------
    sequences : tuple of tuple of int
        A pair of weights (a, b) is the number ``3 (a + 1) + b + 1``.
    number : dict of tuple to int
        The inverse.

    Raises
    ------
    OptionError
        If `bits` is not 4 to 16, `zeros` not in (0, 1), or `max_pairs` below 1.

    Notes
    -----
    Weights count as independent.  A sequence is less probable than each of its beginnings, which are
    therefore in the dictionary too; of equally probable ones the first in lexicographic order is taken.
    The nine single pairs are always there: without them not every row could be coded.

    References
    ----------
    .. [1] Frantar and Alistarh, 2023, arXiv:2310.16795, section 4.2, Dictionary Selection.

    Examples
    --------
    >>> sequences, number = pair_dictionary(bits=4)
    >>> len(sequences), sequences[0], number[(4, 4)]
    (16, (4,), 1)
    """
    whole("bits", bits, least=4)
    whole("max_pairs", max_pairs)
    if bits > 16 or not 0 < zeros < 1:
        raise OptionError(f"bits, zeros: expected 4 to 16 and a share in (0, 1), got {bits} and {zeros}")
    # Surprise, to be kept small: by counts of zero and of other weights, so that equal chances compare equal.
    cost = (math.log((1 - zeros) / 2), math.log(zeros))

    def surprise(sequence: Sequence) -> float:
        count = sum((pair // 3 == 1) + (pair % 3 == 1) for pair in sequence)
        return -(count * cost[1] + (2 * len(sequence) - count) * cost[0])

    chosen: list[Sequence] = []
    waiting: list[tuple[float, Sequence]] = [(surprise((pair,)), (pair,)) for pair in range(9)]
    heapq.heapify(waiting)
    singles = 9
    while waiting and len(chosen) + singles < 2**bits:
        _, sequence = heapq.heappop(waiting)
        singles -= len(sequence) == 1
        chosen.append(sequence)
        if len(sequence) < max_pairs:
            for pair in range(9):
                longer: Sequence = (*sequence, pair)
                heapq.heappush(waiting, (surprise(longer), longer))
    chosen += [sequence for _, sequence in sorted(waiting) if len(sequence) == 1]
    return tuple(chosen), {sequence: index for index, sequence in enumerate(chosen)}


def sample_ternary(
    rng: np.random.Generator, *, rows: int, n: int, bits: int, max_pairs: int, values: str
) -> Case:
    """Return a call of `qmoe` on ternary weights.

    Examples
    --------
    >>> sample_ternary(np.random.default_rng(0), rows=1, n=3, bits=4, max_pairs=2, values="zero").args[0]
    array([[0, 0, 0]], dtype=int8)
    """
    dense = {"sparse": 0.1, "dense": 1.0, "zero": 0.0}[values]
    weights = np.where(rng.random((rows, n)) < dense, rng.choice([-1, 1], (rows, n)), 0)
    return Case((weights.astype(np.int8),), {"bits": bits, "max_pairs": max_pairs})


@technique(
    "quant.qmoe",
    entries=(76,),
    kind="function",
    source=Source("Frantar and Alistarh 2023", "arXiv:2310.16795", "section 4.2"),
    axes={"rows": (1, 4), "n": (1, 40), "bits": (4, 8), "max_pairs": (1, 14)},
    options={"values": ("sparse", "dense", "zero")},
    edges=(
        {"rows": 0, "n": 4},
        {"rows": 2, "n": 0},
        {"rows": 1, "n": 1, "values": "dense"},
        {"rows": 3, "n": 29, "values": "zero", "bits": 8, "max_pairs": 14},
        {"rows": 3, "n": 33, "values": "dense", "bits": 4, "max_pairs": 1},
        {"rows": 2, "n": 57, "values": "sparse", "bits": 8, "max_pairs": 14},
    ),
    sample=sample_ternary,
    exact=True,
)
def qmoe(weights: IntArray, /, *, bits: int = 16, zeros: float = ZEROS, max_pairs: int = MAX_PAIRS) -> QMoE:
    """Return the codewords of ternary weights, each row coded by itself.

    Parameters
    ----------
    weights : ndarray of int, shape (rows, n)
        -1, 0 and 1; a row of odd length is coded with a 0 after it.
    bits, zeros, max_pairs
        As for `pair_dictionary`.

    Returns
    -------
    QMoE
        ``codewords`` uint16, ``row_starts`` int32, as released: fewer than 2**31 codewords.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If `weights` is no matrix of integers from -1 to 1, or the dictionary's options are out of range.

    Notes
    -----
    A row takes, from its start, the longest sequence of the dictionary each time.  Never more than one
    codeword for two weights, and one for ``2 max_pairs`` zeros if that sequence is in the dictionary.

    References
    ----------
    .. [1] Frantar and Alistarh, 2023, arXiv:2310.16795, section 4.2 and Algorithm 1.

    Examples
    --------
    >>> coded = qmoe(np.array([[0] * 28, [1, 0] * 14]))
    >>> np.diff(coded.row_starts)
    array([1, 5], dtype=int32)
    """
    weights = as_array("weights", weights)
    bind_axes({"weights": (weights, "rows n")})
    if not np.issubdtype(weights.dtype, np.integer):
        raise DTypeError(f"weights: expected integers, got {weights.dtype}")
    if weights.size and not -1 <= weights.min() <= weights.max() <= 1:
        raise OptionError(f"weights: expected -1, 0 and 1, got {weights.min()} to {weights.max()}")
    _, number = pair_dictionary(bits, zeros, max_pairs)
    even = np.pad(weights.astype(np.int64), ((0, 0), (0, weights.shape[1] % 2)))
    pairs = 3 * (even[:, 0::2] + 1) + even[:, 1::2] + 1
    codewords: list[int] = []
    starts = [0]
    for row in pairs.tolist():
        place = 0
        while place < len(row):
            length = 1
            while tuple(row[place : place + length + 1]) in number and place + length < len(row):
                length += 1
            codewords.append(number[tuple(row[place : place + length])])
            place += length
        starts.append(len(codewords))
    return QMoE(np.array(codewords, np.uint16), np.array(starts, np.int32))


def qmoe_decode(
    codewords: IntArray,
    row_starts: IntArray,
    /,
    *,
    n: int,
    bits: int = 16,
    zeros: float = ZEROS,
    max_pairs: int = MAX_PAIRS,
) -> IntArray:
    """Return the ternary weights of codewords.

    Parameters
    ----------
    codewords, row_starts
        As from `qmoe`.
    n : int
        Length of a row.
    bits, zeros, max_pairs
        Those of the dictionary that coded them.

    Returns
    -------
    ndarray of int8, shape (rows, n)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If a row's codewords stand for another number of weights, or a codeword for none; if the starts do not
        frame the rows, or anything is no integer.

    Examples
    --------
    >>> qmoe_decode(*qmoe(np.array([[0, 0, -1], [1, 0, 0]])), n=3)
    array([[ 0,  0, -1],
           [ 1,  0,  0]], dtype=int8)
    """
    sequences, _ = pair_dictionary(bits, zeros, max_pairs)
    codewords, row_starts = token_ids("codewords", codewords), token_ids("row_starts", row_starts)
    bind_axes({"codewords": (codewords, "count"), "row_starts": (row_starts, "rows")})
    whole("n", n, least=0)
    if codewords.size and not 0 <= codewords.min() <= codewords.max() < len(sequences):
        raise ShapeError(
            f"codewords: expected 0 to {len(sequences) - 1}, got {codewords.min()} to {codewords.max()}"
        )
    ends = row_starts[[0, -1]].tolist() if row_starts.size else []
    if ends != [0, codewords.size] or np.any(np.diff(row_starts) < 0):
        raise ShapeError(
            f"row_starts: expected to rise from 0 to {codewords.size}, got {row_starts.tolist()}"
        )
    rows = np.zeros((len(row_starts) - 1, n), np.int8)
    for row, (start, end) in enumerate(itertools.pairwise(row_starts.tolist())):
        pairs = np.array([pair for code in codewords[start:end] for pair in sequences[code]], np.int64)
        values = np.stack([pairs // 3 - 1, pairs % 3 - 1], axis=1).reshape(-1)
        if values.size != n + n % 2:
            raise ShapeError(
                f"row {row}: expected {n + n % 2} weights, its codewords stand for {values.size}"
            )
        rows[row] = values[:n]
    return rows
