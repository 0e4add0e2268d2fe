"""AdapterFusion: an attention, for every token, over the outputs of several adapters."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.linear import product
from refimpl.validation import bind_axes, floating

__all__ = ["FusionGradients", "adapter_fusion", "adapter_fusion_vjp"]


class FusionGradients(NamedTuple):
    """Gradients of the layer's output, the adapters' outputs, and the three trained matrices."""

    x: FloatArray
    adapted: FloatArray
    w_q: FloatArray
    w_k: FloatArray
    w_v: FloatArray


def sample_fusion(rng: np.random.Generator, *, T: int, n: int, D: int) -> Case:
    """Return a call of `adapter_fusion`.

    Examples
    --------
    >>> [a.shape for a in sample_fusion(np.random.default_rng(0), T=2, n=3, D=4).args]
    [(2, 4), (3, 2, 4), (4, 4), (4, 4), (4, 4)]
    """
    shapes = ((T, D), (n, T, D), (D, D), (D, D), (D, D))
    return Case(tuple(rng.standard_normal(shape) for shape in shapes))


def _terms(case: Case) -> tuple[int, FloatArray]:
    x, adapted, w_q, w_k, w_v = case.args
    return 3 * x.shape[1] + len(adapted), adapter_fusion(x, np.abs(adapted), w_q * 0, w_k, np.abs(w_v)) * len(
        adapted
    )


@technique(
    "peft.composition.fusion",
    entries=(65,),
    kind="function",
    source=Source("Pfeiffer et al. 2021", "arXiv:2005.00247", "section 3.2, AdapterFusion"),
    axes={"T": (1, 4), "n": (1, 4), "D": (1, 4)},
    edges=({"T": 0}, {"n": 0}, {"n": 1, "T": 2, "D": 3}, {"T": 1, "n": 1, "D": 1}),
    sample=sample_fusion,
    terms=_terms,
    vjp="refimpl.peft.fusion:adapter_fusion_vjp",
)
def adapter_fusion(
    x: FloatArray, adapted: FloatArray, w_q: FloatArray, w_k: FloatArray, w_v: FloatArray, /
) -> FloatArray:
    """Return, for every token, ``Σ_i softmax_i(x W_q · z_i W_k) z_i W_v`` over the adapters' outputs z_i.

    Parameters
    ----------
    x : ndarray of float, shape (T, D)
        Output of the frozen layer: the queries.
    adapted : ndarray of float, shape (n, T, D)
        What n adapters make of it: keys and values.
    w_q, w_k, w_v : ndarray of float, shape (D, D)
        The trained matrices; the adapters are frozen.

    Returns
    -------
    ndarray of float, shape (T, D)

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    Notes
    -----
    Scores are not scaled.  Without adapters the output is 0.

    References
    ----------
    .. [1] Pfeiffer et al., 2021, arXiv:2005.00247, section 3.2.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> adapter_fusion(0 * one, np.array([[[1.0]], [[3.0]]]), one, one, one)
    array([[2.]])
    """
    x, adapted, w_q, w_k, w_v = _checked(x, adapted, w_q, w_k, w_v)
    _, p, values = _parts(*(widen(array) for array in (x, adapted, w_q, w_k, w_v)))
    return round_to(contract("tn,ntd->td", p, values), x.dtype)


def adapter_fusion_vjp(
    x: FloatArray,
    adapted: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    dy: FloatArray,
    /,
) -> FusionGradients:
    """Return the gradients of `adapter_fusion`; the adapters' outputs pass theirs to the layers below.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> adapter_fusion_vjp(0 * one, np.array([[[1.0]], [[3.0]]]), one, one, one, one).w_v
    array([[2.]])
    """
    x, adapted, w_q, w_k, w_v = _checked(x, adapted, w_q, w_k, w_v)
    wx, z, q, k, v = (widen(array) for array in (x, adapted, w_q, w_k, w_v))
    d = widen(floating(dy=dy)[0])
    keys, p, values = _parts(wx, z, q, k, v)
    dvalues = contract("tn,td->ntd", p, d)
    dp = contract("td,ntd->tn", d, values)
    ds = p * (dp - np.sum(p * dp, axis=1, keepdims=True))
    queries = product(wx, q)
    dqueries = contract("tn,ntd->td", ds, keys)
    dkeys = contract("tn,td->ntd", ds, queries)
    dz = contract("ntd,ed->nte", dvalues, v) + contract("ntd,ed->nte", dkeys, k)
    found = (
        product(dqueries, q.T), dz, product(wx.T, dqueries),
        contract("nte,ntd->ed", z, dkeys), contract("nte,ntd->ed", z, dvalues),
    )  # fmt: skip
    return FusionGradients(*(round_to(gradient, x.dtype) for gradient in found))


def _parts(
    x: FloatArray, adapted: FloatArray, w_q: FloatArray, w_k: FloatArray, w_v: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return keys, shares of the adapters, and values."""
    keys = contract("nte,ed->ntd", adapted, w_k)
    scores = contract("td,ntd->tn", product(x, w_q), keys)
    return keys, softmax(scores), contract("nte,ed->ntd", adapted, w_v)


def _checked(
    x: FloatArray, adapted: FloatArray, w_q: FloatArray, w_k: FloatArray, w_v: FloatArray
) -> tuple[FloatArray, ...]:
    arrays = floating(x=x, adapted=adapted, w_q=w_q, w_k=w_k, w_v=w_v)
    size = bind_axes({"x": (arrays[0], "T D"), "adapted": (arrays[1], "n T D")})
    for name, array in zip(("w_q", "w_k", "w_v"), arrays[2:], strict=True):
        bind_axes({"x": (arrays[0], "T D"), name: (array, "D E")})
        bind_axes({"x": (np.empty((0, size["D"])), "T E"), name: (array, "D E")})
    return arrays
