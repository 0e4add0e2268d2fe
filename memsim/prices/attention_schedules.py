"""What each attention algorithm moves between HBM and on-chip memory, as tables that read like the papers.

A schedule is a tuple of moves of one head.  In their formulas T_q and T_k are lengths, D and D_v head
dimensions, T_r and T_c the numbers of query and key blocks; the item sizes are e (inputs), a (accumulators
kept in HBM), s (statistics: row maxima, sums, log-sum-exp) and 1 (a byte mask).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

from memsim import data_files
from memsim.prices.moves import Move
from refimpl.errors import UnknownNameError

__all__ = [
    "BLOCK_SPARSE_FORWARD",
    "BLOCK_SPARSE_INITIALIZATION",
    "FLASH1_BACKWARD",
    "FLASH1_BACKWARD_INITIALIZATION",
    "FLASH1_FORWARD",
    "FLASH1_FORWARD_INITIALIZATION",
    "FLASH2_BACKWARD",
    "FLASH2_BACKWARD_INITIALIZATION",
    "FLASH2_FORWARD",
    "standard_features",
    "standard_schedule",
]


_move = partial(Move, "")  # of one head, in an algorithm without named steps

# Dao et al. 2022, arXiv:2205.14135, Algorithm 1: the outer loop runs over the T_c blocks of K and V, so Q, O
# and the statistics pass through the chip once for each.  O leaves in the output's dtype on the last pass;
# with no keys at all its zeros are still written.
FLASH1_FORWARD = (
    _move("read", "K", "T_k*D", "e"),
    _move("read", "V", "T_k*D_v", "e"),
    _move("read", "Q", "T_c*T_q*D", "e"),
    _move("read", "O", "T_c*T_q*D_v", "a"),
    _move("read", "l, m", "2*T_c*T_q", "s"),
    _move("write", "O before the last pass", "max(T_c - 1, 0)*T_q*D_v", "a"),
    _move("write", "O", "T_q*D_v", "e"),
    _move("write", "l, m", "2*T_c*T_q", "s"),
)
FLASH1_FORWARD_INITIALIZATION = (
    _move("write", "initial O", "min(T_c, 1)*T_q*D_v", "a"),
    _move("write", "initial l, m", "2*T_q", "s"),
)

# Algorithm 4, the same loops: dQ is accumulated in HBM, dK and dV on chip.  The n_s statistics of a row are l
# and m, or their combination, the log-sum-exp.
FLASH1_BACKWARD = (
    _move("read", "K", "T_k*D", "e"),
    _move("read", "V", "T_k*D_v", "e"),
    _move("read", "Q", "T_c*T_q*D", "e"),
    _move("read", "O", "T_c*T_q*D_v", "e"),
    _move("read", "dO", "T_c*T_q*D_v", "e"),
    _move("read", "dQ", "T_c*T_q*D", "a"),
    _move("read", "row statistics", "n_s*T_c*T_q", "s"),
    _move("write", "dQ", "T_c*T_q*D", "a"),
    _move("write", "dK", "T_k*D", "e"),
    _move("write", "dV", "T_k*D_v", "e"),
)
FLASH1_BACKWARD_INITIALIZATION = (
    _move("write", "initial dQ", "T_q*D", "a"),
    _move("write", "initial dK", "T_k*D", "e"),
    _move("write", "initial dV", "T_k*D_v", "e"),
)

# Dao 2023, arXiv:2307.08691, Algorithm 1: the outer loop runs over the T_r blocks of Q, so only K and V are
# read again, and nothing is accumulated in HBM.
FLASH2_FORWARD = (
    _move("read", "Q", "T_q*D", "e"),
    _move("read", "K", "T_r*T_k*D", "e"),
    _move("read", "V", "T_r*T_k*D_v", "e"),
    _move("write", "O", "T_q*D_v", "e"),
    _move("write", "lse", "T_q", "s"),
)
# Algorithm 2: rowsum(dO * O) first, then K and V outside; O enters only through that row sum.
FLASH2_BACKWARD = (
    _move("read", "O", "T_q*D_v", "e"),
    _move("read", "dO for its row sums", "T_q*D_v", "e"),
    _move("write", "row sums of dO*O", "T_q", "s"),
    _move("read", "K", "T_k*D", "e"),
    _move("read", "V", "T_k*D_v", "e"),
    _move("read", "Q", "T_c*T_q*D", "e"),
    _move("read", "dO", "T_c*T_q*D_v", "e"),
    _move("read", "lse and row sums", "2*T_c*T_q", "s"),
    _move("read", "dQ", "T_c*T_q*D", "a"),
    _move("write", "dQ", "T_c*T_q*D", "a"),
    _move("write", "dK", "T_k*D", "e"),
    _move("write", "dV", "T_k*D_v", "e"),
)
FLASH2_BACKWARD_INITIALIZATION = (_move("write", "initial dQ", "T_q*D", "a"),)

# Dao et al. 2022, Algorithm 5: Algorithm 1 with the zero blocks of the mask left out.  C counts the key rows
# of columns with a nonzero block, R the query rows of all nonzero blocks, A the query rows that have any, all
# on average over heads.  A row leaves in the output's dtype after its last block; one without any as zeros.
BLOCK_SPARSE_FORWARD = (
    _move("read", "K", "C*D", "e"),
    _move("read", "V", "C*D_v", "e"),
    _move("read", "Q", "R*D", "e"),
    _move("read", "O", "R*D_v", "a"),
    _move("read", "l, m", "2*R", "s"),
    _move("write", "O before the last block", "(R - A)*D_v", "a"),
    _move("write", "O", "T_q*D_v", "e"),
    _move("write", "l, m", "2*R", "s"),
)
BLOCK_SPARSE_INITIALIZATION = (
    _move("write", "initial O", "A*D_v", "a"),
    _move("write", "initial l, m", "2*T_q", "s"),
)

_ELEMENTS = {
    **dict.fromkeys(("Q", "dQ"), "T_q*D"),
    **dict.fromkeys(("K", "dK"), "T_k*D"),
    **dict.fromkeys(("V", "dV"), "T_k*D_v"),
    **dict.fromkeys(("O", "dO"), "T_q*D_v"),
    **dict.fromkeys(("S", "P", "dP", "dS", "Z"), "T_q*T_k"),
}


def standard_features() -> list[str]:
    """Return the features that add passes to standard attention.

    >>> standard_features()
    ['dropout', 'mask', 'mask_copy', 'mask_gradient']
    """
    steps = data_files.read("standard_attention_passes")["step"]
    return sorted({step["when"] for step in steps if "when" in step})


def standard_schedule(
    direction: Literal["forward", "backward"], features: Iterable[str] = ()
) -> tuple[Move, ...]:
    """Return the moves of standard attention, from ``memsim/data/standard_attention_passes.toml``.

    Parameters
    ----------
    direction : {"forward", "backward"}
        Algorithm 0 or Algorithm 3 of arXiv:2205.14135.
    features : iterable of str
        What happens besides: see `standard_features`.

    Returns
    -------
    tuple of Move

    Raises
    ------
    UnknownNameError
        If a feature is unknown.
    """
    enabled = set(features)
    for feature in sorted(enabled):
        if feature not in standard_features():
            raise UnknownNameError("feature of standard attention", feature, standard_features())

    def move(way: Literal["read", "write"], array: str, step: str) -> Move:
        return Move(step, way, array, _ELEMENTS[array], "1" if array == "Z" else "e")

    moves: list[Move] = []
    for step in data_files.read("standard_attention_passes")["step"]:
        if step["direction"] == direction and ("when" not in step or step["when"] in enabled):
            moves += [move("read", array, step["name"]) for array in step["reads"]]
            moves += [move("write", array, step["name"]) for array in step["writes"]]
    return tuple(moves)
