"""Batch-prioritized routing: tokens with the largest gates are served first, wherever they stand."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients, routed, routed_vjp, through_router
from refimpl.moe.capacity import CapacityOptions
from refimpl.moe.routing import Routing
from refimpl.moe.samples import ROUTED_AXES, ROUTED_EDGES, ROUTED_OPTIONS, layer_terms, sample_routed
from refimpl.moe.token_choice import Chosen, token_choice
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import whole

__all__ = ["batch_priority", "batch_priority_routing", "batch_priority_vjp"]


def _sample(rng: np.random.Generator, *, k: int, values: str = "normal", **shape: Any) -> Case:
    """Return a case in which no two tokens have top gates that a small step could exchange."""
    while True:
        case = sample_routed(rng, values=values, **shape)
        x, w_router = case.args[:2]
        top = softmax(x @ w_router).max(axis=1)
        # With large logits or one expert all gates are 1, to any step, and tokens are served as they come.
        saturated = values == "large" or w_router.shape[1] == 1
        if saturated or np.min(np.diff(np.sort(top)), initial=np.inf) > 1e-4:
            return case.replace(k=min(k, w_router.shape[1]))


@technique(
    "moe.batch_priority",
    entries=(38,),
    kind="function",
    source=Source(
        "Riquelme et al. 2021 (V-MoE), google-research/vmoe",
        "arXiv:2106.05974",
        'section "From Vanilla Routing to Batch Prioritized Routing"; '
        "vmoe/moe.py, _get_top_experts_per_item_common, commit 942a78b",
    ),
    axes={**ROUTED_AXES, "k": (1, 3)},
    options=ROUTED_OPTIONS,
    # With two choices a token, who comes first is decided by the surest gate, not by the sum of both.
    edges=(*ROUTED_EDGES, {"T": 6, "E": 4, "k": 2, "capacity": 1, "groups": 1, "values": "normal"}),
    sample=_sample,
    terms=layer_terms,
    vjp="refimpl.moe.batch_priority:batch_priority_vjp",
)
def batch_priority(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    k: int = 1,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
    **options: Unpack[CapacityOptions],
) -> FloatArray:
    """Return ``sum_j p_j(x) E_j(x)`` over a token's k best experts that have room, sure tokens served first.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, E)
        The router.
    w_in, w_out, w_gate, activation
        The experts, as for `refimpl.moe.expert_ffn.expert_ffn`.
    k : int
        Experts a token.
    memory : Memory, optional
        Counts the operations: ``2 T D E + 4 E C D F + 2 T k D`` for C places in all groups; gated 6 for 4.
    capacity, capacity_factor, rounding, min_capacity, groups
        As for `refimpl.moe.switch.switch`; the factor is of all T k choices, and `rounding` is "vmoe" unless
        told otherwise.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the order of `x`; 0 for a token all of whose choices were dropped.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together or are not real, or tokens do not divide into groups.
    OptionError
        If an option is out of range.

    Notes
    -----
    In each group the tokens are sorted by their largest gate, all first choices find their places in this
    order, then all second ones.  Gates are kept from the softmax over all experts, not divided by their sum.
    **Special cases**

    - Equal gates: the earlier token first (the sort is stable).
    - Where nothing overflows the order does not matter.

    References
    ----------
    .. [1] Riquelme et al., 2021, arXiv:2106.05974, "From Vanilla Routing to Batch Prioritized
       Routing".
    .. [2] google-research/vmoe, vmoe/moe.py, commit 942a78b.

    Examples
    --------
    The second token is surer of expert 1, whose only place it gets:

    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> x = np.array([[1.0], [9.0]])
    >>> batch_priority(x, np.array([[0.0, 1.0]]), w, np.ones((2, 1, 1)), capacity=1)[:, 0].round(2)
    array([ 0., 27.])
    """
    chosen = _route(x, w_router, memory, k=k, **options)
    return routed(x, chosen.routing, w_in, w_out, w_gate=w_gate, activation=activation, memory=memory)


def batch_priority_routing(
    x: FloatArray, w_router: FloatArray, /, *, k: int = 1, **options: Unpack[CapacityOptions]
) -> Routing:
    """Return where `batch_priority` sends each token; options as there.

    Examples
    --------
    >>> x = np.array([[1.0], [9.0]])
    >>> batch_priority_routing(x, np.array([[0.0, 1.0]]), capacity=1).kept[:, 0]
    array([False,  True])
    """
    return _route(x, w_router, None, k=k, **options).routing


def batch_priority_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    k: int = 1,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    **options: Unpack[CapacityOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * batch_priority(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, k, w_gate, activation, **options
        As for `batch_priority`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        Through the kept choices alone; the order has no gradient.

    Examples
    --------
    >>> w, x = np.stack([np.eye(1), 3 * np.eye(1)]), np.array([[1.0], [9.0]])
    >>> out = np.ones((2, 1, 1))
    >>> batch_priority_vjp(x, np.array([[0.0, 1.0]]), w, out, np.ones((2, 1)), capacity=1).dx[0]
    array([0.])
    """
    chosen = _route(x, w_router, None, k=k, **options)
    back = routed_vjp(x, chosen.routing, w_in, w_out, dy, w_gate=w_gate, activation=activation)
    return through_router(back, x, w_router, chosen.logits, chosen.routing, convention="switch")


def _route(
    x: FloatArray,
    w_router: FloatArray,
    memory: Memory | None,
    *,
    k: int,
    **options: Unpack[CapacityOptions],
) -> Chosen:
    factor = options.get("capacity_factor", 1.25)
    k = whole("k", k)
    sized: CapacityOptions = {"rounding": "vmoe", **options, "capacity_factor": k * factor}
    return token_choice(x, w_router, k=k, convention="switch", order=_surest_first, memory=memory, **sized)


def _surest_first(weight: FloatArray) -> IntArray:
    return np.argsort(-weight[:, 0], kind="stable")
