"""Gates: how much each expert counts for each token, without buffers and without drops.

A gating network is a softmax over experts since Jacobs et al.  Sparse ones keep the k largest and differ in
when they keep: before the softmax or after it, with or without a division by what was kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack, get_args

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.memory import Memory
from refimpl.moe.buffers import LayerGradients
from refimpl.moe.expert_ffn import ExpertOptions
from refimpl.moe.mixture import mixture, mixture_vjp
from refimpl.moe.routing import (
    Convention,
    gate_weights,
    gate_weights_vjp,
    router_logits,
    router_logits_vjp,
    top_k_indices,
)
from refimpl.moe.samples import (
    EXPERTS,
    LAYER_AXES,
    LAYER_EDGES,
    VALUES,
    layer_terms,
    sample_layer,
    separated_logits,
)
from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, positive

__all__ = ["TopKGradients", "dense_mixture", "dense_mixture_vjp", "top_k_gates", "top_k_gates_vjp"]


class TopKGradients(NamedTuple):
    """Gradient of the logits."""

    dlogits: FloatArray


def _sample_dense(rng: np.random.Generator, *, temperature: float, **shape: Any) -> Case:
    if shape["values"] == "large":  # a high temperature would leave a softmax too steep for differences
        temperature = min(temperature, 1.0)
    return sample_layer(rng, **shape).replace(temperature=temperature)


def _sample_top_k(rng: np.random.Generator, *, T: int, E: int, k: int, values: str, convention: str) -> Case:
    return Case((separated_logits(rng, T, E, values),), {"k": min(k, E), "convention": convention})


def _gate_terms(case: Case) -> tuple[int, Any]:
    (logits,) = case.args
    return logits.shape[1] + 8, np.ones(logits.shape)


@technique(
    "moe.dense_mixture",
    entries=(32,),
    kind="function",
    source=Source("Jacobs et al. 1991", "doi:10.1162/neco.1991.3.1.79", "section 1, Figure 1"),
    axes=LAYER_AXES,
    options={"values": VALUES, "experts": EXPERTS, "temperature": (1.0, 0.5, 20.0)},
    edges=LAYER_EDGES,
    sample=_sample_dense,
    terms=layer_terms,
    vjp="refimpl.moe.gating:dense_mixture_vjp",
)
def dense_mixture(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    temperature: float = 1.0,
    memory: Memory | None = None,
    **options: Unpack[ExpertOptions],
) -> FloatArray:
    """Return ``sum_e g_e(x) E_e(x)`` over all experts, ``g = softmax(x W_router / temperature)``.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens: inside a transformer, after the norm of the layer.
    w_router : ndarray of float, shape (D, E)
        The gating network.
    w_in, w_out : ndarray of float, shapes (E, D, F), (E, F, D)
        The experts, as for `refimpl.moe.expert_ffn.expert_ffn`.
    temperature : float
        Above 0.  Towards 0 the best expert takes all, far above 1 all count the same.
    memory : Memory, optional
        Counts the operations: ``T E (6 D + 4 D F)``, with gated experts ``T E (4 D + 6 D F)``.
    w_gate : ndarray of float, shape (E, D, F), optional
        Makes gated experts.
    activation : str
        As for `refimpl.transformer.ffn`.

    Returns
    -------
    ndarray of float, shape (T, D)
        In the common dtype of tokens and experts.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit together or are not real.
    OptionError
        If the temperature is not above 0, or the activation is unknown.

    Notes
    -----
    The gates are computed in float32 at least.

    References
    ----------
    .. [1] Jacobs, Jordan, Nowlan and Hinton, 1991, "Adaptive mixtures of local experts", section 1.

    Examples
    --------
    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> dense_mixture(np.ones((1, 1)), np.zeros((1, 2)), w, np.ones((2, 1, 1)))
    array([[2.]])
    """
    logits = router_logits(x, w_router, memory=memory) / positive("temperature", temperature)
    return mixture(x, softmax(logits), w_in, w_out, memory=memory, **options)


def dense_mixture_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    dy: FloatArray,
    /,
    *,
    temperature: float = 1.0,
    **options: Unpack[ExpertOptions],
) -> LayerGradients:
    """Return the gradients of ``sum(dy * dense_mixture(x, w_router, w_in, w_out, ...))``.

    Parameters
    ----------
    x, w_router, w_in, w_out, temperature, **options
        As for `dense_mixture`.
    dy : ndarray of float, shape (T, D)
        Gradient of the output.

    Returns
    -------
    LayerGradients
        `dx` has two parts: through the experts and through the gates.

    Examples
    --------
    >>> w = np.stack([np.eye(1), 3 * np.eye(1)])
    >>> dense_mixture_vjp(np.ones((1, 1)), np.zeros((1, 2)), w, np.ones((2, 1, 1)), np.ones((1, 1))).dw_router
    array([[-0.5,  0.5]])
    """
    logits = router_logits(x, w_router) / positive("temperature", temperature)
    gates = softmax(logits)
    back = mixture_vjp(x, gates, w_in, w_out, dy, **options)
    dlogits = gates * (back.dgates - np.sum(gates * back.dgates, axis=1, keepdims=True)) / temperature
    dseen, dw_router = router_logits_vjp(x, w_router, dlogits)
    dx = round_to(widen(back.dx) + dseen, back.dx.dtype)
    return LayerGradients(dx, round_to(dw_router, w_router.dtype), back.dw_in, back.dw_out, back.dw_gate)


@technique(
    "moe.top_k",
    entries=(34,),
    kind="function",
    source=Source("Jiang et al. 2024 (Mixtral)", "arXiv:2401.04088", "section 2.1"),
    axes={"T": (0, 6), "E": (1, 7), "k": (1, 4)},
    options={"values": VALUES, "convention": get_args(Convention)},
    edges=(
        {"T": 0, "E": 3, "k": 2},
        *({"T": 3, "E": 1, "k": 1, "convention": name} for name in get_args(Convention)),
        *({"T": 5, "E": 4, "k": 4, "convention": name} for name in get_args(Convention)),
        *({"T": 5, "E": 6, "k": 2, "values": "large", "convention": name} for name in get_args(Convention)),
    ),
    sample=_sample_top_k,
    terms=_gate_terms,
    vjp="refimpl.moe.gating:top_k_gates_vjp",
)
def top_k_gates(logits: FloatArray, /, *, k: int, convention: Convention) -> FloatArray:
    """Return the gates of all experts, all but those of the k largest logits 0.

    Parameters
    ----------
    logits : ndarray of float, shape (T, E)
        What the router says.
    k : int
        Experts a token, from 1 to E.
    convention : {"switch", "gshard", "mixtral"}
        ``"switch"`` (also DeepSeekMoE [2]_): softmax over all, then keep; gates sum to less than 1.
        ``"gshard"`` (also Skywork): the same, divided by what was kept.  ``"mixtral"`` [1]_ (also Shazeer):
        keep, then softmax over the kept logits.

    Returns
    -------
    ndarray of float, shape (T, E)
        In the wide dtype of the logits.

    Raises
    ------
    OptionError
        If k is not from 1 to E, or there is no such convention.
    ShapeError, DTypeError
        If `logits` is no real matrix.

    Notes
    -----
    **Special cases**

    - Equal logits: the lowest index is taken.
    - "gshard" and "mixtral" are equal but for rounding; at k = 1 both give a gate of 1 that no logit changes,
      so a router learns nothing from it: a layer that routes to one expert needs "switch".
    - At k = E all three are the softmax.

    References
    ----------
    .. [1] Jiang et al., 2024, arXiv:2401.04088, section 2.1.
    .. [2] Fedus et al., 2021, arXiv:2101.03961, eq. 1 and 2; Dai et al., 2024, arXiv:2401.06066, eq. 4 and 5;
       Lepikhin et al., 2020, arXiv:2006.16668, Algorithm 1.

    Examples
    --------
    >>> logits = np.log([[0.2, 0.5, 0.3]])
    >>> top_k_gates(logits, k=2, convention="switch")
    array([[0. , 0.5, 0.3]])
    >>> top_k_gates(logits, k=2, convention="mixtral")
    array([[0.   , 0.625, 0.375]])
    """
    wide = _wide_logits(logits)
    gates = np.zeros_like(wide)
    expert = top_k_indices(wide, k)
    np.put_along_axis(gates, expert, gate_weights(wide, expert, convention=convention), axis=1)
    return gates


def top_k_gates_vjp(
    logits: FloatArray, dgates: FloatArray, /, *, k: int, convention: Convention
) -> TopKGradients:
    """Return the gradient of ``sum(dgates * top_k_gates(logits, ...))``: through the kept gates only.

    Parameters
    ----------
    logits, k, convention
        As for `top_k_gates`.
    dgates : ndarray of float, shape (T, E)
        Gradient of the gates; that of a gate which is not kept is not looked at.

    Returns
    -------
    TopKGradients
        In the dtype of the gates.

    Examples
    --------
    >>> top_k_gates_vjp(np.zeros((1, 3)), np.array([[1.0, 0.0, 9.0]]), k=1, convention="mixtral").dlogits
    array([[0., 0., 0.]])
    """
    wide, (dgates,) = _wide_logits(logits), floating(dgates=dgates)
    bind_axes({"logits": (wide, "T E"), "dgates": (dgates, "T E")})
    expert = top_k_indices(wide, k)
    kept = np.take_along_axis(widen(dgates).astype(wide.dtype, copy=False), expert, axis=1)
    return TopKGradients(gate_weights_vjp(wide, expert, kept, convention=convention))


def _wide_logits(logits: FloatArray) -> FloatArray:
    (logits,) = floating(logits=logits)
    bind_axes({"logits": (logits, "T E")})
    return widen(logits).astype(wide_dtype(logits.dtype), copy=False)
