"""Embedding and loss of which every rank has the rows of a part of the vocabulary, as parts of a model.

A rank looks up the tokens that it has, and the sum over ranks is the embedding.  Of the loss it has its part
of the logits, which never travel: ranks share each token's largest logit, the sum of its exponentials, and
the logit of its target.
"""

from __future__ import annotations

import numpy as np

from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.parallel.collectives import ring_all_reduce
from refimpl.parallel.comm import Comm
from refimpl.parallel.passes import Back, Part, Weights
from refimpl.parallel.tensor_layers import copied, gathered, scattered, summed
from refimpl.transformer.embedding import sum_rows
from refimpl.transformer.layers import Gradients
from refimpl.transformer.linear import linear, linear_vjp

__all__ = ["embedding_part", "loss_part"]


def _own(tokens: IntArray, comm: Comm, rows: int) -> tuple[BoolArray, IntArray]:
    """Return which tokens this rank has, and their rows; those of others are row 0."""
    place = tokens - comm.rank * rows
    mine = (place >= 0) & (place < rows)
    return mine, np.where(mine, place, 0)


def embedding_part(
    comm: Comm, tokens: IntArray, *, scale: float = 1.0, sequence_parallel: bool = False
) -> Part:
    """Return the embedding of tokens (B, T) as a part whose weight is ``embedding``; it has no input.

    Parameters
    ----------
    comm : Comm
        This rank among those that share the table.
    tokens : ndarray of int, shape (B, T)
        Of the whole vocabulary, and with sequence parallelism of whole sequences.
    scale : float
        Factor on embeddings.
    sequence_parallel : bool
        Whether a rank gets its part of the sequence only.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3.
    """
    end = (scattered if sequence_parallel else summed)(comm)

    def part(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        table = weights["embedding"]
        mine, rows = _own(tokens, comm, len(table))
        y, end_back = end({}, np.where(mine[..., None], table[rows] * table.dtype.type(scale), 0))

        def back(weights: Weights, dy: FloatArray) -> tuple[FloatArray, Gradients]:
            dy, _ = end_back({}, dy)
            found = sum_rows(rows[mine], scale * dy[mine], weights["embedding"].shape)
            return x, {"embedding": found}

        return y, back

    return part


def loss_part(
    comm: Comm, targets: IntArray, *, table: str = "embedding", sequence_parallel: bool = False
) -> Part:
    """Return the loss of each token, ``-log softmax(hidden tableᵀ)[target]``, as a part.

    Parameters
    ----------
    comm : Comm
        This rank among those that share the table.
    targets : ndarray of int, shape (B, T)
        Of the whole vocabulary, and with sequence parallelism of whole sequences.
    table : str
        Name of the weight: ``embedding`` if it is tied.
    sequence_parallel : bool
        Whether a rank has its part of the sequence only.

    Returns
    -------
    Part
        From states to losses (B, T), equal on all ranks.

    References
    ----------
    .. [1] Shoeybi et al., 2019, arXiv:1909.08053, section 3: the loss is fused with the parallel logits.
    """
    start = (gathered if sequence_parallel else copied)(comm)

    def part(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        hidden, start_back = start({}, x)
        logits = linear(hidden, weights[table].T)
        mine, rows = _own(targets, comm, logits.shape[-1])
        with comm.phase("vocabulary all-reduce"):
            largest = ring_all_reduce(comm, logits.max(axis=-1), np.maximum)
        powers = np.exp(logits - largest[..., None])
        chosen = np.take_along_axis(logits, rows[..., None], axis=-1)[..., 0] - largest
        with comm.phase("vocabulary all-reduce"):
            sums, chosen = ring_all_reduce(comm, np.stack([powers.sum(axis=-1), np.where(mine, chosen, 0)]))

        def back(weights: Weights, dy: FloatArray) -> tuple[FloatArray, Gradients]:
            dlogits = powers / sums[..., None]
            place = rows[..., None]
            ours = np.take_along_axis(dlogits, place, axis=-1) - mine[..., None]
            np.put_along_axis(dlogits, place, ours, axis=-1)
            dhidden, dtable, _ = linear_vjp(hidden, weights[table].T, dlogits * dy[..., None])
            return start_back({}, dhidden)[0], {table: dtable.T}

        return np.log(sums) - chosen, back

    return part
