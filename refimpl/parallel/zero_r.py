"""ZeRO-R's partitioned activation checkpoints (P_a): model-parallel ranks divide what they all need.

Ranks that split a model see the same input of every block.  Instead of a copy each, a rank keeps 1/N of it
and gathers the rest when the backward pass recomputes the block: one all-gather of s * h a block.
"""

from __future__ import annotations

import numpy as np

from refimpl.numerics import Array
from refimpl.parallel.collectives import padded, ring_all_gather
from refimpl.parallel.comm import Comm
from refimpl.parallel.network import Keep

__all__ = ["PartitionedKeep"]


class PartitionedKeep(Keep):
    """Keeps this rank's chunk of every input; pass it to `loss_and_gradients` as `inputs`.

    All ranks must run the same batch: their inputs are equal.

    Parameters
    ----------
    comm : Comm
        This rank, among those that hold the same inputs.

    Attributes
    ----------
    peak_bytes : int
        Most bytes kept at once.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, sections 6.1 and 8.

    Examples
    --------
    >>> from refimpl.parallel.comm import run_ranks
    >>> def program(comm):
    ...     keep = PartitionedKeep(comm)
    ...     keep.save(np.arange(6.0).reshape(2, 3))
    ...     return keep.peak_bytes, keep.restore().shape
    >>> run_ranks(2, program)
    [(24, (2, 3)), (24, (2, 3))]
    """

    def __init__(self, comm: Comm) -> None:
        super().__init__()
        self._comm = comm
        self.peak_bytes = 0

    def save(self, x: Array) -> None:
        """Keep this rank's chunk of `x`."""
        chunk = np.array(padded(x, self._comm.size).reshape(self._comm.size, -1)[self._comm.rank])
        self.append((chunk, x.shape))
        self.peak_bytes = max(self.peak_bytes, sum(kept.nbytes for kept, _ in self))

    def restore(self) -> Array:
        """Gather the last input kept, and forget it."""
        chunk, shape = self.pop()
        with self._comm.phase("checkpoints"):
            whole = ring_all_gather(self._comm, chunk)
        return whole[: int(np.prod(shape))].reshape(shape)
