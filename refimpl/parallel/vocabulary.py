"""Embedding and loss whose vocabulary is spread over ranks, on whole arrays: what the records are about.

What a rank does stands in `refimpl.parallel.vocabulary_layers`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, widen
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.parallel.tensor_layers import own_weights
from refimpl.parallel.vocabulary_layers import embedding_part, loss_part
from refimpl.registry import Case, Source, technique
from refimpl.transformer.embedding import indices
from refimpl.transformer.layers import Gradients
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "vocabulary_embedding",
    "vocabulary_embedding_vjp",
    "vocabulary_loss",
    "vocabulary_loss_vjp",
]


class TableGradients(NamedTuple):
    """Gradient of the embedding's table."""

    dtable: FloatArray


class LossGradients(NamedTuple):
    """Gradients of states and of the head's table."""

    dhidden: FloatArray
    dtable: FloatArray


def sample_embedding(
    rng: np.random.Generator, *, ranks: int, B: int, T: int, rows: int, M: int, scaled: bool
) -> Case:
    """Return one call of `vocabulary_embedding`."""
    options = {"ranks": ranks, "scale": M**0.5 if scaled else 1.0}
    return Case((rng.standard_normal((ranks * rows, M)), rng.integers(0, ranks * rows, (B, T))), options)


def sample_loss(
    rng: np.random.Generator, *, ranks: int, B: int, T: int, rows: int, M: int, size: str
) -> Case:
    """Return one call of `vocabulary_loss`; with "large" logits an exponential would overflow."""
    hidden, table = rng.standard_normal((B, T, M)), rng.standard_normal((ranks * rows, M))
    factor = {"small": 1.0, "large": 1000.0}[size]
    return Case((hidden, factor * table, rng.integers(0, ranks * rows, (B, T))), {"ranks": ranks})


_SOURCE = Source("Shoeybi et al. 2019", "arXiv:1909.08053", "section 3, embedding and cross-entropy")
_AXES = {"ranks": (1, 4), "B": (1, 2), "T": (0, 3), "rows": (1, 3), "M": (1, 4)}
_EDGES: tuple[dict[str, Any], ...] = (
    {"ranks": 1, "B": 1, "T": 1, "rows": 1, "M": 1},
    {"ranks": 4, "B": 2, "T": 3, "rows": 1, "M": 2},
    {"ranks": 3, "B": 0, "T": 2},
)


@technique(
    "parallel.tensor.embedding",
    entries=(94,),
    kind="function",
    source=_SOURCE,
    axes=_AXES,
    options={"scaled": (False, True)},
    edges=_EDGES,
    sample=sample_embedding,
    vjp="refimpl.parallel.vocabulary:vocabulary_embedding_vjp",
)
def vocabulary_embedding(
    table: FloatArray,
    tokens: IntArray,
    /,
    *,
    ranks: int,
    scale: float = 1.0,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> FloatArray:
    """Return the row of `table` of each token, times `scale`, when ranks have V / p rows each.

    Parameters
    ----------
    table : ndarray of float, shape (V, M)
        One row a token of the vocabulary, which is padded to a multiple of the ranks.
    tokens : ndarray of int, shape (B, T)
        Token ids in [0, V).
    ranks : int
        p.
    scale : float
        Factor on embeddings.
    traffic : Traffic, optional
        Counts what the ranks send: one all-reduce of the embeddings.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray of float, shape (B, T, M)
        In the dtype of `table`.

    Raises
    ------
    ShapeError
        If the vocabulary does not divide by the ranks, or axes are missing.
    OptionError
        If a token is outside the vocabulary, or there is no rank.
    DTypeError
        If tokens are no integers, or the table is not real.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3.

    Examples
    --------
    >>> vocabulary_embedding(np.array([[1.0], [2.0]]), np.array([[1, 0]]), ranks=2)[..., 0]
    array([[2., 1.]])
    """
    dtype, wide, tokens = _table(table, tokens, "tokens", ranks)

    def run(comm: Comm) -> FloatArray:
        own = own_weights({"embedding": wide}, comm.rank, ranks)
        return embedding_part(comm, tokens, scale=scale)(own, np.zeros(0, wide.dtype))[0]

    return round_to(launch(ranks, run, traffic=traffic)[0], dtype)


def vocabulary_embedding_vjp(
    table: FloatArray,
    tokens: IntArray,
    dy: FloatArray,
    /,
    *,
    ranks: int,
    scale: float = 1.0,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> TableGradients:
    """Return the gradient of ``sum(dy * vocabulary_embedding(table, tokens, ranks=ranks, scale=scale))``.

    Parameters
    ----------
    table, tokens, ranks, scale, traffic, launch
        As for `vocabulary_embedding`.
    dy : ndarray of float, shape (B, T, M)
        Gradient of the output.

    Returns
    -------
    TableGradients
        The rows of all ranks; nothing is sent for them.

    Examples
    --------
    >>> vocabulary_embedding_vjp(np.zeros((2, 1)), np.array([[1, 1]]), np.ones((1, 2, 1)), ranks=2).dtable
    array([[0.],
           [2.]])
    """
    dtype, wide, tokens = _table(table, tokens, "tokens", ranks)
    (dy,) = floating(dy=dy)
    bind_axes({"tokens": (tokens, "B T"), "table": (wide, "V M"), "dy": (dy, "B T M")})

    def run(comm: Comm) -> FloatArray:
        own = own_weights({"embedding": wide}, comm.rank, ranks)
        _, back = embedding_part(comm, tokens, scale=scale)(own, np.zeros(0, wide.dtype))
        return back(own, widen(dy))[1]["embedding"]

    return TableGradients(round_to(np.concatenate(launch(ranks, run, traffic=traffic)), dtype))


@technique(
    "parallel.tensor.cross_entropy",
    entries=(94,),
    kind="function",
    source=_SOURCE,
    axes=_AXES,
    options={"size": ("small", "large")},
    edges=(*_EDGES, {"ranks": 2, "B": 1, "T": 2, "rows": 2, "M": 2, "size": "large"}),
    sample=sample_loss,
    vjp="refimpl.parallel.vocabulary:vocabulary_loss_vjp",
)
def vocabulary_loss(
    hidden: FloatArray,
    table: FloatArray,
    targets: IntArray,
    /,
    *,
    ranks: int,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> FloatArray:
    """Return ``-log softmax(hidden tableᵀ)[target]`` of each token, when ranks have V / p logits each.

    Parameters
    ----------
    hidden : ndarray of float, shape (B, T, M)
        States, which every rank has.
    table : ndarray of float, shape (V, M)
        The head.
    targets : ndarray of int, shape (B, T)
        Right answers in [0, V).
    ranks : int
        p.
    traffic : Traffic, optional
        Counts what the ranks send: three numbers a token, all-reduced; no logits.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    ndarray of float, shape (B, T)
        Losses in nats, in the common dtype.

    Raises
    ------
    ShapeError
        If the vocabulary does not divide by the ranks, or shapes do not fit.
    OptionError
        If a target is outside the vocabulary, or there is no rank.
    DTypeError
        If targets are no integers, or another array is not real.

    Notes
    -----
    The largest logit over all ranks is subtracted before exponentials are taken, so none overflows.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3.

    Examples
    --------
    >>> losses = vocabulary_loss(np.ones((1, 1, 1)), np.zeros((4, 1)), np.array([[3]]), ranks=2)
    >>> np.exp(losses).round(12)
    array([[4.]])
    """
    dtype, states, wide, targets = _loss_input(hidden, table, targets, ranks)

    def run(comm: Comm) -> FloatArray:
        own = own_weights({"embedding": wide}, comm.rank, ranks)
        return loss_part(comm, targets)(own, states)[0]

    return round_to(launch(ranks, run, traffic=traffic)[0], dtype)


def vocabulary_loss_vjp(
    hidden: FloatArray,
    table: FloatArray,
    targets: IntArray,
    dy: FloatArray,
    /,
    *,
    ranks: int,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> LossGradients:
    """Return the gradients of ``sum(dy * vocabulary_loss(hidden, table, targets, ranks=ranks))``.

    Parameters
    ----------
    hidden, table, targets, ranks, traffic, launch
        As for `vocabulary_loss`.
    dy : ndarray of float, shape (B, T)
        Gradient of the losses.

    Returns
    -------
    LossGradients
        That of the states is all-reduced; that of the table are the rows of all ranks.

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> vocabulary_loss_vjp(one, np.zeros((2, 1)), np.array([[1]]), one[0], ranks=2).dtable
    array([[ 0.5],
           [-0.5]])
    """
    dtype, states, wide, targets = _loss_input(hidden, table, targets, ranks)
    (dy,) = floating(dy=dy)
    bind_axes({"targets": (targets, "B T"), "dy": (dy, "B T")})

    def run(comm: Comm) -> tuple[FloatArray, Gradients]:
        own = own_weights({"embedding": wide}, comm.rank, ranks)
        return loss_part(comm, targets)(own, states)[1](own, widen(dy))

    found = launch(ranks, run, traffic=traffic)
    dtable = np.concatenate([rows["embedding"] for _, rows in found])
    return LossGradients(round_to(found[0][0], dtype), round_to(dtable, dtype))


def _table(
    table: FloatArray, tokens: IntArray, name: str, ranks: int
) -> tuple[np.dtype[Any], FloatArray, IntArray]:
    """Check a table and tokens of its vocabulary; return the table's dtype, the table widened, the tokens."""
    (table,) = floating(table=table)
    if table.ndim != 2 or table.shape[0] % whole("ranks", ranks):
        raise ShapeError(f"table: expected (V, M), V divisible by {ranks} ranks; got {table.shape}; pad it")
    tokens = indices(name, tokens, table.shape[0])
    bind_axes({name: (tokens, "B T")})
    return table.dtype, widen(table), tokens


def _loss_input(
    hidden: FloatArray, table: FloatArray, targets: IntArray, ranks: int
) -> tuple[np.dtype[Any], FloatArray, FloatArray, IntArray]:
    hidden, table = floating(hidden=hidden, table=table)
    dtype, wide, targets = _table(table, targets, "targets", ranks)
    bind_axes({"hidden": (hidden, "B T M"), "table": (wide, "V M"), "targets": (targets, "B T")})
    return dtype, widen(hidden), wide, targets
