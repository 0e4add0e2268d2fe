"""How many places an expert has: the same fraction, rounded in three ways."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, TypedDict, get_args

from refimpl.errors import OptionError
from refimpl.validation import positive, whole

__all__ = ["CapacityOptions", "Rounding", "expert_capacity", "places_of"]

Rounding: TypeAlias = Literal["mesh_tf", "flaxformer", "vmoe"]


def expert_capacity(
    tokens: int, experts: int, /, *, factor: float, rounding: Rounding, minimum: int = 4
) -> int:
    """Return the places of each expert for a group of tokens, near ``factor * tokens / experts``.

    Parameters
    ----------
    tokens : int
        Tokens of a group, times the experts that each of them goes to.
    experts : int
        How many there are.
    factor : float
        1 has room for a perfect balance; Switch trains with 1 to 1.25 and evaluates with 2.
    rounding : {"mesh_tf", "flaxformer", "vmoe"}
        ``"mesh_tf"`` [1]_: down, at most all tokens, then at least `minimum`.  ``"flaxformer"`` [2]_: to
        nearest, halves to even, at least `minimum`.  ``"vmoe"`` [3]_: up, then up to a multiple of `minimum`.
    minimum : int
        4 in all three sources; 1 leaves the rounding alone.

    Returns
    -------
    int
        At least 1, except that no tokens give "vmoe" no places.

    Raises
    ------
    OptionError
        If an argument is out of range or there is no such rounding.

    References
    ----------
    .. [1] tensorflow/mesh, mesh_tensorflow/transformer/moe.py, lines 368-371, commit da90793.
    .. [2] google/flaxformer, flaxformer/architectures/moe/moe_layers.py, lines 175-178, commit 399ea3a.
    .. [3] google-research/vmoe, vmoe/moe.py, compute_capacity, commit 942a78b.

    Examples
    --------
    10 tokens for 4 experts: 2.5 places each, and with the sources' minimum of 4.

    >>> names = ("mesh_tf", "flaxformer", "vmoe")
    >>> [expert_capacity(10, 4, factor=1.0, rounding=name, minimum=1) for name in names]
    [2, 2, 3]
    >>> [expert_capacity(26, 4, factor=1.0, rounding=name) for name in names]
    [6, 6, 8]
    """
    whole("tokens", tokens, 0), whole("experts", experts), whole("minimum", minimum)
    share = tokens * positive("capacity_factor", factor) / experts
    if rounding == "mesh_tf":
        return max(min(tokens, int(share)), minimum)
    if rounding == "flaxformer":
        return max(round(share), minimum)
    if rounding == "vmoe":
        return minimum * math.ceil(math.ceil(share) / minimum)
    raise OptionError(f"rounding: expected one of {get_args(Rounding)}, got {rounding!r}")


class CapacityOptions(TypedDict, total=False):
    """Options of `places_of`, which every layer with buffers takes."""

    capacity: int | None
    capacity_factor: float
    rounding: Rounding
    min_capacity: int
    groups: int


def places_of(
    tokens: int,
    experts: int,
    /,
    *,
    capacity: int | None = None,
    capacity_factor: float = 1.25,
    rounding: Rounding = "mesh_tf",
    min_capacity: int = 4,
    groups: int = 1,
) -> int:
    """Return the places of each expert for each of `groups` groups of tokens.

    Parameters
    ----------
    tokens, experts : int
        All tokens, and all experts.
    capacity : int, optional
        The answer, where a layer is told it.
    capacity_factor, rounding, min_capacity
        As for `expert_capacity`.
    groups : int
        The factor is of the tokens of one.

    Returns
    -------
    int
        Places.

    Examples
    --------
    >>> places_of(12, 3, capacity_factor=1.0, min_capacity=1, groups=2), places_of(12, 3, capacity=7)
    (2, 7)
    """
    if capacity is not None:
        return whole("capacity", capacity, 0)
    group = tokens // whole("groups", groups)
    return expert_capacity(group, experts, factor=capacity_factor, rounding=rounding, minimum=min_capacity)
