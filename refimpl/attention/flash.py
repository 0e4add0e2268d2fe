"""FlashAttention, Algorithm 1: exact attention in tiles, with O(N) memory beside the inputs.

The outer loop holds a block of keys and values on chip, the inner loop passes the blocks of queries by.  A
query's output so far is the exact attention over the keys so far; each new block of keys rescales it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from refimpl.attention.dense import AttentionOutput, scaled_dot_product_attention
from refimpl.attention.online_softmax import SoftmaxState, block_state, merge, rescale
from refimpl.attention.output_spread import lse_spread
from refimpl.attention.samples import AXES, EDGES, OPTIONS, attention_terms, sample_tiled_attention
from refimpl.attention.scores import AttentionOptions, ScoreRule, score_rule
from refimpl.errors import DTypeError, OptionError
from refimpl.memory import Memory
from refimpl.numerics import Array, FloatArray, IntArray, contract, is_floating, round_to, wide_dtype
from refimpl.registry import Source, implements, technique
from refimpl.validation import floating, whole

__all__ = ["block_sizes_for", "blocks", "chosen_blocks", "flash_attention", "flash_attention_steps"]

DEFAULT_BLOCKS = (64, 64)


def block_sizes_for(sram: int, D: int) -> tuple[int, int]:
    """Return (Br, Bc), the rows and columns of a tile, for an SRAM of `sram` elements.

    Parameters
    ----------
    sram : int
        Capacity M in elements, not bytes.
    D : int
        Head width d.

    Returns
    -------
    tuple of int
        ``Bc = ceil(M / 4d)``, ``Br = min(Bc, d)``.

    Raises
    ------
    OptionError, DTypeError
        If `sram` or `D` is below 1, or no integer.

    Notes
    -----
    These sizes fill M with blocks of Q, K, V and O and leave no room for S, l and m, and the ceilings may
    exceed M by up to 4d elements: the paper's analysis is asymptotic.  A `Memory` with capacity M therefore
    refuses them; give it room for the tile of scores, or pass smaller `block_sizes`.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, Algorithm 1, line 1.

    Examples
    --------
    >>> block_sizes_for(64, 2)
    (2, 8)
    """
    whole("sram", sram)
    whole("D", D)
    Bc = -(-sram // (4 * D))
    return min(Bc, D), Bc


def blocks(length: int, size: int) -> list[slice]:
    """Return the slices that cut `length` rows into blocks of `size`, the last one ragged.

    Examples
    --------
    >>> blocks(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@implements("attention.dense", backend="numpy")
@technique(
    "attention.flash",
    entries=(29,),
    kind="function",
    source=Source("Dao et al. 2022", "arXiv:2205.14135", "Algorithm 1"),
    axes=AXES,
    options={**OPTIONS, "blocks": ("default", "3x5", "8x4", "sram")},
    edges=EDGES,
    sample=sample_tiled_attention,
    terms=attention_terms,
    spread=lambda case: lse_spread(scaled_dot_product_attention, case.without("block_sizes", "sram")),
    vjp="refimpl.attention.flash_backward:flash_attention_recomputed_vjp",
)
def flash_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    return_lse: bool = False,
    block_sizes: tuple[int, int] | None = None,
    sram: int | None = None,
    memory: Memory | None = None,
    accumulator: npt.DTypeLike | None = None,
    count_initialization: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return scaled dot-product attention, computed tile by tile as in Algorithm 1.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `scaled_dot_product_attention`.
    return_lse : bool
        Also return the log-sum-exp ``m + log(l)`` of each row, shape (B, Hq, Tq).
    block_sizes : tuple of int, optional
        (Br, Bc), queries and keys in a tile; any sizes from 1 on, the last blocks may be ragged.
    sram : int, optional
        Elements that fit on chip: sets the block sizes to those of the paper (`block_sizes_for`).  Without
        either, tiles are 64 x 64.
    memory : Memory, optional
        Counts what moves between HBM and SRAM; logs it, if it was told to.
    accumulator : dtype, optional
        Format of the output while it is accumulated in HBM.  Default: the wide dtype (float32 at least), as
        in the first released kernels; the paper's analysis keeps O in the dtype of Q.
    count_initialization : bool
        Count the stores of line 2, which set O and l to 0 and m to -inf.
    **options
        Those of `scaled_dot_product_attention`.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    OptionError
        If a block size is below 1, or both `block_sizes` and `sram` are given.
    CapacityError
        If `memory` has a capacity and a tile does not fit.
    ShapeError, DTypeError
        As `scaled_dot_product_attention`.

    Notes
    -----
    One head moves ``2 N d + T_c (3 N d + 4 N)`` elements for T_c = ceil(N / Bc) blocks of keys.  Masked
    blocks are visited all the same; `block_sparse_flash` skips them.  With dropout the sum l is over the
    undropped weights, and only the product with V uses the dropped ones.

    References
    ----------
    .. [1] Dao et al., 2022, arXiv:2205.14135, Algorithms 1 and 2.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((1, 7, 2, 4)) for _ in range(3))
    >>> a, b = (flash_attention(q, k, v, block_sizes=size) for size in ((2, 3), (7, 1)))
    >>> bool(np.allclose(a, b))
    True
    """
    steps = _outer_steps(
        q,
        k,
        v,
        block_sizes=block_sizes,
        sram=sram,
        memory=memory,
        accumulator=accumulator,
        count_initialization=count_initialization,
        **options,
    )
    *_, (_keys, out, state, dtype) = steps
    result = finished(out, state, dtype)
    return result if return_lse else result.out


def flash_attention_steps(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    block_sizes: tuple[int, int] | None = None,
    sram: int | None = None,
    memory: Memory | None = None,
    accumulator: npt.DTypeLike | None = None,
    count_initialization: bool = False,
    **options: Unpack[AttentionOptions],
) -> Iterator[tuple[int, AttentionOutput]]:
    """Yield, before the first and after each outer step, how many keys were seen and the output so far.

    Parameters are those of `flash_attention`.  After a step the output is the exact attention over the keys
    seen, which is the induction hypothesis of the paper's proof (appendix C, Theorem 1).

    Yields
    ------
    tuple of int and AttentionOutput
        Keys seen, and the output over them.  The arrays of the last step are the result.

    Examples
    --------
    >>> x = np.ones((1, 3, 1, 2))
    >>> [keys for keys, _ in flash_attention_steps(x, x, x, block_sizes=(3, 2))]
    [0, 2, 3]
    """
    steps = _outer_steps(
        q,
        k,
        v,
        block_sizes=block_sizes,
        sram=sram,
        memory=memory,
        accumulator=accumulator,
        count_initialization=count_initialization,
        **options,
    )
    for keys, out, state, dtype in steps:
        yield keys, finished(out.copy(), state, dtype)


def _outer_steps(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    block_sizes: tuple[int, int] | None,
    sram: int | None,
    memory: Memory | None,
    accumulator: npt.DTypeLike | None,
    count_initialization: bool,
    **options: Unpack[AttentionOptions],
) -> Iterator[tuple[int, FloatArray, SoftmaxState, np.dtype[Any]]]:
    """Yield the keys seen, the output and statistics in HBM, and the dtype of the result: lines 5 to 15."""
    q, k, v = floating(q=q, k=k, v=v)
    dtype = q.dtype
    rule = score_rule(q, k, v, **options)
    Br, Bc = chosen_blocks(block_sizes, sram, rule.shape.D)
    hbm = memory or Memory()
    B, Tq, Tk, Hq, _, _, Dv = rule.shape
    wide = wide_dtype(q.dtype)
    running = np.zeros((B, Tq, Hq, Dv), accumulator_dtype(accumulator, wide))
    out = running if running.dtype == q.dtype else np.zeros((B, Tq, Hq, Dv), q.dtype)
    m, l = np.full((B, Hq, Tq), -np.inf, wide), np.zeros((B, Hq, Tq), wide)  # noqa: E741
    for b, h in np.ndindex(B, Hq):
        if count_initialization:
            initialize(hbm, out if Tk == 0 else running, m, l, b, h)
        elif Tk == 0:  # without keys the zeros are the result, and must be written
            hbm.store("O", out[b, :, h], None, out[b, :, h].copy())
    yield 0, running, SoftmaxState(m, l), dtype

    for columns in blocks(Tk, Bc):
        target = out if columns.stop == Tk else running
        for b, h in np.ndindex(B, Hq):
            group = h // rule.shape.group
            with hbm.on_chip():
                k_j, v_j = hbm.load("K", k[b, :, group], columns), hbm.load("V", v[b, :, group], columns)
                for rows in blocks(Tq, Br):
                    where = b, h, rows, columns
                    inner_step(hbm, rule, (q, k_j, v_j), running, target, SoftmaxState(m, l), where)
        yield columns.stop, target, SoftmaxState(m, l), dtype


def inner_step(
    hbm: Memory,
    rule: ScoreRule,
    tiles: tuple[FloatArray, FloatArray, FloatArray],
    running: FloatArray,
    target: FloatArray,
    statistics: SoftmaxState,
    where: tuple[int, int, slice, slice],
) -> None:
    """Take one block of queries past one block of keys: lines 8 to 13 of Algorithm 1.

    Parameters
    ----------
    hbm : Memory
        What everything goes through.
    rule : ScoreRule
        The options of the call.
    tiles : tuple of ndarray
        Q in HBM, and the blocks of K and V that are on chip.
    running, target : ndarray of float, shape (B, Tq, Hq, Dv)
        Where the output so far is read and the new one written.
    statistics : SoftmaxState
        m and l in HBM, shape (B, Hq, Tq); overwritten.
    where : tuple of int, int, slice, slice
        Sequence, query head, rows, columns.
    """
    q, k_j, v_j = tiles
    b, h, rows, columns = where
    index = np.asarray(b), np.asarray(h), _range(rows), _range(columns)
    with hbm.on_chip():
        q_i, o_i = hbm.load("Q", q[b, :, h], rows), hbm.load("O", running[b, :, h], rows)
        l_i, m_i = hbm.load("l", statistics.l[b, h], rows), hbm.load("m", statistics.m[b, h], rows)
        s = hbm.compute("S", rule.scores(contract("id,jd->ij", q_i, k_j), *index))
        block = block_state(s)
        p = round_to(rescale(s, block.m[:, None]), q_i.dtype)
        keep = rule.keep(*index)
        dropped = p if keep is None else round_to(p * keep, p.dtype)
        new = merge(SoftmaxState(m_i, l_i), block)
        total = np.where(new.l == 0, 1, new.l)
        o_i = (l_i * rescale(m_i, new.m) / total)[:, None] * o_i + (rescale(block.m, new.m) / total)[
            :, None
        ] * contract("ij,jd->id", dropped, v_j)
        hbm.store("O", target[b, :, h], rows, o_i)
        hbm.store("l", statistics.l[b, h], rows, new.l)
        hbm.store("m", statistics.m[b, h], rows, new.m)


def chosen_blocks(block_sizes: tuple[int, int] | None, sram: int | None, D: int) -> tuple[int, int]:
    """Return (Br, Bc) as given, from the size of the SRAM, or the default.

    Raises
    ------
    OptionError
        If both are given, or a size is below 1.

    Examples
    --------
    >>> chosen_blocks(None, 64, 2)
    (2, 8)
    """
    if block_sizes is not None and sram is not None:
        raise OptionError("block_sizes and sram: both say how large a tile is; give one")
    if sram is not None:
        return block_sizes_for(sram, D)
    sizes: Any = DEFAULT_BLOCKS if block_sizes is None else block_sizes
    if not isinstance(sizes, tuple | list) or len(sizes) != 2:
        raise OptionError(f"block_sizes: expected (Br, Bc), got {block_sizes!r}")
    return whole("block_sizes", sizes[0]), whole("block_sizes", sizes[1])


def accumulator_dtype(accumulator: npt.DTypeLike | None, wide: np.dtype[Any]) -> np.dtype[Any]:
    """Return the format in which the output is accumulated: `wide` unless the caller names one.

    Raises
    ------
    DTypeError
        If it is no floating format.

    Examples
    --------
    >>> accumulator_dtype(None, np.dtype(np.float32))
    dtype('float32')
    """
    if accumulator is None:
        return wide
    try:
        dtype = np.dtype(accumulator)
    except TypeError:
        raise DTypeError(f"accumulator: expected a floating dtype, got {accumulator!r}") from None
    if not is_floating(dtype):
        raise DTypeError(f"accumulator: expected a floating dtype, got {dtype}")
    return dtype


def initialize(hbm: Memory, o: Array, m: Array, l: Array, b: int, h: int) -> None:  # noqa: E741
    """Store the initial O, l and m of one head: line 2 of Algorithm 1."""
    for name, array in (("O", o[b, :, h]), ("l", l[b, h]), ("m", m[b, h])):
        hbm.store(name, array, None, array.copy())


def finished(o: FloatArray, state: SoftmaxState, dtype: np.dtype[Any]) -> AttentionOutput:
    """Return the output in `dtype` and the log-sum-exp ``m + log(l)``."""
    with np.errstate(divide="ignore"):  # log(0) = -inf: no key was attended
        lse = state.m + np.log(state.l)
    return AttentionOutput(round_to(o, dtype), lse)


def _range(rows: slice) -> IntArray:
    return np.arange(rows.start, rows.stop)
