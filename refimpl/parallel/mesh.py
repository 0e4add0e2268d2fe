"""Ranks in three dimensions: those that share a layer, those that share a batch, those that share the depth.

>>> mesh = Mesh(tensor=2, pipeline=2, data=2)
>>> [mesh.place(rank) for rank in (0, 1, 2, 4)]
[Place(tensor=0, pipeline=0, data=0), Place(tensor=1, pipeline=0, data=0),
 Place(tensor=0, pipeline=0, data=1), Place(tensor=0, pipeline=1, data=0)]
"""

from __future__ import annotations

from typing import NamedTuple

from refimpl.errors import OptionError
from refimpl.parallel.comm import Comm
from refimpl.parallel.groups import group
from refimpl.validation import whole

__all__ = ["Axes", "Mesh", "Place"]


class Place(NamedTuple):
    """Where a rank stands along each dimension."""

    tensor: int
    pipeline: int
    data: int


class Axes(NamedTuple):
    """A rank's groups: each holds the ranks that differ from it along one dimension alone."""

    tensor: Comm
    pipeline: Comm
    data: Comm


class Mesh(NamedTuple):
    """How many ranks there are along each dimension.

    Ranks count fastest along `tensor`, whose ranks talk most, then along `data`, slowest along `pipeline`,
    as in Megatron-LM.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def place(self, rank: int) -> Place:
        """Return where a rank stands."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Place(tensor, pipeline, data)

    def rank(self, place: Place) -> int:
        """Return which rank stands there: the inverse of `place`."""
        return place.tensor + self.tensor * (place.data + self.data * place.pipeline)

    def axes(self, comm: Comm) -> Axes:
        """Return the groups of a rank.

        Raises
        ------
        OptionError
            If the network has not as many ranks as the mesh, or a dimension has none.
        """
        for name, count in self._asdict().items():
            whole(name, count)
        if comm.size != self.size:
            raise OptionError(f"mesh: {self} has {self.size} ranks, the network {comm.size}")
        place = self.place(comm.rank)
        groups = {
            name: group(comm, [self.rank(place._replace(**{name: n})) for n in range(count)])
            for name, count in self._asdict().items()
        }
        return Axes(**groups)
