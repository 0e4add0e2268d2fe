"""Attention in int8 on a GPU: what callers see, the passes that make codes, the portable kernel's launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend.arrays import View, absent, dtype_name, is_host, view
from cuda_backend.attention import int8_codes_portable, int8_portable
from cuda_backend.attention.int8_codes_portable import PART, THREADS
from cuda_backend.formats import FORMATS
from cuda_backend.int8.memory import allocated
from cuda_backend.int8.operands import described, one_library
from cuda_backend.launch import launch, stream_of, wait_for
from refimpl.attention.int8_attention import DEFAULT_BLOCKS
from refimpl.attention.scores import Causal, score_rule
from refimpl.errors import DTypeError, OptionError, UnsupportedError
from refimpl.validation import floating, whole

__all__ = ["Codes", "Prepared", "int8_attention", "portable_codes", "prepare"]

LARGEST_WIDTH = 256


class Codes(NamedTuple):
    """Codes of queries or keys in words [B, T, H, words], and their scales [B, H, blocks]."""

    words: View
    scale: View
    block: int


class Prepared(NamedTuple):
    """A checked call: codes of q and k, v, and what the attention of them needs."""

    queries: Codes
    keys: Codes
    v: View
    scale: float
    offset: int
    like: Any
    dtype: str
    shape: tuple[int, int, int, int]
    on: int


def int8_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    causal: Causal = False,
    scale: float | None = None,
    smooth: bool = True,
    block_sizes: tuple[int, int] = DEFAULT_BLOCKS,
    stream: Any = None,
) -> Any:
    """Return attention whose scores are products of int8 codes of the queries and of the smoothed keys.

    Parameters
    ----------
    q, k, v : array of float32, float16 or bfloat16, shapes (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
        NumPy arrays, which are copied to the GPU and back, or arrays of one GPU library on the current GPU,
        with any strides; D and Dv up to 256.
    causal, scale, smooth, block_sizes
        As for `refimpl.attention.int8_attention`; `scale` is above 0.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `q` works on.

    Returns
    -------
    array, shape (B, Tq, Hq, Dv)
        In the dtype and library of `q`; P stays in float32.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; numbers on the GPU are not looked at: NaN has code 0.
    UnsupportedError
        If the arrays are float64, or a head is wider than 256.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    References
    ----------
    .. [1] Zhang et al., 2024, arXiv:2410.02367, section 4.2 and Algorithm 1.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     x = np.ones((1, 3, 2, 8), np.float32)
    ...     assert int8_attention(x, x, x).shape == x.shape
    """
    call = prepare("int8_attention", q, k, v, causal, scale, smooth, block_sizes, stream)
    out, result = allocated(call.shape, call.dtype, call.like, call.on)
    if 0 in call.shape:
        return result()
    variant = int8_portable.Variant(
        call.dtype, call.queries.words.shape[3], call.shape[3], causal=bool(causal)
    )
    B, Tq, H, _ = call.shape
    launch(
        int8_portable.build(variant),
        [
            call.queries.words, call.keys.words, call.queries.scale, call.keys.scale,
            np.int64(call.queries.block), np.int64(call.keys.block), call.v, out,
            np.float32(call.scale), np.int64(call.offset),
        ],
        blocks=B * H * -(-Tq // variant.rows),
        threads=variant.threads,
        shared_bytes=variant.shared_bytes,
        stream=call.on,
    )  # fmt: skip
    return result()


def prepare(
    caller: str,
    q: Any,
    k: Any,
    v: Any,
    causal: Causal,
    scale: float | None,
    smooth: bool,
    block_sizes: tuple[int, int],
    stream: Any,
    *,
    coded: Callable[..., tuple[Codes, Codes]] | None = None,
) -> Prepared:
    """Check a call as the reference does; queue what makes its codes: `coded`, or the portable kernels."""
    named = {"q": q, "k": k, "v": v}
    one_library(named)
    if is_host(q):
        named = dict(zip(named, floating(**named), strict=True))
        for name in ("q", "k"):
            if not np.isfinite(named[name].astype(np.float32)).all():
                raise OptionError("q and k: expected finite numbers; NaN and infinity have no code")
    kinds = {str(named[n].dtype.name) if is_host(named[n]) else dtype_name(n, named[n]) for n in named}
    if len(kinds) > 1:
        raise DTypeError(f"q, k and v: expected one dtype, got {', '.join(sorted(kinds))}")
    (dtype,) = kinds
    found = [np.broadcast_to(np.float32(0), described(n, named[n]).shape) for n in named]
    rule = score_rule(found[0], found[1], found[2], causal=causal, scale=scale)
    for size in block_sizes:
        whole("block_sizes", size)
    if dtype not in FORMATS:
        raise UnsupportedError(f"{caller}: inputs are {dtype}; the kernel takes {', '.join(FORMATS)}")
    shape = rule.shape
    if max(shape.D, shape.Dv) > LARGEST_WIDTH:
        raise UnsupportedError(f"{caller}: heads are {shape.D} and {shape.Dv} wide; the kernel takes 256")
    if not rule.scale > 0:
        raise UnsupportedError(f"{caller}: scale is {rule.scale}; the kernel needs it positive")
    on = stream_of(q, stream)
    views = {name: view(name, array, on) for name, array in named.items()}
    wait_for(views.values(), on)
    queries, keys = (coded or portable_codes)(views["q"], views["k"], smooth, block_sizes, dtype, q, on)
    return Prepared(
        queries,
        keys,
        views["v"],
        rule.scale,
        shape.Tk - shape.Tq if causal == "bottom_right" else 0,
        named["q"],
        dtype,
        (shape.B, shape.Tq, shape.Hq, shape.Dv),
        on,
    )


def portable_codes(
    q: View,
    k: View,
    smooth: bool,
    block_sizes: tuple[int, int],
    dtype: str,
    like: Any,
    on: int,
    width: int = 4,
) -> tuple[Codes, Codes]:
    """Queue what makes codes of queries and keys, rows padded to `width`."""
    mean = _mean(k, dtype, like, on) if smooth and k.shape[1] else None
    return (
        _codes(q, None, block_sizes[0], dtype, like, on, width),
        _codes(k, mean, block_sizes[1], dtype, like, on, width),
    )


def _mean(k: View, dtype: str, like: Any, on: int) -> View:
    """Queue the mean of the keys of each head."""
    B, T, H, D = k.shape
    parts = -(-T // PART)
    sums, _ = allocated((parts, B, H, D), "float32", like, on)
    mean, _ = allocated((B, H, D), "float32", like, on)
    add, divide, _ = int8_codes_portable.kernels(dtype)
    if mean.shape[0] * H:
        around: dict[str, Any] = {"threads": THREADS, "shared_bytes": 0, "stream": on}
        launch(add, [k, sums], blocks=parts * B * H, **around)
        launch(divide, [sums, mean, np.int64(T)], blocks=B * H, **around)
    return mean


def _codes(x: View, mean: View | None, block: int, dtype: str, like: Any, on: int, width: int) -> Codes:
    """Queue the codes of queries or keys."""
    B, T, H, D = x.shape
    words, _ = allocated((B, T, H, math.ceil(D / width) * width // 4), "uint32", like, on)
    scale, _ = allocated((B, H, -(-T // block)), "float32", like, on)
    if 0 not in scale.shape:
        launch(
            int8_codes_portable.kernels(dtype).quantize,
            [x, mean or absent("float32", 3), np.int64(mean is not None), words, scale, np.int64(block)],
            blocks=B * H * scale.shape[2],
            threads=THREADS,
            shared_bytes=4 * THREADS,
            stream=on,
        )
    return Codes(words, scale, block)
