"""Depthwise convolution with kernels that softmax makes averages: what both of its users are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.errors import OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, wide_dtype, widen
from refimpl.registry import Case, Option
from refimpl.validation import bind_axes, floating

__all__ = [
    "AXES",
    "EDGES",
    "OPTIONS",
    "checked_kernels",
    "convolution_terms",
    "convolved",
    "convolved_vjp",
    "kernels",
    "sample_convolution",
]


def sample_convolution(
    rng: np.random.Generator,
    *,
    B: int,
    T: int,
    H: int,
    R: int,
    K: int,
    causal: bool = False,
    extra: str = "none",
    dynamic: bool = False,
) -> Case:
    """Return a call of a convolution of H heads with R channels each, its arrays drawn from `rng`.

    Examples
    --------
    >>> shape = dict(B=1, T=5, H=2, R=3, K=3)
    >>> [a.shape for a in sample_convolution(np.random.default_rng(0), dynamic=True, **shape).args]
    [(1, 5, 6), (6, 2, 3)]
    """
    x = rng.standard_normal((B, T, H * R))
    w = rng.standard_normal((H * R, H, K) if dynamic else (H, K))
    if extra == "ties":
        w = np.zeros_like(w)
    if extra == "sharp":
        w = 4.0 * w
    return Case((x, w), {"causal": True} if causal else {})


AXES = {"B": (1, 2), "T": (1, 9), "H": (1, 3), "R": (1, 3), "K": (1, 5)}
OPTIONS: dict[str, tuple[Option, ...]] = {"causal": (False, True), "extra": ("none", "sharp")}
EDGES: tuple[dict[str, Option], ...] = (
    {"B": 1, "T": 1, "H": 1, "R": 1, "K": 1},
    {"B": 0},
    {"T": 0},
    {"T": 1, "K": 5, "causal": True},
    {"T": 2, "K": 5, "causal": False},
    {"T": 6, "K": 4, "causal": False},
    {"T": 7, "H": 2, "R": 1, "K": 3, "extra": "ties", "causal": False},
)


def convolution_terms(case: Case) -> tuple[int, FloatArray]:
    """Return the length of the reductions and the sums of absolute terms: the kernel over absolute tokens.

    Examples
    --------
    >>> case = sample_convolution(np.random.default_rng(0), B=1, T=5, H=2, R=3, K=3)
    >>> convolution_terms(case)[0]
    9
    """
    x, w = case.args
    p = kernels(x, w, Memory())
    return w.shape[-1] + x.shape[2], convolved(np.abs(x), p, bool(case.kwargs.get("causal")), Memory())


def checked_kernels(x: Any, w: Any) -> tuple[FloatArray, FloatArray]:
    """Return tokens (B, T, D) and kernels (H, K), or their projection (D, H, K), if they fit.

    Raises
    ------
    ShapeError
        If shared axes differ, H does not divide D, or the kernels have no taps.
    DTypeError
        If an array is not real.

    Examples
    --------
    >>> checked_kernels(np.ones((1, 5, 4)), np.ones((2, 3), int))[1].dtype
    dtype('float64')
    """
    x, w = floating(x=x, w=w)
    sizes = bind_axes({"x": (x, "B T D"), "w": (w, "D H K" if w.ndim == 3 else "H K")})
    if sizes["H"] == 0 or sizes["D"] % sizes["H"]:
        raise ShapeError(f"w: axis H must divide D; got H={sizes['H']}, D={sizes['D']}")
    if sizes["K"] == 0:
        raise ShapeError(f"w: axis K must be at least 1; got 0 (w has shape {w.shape})")
    return x, w


def kernels(x: FloatArray, w: FloatArray, hbm: Memory) -> FloatArray:
    """Return the kernels, (H, K) or, predicted from the tokens, (B, T, H, K).

    Examples
    --------
    >>> kernels(np.ones((1, 5, 4)), np.zeros((4, 2, 2)), Memory())[0, 0]
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    logits = w.astype(wide_dtype(w.dtype), copy=False) if w.ndim == 2 else hbm.contract("btd,dhk->bthk", x, w)
    return softmax(logits)


def convolved(x: FloatArray, p: FloatArray, causal: bool, hbm: Memory) -> FloatArray:
    """Return the sum over taps of the tokens there, weighed by the kernels `p`.

    Examples
    --------
    >>> convolved(np.ones((1, 3, 1)), np.array([[0.25, 0.75]]), True, Memory()).ravel()
    array([0.75, 1.  , 1.  ])
    """
    T, (H, K) = x.shape[1], p.shape[-2:]
    padded = _padded(x, H, K, causal)
    total = np.zeros((len(x), T, *padded.shape[2:]), padded.dtype)
    for j in range(K):
        total += hbm.contract(f"bthr,{_axes(p)}->bthr", padded[:, j : j + T], p[..., j])
    return total.reshape(x.shape)


def convolved_vjp(
    x: FloatArray, w: FloatArray, dy: FloatArray, causal: bool
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of ``sum(dy * convolved(x, kernels(x, w)))``, in float32 at least.

    Examples
    --------
    >>> ones = np.ones((1, 2, 1))
    >>> convolved_vjp(ones, np.zeros((1, 1)), ones, False)[0].ravel()
    array([1., 1.])
    """
    x, w, dy = (widen(a).astype(wide_dtype(a.dtype), copy=False) for a in (x, w, dy))
    p, T = kernels(x, w, Memory()), x.shape[1]
    H, K = p.shape[-2:]
    padded, given = _padded(x, H, K, causal), dy.reshape(*dy.shape[:2], H, dy.shape[2] // H)
    dpadded, dp = np.zeros_like(padded), np.zeros_like(p)
    for j in range(K):
        dpadded[:, j : j + T] += contract(f"bthr,{_axes(p)}->bthr", given, p[..., j])
        dp[..., j] = contract(f"bthr,bthr->{_axes(p)}", given, padded[:, j : j + T])
    dx = dpadded[:, _before(K, causal) :][:, :T].reshape(x.shape)
    dlogits = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    if w.ndim == 2:
        return dx, dlogits
    return dx + contract("bthk,dhk->btd", dlogits, w), contract("btd,bthk->dhk", x, dlogits)


def _before(K: int, causal: bool) -> int:
    """Return how many tokens before its own a kernel begins."""
    if not isinstance(causal, bool | np.bool_):
        raise OptionError(f"causal: expected True or False, got {causal!r}")
    return K - 1 if causal else (K - 1) // 2


def _axes(p: FloatArray) -> str:
    return "h" if p.ndim == 2 else "bth"


def _padded(x: FloatArray, H: int, K: int, causal: bool) -> FloatArray:
    """Return the tokens cut into heads, (B, T + K - 1, H, R), zeros before and after: tap j begins at j."""
    B, T, D = x.shape
    padded = np.zeros((B, T + K - 1, H, D // H), wide_dtype(x.dtype))
    padded[:, _before(K, causal) :][:, :T] = x.reshape(B, T, H, D // H)
    return padded
