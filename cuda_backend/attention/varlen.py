"""Attention over packed sequences on a GPU: flexible attention of one long one, tiles between two dead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cuda_backend._numba import SIMULATOR
from cuda_backend.arrays import View, empty, is_host, library_of, stub, view
from cuda_backend.attention.flexible import flexible_attention, flexible_attention_vjp
from cuda_backend.attention.ranges_portable import RangesVariant, build
from cuda_backend.attention.remembered import remembered
from cuda_backend.attention.tiers import Tier, known_tier
from cuda_backend.launch import launch, stream_of
from refimpl.attention import AttentionGradients, AttentionOutput, mods
from refimpl.attention.scores import Causal
from refimpl.attention.varlen import EVERYWHERE, checked_window, key_ranges, packing
from refimpl.errors import ShapeError, UnsupportedError

__all__ = ["queue_ranges", "varlen_attention", "varlen_attention_vjp"]

THREADS, SIMULATED_THREADS = 128, 4
MASK = mods.ranges()


def varlen_attention(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    /,
    *,
    causal: Causal = False,
    window_size: tuple[int, int] = EVERYWHERE,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    block_sizes: tuple[int, int] | None = None,
    stream: Any = None,
    tier: Tier = "portable",
) -> Any:
    """Return attention within each of several sequences of variable length, packed one behind the other.

    Parameters
    ----------
    q, k, v : array
        As for `refimpl.attention.varlen_attention`; formats and libraries as `cuda_backend.flash_attention`.
    cu_seqlens_q, cu_seqlens_k : array of int32 or int64
        On the host, or beside `q`, where they are taken unchecked: nothing waits for them.
    causal, window_size, softcap, scale, return_lse
        As for `refimpl.attention.varlen_attention`.
    block_sizes, stream, tier
        As for `cuda_backend.flexible_attention`.

    Returns
    -------
    array or AttentionOutput
        As the reference, in the library of `q`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As the reference, and as `cuda_backend.flexible_attention`.

    Notes
    -----
    What a query sees has no gap, so a mask of two numbers a query says it all (`mods.ranges`), and tiles
    between different sequences are dead.  Numbers and states of tiles are computed once for the same starts,
    so all layers of a step share them.

    References
    ----------
    .. [1] Dao et al., flash-attention, flash_attn_interface.py, ``flash_attn_varlen_func``: the layout.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> x, starts = np.ones((3, 1, 4), np.float32), np.array([0, 2, 3])
    >>> if cuda_backend.availability("cudasim") is None:
    ...     assert varlen_attention(x, x, x, starts, starts, causal=True).shape == (3, 1, 4)
    """
    known_tier(tier)
    aux = _ranges(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, stream)
    options = _options(aux, softcap, scale, block_sizes, stream)
    options.pop("score_mod_vjp", None)
    with _own_name():
        found = flexible_attention(*map(_one, (q, k, v)), return_lse=return_lse, tier=tier, **options)
    return AttentionOutput(found.out[0], found.lse[0]) if return_lse else found[0]


def varlen_attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    o: Any,
    lse: Any,
    do: Any,
    /,
    *,
    causal: Causal = False,
    window_size: tuple[int, int] = EVERYWHERE,
    softcap: float | None = None,
    scale: float | None = None,
    block_sizes: tuple[int, int] | None = None,
    stream: Any = None,
    tier: Tier = "portable",
    deterministic: bool = False,
) -> AttentionGradients:
    """Return the gradients of `varlen_attention` from what it returned.

    Parameters
    ----------
    q, k, v, cu_seqlens_q, cu_seqlens_k
        As for `varlen_attention`.
    o, lse, do : array
        Output, log-sum-exp and gradient of the output.
    causal, window_size, softcap, scale, block_sizes, stream
        Those of the forward call.
    tier, deterministic
        As for `cuda_backend.flexible_attention_vjp`.

    Returns
    -------
    AttentionGradients
        dq, dk and dv, repeating bit for bit; of the Hopper kernels, dq only if it is asked for.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `varlen_attention`.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> x, starts = np.ones((3, 1, 4), np.float32), np.array([0, 2, 3])
    >>> if cuda_backend.availability("cudasim") is None:
    ...     out, lse = varlen_attention(x, x, x, starts, starts, return_lse=True)
    ...     found = varlen_attention_vjp(x, x, x, starts, starts, out, lse, x)
    ...     assert np.allclose(found.dv, 1, atol=1e-6)
    """
    known_tier(tier)
    aux = _ranges(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window_size, stream)
    options = _options(aux, softcap, scale, block_sizes, stream)
    with _own_name():
        arrays = map(_one, (q, k, v, o, lse, do))
        found = flexible_attention_vjp(*arrays, tier=tier, deterministic=deterministic, **options)
    return AttentionGradients(found.dq[0], found.dk[0], found.dv[0])


@contextmanager
def _own_name() -> Iterator[None]:
    """Let a refusal name the function that the caller knows."""
    try:
        yield
    except UnsupportedError as error:
        message = str(error).replace("flexible_attention", "varlen_attention", 1)
        raise UnsupportedError(message) from None


def _one(array: Any) -> Any:
    """Return packed tokens as one sequence."""
    return array.reshape((1, *array.shape)) if hasattr(array, "reshape") else np.asarray(array)[None]


def _options(
    aux: tuple[Any, ...],
    softcap: float | None,
    scale: float | None,
    block_sizes: tuple[int, int] | None,
    stream: Any,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mask_mod": MASK, "aux": aux, "scale": scale, "block_sizes": block_sizes, "stream": stream,
    }  # fmt: skip
    if softcap is not None:
        found |= {"score_mod": mods.softcap(softcap), "score_mod_vjp": mods.softcap_vjp(softcap)}
    return found


def _ranges(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, causal: Causal,
    window_size: tuple[int, int], stream: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Check a call; return the first key that each query sees and the one behind the last, beside `q`."""
    starts, window = (cu_seqlens_q, cu_seqlens_k), checked_window(window_size)
    checked_q, checked_k, checked_v = (
        np.asarray(x) if is_host(x) else stub("q, k or v", x) for x in (q, k, v)
    )
    if is_host(starts[0]) and is_host(starts[1]):
        pack = packing(checked_q, checked_k, checked_v, cu_seqlens_q, cu_seqlens_k, causal=causal)
        if is_host(q):
            first, behind = key_ranges(pack, causal, window)
            return first.astype(np.int32), behind.astype(np.int32)
    else:
        sizes = [tuple(np.shape(x)) for x in starts]
        if sizes[0] != sizes[1] or len(sizes[0]) != 1:
            raise ShapeError(f"cu_seqlens_q, cu_seqlens_k: expected one axis alike, got {sizes}")
        unknown = np.zeros(sizes[0], np.int64)
        packing(checked_q, checked_k, checked_v, unknown, unknown, causal=causal)
    on = stream_of(q, stream)
    aligned = "top_left" if causal is True else causal or ""

    def make() -> tuple[Any, Any]:
        results = [empty((int(q.shape[0]),), "int32", q, on) for _ in range(2)]
        given = [view("cu_seqlens", x, on) for x in starts]
        queue_ranges(given, [where for where, _ in results], aligned, on, window)
        return results[0][1](), results[1][1]()

    question = "ranges", library_of(q), int(q.shape[0]), aligned, window
    found: tuple[Any, Any] = remembered(question, starts, make)
    return found


def queue_ranges(
    starts: list[View], outputs: list[View], causal: str, on: int, window: tuple[int, int] = EVERYWHERE
) -> None:
    """Queue the kernel that finds the range of keys of each query."""
    for given in starts:
        if given.dtype not in ("int32", "int64"):
            raise UnsupportedError(f"cu_seqlens are {given.dtype}; the kernel takes int32, int64")
    threads = SIMULATED_THREADS if SIMULATOR else THREADS
    blocks = -(-outputs[0].shape[0] // threads)
    if blocks:
        variant = RangesVariant(causal, starts[0].dtype, starts[1].dtype, threads)
        arguments: list[Any] = [*starts, *outputs, np.int64(window[0]), np.int64(window[1])]
        launch(build(variant), arguments, blocks=blocks, threads=threads, shared_bytes=0, stream=on)
