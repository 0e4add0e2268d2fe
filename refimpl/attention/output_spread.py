"""How large the terms are that an output of attention sums: the measure of a kernel's rounding errors.

An output is a mean of values, which may have any sign: now and then it is far smaller than what it is made
of.  A kernel rounds the weights, each in its own last bit, and so errs by a share of the terms, whatever they
sum to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import contract
from refimpl.registry import Case

__all__ = ["output_spread"]


def output_spread(attention: Callable[..., Any], case: Case) -> Any:
    """Return, for each output, the root of the sum of its squared terms, and each log-sum-exp itself.

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
    return found._replace(out=np.sqrt(squares)) if hasattr(found, "lse") else np.sqrt(squares)
