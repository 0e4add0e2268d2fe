"""What language models are measured by: perplexity, bits per byte, pass@k, and the standard error of a mean.

>>> round(standard_error(np.array([1.0, 2.0, 4.0])), 4), pass_at_k(np.array([1]), np.array([4]), k=2)
(0.8819, array([0.5]))
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, widen
from refimpl.objectives.cross_entropy import token_ids
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "CorpusMetrics",
    "bits_per_byte",
    "corpus_metrics",
    "pass_at_k",
    "perplexity",
    "standard_error",
]


class CorpusMetrics(NamedTuple):
    """Perplexity of a token, and bits of information a byte of text."""

    perplexity: float
    bits_per_byte: float


def _sample_corpus(rng: np.random.Generator, *, documents: int, length: int) -> Case:
    tokens = rng.integers(1, length + 1, documents)
    n_bytes = tokens * rng.integers(1, 6, documents)
    return Case((tokens * rng.uniform(0, 4, documents), tokens, n_bytes))


def _corpus_terms(case: Case) -> tuple[int, CorpusMetrics]:
    nats, tokens, n_bytes = case.args
    found = corpus_metrics(nats, tokens, n_bytes)
    each = max(float(np.sum(nats)) / float(np.sum(tokens)), 1.0)
    return len(nats) + 4, CorpusMetrics(found.perplexity * each, found.bits_per_byte)


@technique(
    "objectives.metrics",
    entries=(7,),
    kind="function",
    source=Source(
        "Gao et al. 2020",
        "arXiv:2101.00027",
        "section 3.1: bits per byte; perplexity is exp(loss)",
    ),
    axes={"documents": (1, 6), "length": (1, 40)},
    edges=({"documents": 1, "length": 1}, {"documents": 5, "length": 40}),
    sample=_sample_corpus,
    terms=_corpus_terms,
)
def corpus_metrics(nats: FloatArray, tokens: IntArray, n_bytes: IntArray, /) -> CorpusMetrics:
    """Return perplexity and bits per byte of a corpus, from the loss of each document.

    Parameters
    ----------
    nats : ndarray of float, shape (documents,)
        Total negative log-likelihood of each document: a sum over its tokens, not a mean.
    tokens, n_bytes : ndarray of int, shape (documents,)
        Predicted tokens of each document, and bytes of its text in UTF-8.

    Returns
    -------
    CorpusMetrics
        ``exp(sum of nats / sum of tokens)`` and ``sum of nats / sum of bytes / log 2``.

    Raises
    ------
    ShapeError
        If the shapes differ.
    OptionError
        If a loss or count is negative or not finite, or there is no token, or no byte.
    DTypeError
        If counts are no integers.

    Notes
    -----
    **Special cases**

    - Sums are over the corpus: the mean of documents' perplexities, or the perplexity of the mean of their
      means, is another number wherever lengths differ.
    - Perplexity depends on the tokeniser; bits per byte only on the total, so it compares tokenisers.
    - Above 709 nats a token the perplexity is inf.

    References
    ----------
    .. [1] Jelinek et al., 1977, "Perplexity: a measure of the difficulty of speech recognition tasks".
    .. [2] Gao et al., 2020, arXiv:2101.00027, section 3.1: BPB = (L_T / L_B) loss / ln 2.

    Examples
    --------
    >>> corpus_metrics(np.log(2.0) * np.array([30.0, 10.0]), np.array([15, 5]), np.array([60, 20]))
    CorpusMetrics(perplexity=4.0, bits_per_byte=0.5)
    """
    (nats,) = floating(nats=nats)
    counts = {"tokens": token_ids("tokens", tokens), "n_bytes": token_ids("n_bytes", n_bytes)}
    bind_axes({"nats": (nats, "documents"), **{k: (v, "documents") for k, v in counts.items()}})
    wide = widen(nats).astype(np.float64)
    if not np.all(np.isfinite(wide) & (wide >= 0)):
        raise OptionError("nats: expected finite losses of at least 0")
    for name, array in counts.items():
        if np.any(array < 0) or not np.any(array):
            raise OptionError(f"{name}: expected counts of at least 0, not all 0; got {array.tolist()}")
    total = math.fsum(wide)
    return CorpusMetrics(
        perplexity(total / int(counts["tokens"].sum())),
        bits_per_byte(total, n_bytes=int(counts["n_bytes"].sum())),
    )


def perplexity(loss: float, /) -> float:
    """Return ``exp(loss)``, for a loss in nats a token, averaged over *tokens*; inf where it overflows.

    Raises
    ------
    OptionError
        If the loss is negative or NaN.

    Examples
    --------
    >>> round(perplexity(math.log(50257)), 6)
    50257.0
    """
    if not loss >= 0:
        raise OptionError(f"loss: expected at least 0, got {loss}")
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(loss)))


def bits_per_byte(nats: float, /, *, n_bytes: int) -> float:
    """Return ``nats / n_bytes / log 2``: the total loss of a text over its bytes.

    Raises
    ------
    OptionError
        If the loss is negative, or there is no byte.

    Examples
    --------
    >>> bits_per_byte(100 * math.log(256), n_bytes=100)
    8.0
    """
    if not nats >= 0:
        raise OptionError(f"nats: expected at least 0, got {nats}")
    return nats / whole("n_bytes", n_bytes) / math.log(2)


def _sample_pass_at_k(rng: np.random.Generator, *, tasks: int, samples: int, k: int) -> Case:
    n = rng.integers(k, k + samples, tasks)
    return Case((rng.integers(0, n + 1), n), {"k": k})


@technique(
    "objectives.metrics.pass_at_k",
    entries=(7,),
    kind="function",
    source=Source("Chen et al. 2021", "arXiv:2107.03374", "section 2.1, eq. 1"),
    axes={"tasks": (0, 6), "samples": (1, 30), "k": (1, 12)},
    edges=({"tasks": 0}, {"tasks": 1, "samples": 1, "k": 1}, {"tasks": 6, "samples": 30, "k": 1}),
    sample=_sample_pass_at_k,
)
def pass_at_k(correct: IntArray, samples: IntArray, /, *, k: int) -> FloatArray:
    """Return pass@k, unbiased: that one of k samples is correct: ``1 - C(n - c, k) / C(n, k)``.

    Parameters
    ----------
    correct, samples : ndarray of int, shape (tasks,)
        c correct ones among n samples of each task.
    k : int
        From 1 to the smallest n.

    Returns
    -------
    ndarray of float64, shape (tasks,)
        Of each task; a benchmark prints their mean.

    Raises
    ------
    ShapeError
        If the shapes differ.
    OptionError
        Unless ``0 <= c <= n`` and ``1 <= k <= n``.
    DTypeError
        If something is no integer.

    Notes
    -----
    Computed in integers and rounded once.  With ``n - c < k`` every choice has a correct sample, and the
    result is exactly 1.  ``1 - (1 - c / n)**k`` is biased: it draws with replacement.

    References
    ----------
    .. [1] Chen et al., 2021, arXiv:2107.03374, eq. 1.

    Examples
    --------
    >>> pass_at_k(np.array([0, 1, 9]), np.array([10, 10, 10]), k=2)
    array([0. , 0.2, 1. ])
    """
    c, n = token_ids("correct", correct), token_ids("samples", samples)
    bind_axes({"correct": (c, "tasks"), "samples": (n, "tasks")})
    k = whole("k", k)
    if np.any(c < 0) or np.any(c > n):
        raise OptionError(f"correct: expected 0 to samples, got {c.tolist()} of {n.tolist()}")
    if np.any(n < k):
        raise OptionError(f"k: expected at most the number of samples, {int(n.min())}, got {k}")
    pairs = zip(c.tolist(), n.tolist(), strict=True)
    return np.array([float(1 - Fraction(math.comb(n - c, k), math.comb(n, k))) for c, n in pairs], np.float64)


def _sample_values(rng: np.random.Generator, *, n: int, values: str) -> Case:
    x = rng.standard_normal(n)
    return Case(({"normal": x, "offset": x + 1e6, "equal": np.full(n, 0.1)}[values],))


def _error_terms(case: Case) -> tuple[int, Any]:
    """Return the number of values, and the size that their differences cancel from."""
    return case.args[0].size + 4, float(np.max(np.abs(case.args[0])))


@technique(
    "objectives.metrics.standard_error",
    entries=(7,),
    kind="function",
    source=Source("Student 1908", "doi:10.2307/2331554", "sections I and II: s / sqrt(n)"),
    axes={"n": (2, 36)},
    options={"values": ("normal", "offset", "equal")},
    edges=({"n": 2}, {"n": 3}, {"n": 16}, {"n": 36, "values": "offset"}, {"n": 7, "values": "equal"}),
    sample=_sample_values,
    terms=_error_terms,
)
def standard_error(values: FloatArray, /) -> float:
    """Return the standard error of the mean, ``s / sqrt(n)``, with n - 1 in the variance.

    Parameters
    ----------
    values : ndarray of float, shape (n,)
        Results of n runs that differ in their seed; n at least 2.

    Returns
    -------
    float
        In the unit of `values`.

    Raises
    ------
    ShapeError
        If there are several axes.
    OptionError
        If there are fewer than two values, from which no spread can be told.
    DTypeError
        If the values are not real.

    Notes
    -----
    Differences are taken from the mean, so a large common offset loses nothing.  An inf or a NaN among the
    values gives NaN.

    References
    ----------
    .. [1] Student, 1908, "The probable error of a mean", Biometrika 6.

    Examples
    --------
    >>> standard_error(np.array([16.0, 17.0, 18.0, 17.0])).__round__(6)
    0.408248
    """
    (values,) = floating(values=values)
    if values.ndim != 1:
        raise ShapeError(f"values: expected 1 axis (n), got shape {values.shape}")
    if values.size < 2:
        raise OptionError(f"values: expected at least 2, got {values.size}")
    wide = widen(values).astype(np.float64)
    with np.errstate(invalid="ignore"):
        spread = wide - np.mean(wide)
    return math.sqrt(float(np.sum(np.square(spread))) / (wide.size - 1) / wide.size)
