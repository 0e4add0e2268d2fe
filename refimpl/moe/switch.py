"""Switch: each token to its best expert, if that has room; a dropped token is left to the residual."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients, routed, routed_vjp, through_router
from refimpl.moe.capacity import CapacityOptions
from refimpl.moe.routing import Routing
from refimpl.moe.samples import ROUTED_AXES, ROUTED_EDGES, ROUTED_OPTIONS, gap, layer_terms, sample_routed
from refimpl.moe.token_choice import Chosen, token_choice
from refimpl.numerics import FloatArray, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import bind_axes, floating, fraction

__all__ = ["SwitchOptions", "switch", "switch_routing", "switch_vjp"]


class SwitchOptions(CapacityOptions, total=False):
    """Options of `switch_routing`: capacity, and the jitter of the router's input."""

    jitter: float
    uniforms: FloatArray | None
    rng: np.random.Generator | int | None


def _sample(rng: np.random.Generator, *, jitter: bool, **shape: Any) -> Case:
    case = sample_routed(rng, **shape)
    if not jitter:
        return case
    x, w_router = case.args[:2]
    while True:
        uniforms = rng.random(x.shape)
        if gap((x * (0.8 + 0.4 * uniforms)) @ w_router, str(shape["values"])):
            return case.replace(jitter=0.2, uniforms=uniforms)


@technique(
    "moe.switch",
    entries=(35,),
    kind="function",
    source=Source("Fedus et al. 2021", "arXiv:2101.03961", "section 2.1 and 2.2, eq. 1 to 3"),
    axes=ROUTED_AXES,
    options={**ROUTED_OPTIONS, "jitter": (False, True)},
    edges=ROUTED_EDGES,
    sample=_sample,
    terms=layer_terms,
    vjp="refimpl.moe.switch:switch_vjp",
)
def switch(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
    **options: Unpack[SwitchOptions],
) -> FloatArray:
    """Return ``p_i(x) E_i(x)`` for the expert i with the largest ``p = softmax(x W_router)``, if it has room.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, E)
        The router.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts, as for `refimpl.moe.expert_ffn.expert_ffn`.
    w_gate, activation
        As for `expert_ffn`.
    memory : Memory, optional
        Counts the operations: ``2 T D E + 4 E C D F + 2 T D`` for C places in all groups; gated 6 for 4.
    capacity : int, optional
        Places of each expert for a group.  Default: from the three options that follow.
    capacity_factor : float
        Default 1.25, as in training; 2 for evaluation.
    rounding : {"mesh_tf", "flaxformer", "vmoe"}
        As for `refimpl.moe.capacity.expert_capacity`.  Default "mesh_tf".
    min_capacity : int
        Default 4, as in all three.
    groups : int
        Consecutive groups of tokens that are routed by themselves.  Default 1.
    jitter : float
        In training the *router's* input is multiplied by ``U(1 - jitter, 1 + jitter)``; in the paper 0.01.
        Default 0.
    uniforms : ndarray of float, shape (T, D), optional
        The draws from [0, 1) for the jitter.
    rng : numpy.random.Generator or int, optional
        Draws them otherwise.

    Returns
    -------
    ndarray of float, shape (T, D)
        0 for a dropped token: the residual connection around the layer carries it.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together or are not real, or tokens do not divide into groups.
    OptionError
        If an option is out of range, or there is jitter without draws.

    Notes
    -----
    Tokens come in order: those past the capacity of their expert are dropped.  **Special cases**

    - Equal logits: the lowest expert.  A logit decides, not its gate, so gates that underflow do not tie.
    - A capacity of 0 drops every token.
    - Mesh-TF derives where a token goes from its gate being other than 0, so it also takes tokens out whose
      gate underflowed; their output here is 0 times the expert's, which is the same.

    References
    ----------
    .. [1] Fedus, Zoph and Shazeer, 2021, arXiv:2101.03961, section 2.1 and 2.2, eq. 1 to 3.
    .. [2] tensorflow/mesh, mesh_tensorflow/transformer/moe.py, _switch_gating, commit da90793.

    Examples
    --------
    Three tokens want the same expert, which has room for two:

    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> switch(np.ones((3, 1)), np.array([[0.0, 9.0]]), w, np.ones((2, 1, 1)), capacity=2)[:, 0].round(2)
    array([3., 3., 0.])
    """
    chosen, _ = _route(x, w_router, memory, **options)
    return routed(x, chosen.routing, w_in, w_out, w_gate=w_gate, activation=activation, memory=memory)


def switch_routing(x: FloatArray, w_router: FloatArray, /, **options: Unpack[SwitchOptions]) -> Routing:
    """Return where `switch` sends each token, k = 1; options as there.

    Examples
    --------
    >>> switch_routing(np.ones((3, 1)), np.array([[0.0, 9.0]]), capacity=2).kept[:, 0]
    array([ True,  True, False])
    """
    return _route(x, w_router, None, **options)[0].routing


def switch_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    **options: Unpack[SwitchOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * switch(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, w_gate, activation, **options
        As for `switch`; a generator must be an integer seed to draw the same jitter again.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        A dropped token gets 0 and gives nothing; the router learns from the gate of the chosen expert alone.

    Examples
    --------
    >>> w, x = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((2, 1))
    >>> switch_vjp(x, np.array([[0.0, 9.0]]), w, np.ones((2, 1, 1)), x, capacity=1).dx[:, 0].round(2)
    array([3., 0.])
    """
    (routing, logits), factor = _route(x, w_router, None, **options)
    back = routed_vjp(x, routing, w_in, w_out, dy, w_gate=w_gate, activation=activation)
    return through_router(back, x, w_router, logits, routing, convention="switch", factor=factor)


def _route(
    x: FloatArray,
    w_router: FloatArray,
    memory: Memory | None,
    *,
    jitter: float = 0.0,
    uniforms: FloatArray | None = None,
    rng: np.random.Generator | int | None = None,
    **options: Unpack[CapacityOptions],
) -> tuple[Chosen, FloatArray | None]:
    """Return what was chosen, and what the router's input was multiplied by."""
    factor = _jitter(x, jitter, uniforms, rng)
    seen = x if factor is None else widen(x) * factor
    return token_choice(seen, w_router, k=1, convention="switch", memory=memory, **options), factor


def _jitter(
    x: FloatArray, jitter: float, uniforms: FloatArray | None, rng: np.random.Generator | int | None
) -> FloatArray | None:
    """Return what the router's input is multiplied by, in the wide dtype; None without jitter."""
    if not fraction("jitter", jitter):
        return None
    if (uniforms is None) == (rng is None):
        raise OptionError("jitter: expected either uniforms or rng to draw from, got neither or both")
    draws = np.random.default_rng(rng).random(x.shape) if uniforms is None else floating(uniforms=uniforms)[0]
    bind_axes({"x": (x, "T D"), "uniforms": (draws, "T D")})
    return np.asarray(1 + jitter * (2 * widen(draws) - 1)).astype(wide_dtype(x.dtype))
