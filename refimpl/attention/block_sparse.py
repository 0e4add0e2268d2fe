"""Block-sparse FlashAttention, Algorithm 5: Algorithm 1 without the tiles that a block mask leaves out."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from refimpl.attention.dense import AttentionGradients, AttentionOutput, scaled_dot_product_attention_vjp
from refimpl.attention.flash import accumulator_dtype, blocks, chosen_blocks, finished, inner_step
from refimpl.attention.online_softmax import SoftmaxState
from refimpl.attention.samples import AXES, EDGES, OPTIONS, sample_attention
from refimpl.attention.scores import AttentionOptions, score_rule
from refimpl.errors import DTypeError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, wide_dtype
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, broadcastable, floating

__all__ = ["block_sparse_flash", "block_sparse_flash_vjp", "expanded_mask"]


def expanded_mask(block_mask: BoolArray, block_sizes: tuple[int, int], Tq: int, Tk: int) -> BoolArray:
    """Return the mask of scores, shape (..., Tq, Tk), that a mask of blocks stands for.

    Examples
    --------
    >>> expanded_mask(np.array([[True, False]]), (2, 2), 2, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 0]])
    """
    Br, Bc = block_sizes
    return np.repeat(np.repeat(block_mask, Br, axis=-2), Bc, axis=-1)[..., :Tq, :Tk]


def sample_block_sparse(rng: np.random.Generator, *, density: str = "half", **shape: Any) -> Case:
    """Return a call with blocks of 3 x 4, and a random mask of blocks unless `density` is "all".

    Examples
    --------
    >>> shape = dict(B=1, Tq=6, Tk=5, Hkv=1, group=1, D=4, Dv=5)
    >>> sample_block_sparse(np.random.default_rng(0), **shape).kwargs["block_mask"].dtype
    dtype('bool')
    """
    case = sample_attention(rng, **shape)
    (B, Tq, H, _), Tk = case.args[0].shape, case.args[1].shape[1]
    tiles = len(blocks(Tq, 3)), len(blocks(Tk, 4))
    share = {"half": 0.5, "all": 1.1, "none": -1.0}[density]
    shapes = (B, 1, *tiles), (1, H, *tiles), tiles, (1, tiles[1]), (tiles[1],)
    mask = rng.random(shapes[int(rng.integers(len(shapes)))]) < share
    return case.replace(block_sizes=(3, 4), **({} if density == "all" else {"block_mask": mask}))


@technique(
    "attention.block_sparse_flash",
    entries=(31,),
    kind="function",
    source=Source("Dao et al. 2022", "arXiv:2205.14135", "Algorithm 5"),
    axes=AXES,
    options={**OPTIONS, "density": ("half", "all", "none")},
    edges=EDGES,
    sample=sample_block_sparse,
    terms=lambda case: _terms(case),
    vjp="refimpl.attention.block_sparse:block_sparse_flash_vjp",
)
def block_sparse_flash(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    block_mask: BoolArray | None = None,
    return_lse: bool = False,
    block_sizes: tuple[int, int] | None = None,
    sram: int | None = None,
    memory: Memory | None = None,
    accumulator: npt.DTypeLike | None = None,
    count_initialization: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention over the tiles that `block_mask` names; the others are neither read nor computed.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `scaled_dot_product_attention`.
    block_mask : ndarray of bool, broadcastable to (B, Hq, ceil(Tq / Br), ceil(Tk / Bc)), optional
        True for a tile that takes part.  Default: all of them.
    return_lse : bool
        Also return the log-sum-exp of each row.
    block_sizes, sram, memory, accumulator, count_initialization
        As for `flash_attention`.
    **options
        Those of `scaled_dot_product_attention`, inside the tiles that take part.

    Returns
    -------
    ndarray or AttentionOutput
        A query none of whose tiles takes part gets 0, and -inf as its log-sum-exp.

    Raises
    ------
    ShapeError, DTypeError, OptionError, CapacityError
        As `flash_attention`, and if `block_mask` is not bool or does not broadcast.

    Notes
    -----
    Traffic is Θ(N d + N² d² s / M), s the share of tiles that take part (Proposition 4).

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, section 3.3 and appendix D.1, Algorithm 5.

    Examples
    --------
    Two blocks on the diagonal are two attentions of their own:

    >>> x = np.arange(8.0).reshape(1, 4, 1, 2)
    >>> diagonal = block_sparse_flash(x, x, x, block_mask=np.eye(2, dtype=bool), block_sizes=(2, 2))
    >>> alone = block_sparse_flash(x[:, :2], x[:, :2], x[:, :2])
    >>> bool(np.allclose(diagonal[:, :2], alone))
    True
    """
    q, k, v = floating(q=q, k=k, v=v)
    rule = score_rule(q, k, v, **options)
    Br, Bc = chosen_blocks(block_sizes, sram, rule.shape.D)
    hbm = memory or Memory()
    B, Tq, Tk, Hq, _, _, Dv = rule.shape
    row_blocks, column_blocks = blocks(Tq, Br), blocks(Tk, Bc)
    present = _block_mask(block_mask, (B, Hq, len(row_blocks), len(column_blocks)))
    wide = wide_dtype(q.dtype)
    running = np.zeros((B, Tq, Hq, Dv), accumulator_dtype(accumulator, wide))
    out = running if running.dtype == q.dtype else np.zeros((B, Tq, Hq, Dv), q.dtype)
    m, l = np.full((B, Hq, Tq), -np.inf, wide), np.zeros((B, Hq, Tq), wide)  # noqa: E741
    for b, h in np.ndindex(B, Hq):
        group = h // rule.shape.group
        # A block of queries leaves for good after its last tile; without any tile its zeros are the output.
        last = [int(np.flatnonzero(tiles)[-1]) if tiles.any() else -1 for tiles in present[b, h]]
        for rows, tile in zip(row_blocks, last, strict=True):
            if tile < 0:
                hbm.store("O", out[b, :, h], rows, out[b, rows, h].copy())
            elif count_initialization:
                hbm.store("O", running[b, :, h], rows, running[b, rows, h].copy())
        if count_initialization:
            hbm.store("l", l[b, h], None, l[b, h].copy())
            hbm.store("m", m[b, h], None, m[b, h].copy())
        for j, columns in enumerate(column_blocks):
            if not present[b, h, :, j].any():
                continue
            with hbm.on_chip():
                k_j, v_j = hbm.load("K", k[b, :, group], columns), hbm.load("V", v[b, :, group], columns)
                for i, rows in enumerate(row_blocks):
                    if present[b, h, i, j]:
                        where = b, h, rows, columns
                        target = out if j == last[i] else running
                        inner_step(hbm, rule, (q, k_j, v_j), running, target, SoftmaxState(m, l), where)
    result = finished(out, SoftmaxState(m, l), q.dtype)
    return result if return_lse else result.out


def block_sparse_flash_vjp(
    q: FloatArray, k: FloatArray, v: FloatArray, do: FloatArray, /, **options: Any
) -> AttentionGradients:
    """Return the gradients of `block_sparse_flash`: those of dense attention with the blocks as a mask.

    Parameters
    ----------
    q, k, v, do : ndarray of float
        As for `scaled_dot_product_attention_vjp`.
    **options
        Those of `block_sparse_flash`.

    Returns
    -------
    AttentionGradients
        As `scaled_dot_product_attention_vjp`.

    Examples
    --------
    >>> x = np.ones((1, 2, 1, 4))
    >>> nothing = block_sparse_flash_vjp(x, x, x, x, block_mask=np.zeros((1, 1), bool))
    >>> bool(nothing.dv.any())
    False
    """
    return scaled_dot_product_attention_vjp(q, k, v, do, **_as_dense(Case((q, k, v), options)).kwargs)


def _as_dense(case: Case) -> Case:
    """Return the same call with the mask of blocks turned into a mask of scores."""
    q, k = case.args[:2]
    block_mask = case.kwargs.get("block_mask")
    tiling = ("block_mask", "block_sizes", "sram", "memory", "accumulator", "count_initialization")
    dense = case.without(*tiling)
    if block_mask is None:
        return dense
    sizes = chosen_blocks(case.kwargs.get("block_sizes"), case.kwargs.get("sram"), q.shape[3])
    tiles = -(-q.shape[1] // sizes[0]), -(-k.shape[1] // sizes[1])
    present = _block_mask(block_mask, (q.shape[0], q.shape[2], *tiles))
    mask = expanded_mask(present, sizes, q.shape[1], k.shape[1])
    return dense.replace(attn_mask=np.logical_and(case.kwargs.get("attn_mask", True), mask))


def _terms(case: Case) -> tuple[int, Any]:
    from refimpl.attention.samples import attention_terms

    return attention_terms(_as_dense(case))


def _block_mask(value: BoolArray | None, shape: tuple[int, ...]) -> BoolArray:
    if value is None:
        return np.ones(shape, dtype=bool)
    array = as_array("block_mask", value)
    if array.dtype != np.bool_:
        raise DTypeError(f"block_mask: expected bool, True = takes part, got {array.dtype}")
    return broadcastable("block_mask", array, shape)
