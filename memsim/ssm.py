"""What a selective scan and a Mamba block cost: parameters, operations, HBM traffic, carried state.

B sequences, T tokens, M the width of the model, D = 2M channels of the block, N states of a channel, k taps
of the convolution, R the rank of the step.  One multiply-add is two operations, and so is a product of two
elements to which nothing is added: a matrix unit adds 0.

>>> sizes = dict(T=65536, D=1536)
>>> [scan_traffic(algorithm=name, **sizes).total // 10**6 for name in ("fused", "materialized")]
[809, 39665]
"""

from __future__ import annotations

from collections.abc import Mapping

from memsim.estimate import Estimate, estimate, term
from memsim.prices.moves import Move
from memsim.prices.ssm_schedules import Algorithm, mamba_moves, scan_moves
from memsim.units import Number, exact
from refimpl.errors import OptionError

__all__ = [
    "mamba_flops",
    "mamba_parameters",
    "mamba_state",
    "mamba_traffic",
    "scan_flops",
    "scan_traffic",
]

_SCAN = "arXiv:2312.00752, eq. 2 and section 3.3.2"
_BLOCK = "arXiv:2312.00752, section 3.4"


_PARAMETERS = (
    ("w_in", "2*M*D"),
    ("w_conv and b_conv", "D*(k+1)"),
    ("w_x", "D*(R+2*N)"),
    ("w_dt and b_dt", "D*(R+1)"),
    ("A_log", "D*N"),
    ("D", "D"),
    ("w_out", "D*M"),
)
_SCAN_PRODUCTS = (
    ("step times A", "2*B*T*D*N"),
    ("B times u", "2*B*T*D*N"),
    ("decay times state", "2*B*T*D*N"),
    ("C times state", "2*B*T*D*N"),
)
_BLOCK_PRODUCTS = (
    ("project in", "4*B*T*M*D"),
    ("convolve", "2*B*T*D*k"),
    ("make parameters", "2*B*T*D*(R+2*N)"),
    ("make steps", "2*B*T*R*D"),
    *_SCAN_PRODUCTS,
    ("project out", "2*B*T*D*M"),
)
_UNCOUNTED = "exponentials, softplus, gates and activations, and adding what is no product"


def mamba_parameters(
    *, M: int, D: int | None = None, N: int = 16, k: int = 4, R: int | None = None
) -> Estimate:
    """Return the parameters of a Mamba block as published: some ``6 M²``.

    Parameters
    ----------
    M, D, N, k, R : int
        Width of the model and of the block, states, taps, rank of the step; D is 2M by default, and R a
        sixteenth of M, rounded up.

    Returns
    -------
    Estimate
        A term for each weight with its bias, in parameters.

    Raises
    ------
    OptionError
        If a size is negative.

    Examples
    --------
    Mamba-130M has 24 of them, each behind an RMSNorm, one more norm, and an embedding of 50280 tokens:

    >>> 24 * (mamba_parameters(M=768).total + 768) + 768 + 50280 * 768
    129135360
    """
    values = _sizes(M=M, D=2 * M if D is None else D, N=N, k=k, R=-(-M // 16) if R is None else R)
    terms = [term(name, formula, values, "parameters", _BLOCK) for name, formula in _PARAMETERS]
    return estimate("a Mamba block", terms, leaves_out="the norm before it")


def scan_flops(*, T: int, D: int, N: int = 16, B: int = 1) -> Estimate:
    """Return the operations of a selective scan's products: ``8 B T D N``, in either discretization.

    Parameters
    ----------
    T, D, N, B : int
        Tokens, channels, states of a channel, sequences.

    Returns
    -------
    Estimate
        In FLOP.

    Raises
    ------
    OptionError
        If a size is negative.

    Examples
    --------
    >>> scan_flops(T=1024, D=1536).total
    201326592
    """
    return _flops("a selective scan", _SCAN_PRODUCTS, _SCAN, _sizes(B=B, T=T, D=D, N=N))


def mamba_flops(*, T: int, M: int, D: int, N: int, R: int, k: int, B: int = 1) -> Estimate:
    """Return the operations of a Mamba block's products.

    Parameters
    ----------
    T, M, D, N, R, k, B : int
        Tokens, width of the model and of the block, states, rank of the step, taps, sequences.

    Returns
    -------
    Estimate
        In FLOP.

    Raises
    ------
    OptionError
        If a size is negative.

    Examples
    --------
    >>> mamba_flops(T=1, M=768, D=1536, N=16, R=48, k=4).total
    7680000
    """
    return _flops("a Mamba block", _BLOCK_PRODUCTS, _BLOCK, _sizes(B=B, T=T, M=M, D=D, N=N, R=R, k=k))


def scan_traffic(
    *, T: int, D: int, N: int = 16, B: int = 1, algorithm: Algorithm = "fused", itemsize: int = 2
) -> Estimate:
    """Return the HBM traffic of a selective scan with gate, skip connection and bias.

    Parameters
    ----------
    T, D, N, B : int
        Tokens, channels, states of a channel, sequences.
    algorithm : {"fused", "materialized"}
        ``"fused"``: everything is read once and states stay on chip, ``O(B T D + D N)``.  ``"materialized"``:
        decays, drives and states go to HBM and come back, ``O(B T D N)``.
    itemsize : int
        Bytes of an element; what is computed has at least 4.

    Returns
    -------
    Estimate
        A term for each array and direction, in bytes.

    Raises
    ------
    OptionError
        If the algorithm is unknown or a size negative.

    References
    ----------
    .. [1] Gu and Dao, 2023, arXiv:2312.00752, section 3.3.2.

    Examples
    --------
    >>> scan_traffic(T=1024, D=1536)["scan: read B"]
    32768
    """
    values = _sizes(B=B, T=T, D=D, N=N) | _items(itemsize) | {"z": 1, "d": 1, "b": 1, "i": 0, "f": 0}
    return _bytes(f"HBM traffic of a {algorithm} scan", scan_moves(algorithm), values, _SCAN)


def mamba_traffic(
    *, T: int, M: int, D: int, N: int = 16, R: int, k: int = 4, B: int = 1, itemsize: int = 2
) -> Estimate:
    """Return the HBM traffic of a published Mamba block, its stages from HBM to HBM, its scan fused.

    Parameters
    ----------
    T, M, D, N, R, k, B : int
        As for `mamba_flops`.
    itemsize : int
        Bytes of an element of tokens and weights; what is computed between has at least 4.

    Returns
    -------
    Estimate
        A term for each array, stage and direction, in bytes.

    Raises
    ------
    OptionError
        If a size is negative.

    Examples
    --------
    >>> mamba_traffic(T=1, M=768, D=1536, R=48)["project in: read w_in"] == 2 * 2 * 768 * 1536
    True
    """
    has = {"z": 1, "d": 1, "b": 1, "i": 0, "f": 0, "c": 1, "p": 0, "q": 0}
    values = _sizes(B=B, T=T, M=M, D=D, N=N, R=R, k=k) | _items(itemsize) | has
    return _bytes("HBM traffic of a Mamba block", mamba_moves(), values, _BLOCK)


def mamba_state(*, D: int, N: int = 16, k: int = 4, B: int = 1) -> Estimate:
    """Return the numbers that a Mamba block carries from token to token: ``D (N + k - 1)`` a sequence.

    Parameters
    ----------
    D, N, k, B : int
        Channels, states of a channel, taps, sequences; the length does not matter.

    Returns
    -------
    Estimate
        In elements.

    Raises
    ------
    OptionError
        If a size is negative.

    Examples
    --------
    >>> mamba_state(D=1536).total
    29184
    """
    values = _sizes(B=B, D=D, N=N, k=k)
    return estimate(
        "the state of a Mamba block",
        [
            term("scan", "B*D*N", values, "elements", _SCAN),
            term("inputs of the convolution", "B*D*(k-1)", values, "elements", _BLOCK),
        ],
        leaves_out="one input of the convolution, which the released code keeps and never reads",
    )


def _sizes(**sizes: int) -> dict[str, Number]:
    for name, size in sizes.items():
        if size < 0:
            raise OptionError(f"{name}: expected an integer of at least 0; got {size}")
    return {name: exact(size) for name, size in sizes.items()}


def _items(itemsize: int) -> dict[str, Number]:
    wide = max(4, itemsize)
    return {"e": itemsize, "w": wide, "s": wide}


def _flops(
    name: str, products: tuple[tuple[str, str], ...], source: str, values: Mapping[str, Number]
) -> Estimate:
    terms = [term(part, formula, values, "FLOP", source) for part, formula in products]
    return estimate(f"products of {name}", terms, leaves_out=_UNCOUNTED)


def _bytes(name: str, moves: tuple[Move, ...], values: Mapping[str, Number], source: str) -> Estimate:
    terms = [term(move.name, f"{move.elements}*{move.item}", values, "B", source) for move in moves]
    return estimate(name, [item for item in terms if item.value])
