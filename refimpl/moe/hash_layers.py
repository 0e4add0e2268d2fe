"""Hash layers: the expert of a token is looked up, not learned."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.moe.expert_ffn import ExpertGradients, ExpertOptions, expert_ffn
from refimpl.moe.mixture import mixture_vjp
from refimpl.moe.samples import EXPERTS, LAYER_AXES, layer_terms, sample_layer
from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.registry import Case, Source, technique
from refimpl.transformer.embedding import indices
from refimpl.validation import bind_axes, floating

__all__ = ["hash_layer", "hash_layer_vjp"]


def _sample(rng: np.random.Generator, *, T: int, E: int, **axes: Any) -> Case:
    case = sample_layer(rng, T=T, E=E, **axes)
    x, _, w_in, w_out = case.args
    return Case((x, w_in, w_out), {**case.kwargs, "experts": rng.integers(0, E, T)})


def _terms(case: Case) -> tuple[int, Any]:
    x, w_in, w_out = case.args
    return layer_terms(Case((x, np.zeros((x.shape[1], 0)), w_in, w_out), case.kwargs))


@technique(
    "moe.hash",
    entries=(39,),
    kind="function",
    source=Source("Roller et al. 2021", "arXiv:2106.04426", "section 3, eq. 1 to 3"),
    axes=LAYER_AXES,
    options={"experts": EXPERTS},
    edges=({"T": 0, "E": 3}, {"T": 1, "D": 1, "E": 1, "F": 1}, {"T": 2, "E": 5}),
    sample=_sample,
    terms=_terms,
    vjp="refimpl.moe.hash_layers:hash_layer_vjp",
)
def hash_layer(
    x: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    experts: IntArray,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return ``expert_{h(t)}(x[t])``: each token through the one expert that its hash names.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Hidden states.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts.
    experts : ndarray of int, shape (T,)
        Expert of each token: ``table[tokens]`` with a table of `refimpl.moe.hash_tables`, or a hash of
        `refimpl.moe.hash_context`.
    memory : Memory, optional
        Counts the operations: ``4 T D F``, gated ``6 T D F``, as of one dense layer.
    w_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of the experts.  Default: ReLU, as in the paper.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together, or are of the wrong kind.
    OptionError
        If an expert is outside [0, E), or the activation is unknown.

    Notes
    -----
    There is no gate, so nothing is scaled, no gradient reaches a router, and no loss balances the experts.
    Nothing is dropped either: the fullest expert decides how long the layer takes.

    References
    ----------
    .. [1] Roller et al., 2021, arXiv:2106.04426, section 3.

    Examples
    --------
    >>> table = np.array([0, 1, 1])  # expert of each token of a vocabulary of three
    >>> w_in = np.array([[[1.0]], [[10.0]]])
    >>> hash_layer(np.ones((2, 1)), w_in, np.ones((2, 1, 1)), experts=table[np.array([2, 0])])
    array([[10.],
           [ 1.]])
    """
    x, w_in, w_out = floating(x=x, w_in=w_in, w_out=w_out)
    bind_axes({"x": (x, "T D"), "w_in": (w_in, "E D F")})
    chosen, w_gate = _chosen(experts, x, w_in), options.get("w_gate")
    y = np.zeros_like(x)
    for e, rows in enumerate(chosen.T):
        one = options if w_gate is None else {**options, "w_gate": np.asarray(w_gate)[e : e + 1]}
        y[rows] = expert_ffn(x[None, rows], w_in[e : e + 1], w_out[e : e + 1], memory=memory, **one)[0]
    return y


def hash_layer_vjp(
    x: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    experts: IntArray,
    **options: Unpack[ExpertOptions],
) -> ExpertGradients:
    """Return the gradients of ``sum(dy * hash_layer(x, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_in, w_out, experts, **options
        As for `hash_layer`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    ExpertGradients
        An expert that no token has gets 0.

    Examples
    --------
    >>> w_in = np.array([[[1.0]], [[10.0]]])
    >>> one, w_out = np.ones((1, 1)), np.ones((2, 1, 1))
    >>> hash_layer_vjp(one, w_in, w_out, one, experts=np.array([1])).dw_out[:, 0, 0]
    array([ 0., 10.])
    """
    chosen = _chosen(experts, x, w_in)
    back = mixture_vjp(x, chosen.astype(np.float64), w_in, w_out, dy, selected=chosen, **options)
    return ExpertGradients(back.dx, back.dw_in, back.dw_out, back.dw_gate)


def _chosen(experts: IntArray, x: FloatArray, w_in: FloatArray) -> BoolArray:
    """Return which expert each token has, as a mask of shape (T, E)."""
    found = indices("experts", experts, len(w_in))
    if found.shape != (len(x),):
        raise ShapeError(f"experts: expected shape {(len(x),)}, one a token, got {found.shape}")
    return np.asarray(found[:, None] == np.arange(len(w_in)))
