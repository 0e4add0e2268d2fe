"""Decoding on a GPU: a few new queries over a long cache, whole or in pages."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from cuda_backend.arrays import absent, dtype_name, empty, is_host, view
from cuda_backend.attention.call import Call, prepare, reasons
from cuda_backend.attention.decode_call_ampere import attend, capable
from cuda_backend.attention.decode_portable import MERGE_THREADS, DecodeVariant, build, build_merge
from cuda_backend.attention.decode_rule import options_of, rule_of
from cuda_backend.attention.tiers import refused_by
from cuda_backend.launch import launch, shared_memory_bytes, stream_of
from cuda_backend.scratch import UNWRITTEN, scratch
from refimpl.attention import AttentionOutput
from refimpl.errors import OptionError, UnsupportedError
from refimpl.validation import whole

__all__ = ["paged_attention", "split_kv_attention"]

Tier = Literal["portable", "ampere", "auto"]
TIERS = get_args(Tier)

KEYS, THREADS, SIMULATED_KEYS, SIMULATED_THREADS = 64, 128, 4, 4


def split_kv_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    splits: int | None = None,
    k_lengths: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    stream: Any = None,
    tier: Tier = "auto",
) -> Any:
    """Return the attention of the last queries over a cache, its parts computed side by side.

    Parameters
    ----------
    q, k, v, k_lengths, scale, return_lse
        As for `refimpl.attention.split_kv_attention`; arrays as for `cuda_backend.flash_attention`.  Lengths
        on the GPU are clamped to [0, Tk] rather than checked.
    splits : int, optional
        Parts of the cache, which blocks of the GPU take side by side.  Default: what fills the GPU in tier
        "ampere", where each sequence is cut by its own length, in turns of 16 or 32 keys; 1 in tier
        "portable", where parts are those of the reference.
    stream : int or stream object, optional
        As for `cuda_backend.flash_attention`.
    tier : {"auto", "ampere", "portable"}
        Which kernels.  "ampere" ones are made for the speed of memory; they need compute capability 8.0,
        float16 or bfloat16, D and Dv that are multiples of 16 up to 256, pages of a multiple of 16 keys, and
        rows of k and v that begin at multiples of 16 bytes.  "portable" ones run anywhere and take the rest,
        slowly; what a named tier cannot do is an error that says so.  "auto" is "ampere" where GPU, format,
        widths and pages allow it; what that refuses still, the portable ones run, with a
        `refimpl.errors.SlowPathWarning`.

    Returns
    -------
    array or AttentionOutput
        As `cuda_backend.flash_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `cuda_backend.flash_attention`; UnsupportedError too if the queries of a key head fill the GPU's
        shared memory in tier "portable".

    Notes
    -----
    The call needs ``splits B Tq Hq (Dv + 1)`` floats for itself, rows of a key head rounded up to 8 in tier
    "ampere", where P is rounded to `q`'s dtype before P V, unnormalised.  Results repeat bit for bit.

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
    return _attention("split_kv_attention", q, k, v, None, k_lengths, splits, scale, return_lse, stream, tier)


def paged_attention(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_table: Any,
    /,
    *,
    k_lengths: Any,
    splits: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    stream: Any = None,
    tier: Tier = "auto",
) -> Any:
    """Return `split_kv_attention` over a cache that lies in pages.

    Parameters
    ----------
    q, k_pages, v_pages, page_table, k_lengths, scale, return_lse
        As for `refimpl.attention.paged_attention`.  A table on the GPU is taken as it is, unchecked.
    splits, stream, tier
        As for `split_kv_attention`.

    Returns
    -------
    array or AttentionOutput
        As `split_kv_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `split_kv_attention`, and as the reference.

    References
    ----------
    .. [1] Kwon et al., 2023, arXiv:2309.06180, section 4.1.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> q, pages = np.ones((1, 1, 2, 4), np.float32), np.ones((3, 2, 1, 4), np.float32)
    >>> table, lengths = np.array([[2, 0]]), np.array([3])
    >>> if cuda_backend.availability("cudasim") is None:
    ...     out = paged_attention(q, pages, pages, table, k_lengths=lengths)
    ...     assert out.ravel().tolist() == [1.0] * 8
    """
    return _attention(
        "paged_attention", q, k_pages, v_pages, page_table, k_lengths, splits, scale, return_lse, stream, tier
    )


def _attention(
    name: str, q: Any, k: Any, v: Any, table: Any, k_lengths: Any, splits: int | None,
    scale: float | None, return_lse: bool, stream: Any, tier: Tier,
) -> Any:  # fmt: skip
    if tier not in TIERS:
        raise OptionError(f"tier: expected one of {', '.join(TIERS)}, got {tier!r}")
    if tier == "ampere" or (tier == "auto" and _is_for_tensor_cores(q, k, v, table)):
        try:
            return attend(name, q, k, v, table, k_lengths, splits, scale, return_lse, stream)
        except UnsupportedError as error:
            refused_by(tier, error)
    call = prepare({"q": q, "k": k, "v": v}, options_of(k_lengths, scale), rule_of(table, k_lengths))
    return _decoded(name, call, table, k_lengths, 1 if splits is None else splits, return_lse, stream)


def _is_for_tensor_cores(q: Any, k: Any, v: Any, table: Any) -> bool:
    q_shape, k_shape, v_shape = np.shape(q), np.shape(k), np.shape(v)
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4 or 0 in (*q_shape, *k_shape, *v_shape):
        return False  # an error, or nothing to be read
    if table is not None and 0 in np.shape(table):
        return False
    dtype = np.asarray(q).dtype.name if is_host(q) else dtype_name("q", q)
    return capable(dtype, (k_shape[3], v_shape[3]), 0 if table is None else k_shape[1])


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
