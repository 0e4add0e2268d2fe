"""How large the terms are that the gradients of attention sum: the measure of a kernel's rounding errors.

A gradient of attention cancels by design: dS = P ∘ (dP - D), and D is a mean of dP.  A query with one key has
the gradient 0, made of two equal numbers of any size, each with its own rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.attention.dense import AttentionGradients
from refimpl.attention.online_softmax import rescale
from refimpl.attention.scores import backward_rule
from refimpl.numerics import FloatArray, contract
from refimpl.registry import Case

__all__ = ["gradient_spread", "spread_of_gradients"]

Arrays = tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]


def gradient_spread(case: Case) -> AttentionGradients:
    """Return, for each gradient, the root of the sum of its squared terms.

    Parameters
    ----------
    case : Case
        A call of `flash_attention_vjp` in float64.

    Returns
    -------
    AttentionGradients
        Shaped like the gradients.  Without cancellation they have about this size themselves, if the terms
        have random signs.

    Examples
    --------
    The gradient of a lone key is 0, as the difference of two numbers of size 2:

    >>> x = np.ones((1, 1, 1, 4))
    >>> float(gradient_spread(Case((x, x, x, x, np.full((1, 1, 1), 2.0), x))).dq[0, 0, 0, 0])
    1.4142135623730951
    """
    q, k, v, o, lse, do = case.args
    options = case.without("block_sizes", "sram", "memory", "count_initialization").kwargs
    rule = backward_rule(q, k, v, **options)
    shape = rule.shape
    everywhere = (
        np.arange(shape.B)[:, None],
        np.arange(shape.Hq)[None, :],
        np.arange(shape.Tq),
        np.arange(shape.Tk),
    )
    product = contract("bihd,bjhd->bhij", q, np.repeat(k, shape.group, axis=2))
    p = rescale(rule.scores(product, *everywhere), lse[..., None])
    keep = rule.keep(*everywhere)

    def through(ds: FloatArray) -> FloatArray:
        return rule.product_gradient(ds, product)

    found, ds = spread_of_gradients((q, k, v, o, do), p, through, keep)
    bias = options.get("bias")
    dbias = None if bias is None else np.sqrt(_over_broadcast(ds**2, np.shape(bias)))
    return found._replace(dbias=dbias)


def spread_of_gradients(
    arrays: Arrays,
    p: FloatArray,
    through: Callable[[FloatArray], FloatArray],
    keep: FloatArray | None = None,
) -> tuple[AttentionGradients, FloatArray]:
    """Return the sizes of the gradients' terms, and of those of the scores.

    Parameters
    ----------
    arrays : tuple of ndarray
        q, k, v, o and dO.
    p : ndarray, shape (B, Hq, Tq, Tk)
        Probabilities.
    through : callable
        Gradient of the products from that of the scores.
    keep : ndarray, optional
        Factors of a dropout.

    Examples
    --------
    >>> x, p = np.ones((1, 1, 1, 4)), np.ones((1, 1, 1, 1))
    >>> float(spread_of_gradients((x, x, x, x, x), p, lambda ds: ds)[1].item())
    2.8284271247461903
    """
    q, k, v, o, do = arrays
    group = q.shape[2] // max(k.shape[2], 1)
    keys, values = (np.repeat(x, group, axis=2) for x in (k, v))
    dp = contract("bihd,bjhd->bhij", do**2, values**2) * (1 if keep is None else keep**2)
    rows_sum = np.sum(do**2 * o**2, axis=-1).transpose(0, 2, 1)
    ds = p * np.sqrt(dp + rows_sum[..., None])
    dproduct = through(ds) ** 2
    dq = contract("bhij,bjhd->bihd", dproduct, keys**2)
    dk = contract("bhij,bihd->bjhd", dproduct, q**2)
    dv = contract("bhij,bihd->bjhd", (p if keep is None else p * keep) ** 2, do**2)
    grouped = [np.sqrt(x.reshape(*k.shape[:3], group, x.shape[3]).sum(axis=3)) for x in (dk, dv)]
    return AttentionGradients(np.sqrt(dq), grouped[0], grouped[1]), ds


def _over_broadcast(squares: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    full = (1,) * (squares.ndim - len(shape)) + shape
    stretched = tuple(axis for axis, size in enumerate(full) if size == 1)
    total: FloatArray = squares.sum(axis=stretched, keepdims=True).reshape(shape)
    return total
