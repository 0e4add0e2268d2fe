"""Experts as modules: of a layer with experts only some are trained, or new ones; the others stay frozen.

The layer is that of `refimpl.moe`; here is what training adds to it, and which gradients there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.gating import top_k_gates, top_k_gates_vjp
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.routing import Convention, router_logits, router_logits_vjp, top_k_indices
from refimpl.moe.samples import EXPERTS, LAYER_AXES, VALUES, layer_terms, sample_layer
from refimpl.numerics import Array, BoolArray, FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation
from refimpl.validation import as_array, bind_axes, floating

__all__ = ["ExpertTuningGradients", "expert_tuning", "expert_tuning_vjp"]


class ExpertTuningGradients(NamedTuple):
    """Gradients of the tokens and of what is trained; None of the frozen router and weights."""

    x: FloatArray
    delta_in: FloatArray
    delta_out: FloatArray
    w_router: None = None
    w_in: None = None
    w_out: None = None
    ddelta_gate: FloatArray | None = None


def sample_tuned(
    rng: np.random.Generator, *, k: int, trained: str, closed: bool, convention: str, **shape: Any
) -> Case:
    """Return a call of `expert_tuning`; if `closed`, a router's bias of -inf keeps tokens off an expert.

    Examples
    --------
    >>> axes = dict(T=2, D=3, E=4, F=5, k=2, trained="some", closed=True, convention="mixtral")
    >>> case = sample_tuned(np.random.default_rng(0), **axes)
    >>> [a.shape for a in case.args[:3]], case.kwargs["router_bias"]
    ([(2, 3), (4, 3, 5), (4, 5, 3)], array([  0.,   0.,   0., -inf]))
    """
    base = sample_layer(rng, **shape)
    x, w_router, w_in, w_out = base.args
    E = w_router.shape[1]
    options = dict(base.kwargs)
    mask = {"all": np.ones(E, bool), "none": np.zeros(E, bool)}.get(trained, rng.random(E) < 0.5)
    deltas = [0.3 * rng.standard_normal(w.shape) for w in (w_in, w_out)]
    if "w_gate" in options:
        options["delta_gate"] = 0.3 * rng.standard_normal(w_in.shape)
    if closed and E > 1:
        options["router_bias"] = np.where(np.arange(E) == E - 1, -np.inf, 0.0)
    return Case(
        (x, *deltas, w_router, w_in, w_out),
        {**options, "k": min(k, E), "trained": mask, "convention": convention},
    )


def _terms(case: Case) -> tuple[int, Any]:
    x, delta_in, delta_out, w_router, w_in, w_out = (np.abs(array) for array in case.args)
    options = {}
    if case.kwargs.get("w_gate") is not None:
        options["w_gate"] = np.abs(case.kwargs["w_gate"]) + np.abs(case.kwargs["delta_gate"])
    n, magnitudes = layer_terms(Case((x, w_router, w_in + delta_in, w_out + delta_out), options))
    return n + 4, magnitudes


@technique(
    "peft.expert_tuning",
    entries=(67,),
    kind="function",
    source=Source(
        "Wang et al. 2024 (ESFT)", "arXiv:2407.01906", "abstract, (2): experts are chosen and tuned"
    ),
    axes={**LAYER_AXES, "k": (1, 3)},
    options={
        "values": VALUES,
        "experts": EXPERTS,
        "trained": ("some", "all", "none"),
        "closed": (False, True),
        "convention": ("mixtral", "switch", "gshard"),
    },
    edges=(
        {"T": 0, "E": 3},
        {"T": 1, "D": 1, "E": 1, "F": 1, "k": 1, "trained": "all", "closed": True},
        {"T": 5, "E": 4, "k": 2, "trained": "none", "closed": False},
        {"T": 6, "E": 2, "k": 2, "trained": "some", "closed": True, "convention": "switch"},
        {"T": 6, "E": 4, "k": 3, "trained": "some", "experts": "gated silu", "convention": "gshard"},
        {"T": 7, "E": 4, "k": 3, "trained": "all", "values": "large"},
    ),
    sample=sample_tuned,
    terms=_terms,
    vjp="refimpl.peft.expert_tuning:expert_tuning_vjp",
)
def expert_tuning(
    x: FloatArray,
    delta_in: FloatArray,
    delta_out: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    trained: BoolArray,
    k: int,
    convention: Convention = "mixtral",
    router_bias: FloatArray | None = None,
    w_gate: FloatArray | None = None,
    delta_gate: FloatArray | None = None,
    activation: Activation = "relu",
) -> FloatArray:
    """Return a layer with experts of which only the trained ones have moved.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    delta_in, delta_out : ndarray of float, shapes (E, D, F), (E, F, D)
        What training added to each expert; of frozen experts it does not count.
    w_router : ndarray of float, shape (D, E)
        The frozen router.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts before.
    trained : ndarray of bool, shape (E,)
        Which experts are trained.
    k : int
        Experts a token; k = E is the mixture of all.
    convention : {"mixtral", "switch", "gshard"}
        As for `refimpl.moe.top_k_gates`.
    router_bias : ndarray of float, shape (E,), optional
        Added to the logits; -inf closes an expert: no token reaches it, and the others share as without it.
    w_gate, delta_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts, and what training added to their gates.
    activation : str
        As for `refimpl.transformer.ffn`.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype of tokens and experts.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, are not real, or `trained` is not boolean.
    OptionError
        If k is not 1 to E, a bias is NaN or +inf or closes all experts, `delta_gate` comes without `w_gate`,
        or convention or activation is unknown.

    Notes
    -----
    The mathematics is that of the layer, and the mask one on gradients: a frozen expert's is exactly 0, so an
    optimiser without weight decay leaves it, and needs no state for it.  Trained are 2 D F numbers an expert.

    **Special cases**

    - A new expert is one more of each array, trained, its router column drawn or its bias -inf: as long as it
      is closed, the layer is the one without it.
    - If no expert is trained, or nothing has been added, it is the layer before.
    - A token may choose none but frozen experts, and then teaches nothing.

    References
    ----------
    .. [1] Wang et al., 2024, arXiv:2407.01906, abstract: the experts most relevant to a task are tuned, the
       other experts and modules frozen.

    Examples
    --------
    The second expert would have tripled its output:

    >>> x, one, router = np.ones((1, 1)), np.ones((2, 1, 1)), np.zeros((1, 2))
    >>> for trained in (False, True):
    ...     expert_tuning(x, 2 * one, 0 * one, router, one, one, trained=np.array([False, trained]), k=2)
    array([[1.]])
    array([[2.]])
    """
    layer = _layer(x, w_router, w_in, w_out, trained, k, convention, router_bias)
    moved = _moved(layer.mask, delta_in, delta_out, w_in, w_out, w_gate, delta_gate)
    options: ExpertOptions = {"w_gate": moved[2], "activation": activation}
    return mixture(layer.x, layer.gates, moved[0], moved[1], selected=layer.selected, **options)


def expert_tuning_vjp(
    x: FloatArray,
    delta_in: FloatArray,
    delta_out: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    trained: BoolArray,
    k: int,
    convention: Convention = "mixtral",
    router_bias: FloatArray | None = None,
    w_gate: FloatArray | None = None,
    delta_gate: FloatArray | None = None,
    activation: Activation = "relu",
) -> ExpertTuningGradients:
    """Return the gradients of `expert_tuning` that training needs.

    Parameters
    ----------
    x, delta_in, delta_out, w_router, w_in, w_out, trained, k, convention, router_bias, w_gate, delta_gate, \
activation
        As for `expert_tuning`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    ExpertTuningGradients
        That of x passes through frozen experts and through the frozen router's gates; those of frozen
        experts are exactly 0.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `expert_tuning`.

    Examples
    --------
    >>> x, one, router = np.ones((1, 1)), np.ones((2, 1, 1)), np.zeros((1, 2))
    >>> given = (x, 0 * one, 0 * one, router, one, one, x)
    >>> expert_tuning_vjp(*given, trained=np.array([False, True]), k=2).delta_in[:, 0, 0]
    array([0. , 0.5])
    """
    layer = _layer(x, w_router, w_in, w_out, trained, k, convention, router_bias)
    moved = _moved(layer.mask, delta_in, delta_out, w_in, w_out, w_gate, delta_gate)
    options: ExpertOptions = {"w_gate": moved[2], "activation": activation}
    back = mixture_vjp(layer.x, layer.gates, moved[0], moved[1], dy, selected=layer.selected, **options)
    (dlogits,) = top_k_gates_vjp(layer.logits, back.dgates, k=k, convention=convention)
    dseen, _ = router_logits_vjp(layer.x, w_router, dlogits)
    dx = round_to(widen(back.dx) + dseen, back.dx.dtype)
    dgate = None if delta_gate is None or back.dw_gate is None else _masked(layer.mask, back.dw_gate)
    din, dout = (_masked(layer.mask, gradient) for gradient in (back.dw_in, back.dw_out))
    return ExpertTuningGradients(dx, din, dout, ddelta_gate=dgate)


class _Layer(NamedTuple):
    """Tokens, the mask [E, 1, 1] of trained experts, logits, gates, and who runs on what."""

    x: FloatArray
    mask: BoolArray
    logits: FloatArray
    gates: FloatArray
    selected: BoolArray


def _layer(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    trained: Array,
    k: int,
    convention: Convention,
    router_bias: FloatArray | None,
) -> _Layer:
    x, w_in, w_out = floating(x=x, w_in=w_in, w_out=w_out)
    trained = as_array("trained", trained)
    if trained.dtype != np.bool_:
        raise DTypeError(f"trained: expected booleans, got {trained.dtype}")
    (w_router,) = floating(w_router=w_router)
    bind_axes(
        {"x": (x, "T D"), "w_router": (w_router, "D E"), "trained": (trained, "E"), "w_in": (w_in, "E D F"),
         "w_out": (w_out, "E F D")}
    )  # fmt: skip
    logits = router_logits(x, w_router)
    selected = np.zeros(logits.shape, bool)
    if router_bias is not None:
        (bias,) = floating(router_bias=router_bias)
        bind_axes({"trained": (trained, "E"), "router_bias": (bias, "E")})
        bias = widen(bias)
        if np.isnan(bias).any() or (bias == np.inf).any() or (bias.size and (bias == -np.inf).all()):
            raise OptionError(f"router_bias: expected numbers or -inf, and not for all experts, got {bias}")
        logits = logits + bias.astype(logits.dtype, copy=False)
    gates = top_k_gates(logits, k=k, convention=convention)
    np.put_along_axis(selected, top_k_indices(logits, k), True, axis=1)
    return _Layer(x, trained[:, None, None], logits, gates, selected & (logits > -np.inf))


def _moved(
    mask: BoolArray,
    delta_in: FloatArray,
    delta_out: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    w_gate: FloatArray | None,
    delta_gate: FloatArray | None,
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Return the experts after training; a frozen one bit for bit as before."""
    if w_gate is None:
        if delta_gate is not None:
            raise OptionError("delta_gate: expected none, as there is no w_gate")
        return _sum(mask, delta_in, w_in, "in"), _sum(mask, delta_out, w_out, "out"), None
    gate = w_gate if delta_gate is None else _sum(mask, delta_gate, w_gate, "gate")
    return _sum(mask, delta_in, w_in, "in"), _sum(mask, delta_out, w_out, "out"), gate


def _sum(mask: BoolArray, delta: FloatArray, weight: FloatArray, name: str) -> FloatArray:
    delta, weight = floating(**{f"delta_{name}": delta, f"w_{name}": weight})
    bind_axes({f"w_{name}": (weight, "E D F"), f"delta_{name}": (delta, "E D F")})
    total = round_to(widen(weight) + widen(delta), weight.dtype)
    return np.where(mask, total, weight)


def _masked(mask: BoolArray, gradient: FloatArray) -> FloatArray:
    return np.where(mask, gradient, gradient.dtype.type(0))
