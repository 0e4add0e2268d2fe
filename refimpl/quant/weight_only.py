"""Weight-only int8: a linear layer whose weight is stored in int8, a scale for each group along K.

A decoder's step multiplies a few tokens with every weight once, so it takes as long as the weights take to
arrive.  Stored in a byte they arrive in half the time; they are dequantised on the chip, and activations are
never quantised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, IntArray, contract, round_to, wide_dtype, widen
from refimpl.quant.absmax import LIMIT
from refimpl.quant.blocks import expand, reduce_blocks
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = [
    "Int8Groups",
    "WeightOnlyGradients",
    "dequantize_groups",
    "int8_weight_linear",
    "int8_weight_linear_vjp",
    "quantize_groups",
    "sample_weight_only",
]


class Int8Groups(NamedTuple):
    """A weight as it is stored: codes int8 [K, N], and the scale of each group [ceil(K / group_size), N]."""

    codes: IntArray
    scale: FloatArray


class WeightOnlyGradients(NamedTuple):
    """Gradients of x and of the bias, if there is one; the frozen weight has none."""

    x: FloatArray
    weight: None
    dbias: FloatArray | None


def quantize_groups(weight: FloatArray, /, *, group_size: int = 128) -> Int8Groups:
    """Return a weight in int8, symmetric, with a scale for every `group_size` rows of each column.

    Parameters
    ----------
    weight : ndarray of float, shape (K, N)
        Used as ``x @ weight``.
    group_size : int
        Input features that share a scale; the last group may be shorter.

    Returns
    -------
    Int8Groups
        ``scale`` is absmax / 127 in `wide_dtype` of `weight`; that of a group of zeros is 0.

    Raises
    ------
    ShapeError, DTypeError
        If `weight` is no real matrix, or `group_size` no integer.
    OptionError
        If `group_size` is below 1, or `weight` holds NaN or infinity.

    Notes
    -----
    A code is ``rint(w * (127 / absmax))``, halves to even, in the wide dtype; -128 stays unused.  A group so
    small that 127 / absmax is not finite has codes 0.

    References
    ----------
    .. [1] Yao et al., 2022, arXiv:2206.01861, section 4.1, group-wise quantization for weights.

    Examples
    --------
    >>> stored = quantize_groups(np.array([[127.0], [-64.0], [0.5], [0.25]]), group_size=2)
    >>> stored.codes.T, stored.scale.T
    (array([[127, -64, 127,  64]], dtype=int8), array([[1.        , 0.00393701]]))
    """
    (weight,) = floating(weight=weight)
    bind_axes({"weight": (weight, "K N")})
    whole("group_size", group_size)
    wide = widen(weight).astype(wide_dtype(weight.dtype), copy=False)
    if not np.isfinite(wide).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(wide))[0])
        raise OptionError(f"weight: expected finite numbers, got {wide[where]} at {list(where)}")
    absmax = reduce_blocks(np.maximum, np.abs(wide), (group_size, 1))
    with np.errstate(divide="ignore", over="ignore"):
        factor = wide.dtype.type(LIMIT) / absmax
    factor = np.where(np.isfinite(factor), factor, 0)
    codes = np.rint(wide * expand(factor, wide.shape, (group_size, 1))).astype(np.int8)
    return Int8Groups(codes, absmax / wide.dtype.type(LIMIT))


def dequantize_groups(weight: Int8Groups, /, *, group_size: int = 128) -> FloatArray:
    """Return ``codes * scale``.

    Returns
    -------
    ndarray of float, shape (K, N)
        In the dtype of the scales.

    Raises
    ------
    ShapeError, DTypeError
        If the parts do not fit, or the codes are not int8.

    Examples
    --------
    >>> dequantize_groups(quantize_groups(np.array([[12.7], [-6.4]]))).round(3).T
    array([[12.7, -6.4]])
    """
    codes, scale = as_array("weight codes", weight.codes), floating(scale=weight.scale)[0]
    whole("group_size", group_size)
    if codes.dtype != np.int8:
        raise DTypeError(f"weight codes: expected int8, got {codes.dtype}")
    bind_axes({"weight codes": (codes, "K N")})
    groups = -(-codes.shape[0] // group_size), codes.shape[1]
    if scale.shape != groups:
        raise ShapeError(
            f"weight scale: expected shape {groups} for groups of {group_size}, got {scale.shape}"
        )
    wide = widen(scale)
    values: FloatArray = codes.astype(wide.dtype) * expand(wide, codes.shape, (group_size, 1))
    return values


def sample_weight_only(
    rng: np.random.Generator, *, M: int, K: int, N: int, bias: bool, values: str, **sizes: Any
) -> Case:
    """Return a call of a linear layer with a quantised weight; `sizes` are passed on as options.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    M, K, N : int
        Tokens, input features, output features.
    bias : bool
        Draw one.
    values : {"normal", "zero", "scaled"}
        Weights; with ``"zero"`` every second column is 0, with ``"scaled"`` rows differ in size.
    **sizes
        Of groups or blocks.

    Returns
    -------
    Case

    Examples
    --------
    >>> shape = dict(M=2, K=3, N=4, bias=True, values="normal", group_size=2)
    >>> case = sample_weight_only(np.random.default_rng(0), **shape)
    >>> [a.shape for a in case.args], sorted(case.kwargs)
    ([(2, 3), (3, 4)], ['bias', 'group_size'])
    """
    x = rng.standard_normal((M, K))
    weight = rng.standard_normal((K, N)) / np.sqrt(max(K, 1))
    if values == "zero":
        weight[:, ::2] = 0.0
    elif values == "scaled":
        weight = weight * np.exp2(rng.integers(-4, 3, (K, 1)))
    options: dict[str, Any] = {"bias": rng.standard_normal(N)} if bias else {}
    return Case((x, weight), {**sizes, **options})


def linear_terms(case: Case) -> tuple[int, FloatArray]:
    """Return the length of the sums of ``x @ weight + bias`` and the sizes of their terms."""
    x, weight = (np.abs(array) for array in case.args)
    bias = case.kwargs.get("bias")
    return x.shape[1] + 4, 2 * (x @ weight) + (0 if bias is None else np.abs(bias))


EDGES: tuple[dict[str, int | str | bool], ...] = (
    {"M": 0, "K": 3, "N": 4},
    {"M": 2, "K": 0, "N": 4, "bias": True},
    {"M": 2, "K": 3, "N": 0},
    {"M": 1, "K": 1, "N": 1, "bias": False, "values": "normal"},
    {"M": 1, "K": 64, "N": 3, "bias": False, "values": "normal"},
    {"M": 3, "K": 37, "N": 5, "bias": True, "values": "scaled"},
    {"M": 2, "K": 16, "N": 6, "bias": False, "values": "zero"},
    {"M": 16, "K": 24, "N": 17, "bias": True, "values": "normal"},
    {"M": 17, "K": 9, "N": 3, "bias": False, "values": "normal"},
)
# What kernels for tensor cores take: whole steps of their products, and sizes of groups that fit these.
_WHOLE: dict[str, int | str | bool] = {"K": 256, "bias": True, "values": "scaled"}
INT8_EDGES = (
    {**_WHOLE, "M": 1, "N": 5, "group_size": 128},
    {**_WHOLE, "M": 3, "N": 17, "group_size": 256, "values": "zero"},
    {**_WHOLE, "M": 16, "N": 5, "group_size": 128, "bias": False},
)
NF4_EDGES = (
    {**_WHOLE, "M": 1, "N": 5, "block_size": 64, "scale_block_size": 4},
    {**_WHOLE, "M": 3, "N": 17, "block_size": 64, "scale_block_size": 8, "values": "zero"},
    {**_WHOLE, "M": 16, "N": 5, "block_size": 64, "scale_block_size": 16, "bias": False},
)


@technique(
    "quant.weight_only_int8",
    entries=(72,),
    kind="function",
    source=Source("Yao et al. 2022", "arXiv:2206.01861", "section 4.1, group-wise quantization for weights"),
    axes={"M": (1, 4), "K": (1, 40), "N": (1, 7), "group_size": (1, 48)},
    options={"bias": (False, True), "values": ("normal", "zero", "scaled")},
    edges=(*EDGES, *INT8_EDGES),
    sample=sample_weight_only,
    terms=linear_terms,
    vjp="refimpl.quant.weight_only:int8_weight_linear_vjp",
)
def int8_weight_linear(
    x: FloatArray,
    weight: FloatArray | Int8Groups,
    /,
    *,
    bias: FloatArray | None = None,
    group_size: int = 128,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``x @ dequantised(weight) + bias``.

    Parameters
    ----------
    x : ndarray of float, shape (M, K)
        Tokens by features.
    weight : ndarray of float, shape (K, N), or Int8Groups
        The weight, or as `quantize_groups` stores it, ahead and once.
    bias : ndarray of float, shape (N,), optional
        Added before rounding.
    group_size : int
        As for `quantize_groups`; of a stored weight, that which it was stored with.
    memory : Memory, optional
        Counts what moves: every operand once as it is stored, the output once.

    Returns
    -------
    ndarray of float, shape (M, N)
        In the dtype of `x`; products and sums in the wide dtype, rounded once.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, are not real, or cannot be quantised.

    Notes
    -----
    Codes times the scale of a group, summed over groups, is the same number in exact arithmetic: a kernel may
    scale sums instead of weights.

    References
    ----------
    .. [1] Yao et al., 2022, arXiv:2206.01861, section 4.1.

    Examples
    --------
    >>> int8_weight_linear(np.array([[1.0, 2.0]]), np.array([[127.0], [-1.0]]))
    array([[125.]])
    """
    (x,) = floating(x=x)
    if not isinstance(weight, Int8Groups):
        x, weight = floating(x=x, weight=weight)
        weight = quantize_groups(weight, group_size=group_size)
    named, bias = _checked(x, weight.codes, bias)
    hbm = memory or Memory()
    out = np.empty(named, x.dtype)
    with hbm.on_chip():
        features = hbm.load("X", x)
        stored = Int8Groups(hbm.load("W codes", weight.codes), hbm.load("W scale", weight.scale))
        total = contract("mk,kn->mn", features, dequantize_groups(stored, group_size=group_size))
        if bias is not None:
            total = total + widen(hbm.load("bias", bias))
        hbm.store("Y", out, None, round_to(total, x.dtype))
    return out


def int8_weight_linear_vjp(
    x: FloatArray,
    weight: FloatArray | Int8Groups,
    dy: FloatArray,
    /,
    *,
    bias: FloatArray | None = None,
    group_size: int = 128,
) -> WeightOnlyGradients:
    """Return the gradients of `int8_weight_linear` in x and bias; the stored weight is frozen.

    Parameters
    ----------
    x, weight, bias, group_size
        As for `int8_weight_linear`.
    dy : ndarray of float, shape (M, N)
        Gradient of the output.

    Returns
    -------
    WeightOnlyGradients
        ``dy @ dequantised(weight)ᵀ`` and the sum of dy over tokens, in the dtype of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `int8_weight_linear`.

    Examples
    --------
    >>> int8_weight_linear_vjp(np.ones((1, 1)), np.array([[2.0]]), np.ones((1, 1))).x
    array([[2.]])
    """
    x, dy = floating(x=x, dy=dy)
    if not isinstance(weight, Int8Groups):
        x, weight = floating(x=x, weight=weight)
        weight = quantize_groups(weight, group_size=group_size)
    _, bias = _checked(x, weight.codes, bias)
    bind_axes({"x": (x, "M K"), "dy": (dy, "M N"), "weight": (weight.codes, "K N")})
    return gradients(x, dequantize_groups(weight, group_size=group_size), dy, bias)


def gradients(
    x: FloatArray, values: FloatArray, dy: FloatArray, bias: FloatArray | None
) -> WeightOnlyGradients:
    """Return the gradients of ``x @ values + bias``, in the dtype of `x`."""
    dx = contract("mn,kn->mk", widen(dy), values)
    dbias = None if bias is None else round_to(widen(dy).sum(axis=0, dtype=dx.dtype), x.dtype)
    return WeightOnlyGradients(round_to(dx, x.dtype), None, dbias)


def _checked(
    x: FloatArray, codes: IntArray, bias: FloatArray | None
) -> tuple[tuple[int, int], FloatArray | None]:
    """Return the shape of the output and the bias in the dtype of `x`."""
    axes: dict[str, tuple[Any, str]] = {"x": (x, "M K"), "weight": (as_array("weight codes", codes), "K N")}
    if bias is not None:
        x, bias = floating(x=x, bias=bias)
        axes["bias"] = (bias, "N")
    size = bind_axes(axes)
    return (size["M"], size["N"]), bias
