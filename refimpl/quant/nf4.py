"""NF4: four bits a weight, on 16 levels that a normal distribution fills about equally, in blocks of 64.

A block is divided by its absmax and every number takes the nearest level.  The levels are not symmetric: 8
are positive, 7 negative, and 0 is one of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import Array, FloatArray, IntArray, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, finite, floating, whole

__all__ = [
    "LEVELS",
    "NF4",
    "block_absmax",
    "nearest_level",
    "nf4",
    "nf4_dequantize",
    "normal_float_levels",
    "pack_nibbles",
    "unpack_nibbles",
]

# As released; `normal_float_levels` gives them to 1.2e-7, the rounding of float32.
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
LEVELS.flags.writeable = False
# The quantile of the outermost level: midway between those of 15 and of 16 equal parts of each half.
OFFSET = 0.9677083


class NF4(NamedTuple):
    """Packed codes, two a byte, of the flattened array, and the absmax of each block."""

    codes: IntArray
    absmax: FloatArray


def normal_float_levels(offset: float = OFFSET) -> FloatArray:
    """Return the 16 levels from their recipe: normal quantiles, divided by the largest.

    Parameters
    ----------
    offset : float
        The probability of the outermost level, in (1/2, 1).

    Returns
    -------
    ndarray of float64, shape (16,)
        Ascending, from -1 to 1.

    Raises
    ------
    OptionError
        If `offset` is not between 1/2 and 1.

    Notes
    -----
    Equation 4 of the paper, read literally, gives 15 symmetric levels; the recipe is that of the code.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3, "4-bit NormalFloat Quantization".
    .. [2] bitsandbytes, functional.py, ``create_normal_map``.

    Examples
    --------
    >>> bool(np.abs(normal_float_levels() - LEVELS).max() < 1.2e-7)
    True
    """
    from scipy.special import ndtri

    if not 0.5 < finite("offset", offset) < 1:
        raise OptionError(f"offset: expected a probability between 1/2 and 1, got {offset}")
    positive = ndtri(np.linspace(offset, 0.5, 9)[:-1])
    negative = -ndtri(np.linspace(offset, 0.5, 8)[:-1])
    levels: FloatArray = np.sort(np.concatenate([negative, [0.0], positive])) / positive.max()
    return levels


def sample_blocks(rng: np.random.Generator, *, rows: int, columns: int, block_size: int, values: str) -> Case:
    """Return a call of `nf4` on a matrix drawn from `rng`.

    Examples
    --------
    >>> sample_blocks(np.random.default_rng(0), rows=1, columns=2, block_size=8, values="zero").args[0]
    array([[0., 0.]])
    """
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-6, 7, (rows, 1)))
    if values == "zero":
        x = np.zeros_like(x)
    elif values == "midpoints":  # of neighbouring levels, in blocks whose absmax is a power of two
        middle = (LEVELS[:-1].astype(np.float64) + LEVELS[1:]) / 2
        x = 2.0 * rng.choice(middle, (rows, columns))
        x.reshape(-1)[::block_size] = 2.0
    elif values == "tiny":
        x = x * 1e-30
    # Numbers of float32, which the released code computes in.
    return Case((x.astype(np.float32).astype(np.float64),), {"block_size": block_size})


@technique(
    "quant.nf4",
    entries=(73,),
    kind="function",
    source=Source("Dettmers et al. 2023", "arXiv:2305.14314", "section 3, eq. 4; levels as released"),
    axes={"rows": (1, 4), "columns": (1, 40), "block_size": (1, 70)},
    options={"values": ("normal", "midpoints", "zero", "tiny")},
    edges=(
        {"rows": 0, "columns": 3},
        {"rows": 1, "columns": 1, "block_size": 64, "values": "normal"},
        {"rows": 3, "columns": 43, "block_size": 64, "values": "normal"},
        {"rows": 2, "columns": 64, "block_size": 64, "values": "normal"},
        {"rows": 2, "columns": 8, "block_size": 64, "values": "zero"},
        {"rows": 4, "columns": 40, "block_size": 16, "values": "midpoints"},
        {"rows": 1, "columns": 9, "block_size": 4, "values": "tiny"},
    ),
    sample=sample_blocks,
    exact=True,
)
def nf4(x: FloatArray, /, *, block_size: int = 64) -> NF4:
    """Return the NF4 codes of `x`, flattened row by row and cut into blocks.

    Parameters
    ----------
    x : ndarray of float, any shape
        Weights.
    block_size : int
        Numbers that share an absmax; the last block may be shorter.

    Returns
    -------
    NF4
        ``codes`` uint8, shape (ceil(n / 2),): the first of two in the high nibble, and code 7, the level 0,
        in the last low nibble if n is odd.  ``absmax`` in `wide_dtype` of `x`, shape (ceil(n / block_size),).

    Raises
    ------
    DTypeError
        If `x` is not real, or `block_size` no integer.
    OptionError
        If `block_size` is below 1, or `x` holds NaN or infinity.

    Notes
    -----
    A number is multiplied by the reciprocal of its block's absmax, in the wide dtype, and takes the nearest
    level.

    **Special cases**

    - Midway between two levels the lower one is taken, as the released comparison with ``>`` does.
    - A block of zeros, or one so small that the reciprocal overflows, has codes 7, the level 0.
    - The number of largest magnitude comes back exactly if it is positive, or if no positive one is larger:
      both -1 and 1 are levels.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3.
    .. [2] bitsandbytes, csrc/kernels.cu, ``dQuantizeNF4``.

    Examples
    --------
    >>> nf4(np.array([4.0, -4.0, 0.0, 1.0]))
    NF4(codes=array([240, 122], dtype=uint8), absmax=array([4.]))
    """
    (x,) = floating(x=x)
    whole("block_size", block_size)
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False).reshape(-1)
    if not np.isfinite(wide).all():
        place = int(np.argmin(np.isfinite(wide)))
        raise OptionError(f"x: expected finite numbers, got {wide[place]} at flat index {place}")
    absmax = block_absmax(wide, block_size)
    return NF4(pack_nibbles(nearest_level(wide, absmax, LEVELS, block_size)), absmax)


def nf4_dequantize(
    codes: IntArray, absmax: FloatArray, /, *, shape: tuple[int, ...], block_size: int = 64
) -> FloatArray:
    """Return ``level * absmax`` of every code.

    Parameters
    ----------
    codes : ndarray of uint8, shape (ceil(n / 2),)
        As from `nf4`.
    absmax : ndarray of float, shape (ceil(n / block_size),)
        One a block.
    shape : tuple of int
        Of the array, n numbers.
    block_size : int
        As for `nf4`.

    Returns
    -------
    ndarray of float, shape `shape`
        In the dtype of `absmax`.

    Raises
    ------
    ShapeError
        If the codes or the absmax are not those of `shape`.
    DTypeError
        If the codes are not uint8.

    Examples
    --------
    >>> nf4_dequantize(*nf4(np.array([4.0, -4.0, 0.0, 1.0])), shape=(2, 2)).round(4)
    array([[ 4.    , -4.    ],
           [ 0.    ,  0.9844]])
    """
    (absmax,) = floating(absmax=absmax)
    whole("block_size", block_size)
    n = int(np.prod(shape, dtype=np.int64))
    if absmax.shape != (-(-n // block_size),):
        raise ShapeError(
            f"absmax: expected shape ({-(-n // block_size)},) for {n} numbers, got {absmax.shape}"
        )
    wide = widen(absmax)
    levels = LEVELS.astype(wide.dtype)[unpack_nibbles(codes, n)]
    return (levels * np.repeat(wide, block_size)[:n]).reshape(shape)


def block_absmax(x: FloatArray, block_size: int) -> FloatArray:
    """Return the largest magnitude of each block of a flat array, the last one possibly shorter.

    Examples
    --------
    >>> block_absmax(np.array([1.0, -3.0, 2.0]), 2)
    array([3., 2.])
    """
    if not x.size:
        return x
    largest: FloatArray = np.maximum.reduceat(np.abs(x), np.arange(0, x.size, block_size))
    return largest


def nearest_level(x: FloatArray, absmax: FloatArray, levels: FloatArray, block_size: int) -> IntArray:
    """Return the index of the level nearest to each ``x / absmax``; midway between two, the lower.

    Parameters
    ----------
    x : ndarray of float, shape (n,)
        Finite numbers.
    absmax : ndarray of float, shape (ceil(n / block_size),)
        In the same dtype.
    levels : ndarray of float
        Ascending; 0 is one of them.
    block_size : int
        Numbers a block.

    Returns
    -------
    ndarray of uint8, shape (n,)

    Examples
    --------
    >>> nearest_level(np.array([2.0, 0.9]), np.array([2.0]), np.array([-1.0, 0.0, 1.0]), 2)
    array([2, 1], dtype=uint8)
    """
    with np.errstate(divide="ignore", over="ignore"):
        factor = 1 / absmax
    factor = np.where(np.isfinite(factor), factor, 0).astype(x.dtype)
    scaled = x * np.repeat(factor, block_size)[: x.size]
    middle = (levels[:-1].astype(x.dtype) + levels[1:].astype(x.dtype)) / 2
    return np.searchsorted(middle, scaled, side="left").astype(np.uint8)


def pack_nibbles(codes: IntArray) -> IntArray:
    """Return 4-bit codes two a byte, the first in the high nibble; a missing last one is 7.

    Examples
    --------
    >>> pack_nibbles(np.array([1, 15, 2]))
    array([31, 39], dtype=uint8)
    """
    even = np.append(codes, [7] * (codes.size % 2)).astype(np.uint8)
    return even[0::2] << np.uint8(4) | even[1::2]


def unpack_nibbles(codes: Array, n: int) -> IntArray:
    """Return the first `n` 4-bit codes of packed bytes.

    Raises
    ------
    DTypeError
        If `codes` is not uint8.
    ShapeError
        If it does not hold `n` codes.

    Examples
    --------
    >>> unpack_nibbles(np.array([31, 39], np.uint8), 3)
    array([ 1, 15,  2], dtype=uint8)
    """
    codes = as_array("codes", codes)
    if codes.dtype != np.uint8:
        raise DTypeError(f"codes: expected uint8, got {codes.dtype}")
    if codes.shape != (-(-n // 2),):
        raise ShapeError(f"codes: expected shape ({-(-n // 2)},) for {n} numbers, got {codes.shape}")
    return np.stack([codes >> np.uint8(4), codes & np.uint8(15)], axis=1).reshape(-1)[:n]
