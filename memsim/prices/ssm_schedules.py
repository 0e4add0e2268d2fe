"""What a selective scan and the stages of a Mamba block read from HBM and write to it.

>>> [move.name for move in scan_moves("materialized") if move.elements == "B*T*D*N"][:3]
['discretize: write decays', 'discretize: write drives', 'scan: read decays']
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from memsim.prices.moves import Move
from refimpl.errors import OptionError

__all__ = ["Algorithm", "mamba_moves", "scan_moves"]

Algorithm: TypeAlias = Literal["fused", "materialized"]

# Item sizes: e of tokens and weights, w of what is computed, s of given states.  Counts of what a call may
# have or not, 0 or 1: z gate, d skip, b bias, i initial and f final states, c, p, q biases of the block.
_SHARED = (
    Move("scan", "read", "A", "D*N", "e"),
    Move("scan", "read", "D", "d*D", "e"),
    Move("scan", "read", "bias", "b*D", "e"),
    Move("scan", "read", "first state", "i*B*D*N", "s"),
    Move("scan", "write", "last state", "f*B*D*N", "w"),
)
_SCANS: dict[str, tuple[Move, ...]] = {
    "fused": (
        *_SHARED,
        Move("scan", "read", "u", "B*T*D", "e"),
        Move("scan", "read", "delta", "B*T*D", "e"),
        Move("scan", "read", "B", "B*T*N", "e"),
        Move("scan", "read", "C", "B*T*N", "e"),
        Move("scan", "read", "z", "z*B*T*D", "e"),
        Move("scan", "write", "out", "B*T*D", "e"),
    ),
    "materialized": (
        *_SHARED,
        Move("discretize", "read", "u", "B*T*D", "e"),
        Move("discretize", "read", "delta", "B*T*D", "e"),
        Move("discretize", "read", "B", "B*T*N", "e"),
        Move("discretize", "write", "decays", "B*T*D*N", "w"),
        Move("discretize", "write", "drives", "B*T*D*N", "w"),
        Move("scan", "read", "decays", "B*T*D*N", "w"),
        Move("scan", "read", "drives", "B*T*D*N", "w"),
        Move("scan", "write", "states", "B*T*D*N", "w"),
        Move("read", "read", "u", "B*T*D", "e"),
        Move("read", "read", "C", "B*T*N", "e"),
        Move("read", "read", "z", "z*B*T*D", "e"),
        Move("read", "read", "states", "B*T*D*N", "w"),
        Move("read", "write", "out", "B*T*D", "e"),
    ),
}
_STAGES = (
    Move("project in", "read", "tokens", "B*T*M", "e"),
    Move("project in", "read", "w_in", "2*M*D", "e"),
    Move("project in", "read", "b_in", "p*2*D", "e"),
    Move("project in", "write", "u and z", "2*B*T*D", "w"),
    Move("convolve", "read", "u", "B*T*D", "w"),
    Move("convolve", "read", "w_conv", "D*k", "e"),
    Move("convolve", "read", "b_conv", "c*D", "e"),
    Move("convolve", "read", "first inputs", "i*B*(k-1)*D", "s"),
    Move("convolve", "write", "u", "B*T*D", "w"),
    Move("convolve", "write", "last inputs", "f*B*(k-1)*D", "w"),
    Move("make parameters", "read", "u", "B*T*D", "w"),
    Move("make parameters", "read", "w_x", "D*(R+2*N)", "e"),
    Move("make parameters", "write", "step, B and C", "B*T*(R+2*N)", "w"),
    Move("make steps", "read", "step", "B*T*R", "w"),
    Move("make steps", "read", "w_dt", "R*D", "e"),
    Move("make steps", "write", "delta", "B*T*D", "w"),
    *(move._replace(item="w" if move.item == "e" else move.item) for move in _SCANS["fused"]),
    Move("project out", "read", "y", "B*T*D", "w"),
    Move("project out", "read", "w_out", "D*M", "e"),
    Move("project out", "read", "b_out", "q*M", "e"),
    Move("project out", "write", "tokens", "B*T*M", "e"),
)


def scan_moves(algorithm: Algorithm) -> tuple[Move, ...]:
    """Return what a scan reads and writes: in one kernel, or with decays, drives and states in HBM.

    Raises
    ------
    OptionError
        If the algorithm is unknown.

    Examples
    --------
    >>> scan_moves("fused")[0].name
    'scan: read A'
    """
    if algorithm not in _SCANS:
        raise OptionError(f"algorithm: expected one of {', '.join(_SCANS)}; got {algorithm!r}")
    return _SCANS[algorithm]


def mamba_moves() -> tuple[Move, ...]:
    """Return what the stages of a Mamba block read and write, each from HBM to HBM.

    Examples
    --------
    >>> mamba_moves()[0].name
    'project in: read tokens'
    """
    return _STAGES
