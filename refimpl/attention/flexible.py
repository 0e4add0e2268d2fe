"""Attention with a mask and a score that the user writes as Python functions of one score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.block_mask import FULL, PARTIAL, BlockMask, checked_block_mask
from refimpl.attention.dense import AttentionGradients, AttentionOutput
from refimpl.attention.online_softmax import softmax
from refimpl.attention.output_spread import output_spread
from refimpl.attention.samples_flexible import AXES, EDGES, OPTIONS, flexible_terms, sample_flexible
from refimpl.attention.scores import AttentionShape, attention_shape
from refimpl.attention.user_functions import Aux, Mod, as_mod, modified_scores, where_allowed
from refimpl.errors import DTypeError, OptionError
from refimpl.numerics import Array, FloatArray, contract, is_floating, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, bind_axes, finite, floating

__all__ = [
    "ModRule",
    "changed_scores",
    "flexible_attention",
    "flexible_attention_vjp",
    "input_gradients",
    "mod_rule",
]


class ModRule(NamedTuple):
    """The functions of one call, checked, with floating arrays of `aux` in the dtype of scores.

    `states` are those of single scores, if the call has a block mask.
    """

    shape: AttentionShape
    scale: float
    mask: Mod | None
    score: Mod | None
    vjp: Mod | None
    aux: Aux
    states: Array | None = None

    def product_gradient(self, ds: FloatArray, score: FloatArray, alive: Array) -> FloatArray:
        """Return the gradient of q·k, given that of the scores behind `score_mod`.

        Where a score is not `alive` but masked, its gradient is not asked for: it may be no number.
        """
        if self.vjp is not None:
            ds = np.where(alive, modified_scores(self.vjp, (ds, score), _indices(self.shape), self.aux), 0)
        return ds * score.dtype.type(self.scale)


def mod_rule(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    *,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_vjp: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    aux: Aux = (),
    scale: float | None = None,
) -> ModRule:
    """Check the options of `flexible_attention`, which documents them, and return the rule they make.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        See `flexible_attention`.

    Examples
    --------
    >>> x = np.ones((1, 4, 2, 16))
    >>> mod_rule(x, x, x).scale
    0.25
    """
    shape, wide = attention_shape(q, k, v), wide_dtype(q.dtype)
    if not isinstance(aux, tuple | list):
        raise DTypeError(f"aux: expected a tuple of arrays, got {type(aux).__name__}")
    arrays = [as_array(f"aux[{index}]", array) for index, array in enumerate(aux)]
    if score_mod_vjp is not None and score_mod is None:
        raise OptionError("score_mod_vjp: given, but there is no score_mod")
    mask = None if mask_mod is None else as_mod("mask_mod", mask_mod)
    if block_mask is not None:
        mask = checked_block_mask(block_mask, mask, shape.B, shape.Hq, shape.Tq, shape.Tk)
    return ModRule(
        shape,
        shape.D**-0.5 if scale is None else finite("scale", scale),
        mask,
        None if score_mod is None else as_mod("score_mod", score_mod, ("score",)),
        None if score_mod_vjp is None else as_mod("score_mod_vjp", score_mod_vjp, ("gradient", "score")),
        tuple(
            widen(array).astype(wide, copy=False) if is_floating(array.dtype) else array for array in arrays
        ),
        None if block_mask is None else block_mask.spread().states,
    )


def _spread(case: Case) -> Any:
    return output_spread(flexible_attention, case)


@technique(
    "attention.flexible",
    entries=(8, 18, 19, 20, 21, 105),
    kind="function",
    source=Source("Dong et al. 2024", "arXiv:2412.05496", "section 3, eq. 2"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_flexible,
    terms=flexible_terms,
    spread=_spread,
    vjp="refimpl.attention.flexible:flexible_attention_vjp",
)
def flexible_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_vjp: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    aux: Aux = (),
    scale: float | None = None,
    return_lse: bool = False,
) -> FloatArray | AttentionOutput:
    """Return ``softmax(score_mod(scale * q kᵀ)) v`` over the keys that `mask_mod` allows: windows, documents.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `scaled_dot_product_attention`.
    mask_mod : callable, optional
        ``mask_mod(b, h, i, j)``, or ``mask_mod(b, h, i, j, aux)``: whether query i of head h of sequence b
        may attend to key j.  `refimpl.attention.mods` has ready-made ones.
    score_mod : callable, optional
        ``score_mod(score, b, h, i, j)``, or with `aux` as well: another score.  It is not asked where the
        mask says no.
    score_mod_vjp : callable, optional
        ``score_mod_vjp(gradient, score, b, h, i, j)``, or with `aux` as well: the gradient of the score that
        goes in, given that of the score that comes out.  The forward pass does not read it.
    block_mask : BlockMask, optional
        States of tiles that `refimpl.attention.block_mask` computed before, so that no call computes them: a
        dead tile is masked, a full one is not, and in a partial one `mask_mod` is asked, which may be left
        out, for the mask knows its function.
    aux : tuple of ndarray
        Arrays of any shape for these functions; they get no gradient.  An index behind the end of one is an
        error here; kernels do not notice it.
    scale : float, optional
        Factor on q·k.  Default ``D ** -0.5``.
    return_lse : bool
        Also return the natural log-sum-exp of each row, shape (B, Hq, Tq).

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If arrays do not fit each other, a function is none or takes other arguments, or it reads more of
        `aux` than there is.

    Notes
    -----
    Functions are plain Python, closures over numbers included, and must not depend on anything that changes.
    **Special cases**

    - A row with no allowed key gives 0, and -inf as its log-sum-exp.
    - A score_mod may return -inf, which masks.
    - Functions are first called on arrays of indices and, if they refuse those, for each score.

    References
    ----------
    .. [1] Dong et al., 2024, arXiv:2412.05496, section 3.

    Examples
    --------
    >>> x = np.arange(4.0).reshape(1, 4, 1, 1)
    >>> flexible_attention(0 * x, x, x, mask_mod=lambda b, h, i, j: j <= i and i - j < 2).ravel()
    array([0. , 0.5, 1.5, 2.5])
    """
    q, k, v = floating(q=q, k=k, v=v)
    dtype = q.dtype
    q, k, v = widen(q), widen(k), widen(v)
    rule = mod_rule(
        q, k, v, mask_mod=mask_mod, score_mod=score_mod, score_mod_vjp=score_mod_vjp, block_mask=block_mask,
        aux=aux, scale=scale,
    )  # fmt: skip
    _, p, lse = _probabilities(q, k, rule)
    out = round_to(contract("bhij,bjhd->bihd", p, np.repeat(v, rule.shape.group, axis=2)), dtype)
    return AttentionOutput(out, lse) if return_lse else out


def flexible_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
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
    """Return the gradients of ``sum(do * flexible_attention(q, k, v, ...))`` in q, k and v.

    Parameters
    ----------
    q, k, v, do : ndarray of float
        As for `scaled_dot_product_attention_vjp`.
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

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 4))
    >>> flexible_attention_vjp(x, x, x, x, mask_mod=lambda b, h, i, j: i == j).dv[0, :, 0, 0]
    array([1., 1.])
    """
    q, k, v, do = floating(q=q, k=k, v=v, do=do)
    dtype = q.dtype
    q, k, v, do = widen(q), widen(k), widen(v), widen(do)
    rule = mod_rule(
        q, k, v, mask_mod=mask_mod, score_mod=score_mod, score_mod_vjp=score_mod_vjp, block_mask=block_mask,
        aux=aux, scale=scale,
    )  # fmt: skip
    bind_axes({"q": (q, "B Tq Hq D"), "v": (v, "B Tk Hkv Dv"), "do": (do, "B Tq Hq Dv")})
    if rule.score is not None and rule.vjp is None:
        raise OptionError("score_mod_vjp: needed for gradients through score_mod")
    score, p, _ = _probabilities(q, k, rule)
    dp = contract("bihd,bjhd->bhij", do, np.repeat(v, rule.shape.group, axis=2))
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
    found = input_gradients(q, k, do, p, rule.product_gradient(ds, score, p > 0))
    return AttentionGradients(*(round_to(x, dtype) for x in found))


def _probabilities(q: FloatArray, k: FloatArray, rule: ModRule) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return scores before `score_mod` in the wide dtype, probabilities rounded, and the log-sum-exp."""
    score, modified = changed_scores(q, k, rule)
    rounded = round_to(modified, q.dtype).astype(score.dtype, copy=False)
    p, lse = softmax(rounded, return_lse=True)
    return score, round_to(p, q.dtype), lse


def changed_scores(q: FloatArray, k: FloatArray, rule: ModRule) -> tuple[FloatArray, FloatArray]:
    """Return scores in the wide dtype: before `score_mod`, and behind it and the mask.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 4))
    >>> [y.tolist() for y in changed_scores(x, x, mod_rule(x, x, x, mask_mod=lambda b, h, i, j: j < 1))]
    [[[[[2.0, 2.0], [2.0, 2.0]]]], [[[[2.0, -inf], [2.0, -inf]]]]]
    """
    product = contract("bihd,bjhd->bhij", q, np.repeat(k, rule.shape.group, axis=2))
    score = product * product.dtype.type(rule.scale)
    indices = _indices(rule.shape)
    modified = score if rule.score is None else modified_scores(rule.score, (score,), indices, rule.aux)
    if rule.mask is not None:
        allowed = where_allowed(rule.mask, indices, rule.aux)
        if rule.states is not None:
            allowed = np.where(rule.states == PARTIAL, allowed, rule.states == FULL)
        modified = np.where(allowed, modified, score.dtype.type(-np.inf))
    return score, modified


def input_gradients(
    q: FloatArray, k: FloatArray, do: FloatArray, p: FloatArray, dproduct: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return dq, dk and dv from the probabilities and the gradient of q·k, both rounded to the dtype of `q`.

    Examples
    --------
    >>> x, p = np.ones((1, 1, 1, 4)), np.ones((1, 1, 1, 1))
    >>> [float(y.sum()) for y in input_gradients(x, x, x, p, 2 * p)]
    [8.0, 8.0, 4.0]
    """
    group = q.shape[2] // k.shape[2]
    p, dproduct = round_to(p, q.dtype), round_to(dproduct, q.dtype)
    dq = contract("bhij,bjhd->bihd", dproduct, np.repeat(k, group, axis=2))
    dk = contract("bhij,bihd->bjhd", dproduct, q)
    dv = contract("bhij,bihd->bjhd", p, do)
    dk, dv = (x.reshape(*k.shape[:3], group, x.shape[3]).sum(axis=3) for x in (dk, dv))
    return dq, dk, dv


def _indices(shape: AttentionShape) -> tuple[Any, ...]:
    """Return b, h, i, j of every score, broadcasting to (B, Hq, Tq, Tk)."""
    sizes = (shape.B, shape.Hq, shape.Tq, shape.Tk)
    return tuple(
        np.arange(size).reshape(-1, *(1,) * (len(sizes) - 1 - axis)) for axis, size in enumerate(sizes)
    )
