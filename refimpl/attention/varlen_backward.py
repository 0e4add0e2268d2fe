"""Gradients of packed sequences from what the forward pass returned: Algorithm 4, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.dense import AttentionGradients
from refimpl.attention.flash_backward import flash_attention_vjp
from refimpl.attention.gradient_spread import gradient_spread
from refimpl.attention.samples_varlen import AXES, EDGES, OPTIONS, sample_varlen
from refimpl.attention.scores import Causal
from refimpl.attention.varlen import (
    EVERYWHERE,
    Seen,
    gradients_by_sequence,
    packing,
    varlen_attention,
)
from refimpl.numerics import FloatArray, IntArray
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = ["varlen_attention_backward"]


def sample_varlen_backward(rng: np.random.Generator, **shape: Any) -> Case:
    """Return a call of the backward pass, its output and log-sum-exp those of the forward pass.

    Examples
    --------
    >>> shape = dict(S=2, Lq=3, Lk=3, Hkv=1, group=1, D=2, Dv=3, causal=False, tail="none", return_lse=False)
    >>> [a.shape for a in sample_varlen_backward(np.random.default_rng(0), **shape).args][5:]
    [(5, 1, 3), (1, 5), (5, 1, 3)]
    """
    case = sample_varlen(rng, **shape)
    forward = case.replace(return_lse=True).call(varlen_attention)
    return case.replace(*case.args, forward.out, forward.lse, rng.standard_normal(forward.out.shape))


def _spread(case: Case) -> AttentionGradients:
    """Return the sizes of the gradients' terms, as `gradient_spread` does, sequence by sequence."""

    def of_one(*args: Any, **options: Any) -> AttentionGradients:
        return gradient_spread(Case(args, options))

    return _by_sequence(of_one, *case.args, **case.kwargs)


@technique(
    "attention.varlen_backward",
    entries=(8, 30),
    kind="function",
    source=Source("Dao et al. 2022", "github.com/Dao-AILab/flash-attention", "_flash_attn_varlen_backward"),
    axes={**AXES, "S": (2, 4), "Lq": (2, 6), "Lk": (2, 6)},  # few without a query or a key
    options={**OPTIONS, "return_lse": (False,)},
    edges=tuple({**edge, "return_lse": False} for edge in EDGES),
    sample=sample_varlen_backward,
    spread=_spread,
    kernel_factor=3.0,
)
def varlen_attention_backward(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray,
    o: FloatArray,
    lse: FloatArray,
    do: FloatArray,
    /,
    *,
    causal: Causal = False,
    window_size: tuple[int, int] = EVERYWHERE,
    softcap: float | None = None,
    scale: float | None = None,
) -> AttentionGradients:
    """Return the gradients of `varlen_attention` from its output and its log-sum-exp.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k
        As for `varlen_attention`.
    o : ndarray of float, shape (total_q, Hq, Dv)
        Its output.
    lse : ndarray of float, shape (Hq, total_q)
        Its log-sum-exp.
    do : ndarray of float, shape (total_q, Hq, Dv)
        Gradient of the output.
    causal, window_size, softcap, scale
        Those of the forward call.

    Returns
    -------
    AttentionGradients
        In the dtype of the arrays; 0 for padding.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `varlen_attention`.

    References
    ----------
    .. [1] Dao et al., flash-attention, flash_attn_interface.py, ``_flash_attn_varlen_backward``: the layout.
    .. [2] Dao et al., 2022, arXiv:2205.14135, appendix B.4, Algorithm 4.

    Examples
    --------
    >>> x, starts = np.ones((3, 1, 4)), np.array([0, 2, 3])
    >>> out, lse = varlen_attention(x, x, x, starts, starts, return_lse=True)
    >>> varlen_attention_backward(x, x, x, starts, starts, out, lse, x).dv[:, 0, 0]
    array([1., 1., 1.])
    """
    q, k, v, o, do = floating(q=q, k=k, v=v, o=o, do=do)
    (lse,) = floating(lse=lse)
    bind_axes({"q": (q, "Tq Hq D"), "v": (v, "Tk Hkv Dv"), "o": (o, "Tq Hq Dv"), "do": (do, "Tq Hq Dv")})
    bind_axes({"q": (q, "Tq Hq D"), "lse": (lse, "Hq Tq")})
    options: dict[str, Any] = {"causal": causal, "window_size": window_size}
    return _by_sequence(
        flash_attention_vjp, q, k, v, cu_seqlens_q, cu_seqlens_k, o, lse, do, **options,
        softcap=softcap, scale=scale,
    )  # fmt: skip


def _by_sequence(
    gradients: Any, q: FloatArray, k: FloatArray, v: FloatArray, cu_seqlens_q: IntArray,
    cu_seqlens_k: IntArray, o: FloatArray, lse: FloatArray, do: FloatArray, /, *,
    causal: Causal = False, window_size: tuple[int, int] = EVERYWHERE, **options: Any,
) -> AttentionGradients:  # fmt: skip
    """Return what `gradients` says of each sequence, packed again."""
    pack = packing(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal)
    return gradients_by_sequence(
        gradients, (q, k, v), pack, Seen(pack, causal, window_size),
        lambda queries: (o[queries], lse[:, queries], do[queries]), **options,
    )  # fmt: skip
