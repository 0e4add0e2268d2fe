"""Laws of multi-head attention and of its decomposition into heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array
from refimpl.registry import Case, law
from refimpl.testing import Close

MULTI_HEAD = ("attention.multi_head", "attention.head_decomposition")


def _heads(weight: Array, count: int, axis: int) -> Array:
    """Return a weight with its heads along an axis of their own."""
    shape = list(weight.shape)
    shape[axis : axis + 1] = [count, shape[axis] // count]
    return weight.reshape(shape)


@law(*MULTI_HEAD)
def heads_may_be_reordered(f: Callable[..., Any], case: Case, close: Close) -> None:
    """Reversing the heads in all four weights changes nothing."""
    case = case.without("b_q", "b_k", "b_v")
    x, *weights = case.args
    q_heads = case.kwargs["num_heads"]
    counts = (q_heads, *[case.kwargs.get("num_kv_heads", q_heads)] * 2, q_heads)
    turned = [
        np.flip(_heads(w, count, axis), axis).reshape(w.shape)
        for w, count, axis in zip(weights, counts, (1, 1, 1, 0), strict=True)
    ]
    close.on(case)(case.replace(x, *turned).call(f), case.call(f), "heads reversed")


@law(*MULTI_HEAD)
def silent_heads_add_nothing(f: Callable[..., Any], case: Case, close: Close) -> None:
    """The output is the sum of what it is with all heads but one silenced in W^O, the bias counted once."""
    case = case.without("b_o")
    x, w_q, w_k, w_v, w_o = case.args
    rows = w_o.shape[0] // case.kwargs["num_heads"]
    total = 0
    for h in range(case.kwargs["num_heads"]):
        alone = np.zeros_like(w_o)
        alone[h * rows : (h + 1) * rows] = w_o[h * rows : (h + 1) * rows]
        total = total + case.replace(x, w_q, w_k, w_v, alone).call(f)
    close.on(case)(total, case.call(f), "heads one by one", factor=4.0 * case.kwargs["num_heads"])


@law("attention.head_decomposition")
def decomposition_equals_multi_head(f: Callable[..., Any], case: Case, close: Close) -> None:
    """The sum of heads equals multi-head attention."""
    from refimpl.attention.multi_head import multi_head_attention

    close(
        case.call(f), case.call(multi_head_attention), "sum of heads against multi-head attention", factor=8.0
    )


@law("attention.head_decomposition")
def only_the_products_of_a_head_matter(f: Callable[..., Any], case: Case, close: Close) -> None:
    """Turning W^Q and W^K of a head by one rotation, or W^V and W^O by another, changes nothing."""
    x, *weights = case.args
    count = case.kwargs["num_heads"]
    width = weights[0].shape[1] // count
    rng = np.random.default_rng(0)
    turns = np.linalg.qr(rng.standard_normal((2, count, width, width)))[0]
    q, k, v = (
        np.einsum("mhd,hde->mhe", _heads(w, count, 1), turns[index]).reshape(w.shape)
        for w, index in zip(weights[:3], (0, 0, 1), strict=True)
    )
    o = np.einsum("hdo,hde->heo", _heads(weights[3], count, 0), turns[1]).reshape(weights[3].shape)
    close(case.replace(x, q, k, v, o).call(f), case.call(f), "heads rotated", factor=64.0 * width)
