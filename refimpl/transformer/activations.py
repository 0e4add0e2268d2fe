"""GeLU in its three forms, and the other activations of feed-forward layers, each with its slope.

The forms differ by up to 4.73e-4 (tanh, near 2.70) and 2.03e-2 (sigmoid), so the form is part of a model:
BERT is trained with the exact one, GPT-2 with tanh.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["Activation", "GeluForm", "GeluGradients", "activate", "activation_slope", "gelu", "gelu_vjp"]

GeluForm: TypeAlias = Literal["exact", "tanh", "sigmoid"]
Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"]

# Hendrycks and Gimpel 2016, section 2.
CUBIC = 0.044715
SIGMOID = 1.702
# Beyond this a tanh or a density has reached its limit in float64; the clip keeps cubes from overflowing.
SATURATED = 40.0


class GeluGradients(NamedTuple):
    """Gradient of the input."""

    dx: FloatArray


def sample_gelu(rng: np.random.Generator, *, T: int, M: int, values: str, form: str) -> Case:
    """Return one call of `gelu`; "wide" reaches far into both tails, "zero" holds both zeros.

    Examples
    --------
    >>> sample_gelu(np.random.default_rng(0), T=1, M=2, values="zero", form="tanh")
    Case(args=(array([[ 0., -0.]]),), kwargs={'form': 'tanh'})
    """
    x = rng.standard_normal((T, M))
    if values == "wide":
        x = x * 10.0 ** rng.integers(-3, 4, (T, M))
    if values == "zero":
        x = np.zeros((T, M))
        x[:, 1::2] = -0.0
    return Case((x,), {"form": form})


def _terms(case: Case) -> tuple[int, Any]:
    return 8, np.abs(case.args[0])


@technique(
    "transformer.gelu",
    entries=(12,),
    kind="function",
    source=Source("Hendrycks and Gimpel 2016", "arXiv:1606.08415", "section 2"),
    axes={"T": (0, 4), "M": (1, 6)},
    options={"values": ("normal", "wide", "zero"), "form": get_args(GeluForm)},
    edges=(
        {"T": 0, "M": 3},
        *({"T": 3, "M": 6, "values": values, "form": form} for values in ("wide", "zero")
          for form in get_args(GeluForm)),
    ),
    sample=sample_gelu,
    terms=_terms,
    vjp="refimpl.transformer.activations:gelu_vjp",
)  # fmt: skip
def gelu(x: FloatArray, /, *, form: GeluForm = "exact") -> FloatArray:
    """Return the Gaussian error linear unit, ``x Φ(x)``, exactly or in one of its approximations.

    Parameters
    ----------
    x : ndarray of float, any shape
        Pre-activations.
    form : {"exact", "tanh", "sigmoid"}
        ``"exact"``: ``x Φ(x) = x (1 + erf(x / √2)) / 2``.  ``"tanh"``: ``x (1 + tanh(√(2/π) (x + 0.044715
        x³))) / 2``.  ``"sigmoid"``: ``x σ(1.702 x)``.

    Returns
    -------
    ndarray of float
        Shape and dtype of `x`.

    Raises
    ------
    OptionError
        If `form` is none of the three.
    DTypeError
        If `x` is not real.

    Notes
    -----
    Special cases:

    - 0 gives 0.
    - Far to the left the exact form keeps its relative accuracy: it is computed by erfc, not by 1 + erf.
    - -inf gives NaN (-inf · 0), as in PyTorch.

    References
    ----------
    .. [1] Hendrycks and Gimpel, 2016, arXiv:1606.08415, section 2.

    Examples
    --------
    >>> gelu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.1587,  0.    ,  0.8413])
    >>> gelu(np.array([2.7]), form="tanh").round(4)
    array([2.6911])
    """
    (x,) = floating(x=x)
    return round_to(_gelu(_wide(x), form), x.dtype)


def gelu_vjp(x: FloatArray, dy: FloatArray, /, *, form: GeluForm = "exact") -> GeluGradients:
    """Return the gradient of ``sum(dy * gelu(x, form=form))``.

    Parameters
    ----------
    x, dy : ndarray of float, any shape
        Pre-activations, and the gradient of the output in the same shape.
    form : {"exact", "tanh", "sigmoid"}
        As for `gelu`.

    Returns
    -------
    GeluGradients
        In the dtype of `x`.

    Examples
    --------
    >>> gelu_vjp(np.zeros(1), np.ones(1)).dx
    array([0.5])
    """
    x, dy = floating(x=x, dy=dy)
    axes = " ".join(f"axis{index}" for index in range(x.ndim))
    bind_axes({"x": (x, axes), "dy": (dy, axes)})
    return GeluGradients(round_to(_wide(dy) * _gelu_slope(_wide(x), form), x.dtype))


def activate(activation: Activation, x: FloatArray) -> FloatArray:
    """Return an activation by name, in the dtype of `x`.

    ``"relu"`` max(0, x); ``"gelu"``, ``"gelu_tanh"`` and ``"gelu_sigmoid"`` as for `gelu`; ``"silu"`` x σ(x),
    also called swish.

    Raises
    ------
    OptionError
        If the name is none of these.

    Examples
    --------
    >>> activate("relu", np.array([-1.0, 2.0]))
    array([0., 2.])
    """
    wide = _wide(x)
    if activation == "relu":
        y = np.maximum(wide, 0)
    elif activation == "silu":
        y = wide * _sigmoid(wide)
    else:
        y = _gelu(wide, _form(activation))
    return round_to(y, x.dtype)


def activation_slope(activation: Activation, x: FloatArray) -> FloatArray:
    """Return the derivative of `activate`, in the wide dtype; that of ReLU at 0 is 0.

    Examples
    --------
    >>> activation_slope("relu", np.array([-1.0, 0.0, 2.0]))
    array([0., 0., 1.])
    """
    wide = _wide(x)
    if activation == "relu":
        return (wide > 0).astype(wide.dtype)
    if activation == "silu":
        return _logistic_slope(wide, 1.0)
    return _gelu_slope(wide, _form(activation))


def _wide(x: FloatArray) -> FloatArray:
    return widen(x).astype(wide_dtype(x.dtype), copy=False)


def _form(activation: str) -> GeluForm:
    forms: dict[str, GeluForm] = {"gelu": "exact", "gelu_tanh": "tanh", "gelu_sigmoid": "sigmoid"}
    if activation not in forms:
        raise OptionError(f"activation: expected one of {get_args(Activation)}, got {activation!r}")
    return forms[activation]


def _gelu(x: FloatArray, form: str) -> FloatArray:
    if form == "exact":
        return x * _normal_cdf(x)
    if form == "tanh":
        return 0.5 * x * (1 + _tanh_and_slope(x)[0])
    if form == "sigmoid":
        return x * _sigmoid(SIGMOID * x)
    raise OptionError(f"form: expected one of {get_args(GeluForm)}, got {form!r}")


def _gelu_slope(x: FloatArray, form: str) -> FloatArray:
    near: FloatArray = np.clip(x, -SATURATED, SATURATED)
    if form == "exact":
        return np.asarray(_normal_cdf(x) + near * np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi))
    if form == "tanh":
        t, slope = _tanh_and_slope(x)
        return 0.5 * (1 + t) + 0.5 * near * (1 - t**2) * slope
    if form == "sigmoid":
        return _logistic_slope(x, SIGMOID)
    raise OptionError(f"form: expected one of {get_args(GeluForm)}, got {form!r}")


def _tanh_and_slope(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return tanh(u) of the tanh form, and the derivative of u."""
    near = np.clip(x, -SATURATED, SATURATED)
    factor = math.sqrt(2 / math.pi)
    return np.tanh(factor * (near + CUBIC * near**3)), factor * (1 + 3 * CUBIC * near**2)


def _logistic_slope(x: FloatArray, rate: float) -> FloatArray:
    """Return the derivative of ``x σ(rate x)``."""
    s = _sigmoid(rate * x)
    return np.asarray(s + rate * np.clip(x, -20 * SATURATED, 20 * SATURATED) * s * (1 - s))


def _normal_cdf(x: FloatArray) -> FloatArray:
    from scipy.special import erfc

    return np.asarray(0.5 * erfc(x * -math.sqrt(0.5)))


def _sigmoid(x: FloatArray) -> FloatArray:
    from scipy.special import expit

    return np.asarray(expit(x))
