"""Longformer's attention as it is trained: global queries have projections of their own."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import numpy as np

from refimpl.attention.dense import (
    AttentionGradients,
    AttentionOutput,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.attention.global_tokens import (
    global_of_each,
    global_tiles,
    global_tokens_attention,
    global_tokens_attention_vjp,
    local_tiles,
)
from refimpl.attention.patterns import looks_back_only, self_shape, tiled
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_sparse import GLOBAL_EDGES, OPTIONS, SHAPE, sample_longformer
from refimpl.attention.scores import AttentionOptions, with_seed
from refimpl.attention.sliding_window_banded import window_block
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "LongformerGradients",
    "longformer_attention",
    "longformer_attention_blocked",
    "longformer_attention_vjp",
]


class LongformerGradients(NamedTuple):
    """Gradients of the six projections, in their shapes."""

    dq: FloatArray
    dk: FloatArray
    dv: FloatArray
    dq_global: FloatArray
    dk_global: FloatArray
    dv_global: FloatArray


def _terms(case: Case) -> tuple[int, Any]:
    """Return the sums of absolute terms: those of both attentions, each where it is used."""
    hub = global_of_each(case.kwargs["is_global"], self_shape(*case.args[:3]))
    n, everywhere = attention_terms(Case(case.args[3:], case.without("radius", "is_global").kwargs))
    q, k, v = case.args[:3]
    local: Any = case.replace(q, k, np.abs(v)).call(global_tokens_attention)
    if isinstance(local, AttentionOutput):
        near = np.where(np.isfinite(local.lse), np.abs(local.lse), 0.0) + 1.0
        return n, _choose(hub, everywhere, AttentionOutput(local.out, near))
    return n, _choose(hub, everywhere, local)


def _choose(
    hub: BoolArray, everywhere: FloatArray | AttentionOutput, local: FloatArray | AttentionOutput
) -> FloatArray | AttentionOutput:
    """Return `everywhere` for global queries and `local` for the others; `hub` is of shape (B, T)."""
    if isinstance(everywhere, AttentionOutput) and isinstance(local, AttentionOutput):
        out = np.where(hub[..., None, None], everywhere.out, local.out)
        return AttentionOutput(out, np.where(hub[:, None], everywhere.lse, local.lse))
    chosen: FloatArray = np.where(hub[..., None, None], everywhere, local)
    return chosen


@technique(
    "attention.longformer",
    entries=(20,),
    kind="function",
    source=Source(
        "Beltagy et al. 2020", "arXiv:2004.05150", "section 3.1, 'Linear Projections for Global Attention'"
    ),
    axes={**SHAPE, "radius": (0, 6), "hubs": (0, 4)},
    options={**OPTIONS, "alike": (True, False)},
    edges=GLOBAL_EDGES,
    sample=sample_longformer,
    terms=_terms,
    vjp="refimpl.attention.longformer:longformer_attention_vjp",
)
def longformer_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    q_global: FloatArray,
    k_global: FloatArray,
    v_global: FloatArray,
    /,
    *,
    radius: int,
    is_global: BoolArray,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `global_tokens_attention` in which global queries see other projections of the tokens.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, Dv)
        Projections for the local queries, with which they see global keys too.
    q_global, k_global, v_global : ndarray of float, of the same shapes
        Projections for the global queries; those of all tokens, global or not.
    radius, is_global, return_lse, **options
        As for `global_tokens_attention`.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `global_tokens_attention`, and if the two sets of projections differ in shape.

    Notes
    -----
    The second set is initialized as a copy of the first, and then this is `global_tokens_attention`; training
    moves them apart.  **Special cases**

    - ``q_global`` at a local token, and ``q`` at a global one, change nothing.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1, "Linear Projections for Global Attention".
    .. [2] github.com/huggingface/transformers, models/longformer/modeling_longformer.py,
       `LongformerSelfAttention`.

    Examples
    --------
    >>> x, v = np.ones((1, 3, 1, 8)), np.array([0.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    >>> first = np.arange(3) == 0
    >>> longformer_attention(x, x, v, x, x, 10 * v, radius=0, is_global=first).ravel()
    array([20.,  1.,  2.])
    """
    local_arrays, global_arrays, hub = _checked(q, k, v, q_global, k_global, v_global, is_global)
    drawn = with_seed(options)
    if return_lse:
        return _choose(
            hub,
            scaled_dot_product_attention(*global_arrays, return_lse=True, **drawn),
            global_tokens_attention(*local_arrays, radius=radius, is_global=hub, return_lse=True, **drawn),
        )
    return _choose(
        hub,
        scaled_dot_product_attention(*global_arrays, **drawn),
        global_tokens_attention(*local_arrays, radius=radius, is_global=hub, **drawn),
    )


def longformer_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    q_global: FloatArray,
    k_global: FloatArray,
    v_global: FloatArray,
    do: FloatArray,
    /,
    *,
    radius: int,
    is_global: BoolArray,
    **options: Unpack[AttentionOptions],
) -> LongformerGradients:
    """Return the gradients of `longformer_attention`: of either attention, for the queries that take it.

    Examples
    --------
    >>> x, nothing = np.ones((1, 3, 1, 4)), np.zeros(3, dtype=bool)
    >>> gradients = longformer_attention_vjp(x, x, x, x, x, x, x, radius=0, is_global=nothing)
    >>> bool(gradients.dv_global.any())
    False
    """
    local_arrays, global_arrays, hub = _checked(q, k, v, q_global, k_global, v_global, is_global)
    (do,) = floating(do=do)
    ours, nothing = hub[..., None, None], do.dtype.type(0)
    everywhere = scaled_dot_product_attention_vjp(*global_arrays, np.where(ours, do, nothing), **options)
    local: AttentionGradients = global_tokens_attention_vjp(
        *local_arrays, np.where(ours, nothing, do), radius=radius, is_global=hub, **options
    )
    return LongformerGradients(*local[:3], *everywhere[:3])


@implements("attention.longformer", backend="numpy")
def longformer_attention_blocked(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    q_global: FloatArray,
    k_global: FloatArray,
    v_global: FloatArray,
    /,
    *,
    radius: int,
    is_global: BoolArray,
    return_lse: bool = False,
    block_size: int | None = None,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `longformer_attention`, the band and the global queries apart: O(N (radius + g)).

    Parameters
    ----------
    q, k, v, q_global, k_global, v_global, radius, is_global, return_lse, **options
        As for `longformer_attention`.
    block_size : int, optional
        Queries of a block.  Default ``max(radius, 16)``.
    memory : Memory, optional
        Counts traffic and operations.

    Returns
    -------
    ndarray or AttentionOutput
        As `longformer_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `longformer_attention`, and if `block_size` is not positive.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((1, 40, 1, 4))
    >>> pattern = {"radius": 3, "is_global": np.arange(40) % 9 == 0}
    >>> blocked = longformer_attention_blocked(x, x, x, -x, x, x, **pattern)
    >>> bool(np.allclose(blocked, longformer_attention(x, x, x, -x, x, x, **pattern)))
    True
    """
    local_arrays, global_arrays, hub = _checked(q, k, v, q_global, k_global, v_global, is_global)
    block, drawn = window_block(whole("radius", radius, 0), block_size), with_seed(options)
    backward, heads = looks_back_only(options), range(local_arrays[0].shape[2])
    near = (
        tile
        for b, one in enumerate(hub)
        for tile in local_tiles(one, radius, block, backward=backward, sequences=[b], heads=heads)
    )
    everything = (
        tile
        for b, one in enumerate(hub)
        for tile in global_tiles(one, block, backward=backward, sequences=[b], heads=heads)
    )
    return _choose(
        hub,
        tiled(*global_arrays, everything, drawn, return_lse=return_lse, memory=memory),
        tiled(*local_arrays, near, drawn, return_lse=return_lse, memory=memory),
    )


def _checked(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    q_global: FloatArray,
    k_global: FloatArray,
    v_global: FloatArray,
    is_global: BoolArray,
) -> tuple[tuple[FloatArray, FloatArray, FloatArray], tuple[FloatArray, FloatArray, FloatArray], BoolArray]:
    """Return the two sets of projections in one dtype, and which tokens are global, shape (B, T)."""
    q, k, v, q_global, k_global, v_global = floating(
        q=q, k=k, v=v, q_global=q_global, k_global=k_global, v_global=v_global
    )
    axes = {"q": (q, "B T Hq D"), "q_global": (q_global, "B T Hq D")}
    axes |= {"k": (k, "B T Hkv D"), "k_global": (k_global, "B T Hkv D")}
    bind_axes({**axes, "v": (v, "B T Hkv Dv"), "v_global": (v_global, "B T Hkv Dv")})
    return (q, k, v), (q_global, k_global, v_global), global_of_each(is_global, self_shape(q, k, v))
