"""Positions that are added to tokens, sinusoidal and learned, and the slopes by which ALiBi biases scores.

Rotary positions, which turn queries and keys, have a file of their own.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.embedding import indices, sum_rows
from refimpl.validation import floating, positive, whole

__all__ = [
    "LearnedGradients",
    "alibi_slopes",
    "learned_positions",
    "learned_positions_vjp",
    "sinusoidal_positions",
]

Layout: TypeAlias = Literal["interleaved", "concatenated"]


class LearnedGradients(NamedTuple):
    """Gradient of the table; positions have none."""

    dtable: FloatArray


def _sample_sinusoidal(rng: np.random.Generator, *, T: int, pairs: int, far: bool, layout: str) -> Case:
    first = int(rng.integers(0, 10_000)) if far else 0
    return Case((first + np.arange(T),), {"width": 2 * pairs, "layout": layout})


def _sinusoidal_terms(case: Case) -> tuple[int, Any]:
    """An angle is off by some eps times itself, and so is its sine."""
    (p,) = case.args
    return 2, np.broadcast_to(1.0 + np.abs(p)[:, None], (len(p), case.kwargs["width"]))


@technique(
    "transformer.positions",
    entries=(106,),
    kind="function",
    source=Source("Vaswani et al. 2017", "arXiv:1706.03762", "section 3.5"),
    axes={"T": (0, 12), "pairs": (1, 6)},
    options={"far": (False, True), "layout": ("interleaved", "concatenated")},
    edges=({"T": 0}, {"T": 1, "pairs": 1}, {"T": 12, "far": True}),
    sample=_sample_sinusoidal,
    terms=_sinusoidal_terms,
)
def sinusoidal_positions(
    positions: IntArray, /, *, width: int, base: float = 10000.0, layout: Layout = "interleaved"
) -> FloatArray:
    """Return ``sin(p / base^(2i/M))`` and ``cos(p / base^(2i/M))`` for each position p and each i < M / 2.

    Parameters
    ----------
    positions : ndarray of int, shape (...)
        Positions, from 0.
    width : int
        M, even.
    base : float
        Ratio of the longest to the shortest wave length, nearly: the last pair stops short of it.
    layout : {"interleaved", "concatenated"}
        ``"interleaved"``: sine at feature 2i, cosine at 2i + 1, as printed.  ``"concatenated"``: all sines,
        then all cosines.  tensor2tensor and fairseq concatenate and also divide by ``M/2 - 1`` in place of
        ``M/2``, which no argument here does.

    Returns
    -------
    ndarray of float64, shape (..., M)
        To be added to (scaled) embeddings.

    Raises
    ------
    OptionError
        If `width` is odd or below 2, or `base` is not above 0.
    DTypeError
        If positions are not real numbers.

    Notes
    -----
    The vector of p + k is a fixed rotation of that of p: pair i turns by ``k / base^(2i/M)``.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, section 3.5.

    Examples
    --------
    >>> sinusoidal_positions(np.array([0, 1]), width=4).round(4)
    array([[0.    , 1.    , 0.    , 1.    ],
           [0.8415, 0.5403, 0.01  , 1.    ]])
    """
    if whole("width", width, 2) % 2:
        raise OptionError(f"width: expected an even number, got {width}")
    if layout not in ("interleaved", "concatenated"):
        raise OptionError(f'layout: expected "interleaved" or "concatenated", got {layout!r}')
    (p,) = floating(positions=positions)
    frequencies = positive("base", base) ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    angles = widen(p).astype(np.float64)[..., None] * frequencies
    pair = np.sin(angles), np.cos(angles)
    if layout == "concatenated":
        return np.concatenate(pair, axis=-1)
    return np.stack(pair, axis=-1).reshape(*p.shape, width)


def _sample_learned(rng: np.random.Generator, *, T: int, P: int, M: int, offset: int) -> Case:
    table = rng.standard_normal((P + offset, M))
    return Case((table, rng.integers(0, P, T)), {"offset": offset})


@technique(
    "transformer.positions.learned",
    entries=(106,),
    kind="function",
    source=Source("Gehring et al. 2017", "arXiv:1705.03122", "section 3.1"),
    axes={"T": (0, 8), "P": (1, 5), "M": (1, 5)},
    options={"offset": (0, 2)},
    edges=({"T": 0}, {"T": 1, "P": 1, "M": 1, "offset": 0}, {"T": 8, "P": 2, "offset": 2}),
    sample=_sample_learned,
    vjp="refimpl.transformer.positions:learned_positions_vjp",
)
def learned_positions(table: FloatArray, positions: IntArray, /, *, offset: int = 0) -> FloatArray:
    """Return the row of `table` of each position, counted from `offset`.

    Parameters
    ----------
    table : ndarray of float, shape (P + offset, M)
        One row a position.
    positions : ndarray of int, shape (...)
        Positions in [0, P).
    offset : int
        Rows before position 0: 2 in OPT and BART (a relic of padding ids), 0 in BERT and GPT-2.

    Returns
    -------
    ndarray of float, shape (..., M)
        In the dtype of `table`.

    Raises
    ------
    OptionError
        If a position is outside the table, or `offset` is below 0.
    DTypeError, ShapeError
        If the positions are no integers, or the table has not two axes.

    References
    ----------
    .. [1] Gehring et al., 2017, arXiv:1705.03122, section 3.1.
    .. [2] Zhang et al., 2022, arXiv:2205.01068 (OPT); the offset is in ``OPTLearnedPositionalEmbedding``.

    Examples
    --------
    >>> learned_positions(np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1]), offset=2)
    array([[2.],
           [3.]])
    """
    (table,) = floating(table=table)
    return table[_rows(table, positions, offset)]


def learned_positions_vjp(
    table: FloatArray, positions: IntArray, dy: FloatArray, /, *, offset: int = 0
) -> LearnedGradients:
    """Return the gradient of ``sum(dy * learned_positions(table, positions, offset=offset))``.

    Parameters
    ----------
    table, positions, offset
        As for `learned_positions`.
    dy : ndarray of float, shape (..., M)
        Gradient of the output.

    Returns
    -------
    LearnedGradients
        A position that occurs several times sums.

    Examples
    --------
    >>> learned_positions_vjp(np.zeros((2, 1)), np.array([1, 1]), np.ones((2, 1))).dtable[:, 0]
    array([0., 2.])
    """
    table, dy = floating(table=table, dy=dy)
    return LearnedGradients(round_to(sum_rows(_rows(table, positions, offset), dy, table.shape), table.dtype))


def _rows(table: FloatArray, positions: IntArray, offset: int) -> IntArray:
    if table.ndim != 2:
        raise ShapeError(f"table: expected 2 axes (P, M), got shape {table.shape}")
    return indices("positions", positions, len(table) - whole("offset", offset, 0)) + offset


def _sample_alibi(rng: np.random.Generator, *, H: int) -> Case:  # noqa: ARG001 (there is nothing to draw)
    return Case((), {"num_heads": H})


@technique(
    "transformer.positions.alibi",
    entries=(106,),
    kind="function",
    source=Source("Press et al. 2022", "arXiv:2108.12409", "section 3"),
    axes={"H": (1, 40)},
    edges=({"H": 1}, {"H": 8}, {"H": 12}, {"H": 20}),
    sample=_sample_alibi,
)
def alibi_slopes(*, num_heads: int) -> FloatArray:
    """Return ALiBi's slope of each head, ``2^(-8h/H)`` for h = 1 to H where H is a power of two.

    Parameters
    ----------
    num_heads : int
        H.

    Returns
    -------
    ndarray of float64, shape (H,)
        For the option `alibi_slopes` of the attentions, which subtract ``slope * |i - j|`` from scores.

    Raises
    ------
    OptionError
        If `num_heads` is below 1.
    DTypeError
        If it is no integer.

    Notes
    -----
    Where H lies between powers of two, n < H < 2n, the slopes of n heads come first, and then every other
    slope of 2n heads from the first on: the rule of the authors' code, which BLOOM follows.

    References
    ----------
    .. [1] Press, Smith, Lewis, 2022, arXiv:2108.12409, section 3.
    .. [2] github.com/ofirpress/attention_with_linear_biases, ``fairseq/models/transformer.py``, get_slopes.

    Examples
    --------
    >>> alibi_slopes(num_heads=4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> alibi_slopes(num_heads=3)
    array([0.0625    , 0.00390625, 0.25      ])
    """
    n = 1 << (whole("num_heads", num_heads).bit_length() - 1)
    return np.concatenate([_geometric(n), _geometric(2 * n)[::2][: num_heads - n]])


def _geometric(heads: int) -> FloatArray:
    return np.exp2(-8.0 * np.arange(1, heads + 1) / heads)
