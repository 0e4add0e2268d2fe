"""Residual MoE as DeepSpeed's code has it: dense layer and expert weighted by two learned coefficients."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.moe.residual import RECORD, sample_residual
from refimpl.moe.routing import router_logits, router_logits_vjp
from refimpl.moe.sparse_mixture import sparse_mixture, sparse_mixture_vjp, through_logits
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.transformer.ffn import ffn, ffn_vjp
from refimpl.validation import bind_axes, floating

__all__ = ["CoefficientGradients", "residual_coefficients", "residual_coefficients_vjp"]


class CoefficientGradients(NamedTuple):
    """Gradients of tokens, dense layer, router, experts and coefficients."""

    dx: FloatArray
    dw_1: FloatArray
    dw_2: FloatArray
    dw_router: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dw_coefficient: FloatArray


def _sample(rng: np.random.Generator, *, D: int, **options: Any) -> Case:
    case = sample_residual(rng, D=D, **options)
    return case.replace(*case.args, rng.standard_normal((D, 2)))


@technique(
    "moe.residual.deepspeed",
    source=Source("microsoft/DeepSpeed", "GitHub @38327e0", "deepspeed/moe/layer.py, MoE.forward"),
    sample=_sample,
    vjp="refimpl.moe.residual_coefficients:residual_coefficients_vjp",
    **RECORD,
)
def residual_coefficients(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    w_coefficient: FloatArray,
    /,
    *,
    activation: Activation = "relu",
) -> FloatArray:
    """Return ``c_0 g E(x) + c_1 MLP(x)`` with ``c = softmax(x W_c)``: what DeepSpeed's code computes.

    Parameters
    ----------
    x, w_1, w_2, w_router, w_in, w_out, activation
        As for `residual`.
    w_coefficient : ndarray of float, shape (D, 2)
        The first column speaks for the expert, the second for the dense layer.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `residual`.

    Notes
    -----
    Not the sum of the paper: with ``W_c = 0`` both parts count one half.  The code's linear map has a bias;
    a feature of 1 in `x` is one.

    References
    ----------
    .. [1] microsoft/DeepSpeed at 38327e0, deepspeed/moe/layer.py.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> router = np.log([[1.0, 3.0]])
    >>> residual_coefficients(one, 10 * one, one, router, w, np.ones((2, 1, 1)), np.zeros((1, 2)))
    array([[6.125]])
    """
    routed, dense, coefficients = _parts(x, w_1, w_2, w_router, w_in, w_out, w_coefficient, activation)
    y = coefficients[:, :1] * widen(routed) + coefficients[:, 1:] * widen(dense)
    return round_to(y, routed.dtype)


def residual_coefficients_vjp(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    w_coefficient: FloatArray,
    dy: FloatArray,
    /,
    *,
    activation: Activation = "relu",
) -> CoefficientGradients:
    """Return the gradients of ``sum(dy * residual_coefficients(x, w_1, ..., w_coefficient, ...))``.

    Parameters
    ----------
    x, w_1, w_2, w_router, w_in, w_out, w_coefficient, activation
        As for `residual_coefficients`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    CoefficientGradients
        Each in the shape of its array.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.ones((1, 1, 1))
    >>> residual_coefficients_vjp(one, 3 * one, one, one, w, w, np.zeros((1, 2)), one).dw_coefficient
    array([[-0.5,  0.5]])
    """
    routed, dense, c = _parts(x, w_1, w_2, w_router, w_in, w_out, w_coefficient, activation)
    x, w_coefficient, dy = floating(x=x, w_coefficient=w_coefficient, dy=dy)
    upstream = widen(dy).astype(c.dtype)
    to_routed, to_dense = (round_to(c[:, i : i + 1] * upstream, x.dtype) for i in (0, 1))
    logits = router_logits(x, w_router)
    sparse = sparse_mixture_vjp(
        x, logits, w_in, w_out, to_routed, k=1, convention="switch", activation=activation
    )
    back = through_logits(sparse, x, w_router, sparse.dlogits)
    mlp = ffn_vjp(x, w_1, w_2, to_dense, activation=activation)
    dc = np.stack([np.sum(upstream * widen(part), axis=1) for part in (routed, dense)], axis=1)
    dscores = c * (dc - np.sum(c * dc, axis=1, keepdims=True))
    dseen, dw_coefficient = router_logits_vjp(x, w_coefficient, dscores)
    dx = round_to(widen(back.dx) + widen(mlp.dx) + dseen, x.dtype)
    return CoefficientGradients(
        dx, mlp.dw_1, mlp.dw_2, back.dw_router, back.dw_in, back.dw_out, round_to(dw_coefficient, x.dtype)
    )


def _parts(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    w_coefficient: FloatArray,
    activation: Activation,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return what the expert gives, what the dense layer gives, and the two coefficients."""
    scores = router_logits(x, w_coefficient)
    bind_axes({"w_coefficient": (np.asarray(w_coefficient), "D 2"), "pair": (np.zeros(2), "2")})
    logits = router_logits(x, w_router)
    routed = sparse_mixture(x, logits, w_in, w_out, k=1, convention="switch", activation=activation)
    return routed, ffn(x, w_1, w_2, activation=activation), softmax(scores)
