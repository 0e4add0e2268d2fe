"""LLM.int8(): a linear layer in int8, with the few features that hold outliers multiplied in floating point.

The values are one sum, ``Y = (X8 W8) (c_x ⊗ c_w) / 127² + X_O W_O + b``.  `llm_int8_linear` computes it in
the four steps of the released code, each of which leaves its result in HBM; `llm_int8_linear_fused` in two.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray, IntArray, round_to, widen
from refimpl.quant.absmax import Convention, Int8Columns, quantize_rows
from refimpl.quant.epilogue import (
    dequantize_product,
    linear_operands,
    outlier_product,
    scaled_product,
    stored_weight,
)
from refimpl.quant.integer_matmul import int8_matmul
from refimpl.quant.samples import sample_linear
from refimpl.registry import Case, Source, implements, technique

__all__ = [
    "Int8Linear",
    "llm_int8_linear",
    "llm_int8_linear_fused",
]


class Int8Linear(NamedTuple):
    """The output [T, N], and what it was made from."""

    out: FloatArray
    x_codes: IntArray
    x_absmax: FloatArray
    weight_codes: IntArray
    weight_absmax: FloatArray
    outliers: IntArray


def _terms(case: Case) -> tuple[int, FloatArray]:
    """Return the length of the reductions and the sums of absolute terms."""
    x, weight = (np.abs(array) for array in case.args)
    bias = np.abs(case.kwargs.get("bias", np.zeros(weight.shape[1])))
    return x.shape[1] + 4, x @ weight + bias


_SOURCE = Source("Dettmers et al. 2022", "arXiv:2208.07339", "section 3, eq. 8")
_AXES = {"T": (1, 9), "K": (1, 40), "N": (1, 9)}
_OPTIONS: dict[str, tuple[str | float | bool | None, ...]] = {
    "outliers": ("none", "some", "all", "zero_row"),
    "threshold": (6.0, None, 2.5),
    "convention": ("released", "paper"),
    "bias": (False, True),
}
_PLAIN: dict[str, str | float | bool | None] = {
    "outliers": "some", "threshold": 6.0, "convention": "released", "bias": False
}  # fmt: skip
_EDGES: tuple[dict[str, int | str | float | bool | None], ...] = (
    {**_PLAIN, "T": 0, "K": 3, "N": 2},
    {**_PLAIN, "T": 2, "K": 0, "N": 3, "bias": True},
    {**_PLAIN, "T": 2, "K": 3, "N": 0},
    {**_PLAIN, "T": 1, "K": 1, "N": 1},
    {**_PLAIN, "T": 5, "K": 33, "N": 7},
    {**_PLAIN, "T": 5, "K": 33, "N": 7, "convention": "paper", "bias": True},
    {**_PLAIN, "T": 5, "K": 33, "N": 7, "threshold": None, "outliers": "none"},
    {**_PLAIN, "T": 5, "K": 16, "N": 8, "outliers": "all"},
    {**_PLAIN, "T": 5, "K": 16, "N": 8, "outliers": "none", "bias": True},
    {**_PLAIN, "T": 5, "K": 16, "N": 8, "outliers": "zero_row"},
)


@technique(
    "quant.llm_int8",
    entries=(72,),
    kind="function",
    source=_SOURCE,
    axes=_AXES,
    options=_OPTIONS,
    edges=_EDGES,
    sample=sample_linear,
    terms=_terms,
)
def llm_int8_linear(
    x: FloatArray,
    weight: FloatArray | Int8Columns,
    /,
    *,
    bias: FloatArray | None = None,
    threshold: float | None = 6.0,
    convention: Convention = "released",
    return_parts: bool = False,
    memory: Memory | None = None,
) -> FloatArray | Int8Linear:
    """Return ``x @ weight + bias``, in int8 but for the columns of `x` that hold outliers.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Tokens by features.
    weight : ndarray of float, shape (K, N), or Int8Columns
        The weight, or its codes as `quantize_columns` stores them.
    bias : ndarray of float, shape (N,), optional
        Added in the epilogue.
    threshold : float or None
        Magnitude that makes a number an outlier and its column one of floating point; None: all int8.
    convention : {"paper", "released"}
        ``"paper"``: outliers lie strictly above the threshold, absmax is taken over the other columns, and
        outlier columns meet the weights as given.  ``"released"``: from the threshold on, over all cells
        that are no outliers, and they meet the *dequantised int8* weights, whose error therefore remains.
    return_parts : bool
        Return the codes, scales and outliers too.
    memory : Memory, optional
        Counts what moves; quantising the weight is done once, ahead, and is not counted.

    Returns
    -------
    ndarray of float, shape (T, N), or Int8Linear
        In the dtype of `x`, rounded to it twice if there are outliers, as the released code does in float16;
        other formats are ours: the released CUDA code passes through float16 on the way to them.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If K exceeds 133,144 (int32 may overflow), `threshold` is not above 0, `convention` is unknown or
        needs weights that int8 codes are not, or the weight holds NaN or infinity.

    Notes
    -----
    Scales are c/127 with c the absmax, and the bound of the error, for columns without outliers, is
    ``s_x s_w (|x_q|_1 / 2 + |w_q|_1 / 2 + K / 4)``.

    The lecture's slide says "at least one feature dimension with a magnitude larger than the threshold"; what
    is meant is a feature dimension with at least one such number, over all tokens of the call.

    **Special cases**

    - A row of zeros gives the bias.
    - NaN and infinity are outliers: they spoil their own row and no other.  Without a threshold a row that
      holds one of them is all NaN.
    - The released factor 6.200012e-05f is the float32 number nearest to 1/127²: no convention of its own.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3, eq. 8.
    .. [2] bitsandbytes @0155ecc, backends/default/ops.py, ``int8_mixed_scaled_mm``; csrc/cuda/int8.cu,
       ``kdequant_mm_int32_fp16``.

    Examples
    --------
    The second feature holds an outlier; without its column the first keeps its precision:

    >>> x, weight = np.array([[0.02, 60.0]]), np.eye(2)
    >>> llm_int8_linear(x, weight).round(6), llm_int8_linear(x, weight, threshold=None).round(6)
    (array([[2.e-02, 6.e+01]]), array([[ 0., 60.]]))
    """
    x, given, bias = linear_operands(x, weight, bias)
    w = stored_weight(given, convention, threshold)
    hbm = memory or Memory()
    rows = quantize_rows(x, threshold=threshold, convention=convention, memory=hbm)
    product = int8_matmul(rows.codes, w.codes, memory=hbm)
    out = dequantize_product(product, rows.absmax, w.absmax, bias=bias, dtype=x.dtype, memory=hbm)
    if rows.outliers.size:
        with hbm.on_chip():
            sum_ = widen(hbm.load("Y", out)) + outlier_product(hbm, x, given, w, rows, convention)
            hbm.store("Y", out, None, round_to(sum_, x.dtype))
    return Int8Linear(out, rows.codes, rows.absmax, *w, rows.outliers) if return_parts else out


@implements("quant.llm_int8", backend="numpy")
@technique(
    "quant.llm_int8_fused",
    entries=(72,),
    kind="function",
    source=_SOURCE,
    axes=_AXES,
    options=_OPTIONS,
    edges=_EDGES,
    sample=sample_linear,
    terms=_terms,
)
def llm_int8_linear_fused(
    x: FloatArray,
    weight: FloatArray | Int8Columns,
    /,
    *,
    bias: FloatArray | None = None,
    threshold: float | None = 6.0,
    convention: Convention = "released",
    return_parts: bool = False,
    memory: Memory | None = None,
) -> FloatArray | Int8Linear:
    """Return `llm_int8_linear` in two kernels: one quantises, one multiplies and writes the output once.

    Parameters
    ----------
    x, weight, bias, threshold, convention, return_parts, memory
        As for `llm_int8_linear`.

    Returns
    -------
    ndarray of float, shape (T, N), or Int8Linear
        In the dtype of `x`, rounded to it once.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `llm_int8_linear`.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3, eq. 8; the fusion is ours.

    Examples
    --------
    The int32 product never meets HBM:

    >>> x, weight, whole, fused = np.ones((8, 4)), np.ones((4, 8)), Memory(), Memory()
    >>> _ = llm_int8_linear(x, weight, memory=whole), llm_int8_linear_fused(x, weight, memory=fused)
    >>> whole.bytes_written - fused.bytes_written == 4 * 8 * 8
    True
    """
    x, given, bias = linear_operands(x, weight, bias)
    w = stored_weight(given, convention, threshold)
    hbm = memory or Memory()
    rows = quantize_rows(x, threshold=threshold, convention=convention, memory=hbm)
    out = np.empty((x.shape[0], w.codes.shape[1]), x.dtype)
    with hbm.on_chip():
        product = int8_matmul(hbm.load("X codes", rows.codes), hbm.load("W codes", w.codes))
        scales = hbm.load("X absmax", rows.absmax), hbm.load("W absmax", w.absmax)
        total = scaled_product(product, *scales)
        if bias is not None:
            total = total + widen(hbm.load("bias", bias))
        if rows.outliers.size:
            total = total + outlier_product(hbm, x, given, w, rows, convention, scales_on_chip=True)
        hbm.store("Y", out, None, round_to(total, x.dtype))
    return Int8Linear(out, rows.codes, rows.absmax, *w, rows.outliers) if return_parts else out
