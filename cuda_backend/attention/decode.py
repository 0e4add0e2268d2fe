"""Decoding on a GPU: a few new queries over a long cache, whole or in pages."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuda_backend.arrays import absent, empty, is_host, view
from cuda_backend.attention.call import Call, prepare, reasons
from cuda_backend.attention.decode_portable import MERGE_THREADS, DecodeVariant, build, build_merge
from cuda_backend.launch import launch, shared_memory_bytes, stream_of
from cuda_backend.scratch import UNWRITTEN, scratch
from refimpl.attention import AttentionOutput
from refimpl.attention.decode import checked_pages
from refimpl.attention.scores import ScoreRule, score_rule
from refimpl.errors import ShapeError, UnsupportedError
from refimpl.validation import whole

__all__ = ["paged_attention", "split_kv_attention"]

KEYS, THREADS, SIMULATED_KEYS, SIMULATED_THREADS = 64, 128, 4, 4


def split_kv_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    splits: int = 1,
    k_lengths: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    stream: Any = None,
) -> Any:
    """Return the attention of the last queries over a cache, its parts computed side by side.

    Parameters
    ----------
    q, k, v, splits, k_lengths, scale, return_lse
        As for `refimpl.attention.split_kv_attention`; arrays as for `cuda_backend.flash_attention`.
    stream : int or stream object, optional
        As for `cuda_backend.flash_attention`.

    Returns
    -------
    array or AttentionOutput
        As `cuda_backend.flash_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `cuda_backend.flash_attention`; UnsupportedError too if the queries of a key head fill the GPU's
        shared memory.

    Notes
    -----
    The call needs ``splits B Tq Hq (Dv + 1)`` floats for itself.  Not yet run on a device.

    References
    ----------
    .. [1] Dao, Haziza, Massa & Sizov, 2023, Flash-Decoding for long-context inference.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> q, k = np.ones((1, 1, 2, 4), np.float32), np.ones((1, 5, 1, 4), np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert split_kv_attention(q, k, k, splits=2).shape == (1, 1, 2, 4)
    """
    call = prepare({"q": q, "k": k, "v": v}, _options(k_lengths, scale))
    return _decoded("split_kv_attention", call, None, k_lengths, splits, return_lse, stream)


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    /,
    *,
    k_lengths: Any,
    splits: int = 1,
    scale: float | None = None,
    return_lse: bool = False,
    stream: Any = None,
) -> Any:
    """Return `split_kv_attention` over a cache that lies in pages.

    Parameters
    ----------
    q, k_pages, v_pages, page_table, k_lengths, splits, scale, return_lse
        As for `refimpl.attention.paged_attention`.  A table on the GPU is taken as it is, unchecked.
    stream : int or stream object, optional
        As for `cuda_backend.flash_attention`.

    Returns
    -------
    array or AttentionOutput
        As `split_kv_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `split_kv_attention`, and as the reference.

    Notes
    -----
    Not yet run on a device.

    References
    ----------
    .. [1] Kwon et al., 2023, arXiv:2309.06180, section 4.1.
    """

    def rule(q: Any, k: Any, v: Any, **options: Any) -> ScoreRule:
        if is_host(page_table) and is_host(k_lengths):
            checked_pages(q, k, v, page_table, k_lengths)
        if k.ndim != 4 or v.ndim != 4 or len(np.shape(page_table)) != 2:
            raise ShapeError("k_pages, v_pages, page_table: expected 4, 4 and 2 axes")
        B, count = np.shape(page_table)
        cache = (np.broadcast_to(x[:1, :1], (B, count * x.shape[1], *x.shape[2:])) for x in (k, v))
        return score_rule(q, *cache, **options)

    call = prepare({"q": q, "k": k_pages, "v": v_pages}, _options(k_lengths, scale), rule)
    return _decoded("paged_attention", call, page_table, k_lengths, splits, return_lse, stream)


def _options(k_lengths: Any, scale: float | None) -> Any:
    return {"causal": "bottom_right", "k_lengths": k_lengths, "scale": scale}


def _decoded(
    name: str, call: Call, table: Any, lengths: Any, splits: int, return_lse: bool, stream: Any
) -> Any:
    refused = reasons(call)
    whole("splits", splits)
    shape, q = call.rule.shape, call.tensors["q"]
    rows = shape.Tq * shape.group
    on = stream_of(q, stream)
    if lengths is None:
        lengths = np.full(shape.B, shape.Tk, np.int64)
    given = view("k_lengths", np.asarray(lengths, np.int64) if is_host(lengths) else lengths, on)
    pages = absent("int64", 2)
    if table is not None:
        pages = view("page_table", np.asarray(table, np.int64) if is_host(table) else table, on)
    memory = shared_memory_bytes()
    keys, threads = (SIMULATED_KEYS, SIMULATED_THREADS) if memory is None else (KEYS, THREADS)
    widths = call.dtype, shape.D, shape.Dv
    variant = DecodeVariant(*widths, rows, keys, threads, table is not None, pages.dtype, given.dtype)
    while memory is not None and 4 * variant.floats > memory and variant.keys > 1:
        variant = variant._replace(keys=variant.keys // 2)
    if memory is not None and 4 * variant.floats > memory:
        refused.append(f"{rows} queries share a key head; one tile of them exceeds {memory} bytes")
    if refused:
        raise UnsupportedError(f"{name}: " + "; ".join(refused))
    outer = (shape.B, shape.Tq, shape.Hq)
    out, out_result = empty((*outer, shape.Dv), call.dtype, q, on)
    lse, lse_result = empty((shape.B, shape.Hq, shape.Tq), "float32", q, on)
    size = max(1, -(-shape.Tk // splits))
    blocks = splits * shape.B * shape.Hkv
    inputs = [view(key, array, on) for key, array in call.tensors.items()]
    if rows * shape.B * shape.Dv:
        with (
            scratch((splits, *outer, shape.Dv), on, fill=UNWRITTEN) as outs,
            scratch((splits, shape.B, shape.Hq, shape.Tq), on, fill=UNWRITTEN) as lses,
        ):
            numbers = np.int64(size), np.float32(call.rule.scale)
            launch(
                build(variant), [*inputs, pages, given, outs, lses, *numbers],
                blocks=blocks, threads=threads, shared_bytes=4 * variant.floats, stream=on,
            )  # fmt: skip
            total = int(np.prod(out.shape))
            launch(
                build_merge(call.dtype), [outs, lses, out, lse],
                blocks=-(-total // MERGE_THREADS), threads=MERGE_THREADS, shared_bytes=0, stream=on,
            )  # fmt: skip
    return AttentionOutput(out_result(), lse_result()) if return_lse else out_result()
