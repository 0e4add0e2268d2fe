"""Gradients of attention with functions of the user's, from what the forward pass returned: as kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.block_mask import BlockMask
from refimpl.attention.dense import AttentionGradients
from refimpl.attention.flexible import (
    changed_scores,
    flexible_attention,
    input_gradients,
    mod_rule,
)
from refimpl.attention.gradient_spread import spread_of_gradients
from refimpl.attention.online_softmax import rescale
from refimpl.attention.samples_flexible import AXES, EDGES, OPTIONS, sample_flexible
from refimpl.attention.user_functions import Aux
from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, contract, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["flexible_attention_backward"]


def sample_flexible_backward(rng: np.random.Generator, **shape: Any) -> Case:
    """Return a call of the backward pass, its output and log-sum-exp those of the forward pass.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=3, Hkv=1, group=2, D=4, Dv=5, return_lse=False)
    >>> [a.shape for a in sample_flexible_backward(np.random.default_rng(0), **shape).args][3:]
    [(1, 2, 2, 5), (1, 2, 2), (1, 2, 2, 5)]
    """
    case = sample_flexible(rng, **shape)
    forward = case.replace(return_lse=True).call(flexible_attention)
    return case.replace(*case.args, forward.out, forward.lse, rng.standard_normal(forward.out.shape))


def _spread(case: Case) -> AttentionGradients:
    """Return the sizes of the gradients' terms, as `gradient_spread` does."""
    q, k, v, o, lse, do = case.args
    rule = mod_rule(q, k, v, **case.kwargs)
    score, modified = changed_scores(q, k, rule)
    p = rescale(modified, lse[..., None])
    return spread_of_gradients((q, k, v, o, do), p, lambda ds: rule.product_gradient(ds, score, p > 0))[0]


@technique(
    "attention.flexible_backward",
    entries=(8, 30, 105),
    kind="function",
    source=Source("Dong et al. 2024", "arXiv:2412.05496", "section 4"),
    axes=AXES,
    options={**OPTIONS, "return_lse": (False,)},
    # Of equal keys dQ is what the rounding of O leaves of a sum that cancels: no number to be held to.
    edges=tuple({**edge, "return_lse": False} for edge in EDGES if edge.get("extra") != "ties"),
    sample=sample_flexible_backward,
    spread=_spread,
    kernel_factor=3.0,
)
def flexible_attention_backward(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    o: FloatArray,
    lse: FloatArray,
    do: FloatArray,
    /,
    *,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_vjp: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    aux: Aux = (),
    scale: float | None = None,
) -> AttentionGradients:
    """Return the gradients of `flexible_attention` from its output and its log-sum-exp.

    Parameters
    ----------
    q, k, v : ndarray of float
        As for `flexible_attention`.
    o : ndarray of float, shape (B, Tq, Hq, Dv)
        Its output.
    lse : ndarray of float, shape (B, Hq, Tq)
        Its log-sum-exp.
    do : ndarray of float, shape (B, Tq, Hq, Dv)
        Gradient of the output.
    mask_mod, score_mod, score_mod_vjp, block_mask, aux, scale
        Those of the forward call; `score_mod_vjp` is needed if there is a `score_mod`.

    Returns
    -------
    AttentionGradients
        In the dtype of the arrays.

    Raises
    ------
    OptionError
        If there is a `score_mod` without its gradient.
    ShapeError, DTypeError, OptionError
        As `flexible_attention`.

    Notes
    -----
    Probabilities are ``exp(score - lse)``, and what is taken off ``dO vᵀ`` is the sum of ``dO ∘ O``: nothing
    of a row has to be known but its two numbers.

    References
    ----------
    .. [1] Dong et al., 2024, arXiv:2412.05496, section 4: the backward kernel, defined here.
    .. [2] Dao et al., 2022, arXiv:2205.14135, appendix B.2.

    Examples
    --------
    >>> x, alone = np.ones((1, 2, 1, 4)), {"mask_mod": lambda b, h, i, j: i == j}
    >>> out, lse = flexible_attention(x, x, x, return_lse=True, **alone)
    >>> flexible_attention_backward(x, x, x, out, lse, x, **alone).dv[0, :, 0, 0]
    array([1., 1.])
    """
    q, k, v, o, do = floating(q=q, k=k, v=v, o=o, do=do)
    dtype = q.dtype
    q, k, v, o, do = (widen(x) for x in (q, k, v, o, do))
    lse = widen(floating(lse=lse)[0])
    rule = mod_rule(
        q, k, v, mask_mod=mask_mod, score_mod=score_mod, score_mod_vjp=score_mod_vjp, block_mask=block_mask,
        aux=aux, scale=scale,
    )  # fmt: skip
    axes = {"q": (q, "B Tq Hq D"), "v": (v, "B Tk Hkv Dv"), "o": (o, "B Tq Hq Dv"), "do": (do, "B Tq Hq Dv")}
    bind_axes({**axes, "lse": (lse, "B Hq Tq")})
    if rule.score is not None and rule.vjp is None:
        raise OptionError("score_mod_vjp: needed for gradients through score_mod")
    score, modified = changed_scores(q, k, rule)
    p = rescale(modified, lse.astype(score.dtype, copy=False)[..., None])
    dp = contract("bihd,bjhd->bhij", do, np.repeat(v, rule.shape.group, axis=2))
    rows_sum = np.sum(do.astype(p.dtype) * o, axis=-1).transpose(0, 2, 1)[..., None]
    found = input_gradients(q, k, do, p, rule.product_gradient(p * (dp - rows_sum), score, p > 0))
    return AttentionGradients(*(round_to(x, dtype) for x in found))
