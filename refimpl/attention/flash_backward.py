"""FlashAttention, Algorithm 4: gradients from the output and its statistics, probabilities recomputed."""

from __future__ import annotations

from typing import Any, Unpack, cast

import numpy as np

from refimpl.attention.dense import AttentionGradients, scaled_dot_product_attention
from refimpl.attention.flash import blocks, chosen_blocks, flash_attention
from refimpl.attention.gradient_spread import gradient_spread
from refimpl.attention.online_softmax import rescale
from refimpl.attention.samples import AXES, EDGES, OPTIONS, sample_tiled_attention
from refimpl.attention.scores import AttentionOptions, ScoreRule, backward_rule, with_seed
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, contract, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["flash_attention_recomputed_vjp", "flash_attention_vjp"]


def sample_backward(rng: np.random.Generator, **shape: Any) -> Case:
    """Return a call of the backward pass, its output and log-sum-exp those of the forward pass.

    Examples
    --------
    >>> shape = dict(B=1, Tq=2, Tk=3, Hkv=1, group=2, D=4, Dv=5)
    >>> [a.shape for a in sample_backward(np.random.default_rng(0), **shape).args][3:]
    [(1, 2, 2, 5), (1, 2, 2), (1, 2, 2, 5)]
    """
    case = sample_tiled_attention(rng, **shape).without("return_lse")
    forward = case.without("block_sizes", "sram").replace(return_lse=True).call(scaled_dot_product_attention)
    return case.replace(*case.args, forward.out, forward.lse, rng.standard_normal(forward.out.shape))


@technique(
    "attention.flash_backward",
    entries=(30,),
    kind="function",
    source=Source("Dao et al. 2022", "arXiv:2205.14135", "Algorithm 4"),
    axes=AXES,
    options={**OPTIONS, "return_lse": (False,), "blocks": ("default", "3x5", "8x4", "sram")},
    edges=tuple({**edge, "return_lse": False} for edge in EDGES),
    sample=sample_backward,
    spread=gradient_spread,
    kernel_factor=3.0,
)
def flash_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    o: FloatArray,
    lse: FloatArray,
    do: FloatArray,
    /,
    *,
    block_sizes: tuple[int, int] | None = None,
    sram: int | None = None,
    memory: Memory | None = None,
    count_initialization: bool = False,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of attention, tile by tile, from what the forward pass returned.

    Parameters
    ----------
    q, k, v : ndarray of float
        As for `flash_attention`.
    o : ndarray of float, shape (B, Tq, Hq, Dv)
        Its output, after dropout.
    lse : ndarray of float, shape (B, Hq, Tq)
        Its log-sum-exp: ``l * exp(m)`` is all of the two statistics that the gradient needs.
    do : ndarray of float, shape (B, Tq, Hq, Dv)
        Gradient of the output.
    block_sizes, sram, memory, count_initialization
        As for `flash_attention`; line 5 sets dQ, dK and dV to 0.
    **options
        Those of the forward call; with dropout the same integer seed or mask, which regenerates what was
        dropped.

    Returns
    -------
    AttentionGradients
        In the dtype of the arrays; `dbias`, of the shape of `bias`, if one was given.

    Raises
    ------
    ShapeError, DTypeError, OptionError, CapacityError
        As `flash_attention`.

    Notes
    -----
    One head moves ``4 N d + T_c (5 N d + N)`` elements: K and V read once, dK and dV written once, and for
    each block of keys Q, O, dO and the statistic read, dQ read and written.  The paper keeps l and m apart
    and moves ``2 N`` for them.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, appendix B.4, Algorithm 4.
    .. [2] Dao, 2023, arXiv:2307.08691, section 3.1.2: the log-sum-exp alone is enough.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 4))
    >>> out, lse = flash_attention(x, x, x, return_lse=True)
    >>> flash_attention_vjp(x, x, x, out, lse, x).dv[0, :, 0, 0]
    array([1., 1.])
    """
    q, k, v, o, do = floating(q=q, k=k, v=v, o=o, do=do)
    dtype = q.dtype
    axes = {"q": (q, "B Tq Hq D"), "v": (v, "B Tk Hkv Dv"), "o": (o, "B Tq Hq Dv"), "do": (do, "B Tq Hq Dv")}
    bind_axes({**axes, "lse": (floating(lse=lse)[0], "B Hq Tq")})
    rule = backward_rule(q, k, v, **options)
    Br, Bc = chosen_blocks(block_sizes, sram, rule.shape.D)
    hbm = memory or Memory()
    wide = wide_dtype(q.dtype)
    lse = widen(floating(lse=lse)[0]).astype(wide, copy=False)
    # Query heads share the gradient of their key head, so it is summed over them in the wide dtype.
    dq, dk, dv = np.zeros(q.shape, q.dtype), np.zeros(k.shape, wide), np.zeros(v.shape, wide)
    bias = options.get("bias")
    dbias = None if bias is None else np.zeros((1,) * (4 - np.ndim(bias)) + np.shape(bias), wide)
    for b, h in np.ndindex(rule.shape.B, rule.shape.Hq):
        group = h // rule.shape.group
        head_dk, head_dv = np.zeros(k[b, :, 0].shape, q.dtype), np.zeros(v[b, :, 0].shape, q.dtype)
        if count_initialization:
            for name, gradient in (("dQ", dq[b, :, h]), ("dK", head_dk), ("dV", head_dv)):
                hbm.store(name, gradient, None, gradient.copy())
        for columns in blocks(rule.shape.Tk, Bc):
            with hbm.on_chip():
                k_j, v_j = hbm.load("K", k[b, :, group], columns), hbm.load("V", v[b, :, group], columns)
                dk_j, dv_j = np.zeros(k_j.shape, wide), np.zeros(v_j.shape, wide)
                hbm.compute("dK", dk_j)
                hbm.compute("dV", dv_j)
                for rows in blocks(rule.shape.Tq, Br):
                    with hbm.on_chip():
                        q_i, o_i = hbm.load("Q", q[b, :, h], rows), hbm.load("O", o[b, :, h], rows)
                        do_i, dq_i = hbm.load("dO", do[b, :, h], rows), hbm.load("dQ", dq[b, :, h], rows)
                        lse_i = hbm.load("L", lse[b, h], rows)
                        ds, p = _score_gradient(
                            hbm, rule, (q_i, k_j, v_j), o_i, do_i, lse_i, (b, h, rows, columns), dbias
                        )
                        dv_j += contract("ij,id->jd", p, do_i)
                        dk_j += contract("ij,id->jd", ds, q_i)
                        hbm.store("dQ", dq[b, :, h], rows, dq_i + contract("ij,jd->id", ds, k_j))
                hbm.store("dK", head_dk, columns, dk_j)
                hbm.store("dV", head_dv, columns, dv_j)
        dk[b, :, group] += widen(head_dk)
        dv[b, :, group] += widen(head_dv)
    return AttentionGradients(
        round_to(dq, dtype),
        round_to(dk, dtype),
        round_to(dv, dtype),
        None if bias is None or dbias is None else round_to(dbias.reshape(np.shape(bias)), dtype),
    )


def _score_gradient(
    hbm: Memory,
    rule: ScoreRule,
    tiles: tuple[FloatArray, FloatArray, FloatArray],
    o: FloatArray,
    do: FloatArray,
    lse: FloatArray,
    where: tuple[int, int, slice, slice],
    dbias: FloatArray | None,
) -> tuple[FloatArray, FloatArray]:
    """Return the gradient of q·k and the dropped probabilities of one tile: lines 11 to 20."""
    q_i, k_j, v_j = tiles
    b, h, rows, columns = where
    index = (
        np.asarray(b),
        np.asarray(h),
        np.arange(rows.start, rows.stop),
        np.arange(columns.start, columns.stop),
    )
    product = contract("id,jd->ij", q_i, k_j)
    p = hbm.compute("P", rescale(rule.scores(product, *index), lse[:, None]))
    keep = rule.keep(*index)
    dp = contract("id,jd->ij", do, v_j)
    if keep is not None:
        dp = dp * keep
    # rowsum(dO ∘ O) is rowsum(P ∘ dP) because O is the dropped output (appendix B.4, observation 2).
    rows_sum = np.sum(do.astype(p.dtype) * o, axis=-1, keepdims=True)
    ds = p * (dp - rows_sum)
    if dbias is not None:
        _add_to_bias(dbias, ds, where)
    dropped = p if keep is None else p * keep
    return round_to(rule.product_gradient(ds, product), q_i.dtype), round_to(dropped, q_i.dtype)


def _add_to_bias(dbias: FloatArray, ds: FloatArray, where: tuple[int, int, slice, slice]) -> None:
    """Add a tile's gradient to that of a bias of four axes, summed along those that were broadcast."""
    b, h, rows, columns = where
    spans = slice(b, b + 1), slice(h, h + 1), rows, columns
    stretched = tuple(axis for axis, size in enumerate(dbias.shape) if size == 1)
    index = tuple(slice(0, 1) if axis in stretched else span for axis, span in enumerate(spans))
    dbias[index] += ds[None, None].sum(axis=stretched, keepdims=True)


def flash_attention_recomputed_vjp(
    q: FloatArray, k: FloatArray, v: FloatArray, do: FloatArray, /, **options: Any
) -> AttentionGradients:
    """Return the gradients of `flash_attention` from its inputs alone: forward once more, then Algorithm 4.

    Parameters
    ----------
    q, k, v, do : ndarray of float
        As for `flash_attention_vjp`.
    **options
        Those of `flash_attention`.

    Returns
    -------
    AttentionGradients
        As `flash_attention_vjp`.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 4))
    >>> flash_attention_recomputed_vjp(x, x, x, x).dv[0, :, 0, 0]
    array([1., 1.])
    """
    options = {**options, **with_seed(cast("AttentionOptions", options))}
    options.pop("return_lse", None)
    out, lse = flash_attention(q, k, v, return_lse=True, **options)
    options.pop("accumulator", None)
    return flash_attention_vjp(q, k, v, out, lse, do, **options)
