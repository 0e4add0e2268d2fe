"""Pruning to a target structure: a Lagrangian that holds the expected sparsity at its target."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, fraction, whole

__all__ = ["PenaltyGradients", "target_at", "target_structure", "target_structure_vjp"]


class PenaltyGradients(NamedTuple):
    """Gradients of the sparsities, which descend, and of the multipliers, which ascend."""

    sparsity: FloatArray
    first: FloatArray
    second: FloatArray


def sample_penalty(rng: np.random.Generator, *, n: int, met: bool) -> Case:
    """Return a call of `target_structure`; with `met` every sparsity is at its target.

    Examples
    --------
    >>> sample_penalty(np.random.default_rng(0), n=1, met=True).args[0].shape
    (1,)
    """
    sparsity, first, second = rng.random(n), rng.standard_normal(n), rng.standard_normal(n)
    return Case((sparsity, first, second), {"target": sparsity.copy() if met else rng.random(n)})


def _terms(case: Case) -> tuple[int, FloatArray]:
    sparsity, first, second = case.args
    gap = np.abs(sparsity) + np.abs(case.kwargs["target"])
    return 6, np.abs(first) * gap + np.abs(second) * gap**2


@technique(
    "prune.target_structure",
    entries=(81,),
    kind="function",
    source=Source("Xia et al. 2023", "arXiv:2310.06694", "section 2.1: constraint on a layer"),
    axes={"n": (1, 4)},
    options={"met": (False, True)},
    edges=({"n": 0}, {"n": 1, "met": True}, {"n": 4, "met": False}),
    sample=sample_penalty,
    terms=_terms,
    vjp="refimpl.prune.target_structure:target_structure_vjp",
)
def target_structure(
    sparsity: FloatArray, first: FloatArray, second: FloatArray, /, *, target: FloatArray
) -> FloatArray:
    """Return the penalty ``λ (ŝ - t) + φ (ŝ - t)²`` of every kind of mask.

    Parameters
    ----------
    sparsity : ndarray of float, shape (n,)
        Expected share of closed masks of each kind (layers, heads, neurons, hidden features).
    first, second : ndarray of float, shape (n,)
        The multipliers λ and φ: they go up the gradient while masks and weights go down.
    target : ndarray of float, shape (n,)
        The share that the target structure prescribes (`target_at` ramps up to it).

    Returns
    -------
    ndarray of float, shape (n,)
        Added to the loss.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.

    Notes
    -----
    The paper writes it on numbers of units, the released code on shares, with one pair of multipliers for
    each kind.  For kinds that every layer has (heads, neurons) that code takes the penalty of each layer and
    averages it: the mean of the squares, not the square of the mean, so that every layer is held to the
    target.  Without a target structure it holds one share, that of all prunable parameters, in which a
    head's open probability is multiplied by its layer's.

    At a saddle point the constraint holds, since the gradient of λ is ``ŝ - t``.

    References
    ----------
    .. [1] Xia et al., 2023, arXiv:2310.06694, section 2.1; LLM-Shearing, l0_module.py.

    Examples
    --------
    >>> target_structure(np.array([0.75]), np.array([2.0]), np.array([4.0]), target=np.array([0.5]))
    array([0.75])
    """
    sparsity, first, second, gap = _operands(sparsity, first, second, target)
    return round_to((widen(first) + widen(second) * gap) * gap, sparsity.dtype)


def target_structure_vjp(
    sparsity: FloatArray,
    first: FloatArray,
    second: FloatArray,
    dpenalty: FloatArray,
    /,
    *,
    target: FloatArray,
) -> PenaltyGradients:
    """Return the gradients: ``λ + 2 φ (ŝ - t)``, ``ŝ - t`` and ``(ŝ - t)²``.

    Examples
    --------
    >>> one = np.ones(1)
    >>> target_structure_vjp(0.75 * one, 2 * one, 4 * one, one, target=0.5 * one)
    PenaltyGradients(sparsity=array([4.]), first=array([0.25]), second=array([0.0625]))
    """
    sparsity, first, second, gap = _operands(sparsity, first, second, target)
    (dpenalty,) = floating(dpenalty=dpenalty)
    bind_axes({"sparsity": (sparsity, "n"), "dpenalty": (dpenalty, "n")})
    d = widen(dpenalty)
    found = d * (widen(first) + 2 * widen(second) * gap), d * gap, d * gap**2
    return PenaltyGradients(*(round_to(gradient, sparsity.dtype) for gradient in found))


def target_at(step: int, /, *, final: float, warmup: int) -> float:
    """Return the target share at a step: from 0 linearly to `final` in `warmup` steps, then constant.

    The released ramp may also start above 0 (its ``start_sparsity``).

    Parameters
    ----------
    step : int
        From 0.
    final : float
        Of the target structure, in [0, 1).
    warmup : int
        Steps of the ramp; 640 of 3,200 in the paper.

    Returns
    -------
    float

    Raises
    ------
    OptionError, DTypeError
        If a number is out of range.

    References
    ----------
    .. [1] Xia et al., 2023, arXiv:2310.06694; only the released code says it: LLM-Shearing,
       l0_module.py, ``get_target_sparsity``.

    Examples
    --------
    >>> [target_at(step, final=0.5, warmup=4) for step in (0, 2, 4, 9)]
    [0.0, 0.25, 0.5, 0.5]
    """
    whole("step", step, least=0)
    whole("warmup", warmup, least=0)
    fraction("final", final)
    return final if step >= warmup else final * step / warmup


def _operands(
    sparsity: FloatArray, first: FloatArray, second: FloatArray, target: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return the arrays, checked, and how far the sparsity is from its target."""
    sparsity, first, second = floating(sparsity=sparsity, first=first, second=second)
    (target,) = floating(target=target)
    given = {"sparsity": sparsity, "first": first, "second": second, "target": target}
    bind_axes({name: (array, "n") for name, array in given.items()})
    gap = widen(sparsity) - widen(target)
    if np.isnan(gap).any():
        raise OptionError("sparsity, target: expected numbers, got NaN")
    return sparsity, first, second, gap
