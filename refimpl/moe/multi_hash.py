"""MultiHash layers: a feed-forward layer put together from segments, each chosen by a hash of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.moe.expert_ffn import product_of
from refimpl.numerics import FloatArray, IntArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation, activate, activation_slope
from refimpl.transformer.embedding import indices
from refimpl.validation import bind_axes, floating

__all__ = ["MultiHashGradients", "multi_hash_layer", "multi_hash_layer_vjp"]


class MultiHashGradients(NamedTuple):
    """Gradients of tokens and of both stacks of segments."""

    dx: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray


def _sample_multi(
    rng: np.random.Generator, *, T: int, n: int, E: int, d: int, f: int, activation: str
) -> Case:
    D, F = n * d, n * f
    arrays = (rng.standard_normal(shape) for shape in ((T, D), (n, E, D, f), (n, E, F, d)))
    return Case(tuple(arrays), {"experts": rng.integers(0, E, (n, T)), "activation": activation})


def _terms_multi(case: Case) -> tuple[int, Any]:
    x, w_in, w_out = (np.abs(array) for array in case.args)
    hidden = _by_segment(x, w_in, case.kwargs["experts"])
    return w_in.shape[2] + w_out.shape[2], _by_segment(hidden, w_out, case.kwargs["experts"])


@technique(
    "moe.hash.multi",
    entries=(39,),
    kind="function",
    source=Source("Roller et al. 2021", "arXiv:2106.04426", "section 3.2, MultiHash Layers"),
    axes={"T": (0, 6), "n": (1, 3), "E": (1, 4), "d": (1, 3), "f": (1, 3)},
    options={"activation": ("relu", "gelu")},
    edges=({"T": 0}, {"T": 1, "n": 1, "E": 1, "d": 1, "f": 1}, {"T": 6, "n": 3, "E": 1}),
    sample=_sample_multi,
    terms=_terms_multi,
    vjp="refimpl.moe.multi_hash:multi_hash_layer_vjp",
)
def multi_hash_layer(
    x: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    experts: IntArray,
    activation: Activation = "relu",
    memory: Memory | None = None,
) -> FloatArray:
    """Return a feed-forward layer whose matrices are put together from n segments, each chosen by its hash.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Hidden states.
    w_in : ndarray of float, shape (n, E, D, F / n)
        For each segment of the hidden units, E choices.
    w_out : ndarray of float, shape (n, E, F, D / n)
        For each segment of the output, E choices, each seeing all hidden units.
    experts : ndarray of int, shape (n, T)
        Choice of each token in each segment: n hashes.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Default: ReLU, as in the paper.
    memory : Memory, optional
        Counts the operations: ``4 T D F``, as of one dense layer.

    Returns
    -------
    ndarray of float, shape (T, D)
        ``concat_m(v B_m)`` with ``v = act(concat_m(x A_m))``, where ``A_m = w_in[m, experts[m, t]]`` and
        ``B_m = w_out[m, experts[m, t]]``.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together, or are of the wrong kind.
    OptionError
        If a choice is outside [0, E), or the activation is unknown.

    Notes
    -----
    As many parameters and operations as E experts under one hash, but E**n different layers: two tokens that
    meet in one segment are apart in another.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.2.

    Examples
    --------
    >>> w_in = np.array([[[[1.0], [0.0]]], [[[0.0], [2.0]]]])  # two segments, one choice each
    >>> multi_hash_layer(np.ones((1, 2)), w_in, w_in, experts=np.zeros((2, 1), int))
    array([[1., 4.]])
    """
    dtype, experts, x, w_in, w_out = _checked(experts, x=x, w_in=w_in, w_out=w_out)
    hidden = activate(activation, round_to(_by_segment(x, w_in, experts, memory), x.dtype))
    return round_to(_by_segment(hidden, w_out, experts, memory), dtype)


def multi_hash_layer_vjp(
    x: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    experts: IntArray,
    activation: Activation = "relu",
) -> MultiHashGradients:
    """Return the gradients of ``sum(dy * multi_hash_layer(x, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_in, w_out, experts, activation
        As for `multi_hash_layer`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    MultiHashGradients
        A choice that no token has gets 0.

    Examples
    --------
    >>> one = np.ones((1, 1, 1, 1))
    >>> multi_hash_layer_vjp(one[0, 0], 3 * one, one, one[0, 0], experts=np.zeros((1, 1), int)).dx
    array([[3.]])
    """
    dtype, experts, x, w_in, w_out, dy = _checked(experts, x=x, w_in=w_in, w_out=w_out, dy=dy)
    before = round_to(_by_segment(x, w_in, experts), x.dtype)
    dhidden, dw_out = _by_segment_vjp(activate(activation, before), w_out, experts, dy)
    dx, dw_in = _by_segment_vjp(x, w_in, experts, dhidden * activation_slope(activation, before))
    return MultiHashGradients(*(round_to(gradient, dtype) for gradient in (dx, dw_in, dw_out)))


def _by_segment(x: FloatArray, w: FloatArray, experts: IntArray, memory: Memory | None = None) -> FloatArray:
    """Return ``concat_m(x[t] @ w[m, experts[m, t]])`` in the wide dtype, each choice on its own tokens."""
    n, E, _, width = w.shape
    y = np.zeros((len(x), n, width), wide_dtype(x.dtype))
    for m, e in np.ndindex(n, E):
        rows = np.flatnonzero(experts[m] == e)
        y[rows, m] = product_of(memory)("td,df->tf", x[rows], w[m, e])
    return y.reshape(len(x), n * width)


def _by_segment_vjp(
    x: FloatArray, w: FloatArray, experts: IntArray, dy: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of ``sum(dy * _by_segment(x, w, experts))`` with respect to x and w."""
    n, E, _, width = w.shape
    pieces, wide = dy.reshape(len(x), n, width), wide_dtype(dy.dtype)
    dx, dw = np.zeros(x.shape, wide), np.zeros(w.shape, wide)
    for m, e in np.ndindex(n, E):
        rows = np.flatnonzero(experts[m] == e)
        dx[rows] += contract("tf,df->td", pieces[rows, m], w[m, e])
        dw[m, e] = contract("td,tf->df", x[rows], pieces[rows, m])
    return dx, dw


def _checked(experts: IntArray, **arrays: FloatArray) -> tuple[Any, ...]:
    """Return the common dtype, the choices, and the arrays ready to compute with, once all fit together."""
    given = dict(zip(arrays, floating(**arrays), strict=True))
    axes = {"x": "T D", "w_in": "n E D f", "w_out": "n E F d", "dy": "T D"}
    sizes = bind_axes({name: (array, axes[name]) for name, array in given.items()})
    for whole, part in (("F", "f"), ("D", "d")):
        if sizes[whole] != sizes["n"] * sizes[part]:
            raise ShapeError(
                f"w_out: axis {whole} must be n times axis {part}; got {whole}={sizes[whole]}, "
                f"n={sizes['n']}, {part}={sizes[part]} (w_out has shape {given['w_out'].shape})"
            )
    found = indices("experts", experts, sizes["E"])
    bind_axes({"w_in": (given["w_in"], "n E D f"), "x": (given["x"], "T D"), "experts": (found, "n T")})
    return given["x"].dtype, found, *(widen(array) for array in given.values())
