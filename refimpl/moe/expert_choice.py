"""Expert choice: the experts choose their tokens, so each gets exactly as many as it has places for."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.routing import router_logits
from refimpl.moe.samples import EXPERTS, LAYER_AXES, gap, layer_terms, sample_layer
from refimpl.moe.sparse_mixture import through_logits
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = [
    "chosen_by_experts",
    "expert_choice",
    "expert_choice_vjp",
    "expert_selection",
    "expert_selection_vjp",
]


def _sample(rng: np.random.Generator, *, T: int, C: int, E: int, **axes: Any) -> Case:
    while True:  # until no small step changes a choice: choices are discontinuous
        case = sample_layer(rng, T=T, E=E, **axes).replace(capacity=min(C, T))
        logits = case.args[0] @ case.args[1]
        if E == 1 or (gap(logits.T) and gap(0.5 * softmax(logits).T)):
            return case


_RECORD: dict[str, Any] = {
    "entries": (40,),
    "kind": "function",
    "axes": {**LAYER_AXES, "T": (0, 6), "C": (0, 6)},
    "options": {"experts": EXPERTS},
    "edges": (
        {"T": 0, "E": 3},
        {"T": 1, "D": 1, "E": 1, "F": 1, "C": 1},
        {"T": 5, "C": 0},  # nobody chooses anybody
        {"T": 5, "C": 5},  # everybody chooses all
    ),
    "sample": _sample,
    "terms": layer_terms,
}


@technique(
    "moe.expert_choice",
    source=Source("Zhou et al. 2022", "arXiv:2202.09368", "section 3.2, eq. 1"),
    vjp="refimpl.moe.expert_choice:expert_choice_vjp",
    **_RECORD,
)
def expert_choice(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    capacity: int,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return ``sum_e S[t, e] expert_e(x[t])`` over the experts e that chose token t.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens of one group: experts choose among these.
    w_router : ndarray of float, shape (D, E)
        One column for each expert.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts.
    capacity : int
        Tokens that each expert takes; ``c T / E`` for a mean of c experts a token.
    memory : Memory, optional
        Counts the operations: ``2 T D E`` of the router and ``E C (4 D F + 2 D)``, gated ``6 D F``.
    w_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of the experts.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype; 0 for a token that nobody chose: the residual carries it.

    Raises
    ------
    OptionError
        If `capacity` is negative or above T.
    ShapeError, DTypeError
        If the arrays do not fit together, or are not real.

    Notes
    -----
    ``S`` is the softmax over the *experts*; expert e takes the tokens of the C largest ``S[:, e]``.  Special
    cases:

    - Equal scores: the earlier token is taken.
    - Every expert is exactly full, so there is nothing to balance and nothing is dropped, but a token may
      have no expert, or all of them.
    - It is not causal: a later token can take an earlier one's place.  Not for decoders as it stands.

    References
    ----------
    .. [1] Zhou et al., 2022, arXiv:2202.09368, section 3.2; google/flaxformer, architectures/moe/routing.py.

    Examples
    --------
    All scores are equal, so both experts take the first token and none the second:

    >>> x, w = np.array([[1.0], [2.0]]), np.stack([np.eye(1), 10 * np.eye(1)])
    >>> expert_choice(x, np.zeros((1, 2)), w, np.ones((2, 1, 1)), capacity=1)
    array([[5.5],
           [0. ]])
    """
    gates = softmax(router_logits(x, w_router, memory=memory))
    chosen = chosen_by_experts(gates, capacity=capacity)
    return mixture(x, gates, w_in, w_out, selected=chosen, memory=memory, **options)


def expert_choice_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    capacity: int,
    **options: Unpack[ExpertOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * expert_choice(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, capacity, **options
        As for `expert_choice`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        The choice itself has no gradient; the softmax carries one to the logits of all experts.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> expert_choice_vjp(one, np.zeros((1, 2)), w, np.ones((2, 1, 1)), one, capacity=1).dw_router
    array([[-0.5,  0.5]])
    """
    gates = softmax(router_logits(x, w_router))
    chosen = chosen_by_experts(gates, capacity=capacity)
    back = mixture_vjp(x, gates, w_in, w_out, dy, selected=chosen, **options)
    inner = np.sum(gates * back.dgates, axis=1, keepdims=True)
    return through_logits(back, x, w_router, gates * (back.dgates - inner))


@technique(
    "moe.expert_choice.mesh_tf",
    source=Source(
        "tensorflow/mesh", "GitHub @da90793", "mesh_tensorflow/transformer/moe.py, _expert_selection_gating"
    ),
    vjp="refimpl.moe.expert_choice:expert_selection_vjp",
    **_RECORD,
)
def expert_selection(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    capacity: int,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return Mesh-TensorFlow's expert choice: softmax over tokens, mean over the experts that chose a token.

    Parameters
    ----------
    x, w_router, w_in, w_out, capacity, memory, w_gate, activation
        As for `expert_choice`.

    Returns
    -------
    ndarray of float, shape (T, D)
        ``sum_e P[t, e] expert_e(x[t]) / n[t]`` over the n[t] experts that chose token t; 0 where nobody did.

    Raises
    ------
    OptionError, ShapeError, DTypeError
        As for `expert_choice`.

    Notes
    -----
    Not the layer of the paper: ``P[:, e]`` is the softmax of expert e's logits over the *tokens*, so a
    constant added to an expert's logits changes nothing, gates shrink as 1 / T, and a token's gates need not
    sum to anything.

    References
    ----------
    .. [1] tensorflow/mesh at da90793, mesh_tensorflow/transformer/moe.py, ``_expert_selection_gating``.

    Examples
    --------
    >>> x, w = np.array([[1.0], [2.0]]), np.stack([np.eye(1), 10 * np.eye(1)])
    >>> expert_selection(x, np.zeros((1, 2)), w, np.ones((2, 1, 1)), capacity=1)
    array([[2.75],
           [0.  ]])
    """
    gates, shares, chosen = _selection(x, w_router, capacity, memory)
    return mixture(x, gates * shares, w_in, w_out, selected=chosen, memory=memory, **options)


def expert_selection_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    capacity: int,
    **options: Unpack[ExpertOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * expert_selection(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, capacity, **options
        As for `expert_choice`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        The softmax carries a gradient to the logits of all tokens.

    Examples
    --------
    >>> one, w = np.ones((1, 1)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> expert_selection_vjp(one, np.zeros((1, 2)), w, np.ones((2, 1, 1)), one, capacity=1).dx
    array([[2.]])
    """
    gates, shares, chosen = _selection(x, w_router, capacity)
    back = mixture_vjp(x, gates * shares, w_in, w_out, dy, selected=chosen, **options)
    dgates = back.dgates * shares
    inner = np.sum(gates * dgates, axis=0, keepdims=True)
    return through_logits(back, x, w_router, gates * (dgates - inner))


def chosen_by_experts(scores: FloatArray, *, capacity: int) -> BoolArray:
    """Return which tokens each expert chooses, shape (T, E): those of its `capacity` largest scores.

    Raises
    ------
    OptionError
        If `capacity` is negative or above the number of tokens.

    Examples
    --------
    >>> chosen_by_experts(np.array([[1.0, 5.0], [1.0, 6.0]]), capacity=1)
    array([[ True, False],
           [False,  True]])
    """
    if whole("capacity", capacity, 0) > len(scores):
        raise OptionError(f"capacity: expected at most {len(scores)}, the number of tokens, got {capacity}")
    chosen = np.zeros(scores.shape, bool)
    tokens = np.argsort(-scores, axis=0, kind="stable")[:capacity]
    np.put_along_axis(chosen, tokens, values=True, axis=0)
    return chosen


def _selection(
    x: FloatArray, w_router: FloatArray, capacity: int, memory: Memory | None = None
) -> tuple[FloatArray, FloatArray, BoolArray]:
    """Return the softmax over tokens, 1 / (experts that chose the token), and who chose whom."""
    gates = softmax(router_logits(x, w_router, memory=memory).T).T
    chosen = chosen_by_experts(gates, capacity=capacity)
    shares = 1 / np.maximum(chosen.sum(axis=1, keepdims=True), 1).astype(gates.dtype)
    return gates, shares, chosen
