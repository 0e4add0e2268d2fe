"""GShard's top-2 routing as Algorithm 1 is printed; `refimpl.moe.gshard_as_coded` has it as it is coded.

Both place all first choices in token order, then the second ones, each second one only with a probability
that its gate sets.  As printed an expert's counter goes up for every choice that names it, sent or not, so
second choices that chance took out still take places.  The code counts only what is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import numpy as np

from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients, routed, routed_vjp, through_router
from refimpl.moe.capacity import CapacityOptions
from refimpl.moe.routing import Routing, gate_weights
from refimpl.moe.samples import ROUTED_AXES, ROUTED_EDGES, ROUTED_OPTIONS, layer_terms, sample_routed
from refimpl.moe.token_choice import Chosen, token_choice
from refimpl.numerics import BoolArray, FloatArray, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import bind_axes, floating

__all__ = [
    "GShardOptions",
    "draws_for_seconds",
    "gshard_as_printed",
    "gshard_as_printed_routing",
    "gshard_as_printed_vjp",
    "sample_gshard",
    "top_two",
]


class GShardOptions(CapacityOptions, total=False):
    """Options of `gshard_as_printed_routing`: capacity, and the draws for second choices."""

    uniforms: FloatArray | None
    rng: np.random.Generator | int | None


def sample_gshard(rng: np.random.Generator, **shape: Any) -> Case:
    """Return one call of a top-2 layer: `sample_routed` with at least two experts, and draws.

    Examples
    --------
    >>> shape = dict(capacity=1, groups=2, T=3, D=2, E=2, F=2)
    >>> sample_gshard(np.random.default_rng(0), **shape).kwargs["uniforms"].shape
    (6,)
    """
    case = sample_routed(rng, **{**shape, "E": max(2, shape["E"])})
    return case.replace(uniforms=rng.random(len(case.args[0])))


@technique(
    "moe.gshard",
    entries=(36,),
    kind="function",
    source=Source("Lepikhin et al. 2020", "arXiv:2006.16668", "Algorithm 1"),
    axes=ROUTED_AXES,
    options=ROUTED_OPTIONS,
    edges=ROUTED_EDGES,
    sample=sample_gshard,
    terms=layer_terms,
    vjp="refimpl.moe.gshard:gshard_as_printed_vjp",
)
def gshard_as_printed(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
    **options: Unpack[GShardOptions],
) -> FloatArray:
    """Return ``sum_j g_j E_j(x)`` over a token's two best experts that have room, Algorithm 1 as printed.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, E)
        The router; E is at least 2.
    w_in, w_out, w_gate, activation
        The experts, as for `refimpl.moe.expert_ffn.expert_ffn`.
    memory : Memory, optional
        Counts the operations: ``2 T D E + 4 E C D F + 4 T D`` for C places in all groups; gated 6 for 4.
    uniforms : ndarray of float, shape (T,), optional
        Draws u from [0, 1): a second choice is sent only if ``2 g_2 > u``, g_2 being divided already.
    rng : numpy.random.Generator or int, optional
        Draws them otherwise.  With neither u = 0: every second choice is sent.
    capacity, capacity_factor, rounding, min_capacity, groups
        As for `refimpl.moe.switch.switch`; the factor is 2 unless told otherwise, because C = 2 S / E is a
        perfect balance.

    Returns
    -------
    ndarray of float, shape (T, D)
        0 for a token both of whose choices were dropped.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together or are not real, or tokens do not divide into groups.
    OptionError
        If an option is out of range, there is one expert only, or uniforms and rng are both given.

    Notes
    -----
    ``g_1 + g_2 = 1`` before anything is dropped, and a token that keeps one choice keeps its weight as it is.
    The counter of an expert goes up for every choice that names it.  **Special cases**

    - Equal logits: the lowest experts.
    - A first choice is never dropped for a second one.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, Algorithm 1.

    Examples
    --------
    Chance takes out the second choice of the first token, whose place the second token does not get:

    >>> w, draws = np.stack([np.eye(1), 3 * np.eye(1)]), np.array([0.9, 0.0])
    >>> x, router, out = np.ones((2, 1)), np.array([[1.0, 0.0]]), np.ones((2, 1, 1))
    >>> gshard_as_printed(x, router, w, out, capacity=1, uniforms=draws)[:, 0].round(3)
    array([0.731, 0.   ])
    """
    routing = _route(x, w_router, memory, **options).routing
    return routed(x, routing, w_in, w_out, w_gate=w_gate, activation=activation, memory=memory)


def gshard_as_printed_routing(
    x: FloatArray, w_router: FloatArray, /, **options: Unpack[GShardOptions]
) -> Routing:
    """Return where `gshard_as_printed` sends each token, k = 2; options as there.

    Examples
    --------
    >>> x, router = np.ones((2, 1)), np.array([[1.0, 0.0]])
    >>> gshard_as_printed_routing(x, router, capacity=1, uniforms=np.array([0.9, 0.0])).kept
    array([[ True, False],
           [False, False]])
    """
    return _route(x, w_router, None, **options).routing


def gshard_as_printed_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    **options: Unpack[GShardOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * gshard_as_printed(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, w_gate, activation, **options
        As for `gshard_as_printed`; a generator must be an integer seed to draw the same numbers again.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        Through the kept choices alone.

    Examples
    --------
    >>> w, x = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((1, 1))
    >>> gshard_as_printed_vjp(x, np.zeros((1, 2)), w, np.ones((2, 1, 1)), x, capacity=1).dw_router
    array([[-0.5,  0.5]])
    """
    routing, logits = _route(x, w_router, None, **options)
    back = routed_vjp(x, routing, w_in, w_out, dy, w_gate=w_gate, activation=activation)
    return through_router(back, x, w_router, logits, routing, convention="gshard")


def top_two(
    x: FloatArray,
    w_router: FloatArray,
    memory: Memory | None,
    *,
    sent: Callable[[FloatArray], BoolArray] | None = None,
    **options: Unpack[CapacityOptions],
) -> Chosen:
    """Place the two best experts of each token, gates divided by their sum, with a factor of 2 by default.

    Parameters
    ----------
    x, w_router, memory, **options
        As for `gshard_as_printed`.
    sent : callable, optional
        Which second choices, given their gates, ask for a place at all.  Default: all.

    Returns
    -------
    Chosen
        Where everything that asked and found room is kept.

    Examples
    --------
    >>> top_two(np.ones((1, 1)), np.zeros((1, 3)), None).routing.expert
    array([[0, 1]])
    """

    def wanted(weight: FloatArray) -> BoolArray:
        seconds = np.ones(len(weight), bool) if sent is None else sent(weight[:, 1])
        return np.stack([np.ones_like(seconds), seconds], axis=1)

    sized: CapacityOptions = {"capacity_factor": 2.0, **options}
    return token_choice(x, w_router, k=2, convention="gshard", wanted=wanted, memory=memory, **sized)


def draws_for_seconds(
    gates: FloatArray, uniforms: FloatArray | None, rng: np.random.Generator | int | None
) -> FloatArray:
    """Return a number from [0, 1) for each second choice: those given, drawn, or 0.

    Examples
    --------
    >>> draws_for_seconds(np.ones(2), None, None)
    array([0., 0.])
    """
    if uniforms is None:
        return np.zeros(gates.shape) if rng is None else np.random.default_rng(rng).random(gates.shape)
    if rng is not None:
        raise OptionError("rng: expected None beside uniforms, which holds the draws")
    (draws,) = floating(uniforms=uniforms)
    bind_axes({"x": (gates, "T"), "uniforms": (draws, "T")})
    return widen(draws)


def _route(
    x: FloatArray,
    w_router: FloatArray,
    memory: Memory | None,
    *,
    uniforms: FloatArray | None = None,
    rng: np.random.Generator | int | None = None,
    **options: Unpack[CapacityOptions],
) -> Chosen:
    placed, logits = top_two(x, w_router, memory, **options)
    second = gate_weights(logits, placed.expert, convention="gshard")[:, 1]
    # Every choice has taken its place by now; one that chance takes out leaves it empty.
    sent = np.ones(placed.kept.shape, bool)
    sent[:, 1] = 2 * second > draws_for_seconds(second, uniforms, rng)
    kept = placed.kept & sent
    routing = Routing(
        placed.expert,
        np.where(kept, placed.weight, 0),
        np.where(kept, placed.slot, -1),
        kept,
        placed.capacity,
        placed.experts,
    )
    return Chosen(routing, logits)
