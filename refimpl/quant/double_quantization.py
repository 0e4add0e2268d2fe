"""Double quantisation: the absmax of NF4's blocks, quantised themselves to 8 bits on a dynamic map.

One float32 absmax for 64 weights costs half a bit a weight; its 8-bit code, with one float32 scale for 256
codes and one offset for all, costs 0.127.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, wide_dtype, widen
from refimpl.quant.nf4 import block_absmax, nearest_level
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = ["DoubleQuantized", "double", "double_dequantize", "dynamic_map"]


class DoubleQuantized(NamedTuple):
    """The 8-bit codes of the absmax, the absmax of each block of them, and what was subtracted first."""

    codes: IntArray
    scale: FloatArray
    offset: FloatArray


@functools.cache
def dynamic_map() -> FloatArray:
    """Return the 256 levels of the signed dynamic map: the leading zeros of a code are its decimal exponent.

    Returns
    -------
    ndarray of float32, shape (256,)
        Ascending, from -0.9929688 to 1.  Between ``10**(i - 7)`` and ``10**(i - 6)``, for i = 0 to 6, lie the
        2**i middles of equal parts of that decade, with both signs; 0 and 1 complete them.  The released
        map is made in float32 throughout and differs by its roundings, up to 6e-8.

    References
    ----------
    .. [1] Dettmers, 2016, arXiv:1511.04561, section 2.2, dynamic tree quantization.
    .. [2] bitsandbytes, functional.py, ``create_dynamic_map``.

    Examples
    --------
    >>> levels = dynamic_map()
    >>> levels.size, float(levels[-1]), int(np.flatnonzero(levels == 0)[0])
    (256, 1.0, 127)
    """
    magnitudes = []
    for i in range(7):
        borders = np.linspace(0.1, 1, 2**i + 1)
        magnitudes.append(10.0 ** (i - 6) * (borders[:-1] + borders[1:]) / 2)
    positive = np.concatenate(magnitudes)
    levels: FloatArray = np.sort(np.concatenate([-positive, [0, 1], positive]).astype(np.float32))
    levels.flags.writeable = False
    return levels


def sample_absmax(rng: np.random.Generator, *, n: int, block_size: int, values: str) -> Case:
    """Return a call of `double`: the absmax of n blocks of weights.

    Examples
    --------
    >>> sample_absmax(np.random.default_rng(0), n=2, block_size=256, values="equal")
    Case(args=(array([1.5, 1.5]),), kwargs={'block_size': 256})
    """
    absmax = np.abs(rng.standard_normal((n, 16))).max(axis=1, initial=0.0)
    if values == "equal":
        absmax = np.full(n, 1.5)
    elif values == "wide":
        absmax = absmax * 10.0 ** rng.integers(-6, 1, n)
    return Case((absmax,), {"block_size": block_size})


def _terms(case: Case) -> tuple[int, DoubleQuantized]:
    """Return the length of the mean and the sizes of what it is subtracted from; codes have no rounding."""
    (absmax,) = case.args
    codes, scale, offset = double(absmax, **case.kwargs)
    return max(absmax.size, 1), DoubleQuantized(codes * 0, scale + np.abs(offset), np.abs(offset))


@technique(
    "quant.double",
    entries=(74,),
    kind="function",
    source=Source("Dettmers et al. 2023", "arXiv:2305.14314", "section 3, Double Quantization"),
    axes={"n": (1, 40), "block_size": (1, 12)},
    options={"values": ("normal", "equal", "wide")},
    edges=(
        {"n": 0, "block_size": 256},
        {"n": 1, "block_size": 256},
        {"n": 300, "block_size": 256, "values": "normal"},
        {"n": 8, "block_size": 4, "values": "equal"},
        {"n": 33, "block_size": 8, "values": "wide"},
    ),
    sample=sample_absmax,
    terms=_terms,
)
def double(absmax: FloatArray, /, *, block_size: int = 256) -> DoubleQuantized:
    """Return the 8-bit codes of block scales.

    Parameters
    ----------
    absmax : ndarray of float, shape (n,)
        Scales as `nf4` returns them.
    block_size : int
        Codes that share a scale of their own; the last block may be shorter.

    Returns
    -------
    DoubleQuantized
        ``codes`` uint8 (n,), indices into `dynamic_map`; ``scale`` (ceil(n / block_size),) and ``offset``
        (1,), the mean, in `wide_dtype` of `absmax`.

    Raises
    ------
    ShapeError, DTypeError
        If `absmax` is not a real vector, or `block_size` no integer.
    OptionError
        If `block_size` is below 1, a scale is NaN or infinite, or their sum is.

    Notes
    -----
    The paper calls the second format an 8-bit float; the released code uses the dynamic map.

    **Special cases**

    - If all scales are equal their differences to the mean are 0, or its rounding, and they come back.
    - A scale far below the mean may come back negative.
    - The mean of no scales is 0.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3.
    .. [2] bitsandbytes, functional.py, ``quantize_4bit`` with ``compress_statistics=True``.

    Examples
    --------
    >>> double(np.array([1.0, 3.0]))
    DoubleQuantized(codes=array([  0, 255], dtype=uint8), scale=array([1.]), offset=array([2.]))
    """
    (absmax,) = floating(absmax=absmax)
    bind_axes({"absmax": (absmax, "n")})
    whole("block_size", block_size)
    wide = widen(absmax).astype(wide_dtype(absmax.dtype), copy=False)
    if not np.isfinite(wide).all():
        raise OptionError("absmax: expected finite scales, got NaN or infinity")
    with np.errstate(over="ignore"):
        offset = np.asarray([wide.mean() if wide.size else 0], wide.dtype)
    if not np.isfinite(offset[0]):
        raise OptionError("absmax: the sum of the scales overflows")
    centered = wide - offset
    scale = block_absmax(centered, block_size)
    return DoubleQuantized(nearest_level(centered, scale, dynamic_map(), block_size), scale, offset)


def double_dequantize(
    codes: IntArray, scale: FloatArray, offset: FloatArray, /, *, block_size: int = 256
) -> FloatArray:
    """Return ``level * scale + offset`` of every code.

    Parameters
    ----------
    codes : ndarray of uint8, shape (n,)
        As from `double`.
    scale : ndarray of float, shape (ceil(n / block_size),)
        One a block.
    offset : ndarray of float, shape (1,)
        Added to all.
    block_size : int
        As for `double`.

    Returns
    -------
    ndarray of float, shape (n,)
        In the dtype of `scale`.

    Raises
    ------
    ShapeError, DTypeError
        If the parts do not fit, or the codes are not uint8.

    Examples
    --------
    >>> double_dequantize(*double(np.array([1.0, 3.0]))).round(5)
    array([1.00703, 3.     ])
    """
    codes = as_array("codes", codes)
    scale, offset = floating(scale=scale, offset=offset)
    bind_axes({"codes": (codes, "n"), "scale": (scale, "blocks"), "offset": (offset, "one")})
    whole("block_size", block_size)
    if codes.dtype != np.uint8:
        raise DTypeError(f"codes: expected uint8, got {codes.dtype}")
    if scale.size != -(-codes.size // block_size) or offset.size != 1:
        raise ShapeError(
            f"scale: expected {-(-codes.size // block_size)} numbers and one offset for {codes.size} codes, "
            f"got {scale.size} and {offset.size}"
        )
    wide = widen(scale)
    spread = np.repeat(wide, block_size)[: codes.size]
    values: FloatArray = dynamic_map().astype(wide.dtype)[codes] * spread + widen(offset)
    return values
