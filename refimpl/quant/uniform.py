"""Uniform quantisation, r = S (q - Z): the scale and the zero point that fit the range of each block.

The scale is held in `refimpl.numerics.wide_dtype` of the input; codes are made by `refimpl.quant.grid`.
"""

from __future__ import annotations

import numpy as np

from refimpl.numerics import FloatArray, wide_dtype, widen
from refimpl.quant.blocks import Block, reduce_blocks
from refimpl.quant.grid import Quantized, Rounding, Scheme, code_range, finite_array, quantize, round_half
from refimpl.quant.samples import sample_uniform
from refimpl.registry import Source, technique
from refimpl.validation import floating

__all__ = ["uniform"]


# What ONNX has: 8 bits, halves to even.  17 columns leave a last group of 1.
_INT8: dict[str, int | str | bool] = {
    "rows": 3, "columns": 17, "bits": 8, "rounding": "half_even", "values": "normal"
}  # fmt: skip


@technique(
    "quant.uniform",
    entries=(68,),
    kind="function",
    source=Source("Jacob et al. 2018", "arXiv:1712.05877", "eq. 1 and section 3"),
    axes={"rows": (1, 6), "columns": (1, 40), "bits": (2, 8)},
    options={
        "scheme": ("symmetric", "symmetric_full", "affine"),
        "granularity": ("tensor", "row", "column", "group", "tile"),
        "signed": (True, False),
        "rounding": ("half_even", "half_away"),
        "values": ("normal", "ties", "one_sided", "zero", "constant"),
    },
    edges=(
        {"rows": 0, "columns": 3},
        {"rows": 2, "columns": 0, "granularity": "row"},
        {"rows": 1, "columns": 1},
        {**_INT8, "granularity": "group", "scheme": "symmetric"},
        {**_INT8, "granularity": "group", "scheme": "affine"},
        {**_INT8, "granularity": "row", "scheme": "symmetric_full"},
        {**_INT8, "granularity": "column", "scheme": "affine", "signed": False},
        {**_INT8, "granularity": "tensor", "scheme": "affine", "signed": False, "values": "one_sided"},
        {"rows": 5, "columns": 9, "granularity": "tile", "values": "normal"},
        {"rows": 2, "columns": 30, "granularity": "tensor", "scheme": "symmetric", "values": "ties"},
        {"values": "zero"},
        {"values": "constant", "scheme": "affine"},
    ),
    sample=sample_uniform,
    exact=True,
)
def uniform(
    x: FloatArray,
    /,
    *,
    bits: int = 8,
    scheme: Scheme = "symmetric",
    block: Block = None,
    signed: bool = True,
    rounding: Rounding = "half_even",
) -> Quantized:
    """Return the codes of `x` on a uniform grid whose scale fits the range of each block.

    Parameters
    ----------
    x : ndarray of float, any shape
        What is quantised.
    bits : int
        Bits of a code, 2 to 8.
    scheme : {"symmetric", "symmetric_full", "affine"}
        ``"symmetric"``: ``S = max|x| / (2**(bits-1) - 1)`` and the most negative code is not used, so the
        grid is its own mirror image.  ``"symmetric_full"``: all 2**bits codes and ``S = max|x| /
        (2**bits - 1) * 2``, as torch's observers; the largest positive number lies half a step outside.
        ``"affine"``: ``S = (max(x, 0) - min(x, 0)) / (2**bits - 1)``; the range always holds 0.
    block : tuple of (int or None), optional
        Extent of a block along each axis, None the whole axis (`refimpl.quant.blocks`).  Default: one block.
        The last blocks of an axis may be shorter.
    signed : bool
        Codes around 0 in int8, or from 0 in uint8: the same codes plus ``2**(bits-1)``.
    rounding : {"half_even", "half_away"}
        Where halves go.

    Returns
    -------
    Quantized
        ``codes`` shaped like `x`; ``scale`` and ``zero_point`` with one number a block, the latter in the
        dtype of the codes.

    Raises
    ------
    OptionError
        If an option is out of range, `x` holds NaN or infinity, or a range overflows.
    DTypeError
        If `x` is not real.

    Notes
    -----
    **Special cases**

    - A block of zeros has scale 1 and codes equal to its zero point, as in ONNX Runtime.
    - A scale is never below the smallest normal number, so tiny blocks lose nothing but precision.
    - 0 is always represented exactly.

    References
    ----------
    .. [1] Jacob et al., 2018, arXiv:1712.05877, eq. 1: r = S(q - Z); section 3: ranges and nudging.
    .. [2] ONNX DynamicQuantizeLinear (the affine scheme, 8 bits, unsigned).

    Examples
    --------
    >>> q = uniform(np.array([-1.27, 0.0, 0.014, 0.5]))
    >>> q.codes, float(q.scale[0])
    (array([-127,    0,    1,   50], dtype=int8), 0.01)
    >>> uniform(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), bits=2, block=(1, 2)).scale
    array([[2., 3.],
           [1., 1.]])
    """
    (x,) = floating(x=x)
    low_code, high_code = code_range(bits, scheme, signed)
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    finite_array("x", wide)
    middle = 0 if signed else 2 ** (bits - 1)
    dtype = np.dtype(np.int8 if signed else np.uint8)
    with np.errstate(over="ignore"):  # refused below
        if scheme == "affine":
            low = np.minimum(reduce_blocks(np.minimum, wide, block), 0)
            high = np.maximum(reduce_blocks(np.maximum, wide, block), 0)
            scale = _scale(high - low, (high_code - low_code) * wide.dtype.type(1))
            # The range holds 0, so this is a code without clipping; added after rounding, the lowest code
            # shifts signed and unsigned zero points alike, as in ONNX.
            zero_point = (low_code + round_half(-low / scale, rounding)).astype(dtype)
        else:
            absmax = reduce_blocks(np.maximum, np.abs(wide), block)
            scale = _scale(absmax, (high_code - low_code) * wide.dtype.type(0.5))
            zero_point = np.full(scale.shape, middle, dtype)
    codes = quantize(
        x, scale, zero_point, bits=bits, scheme=scheme, block=block, signed=signed, rounding=rounding
    )
    return Quantized(codes, scale, zero_point)


def _scale(extent: FloatArray, steps: FloatArray) -> FloatArray:
    """Return `extent` over `steps`, 1 where the extent is 0, and nowhere a subnormal number."""
    finite_array("range of x", extent)
    tiny = np.finfo(extent.dtype).tiny
    scale: FloatArray = np.where(extent > 0, np.maximum(extent / steps, tiny), 1).astype(extent.dtype)
    return scale
