"""What an algorithm reads from HBM and writes to it, array by array: a schedule is a tuple of moves.

>>> schedule = (Move("", "read", "X", "T*K", "e"), Move("", "write", "Y", "T*N", "e"))
>>> [move.name for move in schedule], counted(schedule, {"T": 2, "K": 3, "N": 4, "e": 2})["bytes_read"]
(['read X', 'write Y'], 12)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from memsim.formula import evaluate
from memsim.units import Number

__all__ = ["Move", "counted"]


class Move(NamedTuple):
    """`elements` of `array`, each `item` bytes, read from or written to HBM in one step of an algorithm.

    Both are formulas; the names in them have their values where the schedule is priced.  Algorithms without
    named steps leave `step` empty.
    """

    step: str
    direction: Literal["read", "write"]
    array: str
    elements: str
    item: str

    @property
    def name(self) -> str:
        """``multiply: read W``, or ``read W`` without a step."""
        moved = f"{self.direction} {self.array}"
        return f"{self.step}: {moved}" if self.step else moved


def counted(moves: Iterable[Move], values: Mapping[str, Number]) -> dict[str, int]:
    """Return the four counters of some moves, the ones that `refimpl.memory` keeps.

    Returns
    -------
    dict of str to int
        ``elements_read``, ``elements_written``, ``bytes_read``, ``bytes_written``.

    Examples
    --------
    >>> counted([Move("scan", "read", "u", "B*T", "e")], {"B": 2, "T": 3, "e": 4})
    {'elements_read': 6, 'elements_written': 0, 'bytes_read': 24, 'bytes_written': 0}
    """
    totals = dict.fromkeys(("elements_read", "elements_written", "bytes_read", "bytes_written"), 0)
    for move in moves:
        ending = "read" if move.direction == "read" else "written"
        totals[f"elements_{ending}"] += int(evaluate(move.elements, values))
        totals[f"bytes_{ending}"] += int(evaluate(f"({move.elements})*{move.item}", values))
    return totals
