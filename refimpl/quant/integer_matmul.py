"""Products of integer codes, exact: what a matrix unit accumulates, and what zero points add to it.

NumPy multiplies int8 by int8 in int8 and wraps silently.  Here the codes are widened to float64, whose sums
of integers below 2**53 are exact in any order, so that a BLAS does the work.
"""

from __future__ import annotations

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import Array, IntArray
from refimpl.quant.samples import sample_integers
from refimpl.registry import Source, technique
from refimpl.validation import as_array, bind_axes

__all__ = ["MAX_INNER", "int8_matmul", "integer_matmul"]

# K * 127**2 <= 2**31 - 1: the longest sum of products of codes in [-127, 127] that int32 always holds.
MAX_INNER = (2**31 - 1) // 127**2

_EDGES: tuple[dict[str, int | str], ...] = (
    {"M": 0, "K": 3, "N": 2},
    {"M": 2, "K": 0, "N": 3},
    {"M": 3, "K": 2, "N": 0},
    {"M": 1, "K": 1, "N": 1},
    {"M": 2, "K": 4099, "N": 3, "codes": "extreme"},  # an odd sum beyond 2**24: float32 cannot hold it
)


@technique(
    "quant.int8_matmul",
    entries=(72,),
    kind="function",
    source=Source("Dettmers et al. 2022", "arXiv:2208.07339", "section 2, int8 matrix multiplication"),
    axes={"M": (1, 9), "K": (1, 70), "N": (1, 9)},
    options={"codes": ("restricted", "extreme")},
    edges=_EDGES,
    sample=sample_integers,
    exact=True,
)
def int8_matmul(a: IntArray, b: IntArray, /, *, memory: Memory | None = None) -> IntArray:
    """Return the int32 product of two int8 matrices, exactly.

    Parameters
    ----------
    a, b : ndarray of int8, shapes (M, K) and (K, N)
        Codes in [-127, 127].
    memory : Memory, optional
        Counts what moves: each operand once, the product once.

    Returns
    -------
    ndarray of int32, shape (M, N)
        No order of summation overflows, so every kernel gives these bits.

    Raises
    ------
    DTypeError
        If an operand is not int8.
    ShapeError
        If they are not matrices, or do not agree on K.
    OptionError
        If K exceeds ``MAX_INNER`` = 133,144, or a code is -128: either may overflow.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 2: products in int8, accumulated in int32.

    Examples
    --------
    >>> a = np.full((1, 4), 127, np.int8)
    >>> int8_matmul(a, a.T), a @ a.T  # NumPy's own product wraps
    (array([[64516]], dtype=int32), array([[4]], dtype=int8))
    """
    a, b = as_array("a", a), as_array("b", b)
    size = bind_axes({"a": (a, "M K"), "b": (b, "K N")})
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype != np.int8:
            raise DTypeError(f"{name}: expected int8, got {codes.dtype}")
        if np.any(codes == -128):
            raise OptionError(f"{name}: expected codes in [-127, 127], got -128")
    if size["K"] > MAX_INNER:
        raise OptionError(
            f"K: expected at most {MAX_INNER}, beyond which int32 may overflow; got {size['K']}"
        )
    hbm = memory or Memory()
    product = np.empty((size["M"], size["N"]), np.int32)
    with hbm.on_chip():
        left, right = hbm.load("A codes", a), hbm.load("B codes", b)
        hbm.store("int32 product", product, None, _exact_product(left, right))
    return product


@technique(
    "quant.integer_matmul",
    entries=(68,),
    kind="function",
    source=Source("Jacob et al. 2018", "arXiv:1712.05877", "eq. 4 and 7"),
    axes={"M": (1, 9), "K": (1, 40), "N": (1, 9)},
    options={"codes": ("restricted", "affine", "extreme")},
    edges=_EDGES,
    sample=sample_integers,
    exact=True,
)
def integer_matmul(
    a: IntArray,
    b: IntArray,
    /,
    *,
    a_zero_point: IntArray | int = 0,
    b_zero_point: IntArray | int = 0,
) -> IntArray:
    """Return ``(A - Z_a) (B - Z_b)`` from the product of the codes alone, in int64.

    The zero points are expanded, ``A B - Z_a colsum(B) - rowsum(A) Z_b + K Z_a Z_b``, so the K-long sums run
    over the stored codes and the rest costs as much as an epilogue.

    Parameters
    ----------
    a, b : ndarray of int, shapes (M, K) and (K, N)
        Codes of 8 bits, signed or not.
    a_zero_point, b_zero_point : int, or ndarray of int, shapes (M, 1) and (1, N)
        Of the whole matrix, or of each row of `a` and each column of `b`; along K they could not be expanded.

    Returns
    -------
    ndarray of int64, shape (M, N)
        Times ``S_a S_b`` it is the product of the dequantised matrices.

    Raises
    ------
    DTypeError
        If an operand does not have 8-bit integers.
    ShapeError
        If the matrices do not fit, or a zero point does not broadcast as said.

    References
    ----------
    .. [1] Jacob et al., 2018, arXiv:1712.05877, eq. 7 (there one zero point for each matrix).

    Examples
    --------
    >>> a = np.array([[255, 3]], np.uint8)
    >>> integer_matmul(a, a.T, a_zero_point=128, b_zero_point=3)
    array([[32004]])
    """
    a, b = as_array("a", a), as_array("b", b)
    size = bind_axes({"a": (a, "M K"), "b": (b, "K N")})
    for name, codes in (("a", a), ("b", b)):
        if codes.dtype not in (np.int8, np.uint8):
            raise DTypeError(f"{name}: expected int8 or uint8, got {codes.dtype}")
    z_a = _zero_point("a_zero_point", a_zero_point, (size["M"], 1))
    z_b = _zero_point("b_zero_point", b_zero_point, (1, size["N"]))
    columns = np.sum(b, axis=0, keepdims=True, dtype=np.int64)
    rows = np.sum(a, axis=1, keepdims=True, dtype=np.int64)
    product: IntArray = _exact_product(a, b) - z_a * columns - rows * z_b + size["K"] * z_a * z_b
    return product


def _exact_product(a: Array, b: Array) -> IntArray:
    """Return the product of 8-bit codes in int64; exact in float64 for any K below 2**37."""
    product: IntArray = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
    return product


def _zero_point(name: str, value: IntArray | int, shape: tuple[int, int]) -> IntArray:
    array = as_array(name, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"{name}: expected integers, got {array.dtype}")
    if array.shape not in ((), (1, 1), shape):
        raise ShapeError(f"{name}: expected one number or shape {shape}, got shape {array.shape}")
    return array.astype(np.int64)
