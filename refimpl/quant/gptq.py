"""GPTQ: weights rounded feature by feature, each error made good by the features still to come.

The layer's output error ``|X (W - Ŵ)|²`` is quadratic in the weights, with Hessian ``2 Xᵀ X`` for every
output alike.  Once a feature's weights are rounded, the others move to the minimum that is left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, IntArray, widen
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import bind_axes, floating, positive, whole

__all__ = ["GPTQ", "compensate", "gptq", "gptq_blocked", "hessian"]

# Rounds the weights of one feature, one of each output, and gives what they become.
Rounding = Callable[[FloatArray], FloatArray]


class GPTQ(NamedTuple):
    """Codes [K, N] in int8, and the step of each output [N]."""

    codes: IntArray
    scale: FloatArray


def hessian(x: FloatArray, /, *, damping: float = 0.01) -> FloatArray:
    """Return ``Xᵀ X`` with ``damping`` times its mean diagonal added to the diagonal.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Calibration inputs of the layer.
    damping : float
        Share of the mean diagonal, > 0: it makes the matrix safe to invert.

    Returns
    -------
    ndarray of float64, shape (K, K)
        A feature that no input uses, dead, counts 0 in the mean and has the mean on its diagonal: it neither
        gives nor takes errors.  Without calibration data it is the unit matrix: GPTQ is then plain rounding.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If `x` is no real finite matrix, its products overflow, or `damping` is not above 0.

    Notes
    -----
    The factor 2 of the Hessian, and a mean over inputs for the sum, change no weight and are left out.
    GPTQ's released code counts a dead feature as 1 in the mean, so that there the size of the inputs matters;
    QMoE's counts it as 0.

    References
    ----------
    .. [1] Frantar et al., 2023, arXiv:2210.17323, eq. 3 and section 3.3, Step 3: numerical inaccuracies.
    .. [2] IST-DASLab/gptq, gptq.py, ``fasterquant``; IST-DASLab/qmoe, gptq.py, ``batch_gptq``.

    Examples
    --------
    >>> hessian(np.array([[1.0, 0.0], [1.0, 0.0]]), damping=0.5)
    array([[2.5, 0. ],
           [0. , 1.5]])
    """
    (x,) = floating(x=x)
    bind_axes({"x": (x, "T K")})
    positive("damping", damping)
    wide = widen(x).astype(np.float64)
    if not np.isfinite(wide).all():
        raise OptionError("x: expected finite calibration inputs, got NaN or infinity")
    with np.errstate(over="ignore"):
        h: FloatArray = wide.T @ wide
    if not np.isfinite(h).all():
        raise OptionError("x: the products of its features overflow; scale the inputs down")
    diagonal = np.einsum("kk->k", h)
    mean = float(diagonal.mean()) if diagonal.size else 0.0
    diagonal[diagonal == 0] = mean or 1.0
    diagonal += damping * mean
    return h


def compensate(weight: FloatArray, h: FloatArray, round_feature: Rounding, *, block: int = 1) -> FloatArray:
    """Return `weight` rounded feature by feature, each error spread over the features after it.

    Parameters
    ----------
    weight : ndarray of float64, shape (K, N)
        Used as ``x @ weight``.
    h : ndarray of float64, shape (K, K)
        Positive definite.
    round_feature : callable
        Rounds a row of weights, shape (N,).
    block : int
        Features whose errors are gathered before they reach the features beyond the block.

    Returns
    -------
    ndarray of float64, shape (K, N)

    Notes
    -----
    With U the upper Cholesky factor of the inverse of `h`, the update that elimination gives for the features
    after k is ``W[j] -= U[k, j] / U[k, k] (W[k] - Ŵ[k])``.

    References
    ----------
    .. [1] Frantar et al., 2023, arXiv:2210.17323, Algorithm 1.

    Examples
    --------
    >>> compensate(np.array([[0.6], [0.2]]), np.array([[2.0, 1.0], [1.0, 2.0]]), np.rint)
    array([[1.],
           [0.]])
    """
    from scipy.linalg import cholesky

    w = weight.copy()
    K = len(w)
    if not K:
        return w
    upper = cholesky(np.linalg.inv(h), lower=False)
    for start in range(0, K, block):
        end = min(start + block, K)
        errors = np.empty_like(w[start:end])
        for k in range(start, end):
            rounded = round_feature(w[k])
            errors[k - start] = (w[k] - rounded) / upper[k, k]
            w[k] = rounded
            w[k + 1 : end] -= upper[k, k + 1 : end, None] * errors[k - start]
        w[end:] -= upper[start:end, end:].T @ errors
    return w


def sample_layer(
    rng: np.random.Generator, *, T: int, K: int, N: int, bits: int, inputs: str, **options: int
) -> Case:
    """Return a call of `gptq`: a weight, and inputs of its layer.

    Examples
    --------
    >>> case = sample_layer(np.random.default_rng(0), T=2, K=3, N=1, bits=4, inputs="identity")
    >>> case.args[1].shape
    (3, 3)
    """
    weight = rng.standard_normal((K, N))
    x = rng.standard_normal((T, K)) + rng.standard_normal((T, 1))  # correlated features
    if inputs == "identity":
        x = 2.0 * np.eye(K)
    elif inputs == "dead":
        x[:, ::2] = 0.0
    elif inputs == "none":
        x = np.zeros((0, K))
    return Case((weight, x), {"bits": bits, "damping": 0.05, **options})


_SOURCE = Source("Frantar et al. 2023", "arXiv:2210.17323", "Algorithm 1")


@technique(
    "quant.gptq",
    entries=(76,),
    kind="function",
    source=_SOURCE,
    axes={"T": (1, 12), "K": (1, 8), "N": (1, 5), "bits": (2, 5)},
    options={"inputs": ("correlated", "identity", "dead", "none")},
    edges=(
        {"T": 2, "K": 0, "N": 3},
        {"T": 2, "K": 3, "N": 0},
        {"T": 1, "K": 1, "N": 1, "inputs": "correlated"},
        {"T": 4, "K": 7, "N": 3, "bits": 3, "inputs": "none"},
        {"T": 9, "K": 8, "N": 4, "bits": 4, "inputs": "dead"},
        {"T": 12, "K": 8, "N": 5, "bits": 2, "inputs": "correlated"},
    ),
    sample=sample_layer,
)
def gptq(weight: FloatArray, x: FloatArray, /, *, bits: int = 4, damping: float = 0.01) -> GPTQ:
    """Return the codes of a weight, rounded so that the layer's output on `x` changes little.

    Parameters
    ----------
    weight : ndarray of float, shape (K, N)
        Used as ``x @ weight``.
    x : ndarray of float, shape (T, K)
        Calibration inputs; T = 0 gives plain rounding.
    bits : int
        Of a code, 2 to 8.
    damping : float
        As for `hessian`.

    Returns
    -------
    GPTQ
        ``codes`` from -(2**(bits-1) - 1) to 2**(bits-1) - 1; ``scale`` float64, that of symmetric rounding:
        an output's largest magnitude over the greatest code, fixed before any weight moves.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If `bits` is not 2 to 8, `damping` not above 0, or a number is NaN or infinite.

    Notes
    -----
    Features are taken in the order given.  Work is O(K² (K + N)): one inverse for all outputs.

    The grid is this library's symmetric one (`refimpl.quant.uniform`).  The paper's runs from an output's
    least to its greatest number, and the released ``sym`` has ``2 absmax / (2**bits - 1)`` for a step and one
    code more below 0 than above.  The released code also sets the weights of dead features to 0, and can take
    features by falling diagonal (``actorder``) and a step for each group of them: none of that is done here.

    **Special cases**

    - Inputs whose features are orthogonal and equally large leave nothing to make good: plain rounding.
    - A weight that moved beyond the grid takes its last code.
    - An output of zeros has scale 1 and codes 0.

    References
    ----------
    .. [1] Frantar et al., 2023, arXiv:2210.17323, Algorithm 1.

    Examples
    --------
    Two features that always agree: the error of the first is made good by the second.

    >>> x = np.array([[1.0, 1.0], [2.0, 2.0]])
    >>> gptq(np.array([[0.4], [0.4], ]), x, bits=2, damping=1e-9).codes.T
    array([[1, 1]], dtype=int8)
    >>> gptq(np.array([[0.4, 1.0], [0.4, 0.4]]), x, bits=3, damping=1e-9).codes.T
    array([[3, 3],
           [3, 1]], dtype=int8)
    """
    return _gptq(weight, x, bits, damping, 1)


@implements("quant.gptq", backend="numpy")
def gptq_blocked(
    weight: FloatArray, x: FloatArray, /, *, bits: int = 4, damping: float = 0.01, block: int = 3
) -> GPTQ:
    """Return `gptq`, updates beyond a block of features made once a block: the paper's lazy batches.

    Parameters
    ----------
    weight, x, bits, damping
        As for `gptq`.
    block : int
        Features a block; the paper takes 128.

    Returns
    -------
    GPTQ

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `gptq`, and if `block` is below 1.

    References
    ----------
    .. [1] Frantar et al., 2023, arXiv:2210.17323, section 3.3, Step 2: lazy batch-updates.

    Examples
    --------
    >>> weight, x = np.random.default_rng(0).standard_normal((2, 9, 9))
    >>> bool((gptq_blocked(weight, x, block=4).codes == gptq(weight, x).codes).all())
    True
    """
    whole("block", block)
    return _gptq(weight, x, bits, damping, block)


def _gptq(weight: FloatArray, x: FloatArray, bits: int, damping: float, block: int) -> GPTQ:
    (weight,), (x,) = floating(weight=weight), floating(x=x)
    bind_axes({"weight": (weight, "K N"), "x": (x, "T K")})
    whole("bits", bits, least=2)
    if bits > 8:
        raise OptionError(f"bits: expected 2 to 8, got {bits}")
    wide = widen(weight).astype(np.float64)
    if not np.isfinite(wide).all():
        raise OptionError("weight: expected finite numbers, got NaN or infinity")
    top = 2 ** (bits - 1) - 1
    largest = np.max(np.abs(wide), axis=0, initial=0.0)
    scale = np.where(largest > 0, largest / top, 1.0)

    def to_grid(row: FloatArray) -> FloatArray:
        rounded: FloatArray = np.clip(np.rint(row / scale), -top, top) * scale
        return rounded

    rounded = compensate(wide, hessian(x, damping=damping), to_grid, block=block)
    return GPTQ(np.rint(rounded / scale).astype(np.int8), scale)
