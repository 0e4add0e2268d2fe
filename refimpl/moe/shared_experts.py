"""Shared experts (DeepSeekMoE, Qwen): some that every token uses, beside those that a router chooses."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack, get_args

import numpy as np

from refimpl.memory import Memory
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.routing import Convention, router_logits, router_logits_vjp
from refimpl.moe.samples import EXPERTS, layer_terms, sample_layer
from refimpl.moe.sparse_mixture import sparse_mixture, sparse_mixture_vjp, through_logits
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["SharedGradients", "sample_shared", "shared_experts", "shared_experts_vjp"]


class SharedGradients(NamedTuple):
    """Gradients of tokens, router, routed and shared experts; those of gates only where they were given."""

    dx: FloatArray
    dw_router: FloatArray
    dw_in: FloatArray
    dw_out: FloatArray
    dshared_in: FloatArray
    dshared_out: FloatArray
    dw_gate: FloatArray | None = None
    dshared_gate: FloatArray | None = None
    dshared_router: FloatArray | None = None


def sample_shared(
    rng: np.random.Generator, *, T: int, D: int, S: int, k: int, gated_sum: bool, **options: Any
) -> Case:
    """Return one call of `shared_experts`, its arrays drawn from `rng`.

    Examples
    --------
    >>> shape = {"T": 1, "D": 2, "E": 3, "F": 4, "S": 1, "k": 2}
    >>> case = sample_shared(np.random.default_rng(0), **shape, convention="switch", gated_sum=False)
    >>> [array.shape for array in case.args[3:]]
    [(3, 4, 2), (1, 2, 5), (1, 5, 2)]
    """
    convention = options.pop("convention")
    case = sample_layer(rng, T=T, D=D, **options)
    F = options["F"] + 1
    shared = rng.standard_normal((S, D, F)), rng.standard_normal((S, F, D))
    case = case.replace(*case.args, *shared)
    case = case.replace(k=min(k, options["E"]), convention=convention)
    if "w_gate" in case.kwargs:
        case = case.replace(shared_gate=rng.standard_normal((S, D, F)))
    return case.replace(shared_router=rng.standard_normal((D, S))) if gated_sum else case


def _terms(case: Case) -> tuple[int, Any]:
    x, _, _, _, shared_in, shared_out = case.args
    gate = case.kwargs.get("shared_gate")
    shared = Case(
        (x, np.zeros((x.shape[1], 0)), shared_in, shared_out), {} if gate is None else {"w_gate": gate}
    )
    (n, routed), (m, always) = layer_terms(case), layer_terms(shared)
    return n + m, routed + always


@technique(
    "moe.shared_experts",
    entries=(47,),
    kind="function",
    source=Source("Dai et al. 2024 (DeepSeekMoE)", "arXiv:2401.06066", "section 3.2, eq. 9 to 11"),
    axes={"T": (0, 4), "D": (1, 4), "E": (1, 4), "F": (1, 3), "S": (0, 2), "k": (1, 3)},
    options={"experts": EXPERTS, "convention": get_args(Convention), "gated_sum": (False, True)},
    edges=(
        {"T": 0, "S": 1},
        {"T": 1, "D": 1, "E": 1, "F": 1, "S": 1},
        {"T": 4, "S": 0},
        {"T": 4, "E": 4, "k": 3, "S": 2, "convention": "switch", "gated_sum": False},
    ),
    sample=sample_shared,
    terms=_terms,
    vjp="refimpl.moe.shared_experts:shared_experts_vjp",
)
def shared_experts(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    shared_in: FloatArray,
    shared_out: FloatArray,
    /,
    *,
    k: int,
    convention: Convention = "switch",
    shared_gate: FloatArray | None = None,
    shared_router: FloatArray | None = None,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return the sum of all shared experts and of the k routed experts that the router chooses.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, R)
        One column for each routed expert; shared ones are outside its softmax.
    w_in, w_out : ndarray of float, shapes (R, D, F), (R, F, D)
        The routed experts.
    shared_in, shared_out : ndarray of float, shapes (S, D, F'), (S, F', D)
        The shared experts; S may be 0.
    k : int
        Routed experts a token: ``m K - S`` in the paper's letters.
    convention : {"switch", "gshard", "mixtral"}
        DeepSeekMoE and Qwen1.5-MoE take "switch", not renormalized.
    shared_gate : ndarray of float, shape (S, D, F'), optional
        Makes gated shared experts.
    shared_router : ndarray of float, shape (D, S), optional
        Qwen's form: shared expert s counts ``σ(x · w_s)``.  Default: 1.
    memory : Memory, optional
        Counts the operations: ``2 T D R + T k (4 D F + 2 D) + T S (4 D F' + 2 D)``, gated ``6 D F``, and
        ``2 T D S`` with a shared router.
    w_gate : ndarray of float, shape (R, D, F), optional
        Makes gated routed experts.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of all experts.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype.  The ``+ u`` of eq. 9 is the residual around the layer, and not part of it.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit together, are not real, or an option is out of range.

    Notes
    -----
    S shared experts of width F' are one of width ``S F'``: released checkpoints hold them so.

    Sources count differently.  DeepSeekMoE 16B's "8 of 66, 2 shared" is 6 of 64 routed and 2 shared;
    Qwen1.5's "8 of 64, 4 shared" is 4 of 60 routed and one shared expert four times as wide, with its own
    sigmoid; OpenMoE's "2 of 16, 1 shared" does not count the shared one.

    References
    ----------
    .. [1] Dai et al., 2024, arXiv:2401.06066, section 3.2.
    .. [2] Qwen Team, 2024, "Qwen1.5-MoE"; transformers 5.24, ``Qwen2MoeSparseMoeBlock``.

    Examples
    --------
    >>> w, ones = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((2, 1, 1))
    >>> shared_experts(np.ones((1, 1)), np.zeros((1, 2)), w, ones, 100 * ones[:1], ones[:1], k=2)
    array([[102.]])
    """
    logits = router_logits(x, w_router, memory=memory)
    routed = sparse_mixture(x, logits, w_in, w_out, k=k, convention=convention, memory=memory, **options)
    gates = _shared_weights(x, shared_in, shared_router, memory)
    always = mixture(x, gates, shared_in, shared_out, memory=memory, **_of_shared(shared_gate, options))
    return round_to(widen(routed) + widen(always), routed.dtype)


def shared_experts_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    shared_in: FloatArray,
    shared_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    k: int,
    convention: Convention = "switch",
    shared_gate: FloatArray | None = None,
    shared_router: FloatArray | None = None,
    **options: Unpack[ExpertOptions],
) -> SharedGradients:
    """Return the gradients of ``sum(dy * shared_experts(x, w_router, ..., shared_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, shared_in, shared_out, k, convention, shared_gate, shared_router, **options
        As for `shared_experts`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    SharedGradients
        A routed expert that no token chose gets 0; a shared one has a gradient from every token.

    Examples
    --------
    >>> w, ones = np.stack([np.eye(1), 3 * np.eye(1)]), np.ones((2, 1, 1))
    >>> x = np.ones((1, 1))
    >>> shared_experts_vjp(x, np.zeros((1, 2)), w, ones, 9 * ones[:1], ones[:1], x, k=2).dshared_out
    array([[[9.]]])
    """
    logits = router_logits(x, w_router)
    back = sparse_mixture_vjp(x, logits, w_in, w_out, dy, k=k, convention=convention, **options)
    routed = through_logits(back, x, w_router, back.dlogits)
    gates = _shared_weights(x, shared_in, shared_router)
    always = mixture_vjp(x, gates, shared_in, shared_out, dy, **_of_shared(shared_gate, options))
    dx, dshared_router = widen(routed.dx) + widen(always.dx), None
    if shared_router is not None:
        tokens, w_shared = floating(x=x, shared_router=shared_router)
        dseen, dw_shared = router_logits_vjp(tokens, w_shared, always.dgates * gates * (1 - gates))
        dx, dshared_router = dx + dseen, round_to(dw_shared, w_shared.dtype)
    return SharedGradients(
        round_to(dx, routed.dx.dtype),
        *routed[1:4],
        dshared_in=always.dw_in,
        dshared_out=always.dw_out,
        dw_gate=routed.dw_gate,
        dshared_gate=always.dw_gate,
        dshared_router=dshared_router,
    )


def _shared_weights(
    x: FloatArray, shared_in: FloatArray, shared_router: FloatArray | None, memory: Memory | None = None
) -> FloatArray:
    """Return how much each shared expert counts, shape (T, S), in the wide dtype."""
    if shared_router is None:
        return np.ones((len(x), len(shared_in)))
    from scipy.special import expit

    scores = router_logits(x, shared_router, memory=memory)
    bind_axes(
        {"shared_in": (np.asarray(shared_in), "S D F"), "shared_router": (np.asarray(shared_router), "D S")}
    )
    return np.asarray(expit(scores))


def _of_shared(shared_gate: FloatArray | None, options: ExpertOptions) -> ExpertOptions:
    return {"w_gate": shared_gate, "activation": options.get("activation", "relu")}
