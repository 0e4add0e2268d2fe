"""Attention with Q Kᵀ in int8: a scale for each block of rows, keys smoothed first, P V as it always is.

A vector that is the same for every key adds the same number to all scores of a query, and the softmax does
not see it.  Keys have such a vector, large and shared: without it they are spread over the int8 grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.attention.output_spread import output_spread
from refimpl.attention.samples import sample_attention
from refimpl.attention.scores import Causal, ScoreRule, score_rule
from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, IntArray, contract, round_to, wide_dtype, widen
from refimpl.quant.absmax import LIMIT
from refimpl.registry import Case, Source, technique
from refimpl.validation import as_array, flag, floating, whole

__all__ = ["DEFAULT_BLOCKS", "Int8Blocks", "int8_attention", "key_mean", "quantize_token_blocks"]

DEFAULT_BLOCKS = (64, 128)


class Int8Blocks(NamedTuple):
    """Codes [B, T, H, D], and the scale of each block of tokens of a head [B, H, ceil(T / block)]."""

    codes: IntArray
    scale: FloatArray


def key_mean(k: FloatArray, /) -> FloatArray:
    """Return the mean of the keys of each head, which smoothing takes off.

    Parameters
    ----------
    k : ndarray of float, shape (B, Tk, Hkv, D)
        Keys.

    Returns
    -------
    ndarray of float, shape (B, Hkv, D)
        In `wide_dtype` of `k`; of no keys it is 0.

    Raises
    ------
    DTypeError
        If `k` is not real.

    Examples
    --------
    >>> key_mean(np.array([1.0, 3.0]).reshape(1, 2, 1, 1)).item()
    2.0
    """
    (k,) = floating(k=k)
    wide = widen(k).astype(wide_dtype(k.dtype), copy=False)
    mean: FloatArray = wide.sum(axis=1) / wide.dtype.type(max(k.shape[1], 1))
    return mean


def quantize_token_blocks(x: FloatArray, /, *, block: int, mean: FloatArray | None = None) -> Int8Blocks:
    """Return the int8 codes of ``x - mean``, a scale for each `block` tokens of a head.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, H, D)
        Queries or keys.
    block : int
        Tokens that share a scale; the last block may be shorter.
    mean : ndarray of float, shape (B, H, D), optional
        Taken off first, in the wide dtype.

    Returns
    -------
    Int8Blocks
        ``scale`` is absmax / 127 in `wide_dtype` of `x`; of a block of zeros it is 0.

    Raises
    ------
    ShapeError, DTypeError
        If `x` is not real or has not four axes.
    OptionError
        If `block` is below 1, or a number is NaN or infinite.

    Notes
    -----
    A code is ``rint(x * (127 / absmax))``, halves to even; -128 stays unused.

    References
    ----------
    .. [1] Zhang et al., 2024, arXiv:2410.02367, section 4, per-block quantization.

    Examples
    --------
    >>> stored = quantize_token_blocks(np.array([127.0, -2.0, 1.0]).reshape(1, 3, 1, 1), block=2)
    >>> stored.codes.reshape(-1), stored.scale.round(5).tolist()
    (array([127,  -2, 127], dtype=int8), [[[1.0, 0.00787]]])
    """
    (x,) = floating(x=x)
    whole("block", block)
    wide = widen(x).astype(wide_dtype(x.dtype), copy=False)
    if mean is not None:
        wide = wide - mean[:, None]
    if not np.isfinite(wide).all():
        raise OptionError("q and k: expected finite numbers; NaN and infinity have no code")
    B, T, H, _ = wide.shape
    starts = np.arange(0, T, block)
    rows = np.max(np.abs(wide), axis=3, initial=0)
    absmax = np.maximum.reduceat(rows, starts, axis=1) if T else rows
    with np.errstate(divide="ignore", over="ignore"):
        factor = wide.dtype.type(LIMIT) / absmax
    factor = np.where(np.isfinite(factor), factor, 0)
    codes = np.rint(wide * np.repeat(factor, block, axis=1)[:, :T, :, None]).astype(np.int8)
    scale = np.ascontiguousarray(absmax.transpose(0, 2, 1)) / wide.dtype.type(LIMIT)
    return Int8Blocks(codes, scale.reshape(B, H, len(starts)))


def sample_int8_attention(
    rng: np.random.Generator, *, smooth: bool, blocks: str, offset: bool, **shape: Any
) -> Case:
    """Return a call of `int8_attention`.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    smooth : bool
        Passed on.
    blocks : {"default", "4x3"}
        Queries and keys that share a scale.
    offset : bool
        Whether all keys have a large vector in common.
    **shape
        As for `refimpl.attention.samples.sample_attention`.

    Returns
    -------
    Case

    Examples
    --------
    >>> sizes = dict(B=1, Tq=2, Tk=3, Hkv=1, group=1, D=4, Dv=5)
    >>> options = dict(smooth=False, blocks="4x3", offset=True)
    >>> sample_int8_attention(np.random.default_rng(0), **options, **sizes).kwargs
    {'smooth': False, 'block_sizes': (4, 3)}
    """
    case = sample_attention(rng, **shape)
    q, k, v = case.args
    if offset:
        k = k + 8.0 * rng.standard_normal((k.shape[0], 1, *k.shape[2:]))
    options: dict[str, Any] = {"smooth": False} if not smooth else {}
    if blocks != "default":
        rows, columns = blocks.split("x")
        options["block_sizes"] = (int(rows), int(columns))
    return Case((q, k, v), {**case.kwargs, **options})


def _terms(case: Case) -> tuple[int, FloatArray]:
    q, k, v = case.args
    return k.shape[1] + q.shape[3], 2 * case.replace(q, k, np.abs(v)).call(int8_attention)


_PLAIN: dict[str, int | str | bool] = {
    "causal": False, "extra": "none", "smooth": True, "blocks": "4x3", "offset": False
}  # fmt: skip


def _spread(case: Case) -> Any:
    return output_spread(int8_attention, case)


@technique(
    "attention.int8",
    entries=(29, 72),
    kind="function",
    source=Source("Zhang et al. 2024", "arXiv:2410.02367", "section 4.2, smooth matrix K; Algorithm 1"),
    axes={
        "B": (1, 2),
        "Tq": (1, 12),
        "Tk": (1, 12),
        "Hkv": (1, 2),
        "group": (1, 2),
        "D": (1, 9),
        "Dv": (1, 9),
    },
    options={
        "causal": (False, "top_left", "bottom_right"),
        "extra": ("none", "scale"),
        "smooth": (True, False),
        "blocks": ("default", "4x3"),
        "offset": (False, True),
    },
    edges=(
        {**_PLAIN, "B": 1, "Tq": 1, "Tk": 1, "Hkv": 1, "group": 1, "D": 1, "Dv": 1},
        {**_PLAIN, "B": 0, "Tq": 3},
        {**_PLAIN, "Tq": 0, "Tk": 3},
        {**_PLAIN, "Tq": 3, "Tk": 0},
        {**_PLAIN, "Tq": 9, "Tk": 11, "Hkv": 2, "group": 2, "D": 8, "offset": True},
        {**_PLAIN, "Tq": 12, "Tk": 5, "causal": "bottom_right"},
        {**_PLAIN, "Tq": 5, "Tk": 12, "causal": "top_left", "smooth": False},
        {**_PLAIN, "Tq": 6, "Tk": 6, "extra": "ties"},
        {**_PLAIN, "B": 1, "Tq": 70, "Tk": 131, "Hkv": 1, "group": 1, "D": 16, "Dv": 8, "blocks": "default"},
    ),
    sample=sample_int8_attention,
    terms=_terms,
    spread=_spread,
)
def int8_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    causal: Causal = False,
    scale: float | None = None,
    smooth: bool = True,
    block_sizes: tuple[int, int] = DEFAULT_BLOCKS,
    memory: Memory | None = None,
) -> FloatArray:
    """Return attention whose scores are products of int8 codes of the queries and of the smoothed keys.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        As for `scaled_dot_product_attention`.
    causal, scale
        As for `scaled_dot_product_attention`.
    smooth : bool
        Take the mean over keys off each key first.
    block_sizes : tuple of int
        Queries, and keys, that share a scale.
    memory : Memory, optional
        Counts what moves, every array once in each of three passes: mean, codes, attention.

    Returns
    -------
    ndarray of float, shape (B, Tq, Hq, Dv)
        In the common dtype of q, k and v; P is rounded to it before P V.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention`, and `quantize_token_blocks`.

    Notes
    -----
    With steps δ of the blocks, a score errs by at most ``scale * (δ_q |k|₁ / 2 + δ_k |q|₁ / 2 + D δ_q δ_k /
    4)``, and if all scores of a row err by at most ε, its output by at most ``(exp(2 ε) - 1) Σ p |v|``.

    **Special cases**

    - A row with no attended key gives 0.  Smoothing is over all keys, masked ones too.
    - The paper's kernels take 128 queries and 64 keys a block, for others of theirs finer ones.

    References
    ----------
    .. [1] Zhang et al., 2024, arXiv:2410.02367, section 4.2 and Algorithm 1.

    Examples
    --------
    >>> q, k = np.ones((1, 1, 1, 8)), np.ones((1, 2, 1, 8))
    >>> v = np.array([2.0, 4.0]).reshape(1, 2, 1, 1)
    >>> int8_attention(q, k, v).item()
    3.0
    """
    q, k, v = floating(q=q, k=k, v=v)
    rule = score_rule(widen(q), widen(k), widen(v), causal=causal, scale=scale)
    rows, columns = block_sizes
    hbm = memory or Memory()
    mean = _stored_mean(hbm, k) if flag("smooth", smooth) else None
    queries = _stored_codes(hbm, "Q", q, rows, None)
    keys = _stored_codes(hbm, "K", k, columns, mean)
    out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
    with hbm.on_chip():
        products = _products(
            Int8Blocks(hbm.load("Q codes", queries.codes), hbm.load("Q scale", queries.scale)),
            Int8Blocks(hbm.load("K codes", keys.codes), hbm.load("K scale", keys.scale)),
            block_sizes,
            rule,
        )
        scores = rule.scores(products, *_everywhere(rule))
        p = round_to(softmax(scores), q.dtype)
        values = np.repeat(hbm.load("V", v), rule.shape.group, axis=2)
        hbm.store("O", out, None, round_to(contract("bhij,bjhd->bihd", widen(p), values), q.dtype))
    return out


def _stored_mean(hbm: Memory, k: FloatArray) -> FloatArray:
    mean = np.empty((k.shape[0], *k.shape[2:]), wide_dtype(k.dtype))
    with hbm.on_chip():
        hbm.store("K mean", mean, None, key_mean(hbm.load("K", k).astype(mean.dtype)))
    return mean


def _stored_codes(hbm: Memory, name: str, x: FloatArray, block: int, mean: FloatArray | None) -> Int8Blocks:
    wide = wide_dtype(x.dtype)
    with hbm.on_chip():
        taken = None if mean is None else hbm.load("K mean", mean)
        found = quantize_token_blocks(hbm.load(name, x).astype(wide), block=block, mean=taken)
        stored = Int8Blocks(np.empty_like(found.codes), np.empty_like(found.scale))
        hbm.store(f"{name} codes", stored.codes, None, found.codes)
        hbm.store(f"{name} scale", stored.scale, None, found.scale)
    return stored


def _products(
    queries: Int8Blocks, keys: Int8Blocks, block_sizes: tuple[int, int], rule: ScoreRule
) -> FloatArray:
    """Return ``(codes_q · codes_k) * (scale_q * scale_k)``, (B, Hq, Tq, Tk); the first factor is exact."""
    group, shape = rule.shape.group, rule.shape
    codes = as_array("codes", np.repeat(keys.codes, group, axis=2)).astype(np.float64)
    whole_numbers = contract("bihd,bjhd->bhij", queries.codes.astype(np.float64), codes)
    rows = np.repeat(queries.scale, block_sizes[0], axis=2)[:, :, : shape.Tq]
    columns = np.repeat(np.repeat(keys.scale, group, axis=1), block_sizes[1], axis=2)[:, :, : shape.Tk]
    products: FloatArray = whole_numbers.astype(rule.wide) * (rows[..., None] * columns[:, :, None])
    return products


def _everywhere(rule: ScoreRule) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return the indices (b, h, rows, columns) of the whole score matrix."""
    shape = rule.shape
    return (
        np.arange(shape.B)[:, None], np.arange(shape.Hq)[None, :], np.arange(shape.Tq), np.arange(shape.Tk)
    )  # fmt: skip
