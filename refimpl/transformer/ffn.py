"""Position-wise feed-forward layers: two matrices with an activation between, or three with a gate."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import numpy as np

from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation, activate, activation_slope
from refimpl.transformer.linear import linear, linear_vjp
from refimpl.validation import bind_axes, floating

__all__ = ["FFNGradients", "GatedFFNGradients", "ffn", "ffn_vjp", "gated_ffn", "gated_ffn_vjp", "sample_ffn"]


class FFNGradients(NamedTuple):
    """Gradients of the input, both weights, and the biases that were given."""

    dx: FloatArray
    dw_1: FloatArray
    dw_2: FloatArray
    db_1: FloatArray | None = None
    db_2: FloatArray | None = None


class GatedFFNGradients(NamedTuple):
    """Gradients of the input and the three weights."""

    dx: FloatArray
    dw_gate: FloatArray
    dw_up: FloatArray
    dw_down: FloatArray


def sample_ffn(
    rng: np.random.Generator, *, T: int, M: int, F: int, activation: str, bias: bool = False
) -> Case:
    """Return one call of `ffn`, its arrays drawn from `rng`.

    Examples
    --------
    >>> case = sample_ffn(np.random.default_rng(0), T=1, M=2, F=3, activation="relu")
    >>> [a.shape for a in case.args]
    [(1, 2), (2, 3), (3, 2)]
    """
    arrays = rng.standard_normal((T, M)), rng.standard_normal((M, F)), rng.standard_normal((F, M))
    biases = {"b_1": rng.standard_normal(F), "b_2": rng.standard_normal(M)} if bias else {}
    return Case(arrays, {"activation": activation, **biases})


def _sample_gated(rng: np.random.Generator, *, T: int, M: int, F: int, activation: str) -> Case:
    case = sample_ffn(rng, T=T, M=M, F=F, activation=activation)
    x, w_gate, w_down = case.args
    return Case((x, w_gate, rng.standard_normal((M, F)), w_down), {"activation": activation})


def _terms(case: Case) -> tuple[int, Any]:
    """Every activation is at most |x| in size, so absolute weights bound the terms."""
    x, w_1, w_2 = (np.abs(array) for array in case.args)
    b_1, b_2 = (np.abs(case.kwargs.get(name, 0.0)) for name in ("b_1", "b_2"))
    return w_1.shape[0] + w_2.shape[0], (x @ w_1 + b_1) @ w_2 + b_2


def _gated_terms(case: Case) -> tuple[int, Any]:
    x, w_gate, w_up, w_down = (np.abs(array) for array in case.args)
    return 2 * w_gate.shape[0] + w_down.shape[0], ((x @ w_gate) * (x @ w_up)) @ w_down


_AXES = {"T": (0, 5), "M": (1, 6), "F": (1, 8)}
_EDGES: tuple[dict[str, Any], ...] = (
    {"T": 0, "M": 3},
    {"T": 1, "M": 1, "F": 1},
    *({"T": 4, "M": 3, "F": 7, "activation": activation} for activation in get_args(Activation)),
)


@technique(
    "transformer.ffn",
    entries=(11,),
    kind="function",
    source=Source("Vaswani et al. 2017", "arXiv:1706.03762", "eq. 2"),
    axes=_AXES,
    options={"activation": get_args(Activation), "bias": (False, True)},
    edges=_EDGES,
    sample=sample_ffn,
    terms=_terms,
    vjp="refimpl.transformer.ffn:ffn_vjp",
)
def ffn(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    /,
    *,
    b_1: FloatArray | None = None,
    b_2: FloatArray | None = None,
    activation: Activation = "relu",
) -> FloatArray:
    """Return ``act(x W_1 + b_1) W_2 + b_2``, for each token by itself.

    Parameters
    ----------
    x : ndarray of float, shape (..., M)
        Tokens.
    w_1 : ndarray of float, shape (M, F)
        Into the hidden units.  F = 4 M is a habit, no rule.
    w_2 : ndarray of float, shape (F, M')
        Out of them.
    b_1, b_2 : ndarray of float, shapes (F,), (M',), optional
        Biases.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        ReLU in the original, GeLU in BERT ("gelu") and GPT-2 ("gelu_tanh").

    Returns
    -------
    ndarray of float, shape (..., M')
        In the common dtype.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    OptionError
        If the activation is unknown.
    DTypeError
        If an array is not real.

    Notes
    -----
    ``4 M F`` FLOPs a token.  The slope of ReLU at 0 is taken as 0.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, eq. 2.

    Examples
    --------
    >>> ffn(np.array([[1.0, -1.0]]), np.eye(2), np.eye(2), b_2=np.array([0.0, 5.0]))
    array([[1., 5.]])
    """
    given = _named(x=x, w_1=w_1, w_2=w_2, b_1=b_1, b_2=b_2)
    a = {name: widen(array) for name, array in given.items()}
    hidden = activate(activation, linear(a["x"], a["w_1"], a.get("b_1"), name="w_1"))
    return round_to(linear(hidden, a["w_2"], a.get("b_2"), name="w_2"), given["x"].dtype)


def ffn_vjp(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    dy: FloatArray,
    /,
    *,
    b_1: FloatArray | None = None,
    b_2: FloatArray | None = None,
    activation: Activation = "relu",
) -> FFNGradients:
    """Return the gradients of ``sum(dy * ffn(x, w_1, w_2, ...))``.

    Parameters
    ----------
    x, w_1, w_2, b_1, b_2, activation
        As for `ffn`.
    dy : ndarray of float, shape (..., M')
        Gradient of the output.

    Returns
    -------
    FFNGradients
        Those of biases only where they were given.

    Examples
    --------
    >>> ffn_vjp(np.array([[1.0, -1.0]]), np.eye(2), np.eye(2), np.ones((1, 2))).dx
    array([[1., 0.]])
    """
    given = _named(x=x, w_1=w_1, w_2=w_2, dy=dy, b_1=b_1, b_2=b_2)
    a = {name: widen(array) for name, array in given.items()}
    before = linear(a["x"], a["w_1"], a.get("b_1"), name="w_1")
    dhidden, dw_2, db_2 = linear_vjp(activate(activation, before), a["w_2"], a["dy"])
    dx, dw_1, db_1 = linear_vjp(a["x"], a["w_1"], _through(activation, before, dhidden))
    found = dx, dw_1, dw_2, None if b_1 is None else db_1, None if b_2 is None else db_2
    return FFNGradients(*_rounded(found, given["x"]))


@technique(
    "transformer.gated_ffn",
    entries=(13,),
    kind="function",
    source=Source("Shazeer 2020", "arXiv:2002.05202", "eq. 6"),
    axes=_AXES,
    options={"activation": get_args(Activation)},
    edges=_EDGES,
    sample=_sample_gated,
    terms=_gated_terms,
    vjp="refimpl.transformer.ffn:gated_ffn_vjp",
)
def gated_ffn(
    x: FloatArray,
    w_gate: FloatArray,
    w_up: FloatArray,
    w_down: FloatArray,
    /,
    *,
    activation: Activation = "silu",
) -> FloatArray:
    """Return ``(act(x W_gate) ∘ x W_up) W_down``: SwiGLU with "silu", GEGLU with "gelu", ReGLU with "relu".

    Parameters
    ----------
    x : ndarray of float, shape (..., M)
        Tokens.
    w_gate, w_up : ndarray of float, shape (M, F)
        The half that passes the activation, and the half that is gated.  Fused weights must be cut by the
        caller, because their order differs: `torch.nn.functional.glu` gates by the second half.
    w_down : ndarray of float, shape (F, M')
        Out of the hidden units.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of the gate.  T5's GEGLU uses "gelu_tanh".

    Returns
    -------
    ndarray of float, shape (..., M')
        In the common dtype.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    OptionError
        If the activation is unknown.
    DTypeError
        If an array is not real.

    Notes
    -----
    Three matrices: ``3 M F`` parameters, against ``2 M F`` without a gate; models shrink F by 2/3 to make up.

    References
    ----------
    .. [1] Shazeer, 2020, arXiv:2002.05202, eq. 5 and 6.

    Examples
    --------
    >>> gated_ffn(np.array([[2.0, -1.0]]), np.eye(2), np.eye(2), np.eye(2), activation="relu")
    array([[4., 0.]])
    """
    given = _gated(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    a = {name: widen(array) for name, array in given.items()}
    gate, up = linear(a["x"], a["w_gate"], name="w_gate"), linear(a["x"], a["w_up"], name="w_up")
    return round_to(linear(activate(activation, gate) * up, a["w_down"], name="w_down"), given["x"].dtype)


def gated_ffn_vjp(
    x: FloatArray,
    w_gate: FloatArray,
    w_up: FloatArray,
    w_down: FloatArray,
    dy: FloatArray,
    /,
    *,
    activation: Activation = "silu",
) -> GatedFFNGradients:
    """Return the gradients of ``sum(dy * gated_ffn(x, w_gate, w_up, w_down, activation=activation))``.

    Parameters
    ----------
    x, w_gate, w_up, w_down, activation
        As for `gated_ffn`.
    dy : ndarray of float, shape (..., M')
        Gradient of the output.

    Returns
    -------
    GatedFFNGradients
        In the common dtype.

    Examples
    --------
    >>> x, eye = np.array([[2.0, -1.0]]), np.eye(2)
    >>> gated_ffn_vjp(x, eye, eye, eye, np.ones((1, 2)), activation="relu").dx
    array([[4., 0.]])
    """
    given = _gated(x=x, w_gate=w_gate, w_up=w_up, w_down=w_down, dy=dy)
    a = {name: widen(array) for name, array in given.items()}
    gate, up = linear(a["x"], a["w_gate"], name="w_gate"), linear(a["x"], a["w_up"], name="w_up")
    gated = activate(activation, gate)
    dhidden, dw_down, _ = linear_vjp(gated * up, a["w_down"], a["dy"])
    dx_gate, dw_gate, _ = linear_vjp(a["x"], a["w_gate"], _through(activation, gate, dhidden * up))
    dx_up, dw_up, _ = linear_vjp(a["x"], a["w_up"], dhidden * gated)
    found = dx_gate + dx_up, dw_gate, dw_up, dw_down
    return GatedFFNGradients(*_rounded(found, given["x"]))


def _gated(**arrays: FloatArray) -> dict[str, FloatArray]:
    """Return the arrays of a gated layer in one dtype; its first two matrices are of one shape."""
    given = _named(**arrays)
    bind_axes({name: (given[name], "M F") for name in ("w_gate", "w_up")})
    return given


def _named(**arrays: FloatArray | None) -> dict[str, FloatArray]:
    """Return the arrays in one dtype; a bias may be missing."""
    given = {name: array for name, array in arrays.items() if array is not None or not name.startswith("b_")}
    return dict(zip(given, floating(**given), strict=True))


def _through(activation: Activation, before: FloatArray, dhidden: FloatArray) -> FloatArray:
    wide = dhidden.astype(wide_dtype(dhidden.dtype), copy=False)
    return round_to(wide * activation_slope(activation, before), before.dtype)


def _rounded(found: tuple[FloatArray | None, ...], like: FloatArray) -> Any:
    return (None if gradient is None else round_to(gradient, like.dtype) for gradient in found)
