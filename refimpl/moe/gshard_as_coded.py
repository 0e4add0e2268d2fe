"""GShard's top-2 routing as the authors' code has it: only choices that are sent count against a capacity."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, Unpack, get_args

import numpy as np

from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients, routed, routed_vjp, through_router
from refimpl.moe.capacity import CapacityOptions
from refimpl.moe.gshard import GShardOptions, draws_for_seconds, sample_gshard, top_two
from refimpl.moe.routing import Routing
from refimpl.moe.samples import ROUTED_AXES, ROUTED_EDGES, ROUTED_OPTIONS, layer_terms
from refimpl.moe.token_choice import Chosen
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import positive

__all__ = [
    "CodedOptions",
    "SecondPolicy",
    "gshard_as_coded",
    "gshard_as_coded_routing",
    "gshard_as_coded_vjp",
]

SecondPolicy: TypeAlias = Literal["all", "random", "threshold"]


class CodedOptions(GShardOptions, total=False):
    """Options of `gshard_as_coded_routing`: those of `gshard_as_printed`, and who sends second choices."""

    second_policy: SecondPolicy
    threshold: float


def _sample(rng: np.random.Generator, *, second_policy: str, **shape: Any) -> Case:
    case = sample_gshard(rng, **shape).replace(second_policy=second_policy, threshold=0.3)
    return case if second_policy == "random" else case.without("uniforms")


@technique(
    "moe.gshard.as_coded",
    entries=(36,),
    kind="function",
    source=Source(
        "tensorflow/lingvo and tensorflow/mesh",
        "github.com/tensorflow/lingvo, github.com/tensorflow/mesh",
        "lingvo/core/gshard_layers.py, Top2GatingOnLogits, commit e0be5dc; "
        "mesh_tensorflow/transformer/moe.py, _top_2_gating, commit da90793",
    ),
    axes=ROUTED_AXES,
    options={**ROUTED_OPTIONS, "second_policy": get_args(SecondPolicy)},
    edges=(*ROUTED_EDGES, {"T": 6, "E": 3, "capacity": 2, "groups": 1, "second_policy": "random"}),
    sample=_sample,
    terms=layer_terms,
    vjp="refimpl.moe.gshard_as_coded:gshard_as_coded_vjp",
)
def gshard_as_coded(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    memory: Memory | None = None,
    **options: Unpack[CodedOptions],
) -> FloatArray:
    """Return ``sum_j g_j E_j(x)`` over a token's two best experts that have room, as it is coded.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, E)
        The router; E is at least 2.
    w_in, w_out, w_gate, activation
        The experts, as for `refimpl.moe.expert_ffn.expert_ffn`.
    memory : Memory, optional
        Counts the operations, as many as `gshard_as_printed`.
    second_policy : {"all", "random", "threshold"}
        ``"all"``: second choices are all sent.  ``"random"``: with probability ``min(1, g_2 / threshold)``.
        ``"threshold"`` (Mesh-TensorFlow): if ``g_2 > threshold``.
    threshold : float
        Default 0.2, that of Mesh-TensorFlow's layer; 0.5 makes ``2 g_2 > u`` of the paper.
    uniforms, rng
        Draws for "random", as for `gshard_as_printed`.
    capacity, capacity_factor, rounding, min_capacity, groups
        As for `gshard_as_printed`.

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
    Gates are divided by their sum before anything is dropped.  An expert's places are counted over what is
    sent and kept.  The code adds 1e-9 to that sum, which this does not: at most 1e-9 E in a weight.

    References
    ----------
    .. [1] tensorflow/lingvo, lingvo/core/gshard_layers.py, Top2GatingOnLogits, commit e0be5dc.
    .. [2] tensorflow/mesh, mesh_tensorflow/transformer/moe.py, _top_2_gating, commit da90793.

    Examples
    --------
    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> gshard_as_coded(np.ones((1, 1)), np.zeros((1, 2)), w, np.ones((2, 1, 1)), capacity=1)
    array([[2.]])

    Where the printed algorithm leaves a place empty, the next token has it:

    >>> options = {"second_policy": "random", "threshold": 0.5, "uniforms": np.array([0.9, 0.0])}
    >>> x, router = np.ones((2, 1)), np.array([[1.0, 0.0]])
    >>> gshard_as_coded(x, router, w, np.ones((2, 1, 1)), capacity=1, **options)[:, 0].round(3)
    array([0.731, 0.807])
    """
    routing = _route(x, w_router, memory, **options).routing
    return routed(x, routing, w_in, w_out, w_gate=w_gate, activation=activation, memory=memory)


def gshard_as_coded_routing(
    x: FloatArray, w_router: FloatArray, /, **options: Unpack[CodedOptions]
) -> Routing:
    """Return where `gshard_as_coded` sends each token, k = 2; options as there.

    Examples
    --------
    >>> x, router = np.ones((2, 1)), np.array([[1.0, 0.0]])
    >>> gshard_as_coded_routing(x, router, capacity=1).kept
    array([[ True,  True],
           [False, False]])
    """
    return _route(x, w_router, None, **options).routing


def gshard_as_coded_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    w_gate: FloatArray | None = None,
    activation: Activation = "relu",
    **options: Unpack[CodedOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * gshard_as_coded(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, w_gate, activation, **options
        As for `gshard_as_coded`; a generator must be an integer seed to draw the same numbers again.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        Through the kept choices alone.

    Examples
    --------
    >>> w, x = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((1, 1))
    >>> gshard_as_coded_vjp(x, np.zeros((1, 2)), w, np.ones((2, 1, 1)), x, capacity=1).dx
    array([[2.]])
    """
    routing, logits = _route(x, w_router, None, **options)
    back = routed_vjp(x, routing, w_in, w_out, dy, w_gate=w_gate, activation=activation)
    return through_router(back, x, w_router, logits, routing, convention="gshard")


def _route(
    x: FloatArray,
    w_router: FloatArray,
    memory: Memory | None,
    *,
    second_policy: SecondPolicy = "all",
    threshold: float = 0.2,
    uniforms: FloatArray | None = None,
    rng: np.random.Generator | int | None = None,
    **options: Unpack[CapacityOptions],
) -> Chosen:
    def sent(gates: FloatArray) -> BoolArray:
        if second_policy == "all":
            return np.ones(gates.shape, bool)
        if second_policy == "random":
            return draws_for_seconds(gates, uniforms, rng) < gates / positive("threshold", threshold)
        if second_policy == "threshold":
            return gates > positive("threshold", threshold)
        raise OptionError(f"second_policy: expected one of {get_args(SecondPolicy)}, got {second_policy!r}")

    return top_two(x, w_router, memory, sent=sent, **options)
