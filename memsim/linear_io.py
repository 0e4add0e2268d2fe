"""HBM traffic and operations of a linear layer: in floating point, in int8 step by step, in int8 fused.

The counts are compulsory traffic: every kernel reads each operand once and writes its result once.  In steps,
as bitsandbytes runs it, the int32 product goes to HBM and back, and outliers read and write the output again.

>>> shape = dict(T=4096, K=4096, N=4096)
>>> [linear_io(algorithm=a, **shape).total // 10**6 for a in ("fp16", "int8", "int8_fused")]
[100, 285, 151]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.prices.moves import Move, counted
from memsim.units import Number, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, law, prices, technique
from refimpl.testing import require

__all__ = ["ALGORITHMS", "Algorithm", "linear_flops", "linear_io", "linear_traffic"]

Algorithm = Literal["fp16", "int8", "int8_fused"]
Convention = Literal["paper", "released"]
ALGORITHMS: tuple[Algorithm, ...] = ("fp16", "int8", "int8_fused")
_SOURCE = "arXiv:2208.07339, eq. 8"


# Item sizes: e of x, bias and output, s of the absmax, 8 of an index, 4 of int32, 1 of int8.
_FP16 = (
    Move("multiply", "read", "X", "T*K", "e"),
    Move("multiply", "read", "W", "K*N", "e"),
    Move("multiply", "read", "bias", "b*N", "e"),
    Move("multiply", "write", "Y", "T*N", "e"),
)
_FIND = (
    Move("find outliers", "read", "X", "T*K", "e"),
    Move("find outliers", "write", "outliers", "n", "8"),
)
_QUANTIZE = (
    Move("quantise", "read", "X", "T*K", "e"),
    Move("quantise", "read", "outliers", "n", "8"),
    Move("quantise", "write", "X codes", "T*K", "1"),
    Move("quantise", "write", "X absmax", "T", "s"),
)
_OPERANDS = (
    Move("multiply", "read", "X codes", "T*K", "1"),
    Move("multiply", "read", "W codes", "K*N", "1"),
)
_EPILOGUE = (
    Move("dequantise", "read", "X absmax", "T", "s"),
    Move("dequantise", "read", "W absmax", "N", "s"),
    Move("dequantise", "read", "bias", "b*N", "e"),
    Move("dequantise", "write", "Y", "T*N", "e"),
)
_INT32 = (
    Move("multiply", "write", "int32 product", "T*N", "4"),
    Move("dequantise", "read", "int32 product", "T*N", "4"),
)
_OUTLIERS = (
    Move("add outliers", "read", "outliers", "n", "8"),
    Move("add outliers", "read", "X outliers", "T*n", "e"),
)
_OUTLIER_WEIGHTS: dict[str, tuple[Move, ...]] = {
    "paper": (Move("add outliers", "read", "W outliers", "n*N", "e"),),
    "released": (Move("add outliers", "read", "W outlier codes", "n*N", "1"),),
}
# Step by step the output is written, read and written again; the released one needs the scales of W anew.
_OUTLIER_OUTPUT = (
    Move("add outliers", "read", "Y", "T*N", "e"),
    Move("add outliers", "write", "Y", "T*N", "e"),
)
_OUTLIER_SCALES = (Move("add outliers", "read", "W absmax", "N", "s"),)


def _whole(name: str, value: Any, least: int = 0) -> int:
    number = exact(value, name)
    if not isinstance(number, int) or number < least:
        raise OptionError(f"{name}: expected an integer of at least {least}; got {value!r}")
    return number


def _schedule(algorithm: Algorithm, outliers: int | None, convention: Convention) -> tuple[Move, ...]:
    """Return what moves, step by step; nothing is looked for if `outliers` is None."""
    if algorithm == "fp16":
        return _FP16
    moves = (_FIND if outliers is not None else ()) + _QUANTIZE + _OPERANDS
    aside = _OUTLIERS + _OUTLIER_WEIGHTS[convention] if outliers else ()
    if algorithm == "int8_fused":
        return moves + _EPILOGUE + aside
    if aside:
        aside += _OUTLIER_OUTPUT + (_OUTLIER_SCALES if convention == "released" else ())
    return moves + _INT32 + _EPILOGUE + aside


def _prepare(
    *,
    algorithm: Algorithm,
    T: int,
    K: int,
    N: int,
    outliers: int | None = 0,
    convention: Convention = "released",
    bias: bool = False,
    itemsize: int = 2,
    statistics_itemsize: int = 4,
) -> tuple[tuple[Move, ...], dict[str, Number]]:
    """Return the moves and the values of the names in their formulas."""
    if algorithm not in ALGORITHMS:
        raise OptionError(f"algorithm: expected one of {ALGORITHMS}; got {algorithm!r}")
    if convention not in _OUTLIER_WEIGHTS:
        raise OptionError(f"convention: expected one of {tuple(_OUTLIER_WEIGHTS)}; got {convention!r}")
    values: dict[str, Number] = {
        "T": _whole("T", T), "K": _whole("K", K), "N": _whole("N", N), "n": _whole("outliers", outliers or 0),
        "b": int(bias), "e": _whole("itemsize", itemsize, 1),
        "s": _whole("statistics_itemsize", statistics_itemsize, 1),
    }  # fmt: skip
    if values["n"] > values["K"]:
        raise OptionError(f"outliers: expected at most K={K} columns; got {outliers}")
    return _schedule(algorithm, outliers, convention), values


def _sample(rng: np.random.Generator, *, K: int, outliers: str, **options: Any) -> Case:
    count = {"none": None, "zero": 0, "all": K}.get(outliers, int(rng.integers(K + 1)))
    return Case((), {"K": K, "outliers": count, **options})


@technique(
    "cost.linear_io",
    entries=(72,),
    kind="cost",
    source=Source("Dettmers et al. 2022", "arXiv:2208.07339", "eq. 8; steps of bitsandbytes @0155ecc"),
    axes={"T": (0, 300), "K": (0, 300), "N": (0, 300)},
    options={
        "algorithm": ALGORITHMS,
        "outliers": ("none", "zero", "some", "all"),
        "convention": ("released", "paper"),
        "bias": (False, True),
        "itemsize": (2, 4),
    },
    edges=({"T": 0}, {"K": 0}, {"N": 0}, {"T": 1, "K": 1, "N": 1, "outliers": "all"}),
    sample=_sample,
    exact=True,
)
def linear_io(
    *,
    algorithm: Algorithm,
    T: int,
    K: int,
    N: int,
    outliers: int | None = 0,
    convention: Convention = "released",
    bias: bool = False,
    itemsize: int = 2,
    statistics_itemsize: int = 4,
) -> Estimate:
    """Return the bytes that ``Y = X W + b`` moves between HBM and the chip, array by array.

    Parameters
    ----------
    algorithm : {"fp16", "int8", "int8_fused"}
        One floating-point product; LLM.int8() in the steps of the released code, the product in int32 and
        the outliers apart; the same with one product that scales, adds bias and outliers, and writes Y once.
    T, K, N : int
        Tokens, input features, output features.
    outliers : int or None
        Columns of X that hold outliers; 0: looked for and not found; None: not looked for.
    convention : {"paper", "released"}
        Whether outliers meet the weights as given, or dequantised from int8.
    bias : bool
        Whether there is one.
    itemsize, statistics_itemsize : int
        Bytes of a number of X, b and Y (and of W in floating point), and of an absmax.

    Returns
    -------
    Estimate
        Terms in bytes, named "multiply: read W codes", ...: `linear_traffic` gives the four counters.

    Raises
    ------
    OptionError
        If a size is negative, there are more outliers than columns, or an option is unknown.

    Notes
    -----
    Quantising the weight is done once, ahead, and not counted.

    References
    ----------
    .. [1] Dettmers et al. 2022, arXiv:2208.07339, section 3, eq. 8.
    .. [2] bitsandbytes @0155ecc, backends/default/ops.py, ``int8_mixed_scaled_mm``.

    Examples
    --------
    A decoder's step, one token: the weights are everything, and int8 halves them.

    >>> one = dict(T=1, K=4096, N=4096)
    >>> linear_io(algorithm="int8", **one).total / linear_io(algorithm="fp16", **one).total < 0.51
    True
    >>> print(linear_io(algorithm="int8", **one).explain()[-1][:22])
    total: T*K*e + n*8 + T
    """
    moves, values = _prepare(
        algorithm=algorithm, T=T, K=K, N=N, outliers=outliers, convention=convention, bias=bias,
        itemsize=itemsize, statistics_itemsize=statistics_itemsize,
    )  # fmt: skip
    return estimate(
        f"HBM traffic of a linear layer, {algorithm}",
        [term(move.name, f"{move.elements}*{move.item}", values, "B", _SOURCE) for move in moves],
        leaves_out="tiles read again, what caches absorb, quantising the weight",
    )


def linear_traffic(**options: Any) -> dict[str, int]:
    """Return `linear_io` of the same options as four counters, the ones that `refimpl.memory` keeps.

    Returns
    -------
    dict of str to int
        ``elements_read``, ``elements_written``, ``bytes_read``, ``bytes_written``.

    Examples
    --------
    >>> linear_traffic(algorithm="fp16", T=2, K=3, N=4)
    {'elements_read': 18, 'elements_written': 8, 'bytes_read': 36, 'bytes_written': 16}
    """
    moves, values = _prepare(**options)
    return counted(moves, values)


def linear_flops(*, T: int, K: int, N: int, outliers: int = 0, algorithm: Algorithm = "int8") -> Estimate:
    """Return the operations of the matrix products of a linear layer, a multiply-add being two.

    Parameters
    ----------
    T, K, N, outliers, algorithm
        As for `linear_io`.  In int8 all K columns are multiplied, outlier columns with codes 0.

    Returns
    -------
    Estimate
        In FLOP; operations on integers count as well.

    Raises
    ------
    OptionError
        As `linear_io`.

    Examples
    --------
    >>> print(linear_flops(T=4096, K=4096, N=4096, outliers=4).explain()[-1])
    total: 2*T*K*N + 2*T*n*N = 2*4096*4096*4096 + 2*4096*4*4096 = 137.6 GFLOP
    """
    _, values = _prepare(algorithm=algorithm, T=T, K=K, N=N, outliers=outliers)
    kind = "floating point" if algorithm == "fp16" else "int8"
    terms = [term(f"product in {kind}", "2*T*K*N", values, "FLOP", _SOURCE)]
    if outliers and algorithm != "fp16":
        terms.append(term("product of outliers", "2*T*n*N", values, "FLOP", _SOURCE))
    return estimate(f"matrix products of a linear layer, {algorithm}", terms, leaves_out="scaling, rounding")


def _call(case: Case, algorithm: Algorithm) -> dict[str, int]:
    """Return the counters of a call of a reference, from its shapes, dtypes, and the outliers in `x`."""
    from refimpl.numerics import wide_dtype
    from refimpl.quant.absmax import outlier_columns

    x, weight = case.args
    threshold = case.kwargs.get("threshold", 6.0)
    convention = case.kwargs.get("convention", "released")
    found = None
    if threshold is not None:
        found = outlier_columns(x, threshold=threshold, convention=convention).size
    shape = getattr(weight, "codes", weight).shape
    return linear_traffic(
        algorithm=algorithm, T=x.shape[0], K=shape[0], N=shape[1], outliers=found, convention=convention,
        bias=case.kwargs.get("bias") is not None, itemsize=x.dtype.itemsize,
        statistics_itemsize=wide_dtype(x.dtype).itemsize,
    )  # fmt: skip


@prices("quant.llm_int8", counts="hbm")
def int8(case: Case) -> dict[str, int]:
    """Return the four counters of ``llm_int8_linear(x, weight, ...)``."""
    return _call(case, "int8")


@prices("quant.llm_int8_fused", counts="hbm")
def int8_fused(case: Case) -> dict[str, int]:
    """Return the four counters of ``llm_int8_linear_fused(x, weight, ...)``."""
    return _call(case, "int8_fused")


Model = Callable[..., Estimate]


@law("cost.linear_io")
def fusing_saves_the_int32_round_trip(f: Model, case: Case, _close: object) -> None:
    """Fused int8 saves 8 bytes an output, and with outliers the second pass over Y and the scales of W."""
    shape = case.kwargs
    saved = case.replace(algorithm="int8").call(f).total - case.replace(algorithm="int8_fused").call(f).total
    expected = 8 * shape["T"] * shape["N"]
    if shape["outliers"]:
        scales = 4 * shape["N"] if shape["convention"] == "released" else 0
        expected += 2 * shape["itemsize"] * shape["T"] * shape["N"] + scales
    require(saved == expected, f"fusing saves {saved} bytes, expected {expected}")


@law("cost.linear_io")
def weights_in_int8_are_a_fraction(f: Model, case: Case, _close: object) -> None:
    """A further output feature costs K bytes of weight in int8 and K numbers in floating point."""
    shape = case.replace(T=0, outliers=None, bias=False)
    more = shape.replace(N=case.kwargs["N"] + 1)
    grown = more.call(f).total - shape.call(f).total
    K, e = case.kwargs["K"], case.kwargs["itemsize"]
    expected = K * e if case.kwargs["algorithm"] == "fp16" else K + 4
    require(grown == expected, f"a further feature costs {grown} bytes, expected {expected}")


@law("cost.linear_io")
def outliers_cost_traffic(f: Model, case: Case, _close: object) -> None:
    """Traffic grows with the outliers in int8, and does not know of them in floating point."""
    totals = [case.replace(outliers=n).call(f).total for n in (None, *range(min(case.kwargs["K"], 3) + 1))]
    if case.kwargs["algorithm"] == "fp16":
        require(len(set(totals)) == 1, f"floating point depends on the outliers: {totals}")
    else:
        require(totals == sorted(totals), f"traffic falls with more outliers: {totals}")


@law("cost.linear_io")
def traffic_is_linear_in_the_tokens(f: Model, case: Case, _close: object) -> None:
    """Further tokens cost the same each; what does not depend on them is the weight, read once."""
    one, two, three = (case.replace(T=T).call(f).total for T in (1, 2, 3))
    require(three - two == two - one, f"tokens cost {two - one}, then {three - two} bytes")
