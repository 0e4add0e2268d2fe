"""A vector over all parameters, cut into shards: chunk r of every unit, padded, belongs to rank r."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.parallel.collectives import chunk_length, padded
from refimpl.parallel.network import Sized, split_units

__all__ = ["cut_shard", "gather_vector", "shard_vector"]


def shard_vector(network: Sequence[Sized], flat: FloatArray, rank: int, ranks: int) -> FloatArray:
    """Return the chunks of a vector over all parameters that `rank` owns, unit by unit, padded; a copy.

    Examples
    --------
    >>> from refimpl.parallel.network import attention_network
    >>> network = attention_network(vocabulary=3, width=1, heads=1, head_width=1, blocks=0)
    >>> [unit.size for unit in network]
    [3, 3]
    >>> shard_vector(network, np.arange(1.0, 7.0), rank=1, ranks=2)
    array([3., 0., 6., 0.])
    """
    chunks = [padded(unit, ranks).reshape(ranks, -1)[rank] for unit in split_units(network, flat)]
    return np.concatenate(chunks)


def gather_vector(network: Sequence[Sized], shards: Sequence[FloatArray]) -> FloatArray:
    """Return the vector whose shards these are, one of each rank: the inverse of `shard_vector`.

    Examples
    --------
    >>> from refimpl.parallel.network import attention_network
    >>> network = attention_network(vocabulary=3, width=1, heads=1, head_width=1, blocks=0)
    >>> gather_vector(network, [np.array([1.0, 2.0, 4.0, 5.0]), np.array([3.0, 0.0, 6.0, 0.0])])
    array([1., 2., 3., 4., 5., 6.])
    """
    by_rank = [cut_shard(network, shard, len(shards)) for shard in shards]
    parts = [np.concatenate(chunks)[: unit.size] for unit, *chunks in zip(network, *by_rank, strict=True)]
    return np.concatenate(parts)


def cut_shard(network: Sequence[Sized], shard: FloatArray, ranks: int) -> list[FloatArray]:
    """Return each unit's chunk of a shard, as views."""
    ends = np.cumsum([chunk_length(unit.size, ranks) for unit in network])[:-1]
    return np.split(shard, ends)
