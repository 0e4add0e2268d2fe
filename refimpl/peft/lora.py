"""LoRA: a frozen weight plus a trained update of low rank; and the full update that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.linear import product
from refimpl.validation import bind_axes, finite, floating

__all__ = [
    "FullGradients",
    "LoRAGradients",
    "counted_product",
    "full_linear",
    "full_linear_vjp",
    "lora_linear",
    "lora_linear_vjp",
    "scaling",
]


class LoRAGradients(NamedTuple):
    """Gradients of the input and of the two factors; the frozen weight has none."""

    x: FloatArray
    lora_a: FloatArray
    lora_b: FloatArray


class FullGradients(NamedTuple):
    """Gradients of the input and of the update, which is that of the weight too."""

    x: FloatArray
    delta: FloatArray


def scaling(lora_alpha: float | None, r: int) -> float:
    """Return LoRA's factor ``lora_alpha / r``; 1 if `lora_alpha` is None or there is no rank.

    Examples
    --------
    >>> scaling(16, 8), scaling(None, 8)
    (2.0, 1.0)
    """
    return 1.0 if lora_alpha is None or r == 0 else finite("lora_alpha", lora_alpha) / r


def counted_product(memory: Memory | None) -> Callable[[FloatArray, FloatArray], FloatArray]:
    """Return the product of two matrices, counted by `memory` if there is one.

    Examples
    --------
    >>> memory = Memory()
    >>> counted_product(memory)(np.ones((2, 3)), np.ones((3, 4))).shape, memory.flops
    ((2, 4), 48)
    """
    return product if memory is None else partial(memory.contract, "ij,jk->ik")


def sample_full(rng: np.random.Generator, *, T: int, K: int, N: int) -> Case:
    """Return a call of `full_linear`.

    Examples
    --------
    >>> [a.shape for a in sample_full(np.random.default_rng(0), T=2, K=3, N=4).args]
    [(2, 3), (3, 4), (3, 4)]
    """
    return Case(tuple(rng.standard_normal(shape) for shape in ((T, K), (K, N), (K, N))))


def _full_terms(case: Case) -> tuple[int, FloatArray]:
    x, delta, weight = (np.abs(array) for array in case.args)
    return 2 * x.shape[1] + 1, x @ delta + x @ weight


@technique(
    "peft.full",
    entries=(59,),
    kind="function",
    source=Source("Hu et al. 2021", "arXiv:2106.09685", "section 2, eq. 1: full fine-tuning"),
    axes={"T": (1, 5), "K": (1, 6), "N": (1, 6)},
    edges=({"T": 0}, {"T": 2, "K": 0}, {"T": 2, "N": 0}, {"T": 1, "K": 1, "N": 1}),
    sample=sample_full,
    terms=_full_terms,
    vjp="refimpl.peft.lora:full_linear_vjp",
)
def full_linear(x: FloatArray, delta: FloatArray, weight: FloatArray, /) -> FloatArray:
    """Return ``x (weight + delta)``: full fine-tuning, an update as large as the weight.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Tokens by features.
    delta, weight : ndarray of float, shape (K, N)
        What training added, and the weight before it.

    Returns
    -------
    ndarray of float, shape (T, N)

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    Notes
    -----
    With Adam in mixed precision each of the K N numbers costs 16 bytes in training (`memsim`, ZeRO's count).

    References
    ----------
    .. [1] Hu et al., 2021, arXiv:2106.09685, section 2, eq. 1.

    Examples
    --------
    >>> full_linear(np.ones((1, 2)), np.eye(2), np.zeros((2, 2)))
    array([[1., 1.]])
    """
    x, delta, weight = floating(x=x, delta=delta, weight=weight)
    bind_axes({"x": (x, "T K"), "weight": (weight, "K N"), "delta": (delta, "K N")})
    wide = [widen(array) for array in (x, delta, weight)]
    return round_to(product(wide[0], wide[1]) + product(wide[0], wide[2]), x.dtype)


def full_linear_vjp(x: FloatArray, delta: FloatArray, weight: FloatArray, dy: FloatArray, /) -> FullGradients:
    """Return the gradients of `full_linear`: ``dY (W + Δ)ᵀ`` and ``Xᵀ dY``.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> full_linear_vjp(2 * one, one, one, one)
    FullGradients(x=array([[2.]]), delta=array([[2.]]))
    """
    x, delta, weight, dy = floating(x=x, delta=delta, weight=weight, dy=dy)
    bind_axes({"x": (x, "T K"), "weight": (weight, "K N"), "delta": (delta, "K N"), "dy": (dy, "T N")})
    dtype = x.dtype
    x, delta, weight, dy = (widen(array) for array in (x, delta, weight, dy))
    dx = product(dy, weight.T) + product(dy, delta.T)
    return FullGradients(round_to(dx, dtype), round_to(product(x.T, dy), dtype))


def sample_lora(rng: np.random.Generator, *, T: int, K: int, N: int, R: int, extra: str) -> Case:
    """Return a call of `lora_linear`; ``extra`` is "none", "zero" (B = 0, as at the start) or "dropout".

    Examples
    --------
    >>> case = sample_lora(np.random.default_rng(0), T=2, K=3, N=4, R=1, extra="none")
    >>> [a.shape for a in case.args]
    [(2, 3), (3, 1), (1, 4), (3, 4)]
    """
    shapes = ((T, K), (K, R), (R, N), (K, N))
    x, a, b, weight = (rng.standard_normal(shape) for shape in shapes)
    options: dict[str, object] = {"lora_alpha": 2.0}
    if extra == "zero":
        b = np.zeros_like(b)
    if extra == "dropout":
        options["dropout_mask"] = (rng.random((T, K)) < 0.75) / 0.75
    return Case((x, a, b, weight), options)


def _terms(case: Case) -> tuple[int, FloatArray]:
    x, a, b, weight = (np.abs(array) for array in case.args)
    branch = x * case.kwargs.get("dropout_mask", 1.0)
    return sum(weight.shape) + a.shape[1] + 2, x @ weight + scaling(2.0, a.shape[1]) * (branch @ a @ b)


@technique(
    "peft.lora",
    entries=(60,),
    kind="function",
    source=Source("Hu et al. 2021", "arXiv:2106.09685", "section 4.1, eq. 3"),
    axes={"T": (1, 5), "K": (1, 6), "N": (1, 6), "R": (0, 4)},
    options={"extra": ("none", "zero", "dropout")},
    edges=(
        {"T": 0, "R": 1},
        {"T": 2, "K": 0, "R": 1},
        {"T": 2, "N": 0, "R": 1},
        {"T": 2, "R": 0, "extra": "none"},
        {"T": 1, "K": 1, "N": 1, "R": 1, "extra": "none"},
        {"T": 3, "K": 4, "N": 3, "R": 3, "extra": "none"},
        {"T": 3, "K": 4, "N": 3, "R": 2, "extra": "zero"},
        {"T": 3, "K": 4, "N": 3, "R": 2, "extra": "dropout"},
    ),
    sample=sample_lora,
    terms=_terms,
    vjp="refimpl.peft.lora:lora_linear_vjp",
)
def lora_linear(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    /,
    *,
    lora_alpha: float | None = None,
    dropout_mask: FloatArray | None = None,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``x W + (lora_alpha / R) (x A) B``.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Tokens by features.
    lora_a, lora_b : ndarray of float, shapes (K, R) and (R, N)
        The trained factors; the paper's A and B, which multiply from the left, are their transposes.
    weight : ndarray of float, shape (K, N)
        The frozen weight.
    lora_alpha : float, optional
        Numerator of the factor.  Default: R, a factor of 1.
    dropout_mask : ndarray of float, shape (T, K), optional
        Factors on the input of the low-rank branch alone, 0 or 1 / (1 - p).
    memory : Memory, optional
        Counts the operations: ``2 T K N`` of the base and ``2 T R (K + N)`` of the branch.

    Returns
    -------
    ndarray of float, shape (T, N)

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If `lora_alpha` is not finite.

    Notes
    -----
    The branch is computed from left to right: R (K + N) products a token, and never a K by N update.

    **Special cases**

    - B = 0, as at the start of training, and R = 0 give the base layer exactly.
    - The lecture's slide omits the factor lora_alpha / R.

    References
    ----------
    .. [1] Hu et al., 2021, arXiv:2106.09685, section 4.1, eq. 3.
    .. [2] loralib, layers.py, ``Linear.forward``: dropout on the branch's input.

    Examples
    --------
    >>> x, a, b = np.ones((1, 2)), np.ones((2, 1)), np.array([[0.5, 0.0]])
    >>> lora_linear(x, a, b, np.eye(2), lora_alpha=2.0)
    array([[3., 1.]])
    """
    x, lora_a, lora_b, weight, branch = _operands(x, lora_a, lora_b, weight, dropout_mask)
    times = counted_product(memory)
    base = times(widen(x), widen(weight))
    low = times(times(branch, widen(lora_a)), widen(lora_b))
    return round_to(base + base.dtype.type(scaling(lora_alpha, lora_a.shape[1])) * low, x.dtype)


def lora_linear_vjp(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    dy: FloatArray,
    /,
    *,
    lora_alpha: float | None = None,
    dropout_mask: FloatArray | None = None,
) -> LoRAGradients:
    """Return the gradients of `lora_linear`: of the input and the factors, and of nothing else.

    Parameters
    ----------
    x, lora_a, lora_b, weight, lora_alpha, dropout_mask
        As for `lora_linear`.
    dy : ndarray of float, shape (T, N)
        Gradient of the output.

    Returns
    -------
    LoRAGradients
        With B = 0 that of A is 0, and that of B is not: B moves first.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `lora_linear`.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> lora_linear_vjp(one, 3 * one, 0 * one, one, one)
    LoRAGradients(x=array([[1.]]), lora_a=array([[0.]]), lora_b=array([[3.]]))
    """
    x, lora_a, lora_b, weight, branch = _operands(x, lora_a, lora_b, weight, dropout_mask)
    (dy,) = floating(dy=dy)
    bind_axes({"x": (x, "T K"), "weight": (weight, "K N"), "dy": (dy, "T N")})
    dtype = x.dtype
    a, b, w, dy = (widen(array) for array in (lora_a, lora_b, weight, dy))
    inner = product(branch, a)
    factor = inner.dtype.type(scaling(lora_alpha, a.shape[1]))
    dinner = factor * product(dy, b.T)
    dbranch = product(dinner, a.T)
    if dropout_mask is not None:
        dbranch = dbranch * widen(floating(dropout_mask=dropout_mask)[0])
    dx = product(dy, w.T) + dbranch
    da, db = product(branch.T, dinner), factor * product(inner.T, dy)
    return LoRAGradients(*(round_to(gradient, dtype) for gradient in (dx, da, db)))


def _operands(
    x: FloatArray, lora_a: FloatArray, lora_b: FloatArray, weight: FloatArray, mask: FloatArray | None
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return the arrays, checked, and the input of the branch, widened and masked."""
    x, lora_a, lora_b, weight = floating(x=x, lora_a=lora_a, lora_b=lora_b, weight=weight)
    shapes = {
        "x": (x, "T K"),
        "weight": (weight, "K N"),
        "lora_a": (lora_a, "K R"),
        "lora_b": (lora_b, "R N"),
    }
    branch = widen(x)
    if mask is not None:
        (mask,) = floating(dropout_mask=mask)
        shapes["dropout_mask"] = (mask, "T K")
    bind_axes(shapes)
    if mask is not None:
        branch = branch * widen(mask)
    return x, lora_a, lora_b, weight, branch
