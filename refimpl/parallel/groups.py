"""A group of ranks as a network of its own: collectives run on it unchanged, and count under the real ranks.

>>> import numpy as np
>>> from refimpl.parallel.collectives import ring_all_reduce
>>> from refimpl.parallel.comm import run_ranks
>>> def even_and_odd(comm):
...     return int(ring_all_reduce(group(comm, range(comm.rank % 2, comm.size, 2)), np.array([comm.rank]))[0])
>>> run_ranks(4, even_and_odd)
[2, 4, 2, 4]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from refimpl.errors import OptionError
from refimpl.numerics import Array
from refimpl.parallel.comm import Comm

__all__ = ["group"]


class _Group(Comm):
    """Some ranks of `comm`, numbered anew in the order given."""

    def __init__(self, comm: Comm, ranks: Sequence[int]) -> None:
        # Not the parent's: it would count this rank under its number within the group.
        self.rank = ranks.index(comm.rank)
        self.size = len(ranks)
        self.traffic = comm.traffic
        self._comm = comm
        self._ranks = ranks

    def send(self, dest: int, array: Array, tag: int = 0) -> None:
        self._check_peer("dest", dest)
        self._comm.send(self._ranks[dest], array, tag)

    def recv(self, source: int, tag: int = 0) -> Array:
        self._check_peer("source", source)
        return self._comm.recv(self._ranks[source], tag)

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        with self._comm.phase(label):
            yield

    def _post(self, dest: int, array: Array, tag: int) -> None:
        raise NotImplementedError("a group sends through its network")

    def _take(self, source: int, tag: int) -> Array:
        raise NotImplementedError("a group receives through its network")


def group(comm: Comm, ranks: Sequence[int]) -> Comm:
    """Return the network of some ranks, as one of them sees it.

    Parameters
    ----------
    comm : Comm
        This rank of the whole network, which may be a group itself.
    ranks : sequence of int
        Members in the order that numbers them; this rank is one.

    Returns
    -------
    Comm
        What it sends is counted under this rank's number in the whole network.  Two ranks that meet in
        several groups share one order of messages: groups of one mesh have at most one rank in common.

    Raises
    ------
    OptionError
        If a rank is named twice, is none of the network, or this one is missing.

    Examples
    --------
    >>> from refimpl.parallel.comm import run_ranks
    >>> run_ranks(3, lambda comm: group(comm, [2, 0, 1]).rank)
    [1, 2, 0]
    """
    members = list(ranks)
    if len(set(members)) != len(members) or not all(0 <= rank < comm.size for rank in members):
        raise OptionError(f"ranks: expected different ranks below {comm.size}; got {members}")
    if comm.rank not in members:
        raise OptionError(f"ranks: expected rank {comm.rank} among them; got {members}")
    return _Group(comm, members)
