"""Noise on the logits of a router, so that tokens try experts that they would not choose: two ways."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.moe.gating import top_k_gates, top_k_gates_vjp
from refimpl.moe.routing import router_logits, router_logits_vjp
from refimpl.moe.samples import VALUES, gap, routers_apart
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, finite, floating

__all__ = [
    "NoisyGradients",
    "RouterGradients",
    "noisy_top_k_gates",
    "noisy_top_k_gates_vjp",
    "vmoe_noisy_gates",
    "vmoe_noisy_gates_vjp",
]

Rng = np.random.Generator | int | None


class NoisyGradients(NamedTuple):
    """Gradients of tokens, router, and the router of the noise."""

    dx: FloatArray
    dw_router: FloatArray
    dw_noise: FloatArray


class RouterGradients(NamedTuple):
    """Gradients of tokens and router."""

    dx: FloatArray
    dw_router: FloatArray


_AXES = {"T": (0, 5), "D": (1, 4), "E": (1, 6), "k": (1, 3)}
_EDGES: tuple[dict[str, Any], ...] = (
    {"T": 0},
    {"T": 4, "E": 1, "D": 1, "k": 1},
    {"T": 5, "E": 4, "k": 2, "training": False},
    {"T": 5, "E": 3, "k": 3},
    {"T": 5, "E": 5, "k": 2, "values": "large"},
)


def sample_noisy(
    rng: np.random.Generator, *, T: int, D: int, E: int, k: int, values: str, training: bool
) -> Case:
    """Return one call of `noisy_top_k_gates`, its noise given, the noisy logits of a token apart.

    Examples
    --------
    >>> case = sample_noisy(np.random.default_rng(0), T=2, D=1, E=3, k=2, values="normal", training=True)
    >>> [a.shape for a in case.args], case.kwargs["noise"].shape
    ([(2, 1), (1, 3), (1, 3)], (2, 3))
    """
    while True:
        x, w_router = routers_apart(rng, T, D, E, values)
        w_noise, noise = rng.standard_normal((D, E)), rng.standard_normal((T, E))
        noisy = x @ w_router + noise * np.logaddexp(0, x @ w_noise)
        if gap(noisy, values):
            return Case((x, w_router, w_noise), {"k": min(k, E), **({"noise": noise} if training else {})})


def _sample_vmoe(rng: np.random.Generator, *, training: bool, **shape: Any) -> Case:
    while True:
        case = sample_noisy(rng, training=True, **shape)
        x, w_router, _ = case.args
        noise = case.kwargs["noise"]
        if gap(x @ w_router + 0.7 * noise / max(1, w_router.shape[1]), str(shape["values"])):
            options = {"noise_std": 0.7, "noise": noise} if training else {"noise_std": 0.7}
            return Case((x, w_router), {"k": case.kwargs["k"], **options})


def _terms(case: Case) -> tuple[int, Any]:
    x, w_router = case.args[:2]
    return x.shape[1] + w_router.shape[1] + 8, np.ones((len(x), w_router.shape[1]))


@technique(
    "moe.noisy_top_k",
    entries=(33,),
    kind="function",
    source=Source("Shazeer et al. 2017", "arXiv:1701.06538", "section 2.1, eq. 3 to 5"),
    axes=_AXES,
    options={"values": VALUES, "training": (True, False)},
    edges=_EDGES,
    sample=sample_noisy,
    terms=_terms,
    vjp="refimpl.moe.noisy_gating:noisy_top_k_gates_vjp",
)
def noisy_top_k_gates(
    x: FloatArray,
    w_router: FloatArray,
    w_noise: FloatArray,
    /,
    *,
    k: int,
    noise: FloatArray | None = None,
    rng: Rng = None,
) -> FloatArray:
    """Return ``softmax(KeepTopK(H, k))``, ``H = x W_router + noise * softplus(x W_noise)``.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router, w_noise : ndarray of float, shape (D, E)
        The router, and what learns how much noise each expert gets.
    k : int
        Experts a token.
    noise : ndarray of float, shape (T, E), optional
        Standard normal draws.
    rng : numpy.random.Generator or int, optional
        Draws the noise.  With neither: no noise, as at inference.

    Returns
    -------
    ndarray of float, shape (T, E)
        In float32 at least; k gates of each token sum to 1, the others are 0.

    Raises
    ------
    OptionError
        If k is not from 1 to E, or noise and rng are both given.
    ShapeError, DTypeError
        If the arrays do not fit together or are not real.

    Notes
    -----
    The k largest *noisy* logits are kept, and the softmax is over these.  **Special cases**

    - softplus far to the left is 0 and far to the right its argument, without overflow.
    - Equal logits: the lowest index is taken.

    References
    ----------
    .. [1] Shazeer et al., 2017, arXiv:1701.06538, section 2.1, eq. 3 to 5.

    Examples
    --------
    >>> zero = np.zeros((1, 3))
    >>> noisy_top_k_gates(np.ones((1, 1)), zero, zero, k=2, noise=np.array([[0.0, 1.0, 1.0]]))
    array([[0. , 0.5, 0.5]])
    """
    logits, _, _ = _noisy(x, w_router, w_noise, noise, rng)
    return top_k_gates(logits, k=k, convention="mixtral")


def noisy_top_k_gates_vjp(
    x: FloatArray,
    w_router: FloatArray,
    w_noise: FloatArray,
    dgates: FloatArray,
    /,
    *,
    k: int,
    noise: FloatArray | None = None,
    rng: Rng = None,
) -> NoisyGradients:
    """Return the gradients of ``sum(dgates * noisy_top_k_gates(...))``, on the same noise.

    Parameters
    ----------
    x, w_router, w_noise, k, noise, rng
        As for `noisy_top_k_gates`; a generator must be an integer seed to draw the same noise again.
    dgates : ndarray of float, shape (T, E)
        Gradient of the gates.

    Returns
    -------
    NoisyGradients
        `dw_noise` is 0 without noise.

    Examples
    --------
    >>> zero, one = np.zeros((1, 2)), np.ones((1, 1))
    >>> noisy_top_k_gates_vjp(one, zero, zero, np.array([[1.0, 0.0]]), k=2).dw_router
    array([[ 0.25, -0.25]])
    """
    logits, draws, before = _noisy(x, w_router, w_noise, noise, rng)
    dlogits = top_k_gates_vjp(logits, dgates, k=k, convention="mixtral").dlogits
    dx, dw_router = router_logits_vjp(x, w_router, dlogits)
    dx_noise, dw_noise = router_logits_vjp(x, w_noise, dlogits * draws * _sigmoid(before))
    return NoisyGradients(
        round_to(dx + dx_noise, x.dtype), round_to(dw_router, x.dtype), round_to(dw_noise, x.dtype)
    )


@technique(
    "moe.noisy_top_k.vmoe",
    entries=(33,),
    kind="function",
    source=Source(
        "Riquelme et al. 2021 (V-MoE), google-research/vmoe",
        "arXiv:2106.05974",
        "section 2, Routing; vmoe/nn/routing.py, NoisyTopExpertsPerItemRouter, commit 942a78b",
    ),
    axes=_AXES,
    options={"values": VALUES, "training": (True, False)},
    edges=_EDGES,
    sample=_sample_vmoe,
    terms=_terms,
    vjp="refimpl.moe.noisy_gating:vmoe_noisy_gates_vjp",
)
def vmoe_noisy_gates(
    x: FloatArray,
    w_router: FloatArray,
    /,
    *,
    k: int,
    noise_std: float = 1.0,
    noise: FloatArray | None = None,
    rng: Rng = None,
) -> FloatArray:
    """Return the k largest of ``softmax(x W_router + (noise_std / E) noise)``, not divided by their sum.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Tokens.
    w_router : ndarray of float, shape (D, E)
        The router.
    k : int
        Experts a token.
    noise_std : float
        In units of 1 / E, which is what the code has where the paper says a standard deviation of 1 / E.
    noise : ndarray of float, shape (T, E), optional
        Standard normal draws.
    rng : numpy.random.Generator or int, optional
        Draws the noise.  With neither: no noise, as at inference.

    Returns
    -------
    ndarray of float, shape (T, E)
        In float32 at least; all but k gates of each token are 0.

    Raises
    ------
    OptionError
        If k is not from 1 to E, noise and rng are both given, or `noise_std` is not finite.
    ShapeError, DTypeError
        If the arrays do not fit together or are not real.

    References
    ----------
    .. [1] Riquelme et al., 2021, arXiv:2106.05974, section 2, Routing.
    .. [2] google-research/vmoe, vmoe/nn/routing.py, commit 942a78b.

    Examples
    --------
    >>> vmoe_noisy_gates(np.ones((1, 1)), np.log([[0.2, 0.5, 0.3]]), k=1)
    array([[0. , 0.5, 0. ]])
    """
    return top_k_gates(_fixed(x, w_router, noise_std, noise, rng), k=k, convention="switch")


def vmoe_noisy_gates_vjp(
    x: FloatArray,
    w_router: FloatArray,
    dgates: FloatArray,
    /,
    *,
    k: int,
    noise_std: float = 1.0,
    noise: FloatArray | None = None,
    rng: Rng = None,
) -> RouterGradients:
    """Return the gradients of ``sum(dgates * vmoe_noisy_gates(...))``, on the same noise.

    Parameters
    ----------
    x, w_router, k, noise_std, noise, rng
        As for `vmoe_noisy_gates`.
    dgates : ndarray of float, shape (T, E)
        Gradient of the gates.

    Returns
    -------
    RouterGradients
        In the dtype of `x`.

    Examples
    --------
    >>> vmoe_noisy_gates_vjp(np.ones((1, 1)), np.zeros((1, 2)), np.ones((1, 2)), k=1).dw_router
    array([[ 0.25, -0.25]])
    """
    logits = _fixed(x, w_router, noise_std, noise, rng)
    dlogits = top_k_gates_vjp(logits, dgates, k=k, convention="switch").dlogits
    dx, dw_router = router_logits_vjp(x, w_router, dlogits)
    return RouterGradients(round_to(dx, x.dtype), round_to(dw_router, x.dtype))


def _noisy(
    x: FloatArray, w_router: FloatArray, w_noise: FloatArray, noise: FloatArray | None, rng: Rng
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the noisy logits, the draws, and what the softplus of the noise is taken of."""
    w_router, w_noise = as_array("w_router", w_router), as_array("w_noise", w_noise)
    bind_axes({"w_router": (w_router, "D E"), "w_noise": (w_noise, "D E")})
    logits, before = router_logits(x, w_router), router_logits(x, w_noise)
    draws = _draws(logits, noise, rng)
    return logits + draws * np.logaddexp(0, before).astype(logits.dtype), draws, before


def _fixed(
    x: FloatArray, w_router: FloatArray, noise_std: float, noise: FloatArray | None, rng: Rng
) -> FloatArray:
    logits = router_logits(x, w_router)
    std = logits.dtype.type(finite("noise_std", noise_std) / max(1, logits.shape[1]))
    return logits + std * _draws(logits, noise, rng)


def _draws(logits: FloatArray, noise: FloatArray | None, rng: Rng) -> FloatArray:
    if noise is None:
        drawn = 0.0 if rng is None else np.random.default_rng(rng).standard_normal(logits.shape)
        return np.broadcast_to(np.asarray(drawn, logits.dtype), logits.shape)
    if rng is not None:
        raise OptionError("rng: expected None beside noise, which holds the draws")
    (draws,) = floating(noise=noise)
    bind_axes({"logits": (logits, "T E"), "noise": (draws, "T E")})
    return widen(draws).astype(logits.dtype, copy=False)


def _sigmoid(x: FloatArray) -> FloatArray:
    from scipy.special import expit

    return np.asarray(expit(x))
