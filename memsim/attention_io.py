"""HBM traffic of attention, counted exactly as the algorithms move it: elements and bytes.

The counts are of the algorithm as printed: nothing is skipped for a causal mask, and no cache absorbs a
second read.  A GPU's counters therefore stay below them.

>>> forward = attention_io(algorithm="flash1", Tq=1024, D=64, H=16, B=64, sram=98304)
>>> print(forward.explain()[0])
read K: T_k*D*e*B*H = 1024*64*2*64*16 = 134.2 MB
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from memsim.estimate import Estimate, estimate, term
from memsim.prices import attention_schedules as schedules
from memsim.prices.moves import Move, counted
from memsim.units import Number, exact
from refimpl.errors import OptionError, ShapeError
from refimpl.registry import Case, Source, technique

__all__ = ["ALGORITHMS", "Algorithm", "Direction", "attention_io", "attention_traffic", "block_sizes"]

Algorithm = Literal["standard", "flash1", "flash2", "block_sparse"]
Pass = Literal["forward", "backward"]
Direction = Literal["forward", "backward", "both"]
ALGORITHMS: tuple[Algorithm, ...] = ("standard", "flash1", "flash2", "block_sparse")
_SOURCES = {
    ("standard", "forward"): "arXiv:2205.14135, Algorithm 0",
    ("standard", "backward"): "arXiv:2205.14135, Algorithm 3",
    ("flash1", "forward"): "arXiv:2205.14135, Algorithm 1",
    ("flash1", "backward"): "arXiv:2205.14135, Algorithm 4",
    ("flash2", "forward"): "arXiv:2307.08691, Algorithm 1",
    ("flash2", "backward"): "arXiv:2307.08691, Algorithm 2",
    ("block_sparse", "forward"): "arXiv:2205.14135, Algorithm 5",
}
_SCHEDULES: dict[tuple[str, str], tuple[tuple[Move, ...], tuple[Move, ...]]] = {
    ("flash1", "forward"): (schedules.FLASH1_FORWARD, schedules.FLASH1_FORWARD_INITIALIZATION),
    ("flash1", "backward"): (schedules.FLASH1_BACKWARD, schedules.FLASH1_BACKWARD_INITIALIZATION),
    ("flash2", "forward"): (schedules.FLASH2_FORWARD, ()),
    ("flash2", "backward"): (schedules.FLASH2_BACKWARD, schedules.FLASH2_BACKWARD_INITIALIZATION),
    ("block_sparse", "forward"): (schedules.BLOCK_SPARSE_FORWARD, schedules.BLOCK_SPARSE_INITIALIZATION),
}


def _whole(name: str, value: Any, least: int = 0) -> int:
    number = exact(value, name)
    if not isinstance(number, int) or number < least:
        raise OptionError(f"{name}: expected an integer of at least {least}; got {value!r}")
    return number


def block_sizes(sram: int, d: int) -> tuple[int, int]:
    """Return the paper's block sizes (Br, Bc) for `sram` elements on chip and head dimension `d`.

    Bc = ceil(M/4d) and Br = min(Bc, d): arXiv:2205.14135, Algorithm 1, line 1.  They fill M with blocks of Q,
    K, V and O and leave nothing for the scores: the paper's analysis is asymptotic.

    Raises
    ------
    OptionError
        If `sram` or `d` is not a positive integer.

    Examples
    --------
    >>> block_sizes(98304, 64)
    (64, 384)
    """
    width = _whole("d", d, 1)
    columns = -(-_whole("sram", sram, 1) // (4 * width))
    return min(columns, width), columns


_paper_blocks = block_sizes  # where an argument of the same name hides it


def _present(
    block_mask: npt.NDArray[np.bool_] | None, B: int, H: int, rows: list[int], columns: list[int]
) -> dict[str, Number]:
    """Return R, A and C: query rows of the nonzero blocks, rows with any, key rows; a head on average."""
    shape = (B, H, len(rows), len(columns))
    given = np.asarray(True if block_mask is None else block_mask, dtype=bool)
    try:
        mask = np.broadcast_to(given, shape)
    except ValueError:
        expected = f"a shape that broadcasts to (B, H, Tr, Tc) = {shape}"
        raise ShapeError(f"block_mask: expected {expected}; got {given.shape}") from None
    touched = {
        "R": int(mask.sum(axis=(0, 1, 3)) @ np.asarray(rows, dtype=np.int64)),
        "A": int(mask.any(axis=3).sum(axis=(0, 1)) @ np.asarray(rows, dtype=np.int64)),
        "C": int(mask.any(axis=2).sum(axis=(0, 1)) @ np.asarray(columns, dtype=np.int64)),
    }
    return {name: exact(Fraction(count, B * H)) if count else 0 for name, count in touched.items()}


def _blocks(size: int, block: int) -> list[int]:
    """Return the lengths of the blocks that cut `size` rows; the last one may be shorter."""
    return [min(block, size - start) for start in range(0, size, block)]


def _prepare(
    *,
    algorithm: Algorithm,
    Tq: int,
    D: int,
    Tk: int | None = None,
    Dv: int | None = None,
    H: int = 1,
    B: int = 1,
    direction: Pass = "forward",
    sram: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    block_mask: npt.NDArray[np.bool_] | None = None,
    itemsize: int = 2,
    accumulator_itemsize: int | None = None,
    statistics_itemsize: int = 4,
    row_statistics: int = 2,
    count_initialization: bool = False,
    features: Iterable[str] = (),
) -> tuple[tuple[Move, ...], dict[str, Number]]:
    """Return the moves of one head and the values of the names in their formulas."""
    if (algorithm, direction) not in _SOURCES:
        raise OptionError(
            f"algorithm, direction: expected one of {sorted(_SOURCES)}; got {(algorithm, direction)!r}"
        )
    values: dict[str, Number] = {
        "T_q": _whole("Tq", Tq),
        "T_k": _whole("Tk", Tq if Tk is None else Tk),
        "D": _whole("D", D, 1),
        "D_v": _whole("Dv", D if Dv is None else Dv, 1),
        "H": _whole("H", H),
        "B": _whole("B", B),
        "e": _whole("itemsize", itemsize, 1),
        "a": _whole(
            "accumulator_itemsize", itemsize if accumulator_itemsize is None else accumulator_itemsize, 1
        ),
        "s": _whole("statistics_itemsize", statistics_itemsize),
        "n_s": _whole("row_statistics", row_statistics),
    }
    if algorithm == "standard":
        return schedules.standard_schedule(direction, features), values
    if tuple(features):
        raise OptionError(f"features: only standard attention has passes of its own; got {features!r}")
    if sram is not None and block_sizes is None:
        Br, Bc = _paper_blocks(sram, D)
    elif block_sizes is not None and sram is None:
        Br, Bc = (_whole("block_sizes", size, 1) for size in block_sizes)
    else:
        raise OptionError("sram, block_sizes: expected exactly one of the two")
    values |= {"T_r": -(-values["T_q"] // Br), "T_c": -(-values["T_k"] // Bc)}
    if algorithm == "block_sparse":
        rows, columns = _blocks(int(values["T_q"]), Br), _blocks(int(values["T_k"]), Bc)
        values |= _present(block_mask, int(values["B"]), int(values["H"]), rows, columns)
    elif block_mask is not None:
        raise OptionError("block_mask: expected with algorithm='block_sparse' only")
    moves, initialization = _SCHEDULES[algorithm, direction]
    return (initialization + moves if count_initialization else moves), values


def _passes(direction: Direction) -> tuple[Pass, ...]:
    return ("forward", "backward") if direction == "both" else (direction,)


def _sample(rng: np.random.Generator, *, algorithm: Algorithm, direction: Direction, **axes: int) -> Case:
    options: dict[str, Any] = {"algorithm": algorithm, "direction": direction, **axes}
    if algorithm != "standard":
        options["sram"] = int(rng.integers(1, 16 * axes["D"] ** 2 + 2))
        options["count_initialization"] = bool(rng.integers(2))
        options["accumulator_itemsize"] = int(rng.choice([2, 4]))
    return Case((), options)


@technique(
    "cost.attention_io",
    entries=(31,),
    kind="cost",
    source=Source("Dao et al. 2022", "arXiv:2205.14135", "Theorem 2; Algorithms 0, 1, 3, 4 and 5"),
    axes={"Tq": (0, 300), "Tk": (0, 300), "D": (1, 80), "Dv": (1, 80), "H": (1, 4), "B": (0, 3)},
    options={"algorithm": ("standard", "flash1", "flash2"), "direction": ("forward", "backward", "both")},
    sample=_sample,
    edges=({"Tk": 0}, {"Tq": 0}, {"Tq": 65, "Tk": 257, "D": 1, "Dv": 1}),
    exact=True,
)
def attention_io(
    *,
    algorithm: Algorithm,
    Tq: int,
    D: int,
    Tk: int | None = None,
    Dv: int | None = None,
    H: int = 1,
    B: int = 1,
    direction: Direction = "forward",
    sram: int | None = None,
    block_sizes: tuple[int, int] | None = None,
    block_mask: npt.NDArray[np.bool_] | None = None,
    itemsize: int = 2,
    accumulator_itemsize: int | None = None,
    statistics_itemsize: int = 4,
    row_statistics: int = 2,
    count_initialization: bool = False,
    features: Iterable[str] = (),
) -> Estimate:
    """Return the bytes that attention moves between HBM and the chip, array by array.

    Parameters
    ----------
    algorithm : {"standard", "flash1", "flash2", "block_sparse"}
        Algorithms 0 and 3, 1 and 4, or 5 of Dao et al. 2022; "flash2" is Dao 2023, with the queries outside.
    Tq, Tk : int
        Query and key length; `Tk` defaults to `Tq`.
    D, Dv : int
        Head dimension of queries and keys, and of values (default `D`).
    H, B : int
        Query heads and batch; every query head reads its own copy of the keys.
    direction : {"forward", "backward", "both"}
        Which pass; the terms of "both" are named "forward: read Q".  "block_sparse" has "forward" only.
    sram : int, optional
        Elements that fit on chip: block sizes by the function `block_sizes` with `D`.
    block_sizes : (int, int), optional
        (Br, Bc) instead of `sram`.
    block_mask : ndarray of bool, broadcastable to (B, H, Tr, Tc), optional
        The blocks that are not zero; with "block_sparse" only, where it defaults to all.
    itemsize, accumulator_itemsize, statistics_itemsize : int
        Bytes of an input element, of O and dQ while they are accumulated in HBM (default `itemsize`, as in
        the paper; the first released kernels kept 4), and of a row statistic.  A `statistics_itemsize` of 0
        leaves the statistics out of the bytes.
    row_statistics : {2, 1}
        What "flash1" reads for a row in its backward pass: l and m as in the paper, or the log-sum-exp.
    count_initialization : bool
        Whether filling O, l, m (backward: dQ, dK, dV) before the loops counts.
    features : iterable of str
        For "standard": "mask", "dropout", ... add their passes (`memsim.prices.attention_schedules`).

    Returns
    -------
    Estimate
        Terms in bytes, named "read Q", "write O", ...: `attention_traffic` gives the four counters.

    Raises
    ------
    OptionError
        If sizes are negative, or options are missing or contradict each other.
    ShapeError
        If `block_mask` does not broadcast to one cell a block.

    Notes
    -----
    **Special cases**: - With ``Tk = 0`` the zeros of O are still written once.

    References
    ----------
    .. [1] Dao et al. 2022, arXiv:2205.14135, Algorithms 0 to 5, Theorem 2.

    Examples
    --------
    >>> attention_io(algorithm="standard", Tq=1024, D=64).total == 2 * (4 * 1024 * 64 + 4 * 1024**2)
    True
    """
    options: dict[str, Any] = {
        "algorithm": algorithm, "Tq": Tq, "Tk": Tk, "D": D, "Dv": Dv, "H": H, "B": B, "sram": sram,
        "block_sizes": block_sizes, "block_mask": block_mask, "itemsize": itemsize,
        "accumulator_itemsize": accumulator_itemsize, "statistics_itemsize": statistics_itemsize,
        "row_statistics": row_statistics, "count_initialization": count_initialization,
        "features": tuple(features),
    }  # fmt: skip
    terms = [
        term(
            f"{way}: {move.name}" if direction == "both" else move.name,
            f"{move.elements}*{move.item}*B*H",
            values,
            "B",
            _SOURCES[algorithm, way],
        )
        for way in _passes(direction)
        for moves, values in [_prepare(**options, direction=way)]
        for move in moves
    ]
    return estimate(
        f"HBM traffic of {algorithm} attention, {direction}",
        terms,
        leaves_out="re-reads that caches absorb; blocks that a causal mask would skip",
    )


def attention_traffic(**options: Any) -> dict[str, int]:
    """Return `attention_io` of the same options as four counters, the ones that `refimpl.memory` keeps.

    Returns
    -------
    dict of str to int
        ``elements_read``, ``elements_written``, ``bytes_read``, ``bytes_written``.

    Examples
    --------
    >>> attention_traffic(algorithm="flash2", Tq=128, D=64, block_sizes=(64, 64))["elements_read"]
    40960
    """
    parts = []
    for way in _passes(options.pop("direction", "forward")):
        moves, values = _prepare(**options, direction=way)
        # A schedule is that of one head.
        parts.append(counted((move._replace(elements=f"{move.elements}*B*H") for move in moves), values))
    return {counter: sum(part[counter] for part in parts) for counter in parts[0]}
