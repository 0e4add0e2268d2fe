"""Soft merging (SMEAR): experts are averaged as parameters, and the average runs once."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients
from refimpl.moe.expert_ffn import ExpertOptions, expert_ffn, expert_ffn_vjp, product_of
from refimpl.moe.routing import router_logits, router_logits_vjp
from refimpl.moe.samples import EXPERTS, VALUES, sample_layer
from refimpl.numerics import FloatArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["merge_experts", "soft_merging", "soft_merging_vjp"]


def _sample(rng: np.random.Generator, *, B: int, T: int, D: int, values: str, **shape: Any) -> Case:
    case = sample_layer(rng, T=B, D=D, **shape)
    means, w_router, *experts = case.args
    x = rng.standard_normal((B, T, D))
    x += (means - x.mean(axis=1))[:, None]
    factor = {"normal": 1.0, "large": 30.0}[values]  # nearly one expert, and still a slope to differentiate
    return Case((x, factor * w_router, *experts), case.kwargs)


def _terms(case: Case) -> tuple[int, Any]:
    """The merged expert is no larger than the sum of all of them."""
    x, w_router, w_in, w_out = (np.abs(array) for array in case.args)
    hidden = x @ w_in.max(axis=0, initial=0)
    if case.kwargs.get("w_gate") is not None:
        hidden = hidden * (x @ np.abs(case.kwargs["w_gate"]).max(axis=0, initial=0))
    n = x.shape[1] + 2 * x.shape[2] + w_router.shape[1] + w_in.shape[2]
    return n, hidden @ w_out.max(axis=0, initial=0)


@technique(
    "moe.soft_merging",
    entries=(44,),
    kind="function",
    source=Source("Muqeeth et al. 2023 (SMEAR)", "arXiv:2306.03745", "section 3.1, eq. 1"),
    axes={"B": (0, 3), "T": (1, 4), "D": (1, 4), "E": (1, 4), "F": (1, 4)},
    options={"values": VALUES, "experts": EXPERTS},
    edges=({"B": 0}, {"B": 1, "T": 1, "D": 1, "E": 1, "F": 1}, {"B": 2, "E": 4, "values": "large"}),
    sample=_sample,
    terms=_terms,
    vjp="refimpl.moe.soft_merging:soft_merging_vjp",
)
def soft_merging(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return each sequence through one expert of its own: the experts' parameters averaged by its router.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, D)
        Sequences.
    w_router : ndarray of float, shape (D, E)
        Sees the mean of a sequence's tokens.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts.
    memory : Memory, optional
        Counts the operations: ``2 B D E + 4 B E D F`` to route and to merge, ``4 B T D F`` to run; with gated
        experts 6 for each 4.
    w_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts; it is merged like the others.
    activation : {"relu", "gelu", "gelu_tanh", "gelu_sigmoid", "silu"}
        Of the experts.

    Returns
    -------
    ndarray of float, shape (B, T, D)
        ``act(x W_in) W_out`` with ``W = sum_e p_e W_e`` and ``p = softmax(mean_t(x) W_router)``.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together, or are not real.
    OptionError
        If the activation is unknown.

    Notes
    -----
    Differentiable throughout, with the operations of one expert besides ``2 B E |FFN|`` for merging.  It is
    not a mixture of outputs: for experts that are not linear, ``FFN(sum p W)`` is another function than
    ``sum p FFN(W)``.  Padding counts in the mean; a causal decoder must not average over the future, so this
    is for encoders, or for the prompt.  A sequence without tokens has no mean and is refused.

    References
    ----------
    .. [1] Muqeeth et al., 2023, arXiv:2306.03745, section 3.1; r-three/smear at 6e44c82,
       hyperformer/adapters/adapter_controller_fast.py.

    Examples
    --------
    Weights 1 and 3 are averaged to 2 in both matrices, so the output is 4, where a mixture would give 5:

    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> soft_merging(np.ones((1, 1, 1)), np.zeros((1, 2)), w, w)
    array([[[4.]]])
    """
    x, weights, experts = _checked(x, w_router, w_in, w_out, options, memory)
    merged = {name: merge_experts(weights, w, memory=memory) for name, w in experts.items()}
    return expert_ffn(x, merged["w_in"], merged["w_out"], memory=memory, **_options(merged, options))


def soft_merging_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    **options: Unpack[ExpertOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * soft_merging(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, **options
        As for `soft_merging`.
    dy : ndarray of float, shape (B, T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        Every expert has a gradient, because every expert is in every average.

    Examples
    --------
    >>> one, w = np.ones((1, 1, 1)), np.stack([np.eye(1), 3 * np.eye(1)])
    >>> soft_merging_vjp(one, np.zeros((1, 2)), w, w, one).dw_in[:, 0, 0]
    array([1., 1.])
    """
    x, weights, experts = _checked(x, w_router, w_in, w_out, options)
    merged = {name: merge_experts(weights, w) for name, w in experts.items()}
    back = expert_ffn_vjp(x, merged["w_in"], merged["w_out"], dy, **_options(merged, options))
    gradients = {name: getattr(back, f"d{name}") for name in merged}
    dweights = np.zeros_like(weights)
    for name, w in experts.items():
        dweights += contract("bij,eij->be", widen(gradients[name]), widen(w))
    dlogits = weights * (dweights - np.sum(weights * dweights, axis=1, keepdims=True))
    dmeans, dw_router = router_logits_vjp(_means(x), np.asarray(w_router), dlogits)
    dx = round_to(widen(back.dx) + dmeans[:, None] / x.shape[1], x.dtype)
    shared = {
        f"d{name}": round_to(contract("be,bij->eij", weights, widen(g)), x.dtype)
        for name, g in gradients.items()
    }
    return LayerGradients(dx, round_to(dw_router, x.dtype), **shared)


def merge_experts(weights: FloatArray, experts: FloatArray, *, memory: Memory | None = None) -> FloatArray:
    """Return ``sum_e weights[b, e] experts[e]`` for each sequence b, in the dtype of the experts.

    Examples
    --------
    >>> merge_experts(np.array([[0.5, 0.5]]), np.array([[[1.0]], [[3.0]]]))
    array([[[2.]]])
    """
    return round_to(product_of(memory)("be,eij->bij", weights, widen(experts)), experts.dtype)


def _options(merged: dict[str, FloatArray], options: ExpertOptions) -> ExpertOptions:
    return {"w_gate": merged.get("w_gate"), "activation": options.get("activation", "relu")}


def _means(x: FloatArray) -> FloatArray:
    return np.asarray(np.mean(widen(x), axis=1, dtype=wide_dtype(x.dtype)))


def _checked(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    options: ExpertOptions,
    memory: Memory | None = None,
) -> tuple[FloatArray, FloatArray, dict[str, FloatArray]]:
    """Return the sequences, the weights of each one's average, shape (B, E), and the experts."""
    given = {"x": x, "w_router": w_router, "w_in": w_in, "w_out": w_out}
    if options.get("w_gate") is not None:
        given["w_gate"] = np.asarray(options["w_gate"])
    found = dict(zip(given, floating(**given), strict=True))
    axes = {"x": "B T D", "w_router": "D E", "w_in": "E D F", "w_out": "E F D", "w_gate": "E D F"}
    bind_axes({name: (array, axes[name]) for name, array in found.items()})
    x, w_router = found.pop("x"), found.pop("w_router")
    if not x.shape[1]:
        raise ShapeError(f"x: expected at least one token a sequence, got shape {x.shape}")
    return x, softmax(router_logits(_means(x), widen(w_router), memory=memory)), found
