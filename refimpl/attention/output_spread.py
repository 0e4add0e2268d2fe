"""How large the terms are of which an output of attention is made: the measure of a kernel's rounding errors.

An output is a mean of values, which may have any sign: now and then it is far smaller than what it is made
of.  A kernel rounds the weights, each in its own last bit, and so errs by a share of the terms, whatever they
sum to.  A log-sum-exp is the largest score and the logarithm of a sum of at least 1, which may cancel, too:
each keeps its roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import contract
from refimpl.registry import Case

__all__ = ["lse_spread", "output_spread"]


def output_spread(attention: Callable[..., Any], case: Case) -> Any:
    """Return the root of the sum of squared terms of each output, and of each log-sum-exp.

    Parameters
    ----------
    attention : callable
        The reference.
    case : Case
        A call of it in float64.  Values of three axes are packed; with a fourth array they lie in pages.

    Returns
    -------
    ndarray or AttentionOutput
        Shaped like the outputs.

    Notes
    -----
    With a column for each key as values, attention gives its weights.

    Examples
    --------
    >>> from refimpl.attention import scaled_dot_product_attention
    >>> q, k, v = np.zeros((1, 1, 1, 4)), np.zeros((1, 2, 1, 4)), np.array([3.0, -3.0]).reshape(1, 2, 1, 1)
    >>> output_spread(scaled_dot_product_attention, Case((q, k, v))).round(3).item()
    2.121
    """
    q, k, v, *others = case.args
    shared = v.ndim == 3 or bool(others)  # packed or in pages: one store of keys for all queries
    places = v.shape[:-2] if shared else v.shape[1:-2]
    keys = math.prod(places)
    columns = np.broadcast_to(np.eye(keys).reshape(*places, 1, keys), (*v.shape[:-1], keys))
    found = case.replace(q, k, columns, *others).call(attention)
    weights = found.out if hasattr(found, "lse") else found
    values = np.repeat(v, weights.shape[-2] // v.shape[-2], axis=-2) ** 2
    if shared:
        squares = contract("...hj,jhd->...hd", weights**2, values.reshape(keys, *values.shape[-2:]))
    else:
        squares = contract("bihj,bjhd->bihd", weights**2, values)
    if not hasattr(found, "lse"):
        return np.sqrt(squares)
    # The weight of the largest score m is exp(m - lse) = 1 / l; nobody's row has no scores.
    largest = np.swapaxes(weights.max(-1, initial=0.0), -1, -2)
    logarithm = -np.log(np.where(largest > 0, largest, 1.0))
    finite = np.where(np.isfinite(found.lse), found.lse, 0.0)
    return found._replace(out=np.sqrt(squares), lse=np.hypot(finite - logarithm, logarithm))


def lse_spread(attention: Callable[..., Any], case: Case) -> Any:
    """Return the outputs themselves, but of each log-sum-exp what `output_spread` does, without dropout.

    Examples
    --------
    >>> from refimpl.attention import scaled_dot_product_attention
    >>> q, k = np.ones((1, 1, 1, 1)), np.full((1, 2, 1, 1), -np.log(2.0))
    >>> case = Case((q, k, k), {"return_lse": True})
    >>> case.call(scaled_dot_product_attention).lse.item()
    0.0
    >>> lse_spread(scaled_dot_product_attention, case).lse.round(3).item()
    0.98
    """
    found = case.call(attention)
    if not hasattr(found, "lse"):
        return found
    return found._replace(lse=output_spread(attention, case.without("dropout_p", "dropout_mask", "rng")).lse)
