"""Modules put together: updates summed, factors summed (LoraHub), outputs fused, and mixed token by token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.linear import product
from refimpl.validation import bind_axes, floating

__all__ = [
    "GatedGradients",
    "composed_factors",
    "composed_factors_vjp",
    "composed_update",
    "composed_update_vjp",
    "gated_lora",
    "gated_lora_vjp",
]


class GatedGradients(NamedTuple):
    """Gradients of input, gates and factors; the weight is frozen."""

    x: FloatArray
    gates: FloatArray
    lora_a: FloatArray
    lora_b: FloatArray


def sample_updates(rng: np.random.Generator, *, n: int, K: int, N: int, R: int, weights: str) -> Case:
    """Return a call of `composed_update`; `weights` is "random" or "one_hot".

    Examples
    --------
    >>> case = sample_updates(np.random.default_rng(0), n=2, K=3, N=4, R=1, weights="one_hot")
    >>> case.args[0], [a.shape for a in case.args[1:]]
    (array([1., 0.]), [(2, 3, 1), (2, 1, 4)])
    """
    w = rng.standard_normal(n)
    if weights == "one_hot":
        w = (np.arange(n) == 0).astype(np.float64)
    return Case((w, rng.standard_normal((n, K, R)), rng.standard_normal((n, R, N))))


def _update_terms(case: Case) -> tuple[int, FloatArray]:
    w, a, b = (np.abs(array) for array in case.args)
    return a.shape[0] * a.shape[2] + 2, np.einsum("n,nkr,nrm->km", w, a, b)


def _factor_terms(case: Case) -> tuple[int, FloatArray]:
    w, a, b = (np.abs(array) for array in case.args)
    return a.shape[0] * 2 + a.shape[2], np.tensordot(w, a, 1) @ np.tensordot(w, b, 1)


_AXES = {"n": (1, 4), "K": (1, 5), "N": (1, 5), "R": (1, 3)}
_OPTIONS = {"weights": ("random", "one_hot")}
_EDGES: tuple[dict[str, int | str], ...] = (
    {"n": 0},
    {"n": 2, "K": 0},
    {"n": 2, "R": 0},
    {"n": 1, "K": 1, "N": 1, "R": 1, "weights": "one_hot"},
    {"n": 3, "K": 4, "N": 3, "R": 2, "weights": "one_hot"},
)


@technique(
    "peft.composition",
    entries=(65,),
    kind="function",
    source=Source("Ilharco et al. 2023", "arXiv:2212.04089", "section 2: task arithmetic, on LoRA's updates"),
    axes=_AXES,
    options=_OPTIONS,
    edges=_EDGES,
    sample=sample_updates,
    terms=_update_terms,
    vjp="refimpl.peft.composition:composed_update_vjp",
)
def composed_update(weights: FloatArray, lora_a: FloatArray, lora_b: FloatArray, /) -> FloatArray:
    """Return ``Σ w_i A_i B_i``: a weighted sum of updates.

    Parameters
    ----------
    weights : ndarray of float, shape (n,)
        One for each module; they need not sum to 1.
    lora_a, lora_b : ndarray of float, shapes (n, K, R) and (n, R, N)
        The factors of the modules.

    Returns
    -------
    ndarray of float, shape (K, N)
        Of rank n R at most.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    References
    ----------
    .. [1] Ilharco et al., 2023, arXiv:2212.04089, section 2.

    Examples
    --------
    >>> a, b = np.ones((2, 1, 1)), np.array([[[1.0]], [[10.0]]])
    >>> composed_update(np.array([2.0, 3.0]), a, b)
    array([[32.]])
    """
    weights, lora_a, lora_b = _modules(weights, lora_a, lora_b)
    w, a, b = (widen(array) for array in (weights, lora_a, lora_b))
    return round_to(contract("nkr,nrm->km", w[:, None, None] * a, b), weights.dtype)


def composed_update_vjp(
    weights: FloatArray, lora_a: FloatArray, lora_b: FloatArray, dupdate: FloatArray, /
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the gradients of weights and factors.

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> [g.item() for g in composed_update_vjp(one[0, 0], 2 * one, 3 * one, one[0])]
    [6.0, 3.0, 2.0]
    """
    weights, lora_a, lora_b = _modules(weights, lora_a, lora_b)
    (dupdate,) = floating(dupdate=dupdate)
    w, a, b, d = (widen(array) for array in (weights, lora_a, lora_b, dupdate))
    da = contract("km,nrm->nkr", d, b)
    db = contract("nkr,km->nrm", a, d)
    dw = np.sum(a * da, axis=(1, 2))
    scale = w[:, None, None]
    dtype = weights.dtype
    return round_to(dw, dtype), round_to(scale * da, dtype), round_to(scale * db, dtype)


@technique(
    "peft.composition.lorahub",
    entries=(65,),
    kind="function",
    source=Source("Huang et al. 2023", "arXiv:2307.13269", "section 3.2, eq. 1"),
    axes=_AXES,
    options=_OPTIONS,
    edges=_EDGES,
    sample=sample_updates,
    terms=_factor_terms,
    vjp="refimpl.peft.composition:composed_factors_vjp",
)
def composed_factors(weights: FloatArray, lora_a: FloatArray, lora_b: FloatArray, /) -> FloatArray:
    """Return ``(Σ w_i A_i) (Σ w_i B_i)``: LoraHub's sum of factors, with the cross terms that it makes.

    Parameters
    ----------
    weights, lora_a, lora_b
        As for `composed_update`; all modules have one rank.

    Returns
    -------
    ndarray of float, shape (K, N)
        Of rank R at most: A_i meets B_j also for i and j that never trained together.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    Notes
    -----
    The peft library's ``combination_type="linear"`` is this with the roots of the weights, its ``"cat"``
    `composed_update`.

    References
    ----------
    .. [1] Huang et al., 2023, arXiv:2307.13269, section 3.2.
    .. [2] huggingface/peft, tuners/lora/model.py, ``_generalized_task_arithmetic_weighted_adapter``.

    Examples
    --------
    With both weights 1/2 it is not the mean of the updates 1 and 10:

    >>> a, b = np.ones((2, 1, 1)), np.array([[[1.0]], [[10.0]]])
    >>> composed_factors(np.array([2.0, 3.0]), a, b)
    array([[160.]])
    """
    weights, lora_a, lora_b = _modules(weights, lora_a, lora_b)
    return round_to(product(*_summed(weights, lora_a, lora_b)), weights.dtype)


def composed_factors_vjp(
    weights: FloatArray, lora_a: FloatArray, lora_b: FloatArray, dupdate: FloatArray, /
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the gradients of weights and factors.

    Examples
    --------
    >>> one = np.ones((1, 1, 1))
    >>> [g.item() for g in composed_factors_vjp(one[0, 0], 2 * one, 3 * one, one[0])]
    [12.0, 3.0, 2.0]
    """
    weights, lora_a, lora_b = _modules(weights, lora_a, lora_b)
    (dupdate,) = floating(dupdate=dupdate)
    a, b = _summed(weights, lora_a, lora_b)
    d, w = widen(dupdate), widen(weights)
    da, db = product(d, b.T), product(a.T, d)
    dw = contract("nkr,kr->n", widen(lora_a), da) + contract("nrm,rm->n", widen(lora_b), db)
    scale, dtype = w[:, None, None], weights.dtype
    return round_to(dw, dtype), round_to(scale * da, dtype), round_to(scale * db, dtype)


def sample_gated(rng: np.random.Generator, *, T: int, n: int, K: int, N: int, R: int) -> Case:
    """Return a call of `gated_lora`, its gates a softmax.

    Examples
    --------
    >>> case = sample_gated(np.random.default_rng(0), T=5, n=2, K=3, N=4, R=1)
    >>> [a.shape for a in case.args]
    [(5, 3), (5, 2), (2, 3, 1), (2, 1, 4), (3, 4)]
    """
    gates = np.exp(rng.standard_normal((T, n)))
    gates = gates / gates.sum(axis=1, keepdims=True)
    shapes = ((n, K, R), (n, R, N), (K, N))
    x, *rest = (rng.standard_normal(shape) for shape in ((T, K), *shapes))
    return Case((x, gates, *rest))


def _gated_terms(case: Case) -> tuple[int, FloatArray]:
    x, gates, a, b, weight = (np.abs(array) for array in case.args)
    size = x @ weight + np.einsum("tk,tn,nkr,nrm->tm", x, gates, a, b)
    return sum(weight.shape) + 2 * a.shape[0] * a.shape[2], size


@technique(
    "peft.composition.gated",
    entries=(65,),
    kind="function",
    source=Source("Wu et al. 2024", "arXiv:2404.13628", "section 3.2: gates over LoRA experts"),
    axes={"T": (1, 4), **_AXES},
    edges=({"T": 0}, {"T": 2, "K": 0}, {"T": 1, "n": 1, "K": 1, "N": 1, "R": 1}, {"T": 3, "n": 2, "R": 0}),
    sample=sample_gated,
    terms=_gated_terms,
    vjp="refimpl.peft.composition:gated_lora_vjp",
)
def gated_lora(
    x: FloatArray, gates: FloatArray, lora_a: FloatArray, lora_b: FloatArray, weight: FloatArray, /
) -> FloatArray:
    """Return ``x W + Σ_i g_i(x) (x A_i) B_i``: a gate for every token over LoRA modules.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Tokens by features.
    gates : ndarray of float, shape (T, n)
        Shares of the modules, for example a softmax of router logits.
    lora_a, lora_b : ndarray of float, shapes (n, K, R) and (n, R, N)
        The factors of the modules.
    weight : ndarray of float, shape (K, N)
        Frozen.

    Returns
    -------
    ndarray of float, shape (T, N)

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    Notes
    -----
    With gates that are the same for all tokens it is `composed_update`.

    References
    ----------
    .. [1] Wu et al., 2024, arXiv:2404.13628, section 3.2.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> gated_lora(one, np.array([[0.5, 0.25]]), np.ones((2, 1, 1)), 4 * np.ones((2, 1, 1)), one)
    array([[4.]])
    """
    x, gates, lora_a, lora_b, weight = _gated(x, gates, lora_a, lora_b, weight)
    wide = [widen(array) for array in (x, gates, lora_a, lora_b, weight)]
    inner = contract("tk,nkr->tnr", wide[0], wide[2]) * wide[1][:, :, None]
    return round_to(product(wide[0], wide[4]) + contract("tnr,nrm->tm", inner, wide[3]), x.dtype)


def gated_lora_vjp(
    x: FloatArray,
    gates: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    dy: FloatArray,
    /,
) -> GatedGradients:
    """Return the gradients of `gated_lora`; the frozen weight has none.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> gated_lora_vjp(one, one, 2 * one[None], 3 * one[None], one, one).x
    array([[7.]])
    """
    x, gates, lora_a, lora_b, weight = _gated(x, gates, lora_a, lora_b, weight)
    (dy,) = floating(dy=dy)
    wx, wg, wa, wb, ww, wd = (widen(array) for array in (x, gates, lora_a, lora_b, weight, dy))
    inner = contract("tk,nkr->tnr", wx, wa)
    dinner = contract("tm,nrm->tnr", wd, wb)
    dgates = np.sum(inner * dinner, axis=2)
    through = dinner * wg[:, :, None]
    dx = product(wd, ww.T) + contract("tnr,nkr->tk", through, wa)
    da = contract("tk,tnr->nkr", wx, through)
    db = contract("tnr,tm->nrm", inner * wg[:, :, None], wd)
    return GatedGradients(*(round_to(gradient, x.dtype) for gradient in (dx, dgates, da, db)))


def _modules(weights: FloatArray, lora_a: FloatArray, lora_b: FloatArray) -> tuple[FloatArray, ...]:
    arrays = floating(weights=weights, lora_a=lora_a, lora_b=lora_b)
    bind_axes({"weights": (arrays[0], "n"), "lora_a": (arrays[1], "n K R"), "lora_b": (arrays[2], "n R N")})
    return arrays


def _summed(weights: FloatArray, lora_a: FloatArray, lora_b: FloatArray) -> tuple[FloatArray, FloatArray]:
    w = widen(weights)
    return contract("n,nkr->kr", w, widen(lora_a)), contract("n,nrm->rm", w, widen(lora_b))


def _gated(
    x: FloatArray, gates: FloatArray, lora_a: FloatArray, lora_b: FloatArray, weight: FloatArray
) -> tuple[FloatArray, ...]:
    arrays = floating(x=x, gates=gates, lora_a=lora_a, lora_b=lora_b, weight=weight)
    names = ("T K", "T n", "n K R", "n R N", "K N")
    given = ("x", "gates", "lora_a", "lora_b", "weight")
    bind_axes({name: (array, axes) for name, array, axes in zip(given, arrays, names, strict=True)})
    return arrays
