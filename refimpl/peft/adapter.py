"""Adapters: a bottleneck with a residual connection, after each sub-layer of a frozen transformer."""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np

from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.peft.lora import counted_product
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation, activate
from refimpl.transformer.ffn import ffn_vjp
from refimpl.validation import bind_axes, floating

__all__ = ["AdapterGradients", "adapter", "adapter_vjp"]


class AdapterGradients(NamedTuple):
    """Gradients of the input and of all that an adapter trains."""

    x: FloatArray
    w_down: FloatArray
    b_down: FloatArray
    w_up: FloatArray
    b_up: FloatArray


def sample_adapter(rng: np.random.Generator, *, T: int, D: int, m: int, activation: str, start: str) -> Case:
    """Return a call of `adapter`; with ``start="zero"`` its way up is 0.

    Examples
    --------
    >>> case = sample_adapter(np.random.default_rng(0), T=2, D=4, m=3, activation="gelu", start="random")
    >>> [a.shape for a in case.args]
    [(2, 4), (4, 3), (3,), (3, 4), (4,)]
    """
    shapes = ((T, D), (D, m), (m,), (m, D), (D,))
    x, w_down, b_down, w_up, b_up = (rng.standard_normal(shape) for shape in shapes)
    if start == "zero":
        w_up, b_up = 0 * w_up, 0 * b_up
    return Case((x, w_down, b_down, w_up, b_up), {"activation": activation})


def _terms(case: Case) -> tuple[int, FloatArray]:
    x, w_down, b_down, w_up, b_up = (np.abs(array) for array in case.args)
    return sum(w_down.shape) + 8, x + (x @ w_down + b_down) @ w_up + b_up


@technique(
    "peft.adapter",
    entries=(62,),
    kind="function",
    source=Source("Houlsby et al. 2019", "arXiv:1902.00751", "section 2.1, Figure 2"),
    axes={"T": (1, 5), "D": (1, 6), "m": (0, 4)},
    options={"activation": get_args(Activation), "start": ("random", "zero")},
    edges=(
        {"T": 0, "activation": "gelu"},
        {"T": 1, "D": 1, "m": 1, "activation": "relu", "start": "random"},
        {"T": 2, "D": 3, "m": 0, "activation": "gelu", "start": "random"},
        {"T": 2, "D": 3, "m": 2, "activation": "gelu_tanh", "start": "zero"},
    ),
    sample=sample_adapter,
    terms=_terms,
    vjp="refimpl.peft.adapter:adapter_vjp",
)
def adapter(
    x: FloatArray,
    w_down: FloatArray,
    b_down: FloatArray,
    w_up: FloatArray,
    b_up: FloatArray,
    /,
    *,
    activation: Activation = "gelu",
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``x + act(x W_down + b_down) W_up + b_up``.

    Parameters
    ----------
    x : ndarray of float, shape (..., D)
        Output of a sub-layer, before its residual connection.
    w_down, b_down : ndarray of float, shapes (D, m) and (m,)
        Into the bottleneck.
    w_up, b_up : ndarray of float, shapes (m, D) and (D,)
        Out of it.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        The released code takes GeLU.
    memory : Memory, optional
        Counts the operations, ``4 D m`` a token.

    Returns
    -------
    ndarray of float, shape (..., D)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit or are not real, or the activation is unknown.

    Notes
    -----
    2 m D + D + m numbers, two adapters a block, and the gains and biases of the block's layer norms are
    trained too.  Weights start near 0 (standard deviation 1e-3 in the released code), which makes the adapter
    nearly, not exactly, the identity; W_up = 0, b_up = 0 makes it exact.  The lecture calls the width m and
    then r.

    References
    ----------
    .. [1] Houlsby et al., 2019, arXiv:1902.00751, section 2.1.
    .. [2] google-research/adapter-bert, modeling.py, ``feedforward_adapter``.

    Examples
    --------
    >>> ones = np.ones
    >>> adapter(ones((1, 2)), ones((2, 1)), np.zeros(1), ones((1, 2)), np.zeros(2), activation="relu")
    array([[3., 3.]])
    """
    x, w_down, b_down, w_up, b_up = _checked(x, w_down, b_down, w_up, b_up)
    times = counted_product(memory)
    flat = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
    rows, w_1, b_1, w_2, b_2 = (widen(array) for array in (flat, w_down, b_down, w_up, b_up))
    hidden = activate(activation, times(rows, w_1) + b_1)
    return round_to((rows + (times(hidden, w_2) + b_2)).reshape(x.shape), x.dtype)


def adapter_vjp(
    x: FloatArray,
    w_down: FloatArray,
    b_down: FloatArray,
    w_up: FloatArray,
    b_up: FloatArray,
    dy: FloatArray,
    /,
    *,
    activation: Activation = "gelu",
) -> AdapterGradients:
    """Return the gradients of `adapter`; that of x reaches the frozen layers below, their weights not.

    Parameters
    ----------
    x, w_down, b_down, w_up, b_up, activation
        As for `adapter`.
    dy : ndarray of float, shape (..., D)
        Gradient of the output.

    Returns
    -------
    AdapterGradients

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `adapter`.

    Examples
    --------
    >>> one, zero = np.ones((1, 1)), np.zeros(1)
    >>> adapter_vjp(one, one, zero, 2 * one, zero, one, activation="relu").x
    array([[3.]])
    """
    x, w_down, b_down, w_up, b_up = _checked(x, w_down, b_down, w_up, b_up)
    (dy,) = floating(dy=dy)
    arrays = (widen(array) for array in (x, w_down, w_up, dy))
    inner = ffn_vjp(*arrays, b_1=widen(b_down), b_2=widen(b_up), activation=activation)
    dx, dw_down, dw_up, db_down, db_up = inner
    found = widen(dy) + dx, dw_down, db_down, dw_up, db_up
    return AdapterGradients(*(round_to(np.asarray(gradient), x.dtype) for gradient in found))


def _checked(
    x: FloatArray, w_down: FloatArray, b_down: FloatArray, w_up: FloatArray, b_up: FloatArray
) -> tuple[FloatArray, ...]:
    arrays = floating(x=x, w_down=w_down, b_down=b_down, w_up=w_up, b_up=b_up)
    x, w_down, _, w_up, _ = arrays
    if not x.ndim or w_up.shape != w_down.shape[::-1] or w_up.shape[-1:] != x.shape[-1:]:
        raise ShapeError(
            f"w_down, w_up: expected (D, m) and (m, D) for x of shape {x.shape}, "
            f"got {w_down.shape} and {w_up.shape}"
        )
    bind_axes({"w_down": (w_down, "D m"), "b_down": (arrays[2], "m"), "b_up": (arrays[4], "D")})
    return arrays
