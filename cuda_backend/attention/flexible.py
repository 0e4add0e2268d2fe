"""Attention with functions of the user's on a GPU: they are compiled into the portable kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend.arrays import View, broadcast, empty, is_host, view
from cuda_backend.attention.backward import backward_variant, prepare_backward, queue_backward
from cuda_backend.attention.call import Call, features, numbers, prepare, reasons
from cuda_backend.attention.forward import forward_variant, run_forward
from cuda_backend.attention.tiers import Tier, by_tier, known_tier
from cuda_backend.attention.tile_states import aux_views, tile_states
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_portable import Features, Variant
from cuda_backend.launch import stream_of
from refimpl.attention import AttentionGradients
from refimpl.attention.block_mask import BlockMask, checked_block_mask
from refimpl.attention.user_functions import as_mod, check_reads
from refimpl.errors import OptionError, UnsupportedError

__all__ = ["flexible_attention", "flexible_attention_vjp"]


def flexible_attention(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_vjp: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    aux: tuple[Any, ...] = (),
    scale: float | None = None,
    return_lse: bool = False,
    block_sizes: tuple[int, int] | None = None,
    stream: Any = None,
    tier: Tier = "portable",
) -> Any:
    """Return attention with a mask and a score that the user writes, tile by tile; dead tiles are skipped.

    Parameters
    ----------
    q, k, v : array
        As for `cuda_backend.flash_attention`.
    mask_mod, score_mod, score_mod_vjp, block_mask, aux, scale, return_lse
        As for `refimpl.attention.flexible_attention`.  Floats that functions close over are float32 here, and
        so are floating arrays of `aux` on the host; on the GPU they are bool, int32, int64, uint8 or float32.
        No kernel notices an index behind the end of such an array: it reads what lies there.  Where all of
        them are on the host, each function is called there once before, at the last indices.
    block_sizes, stream, tier
        As for `cuda_backend.flash_attention`; the Hopper kernels choose their own block sizes.

    Returns
    -------
    array or AttentionOutput
        As `cuda_backend.flash_attention`.

    Raises
    ------
    OptionError
        If a function does not compile; the message names its file and line.
    ShapeError, DTypeError, CapacityError, UnsupportedError, BackendUnavailableError
        As `cuda_backend.flash_attention`.

    Notes
    -----
    A kernel is compiled once for functions that compute the same, and the states of tiles are computed once
    for each mask and what it reads, on the device (`cuda_backend.attention.tile_states`).  Tiles of a
    `block_mask` that the kernel's do not divide cut the kernel's.

    References
    ----------
    .. [1] Dong et al., 2024, arXiv:2412.05496, section 4.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> x = np.ones((1, 3, 2, 4), np.float32)
    >>> if cuda_backend.availability("cudasim") is None:
    ...     out = flexible_attention(x, x, x, mask_mod=lambda b, h, i, j: j < i)
    ...     assert out[0, :, 0, 0].tolist() == [0, 1, 1]
    """
    known_tier(tier)
    call = prepare({"q": q, "k": k, "v": v}, {"scale": scale})
    refused = reasons(call)
    if refused:
        raise UnsupportedError("flexible_attention: " + "; ".join(refused))
    on = stream_of(q, stream)
    arrays, mods = _mods(call, mask_mod, score_mod, score_mod_vjp, block_mask, aux, on)

    def hopper() -> Any:
        from cuda_backend.attention.call_flexible_hopper import flexible_attention_hopper

        if block_sizes is not None:
            raise UnsupportedError("flexible_attention_hopper: the kernel has no block_sizes")
        given: dict[str, Any] = {"arrays": arrays, "aux": aux, "blocks": block_mask, "scale": scale}
        return flexible_attention_hopper(q, k, v, mods=mods, return_lse=return_lse, stream=on, **given)

    def portable() -> Any:
        wanted, optional = features(call, on, lse=return_lse)
        wanted = wanted._replace(mods=mods._replace(vjp=None))
        sizes = _tile_sizes(block_mask, forward_variant(call, wanted, block_sizes, None), block_sizes)
        variant = forward_variant(call, wanted, sizes, None)
        options = _with_mods(call, variant, optional, arrays, aux, block_mask, on)
        return run_forward(call, variant, options, on)

    return by_tier(tier, q, hopper, portable)


def flexible_attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    do: Any,
    /,
    *,
    mask_mod: Callable[..., Any] | None = None,
    score_mod: Callable[..., Any] | None = None,
    score_mod_vjp: Callable[..., Any] | None = None,
    block_mask: BlockMask | None = None,
    aux: tuple[Any, ...] = (),
    scale: float | None = None,
    block_sizes: tuple[int, int] | None = None,
    stream: Any = None,
    tier: Tier = "portable",
    deterministic: bool = False,
) -> AttentionGradients:
    """Return the gradients of `flexible_attention` from what it returned, tile by tile.

    Parameters
    ----------
    q, k, v, o, lse, do : array
        As for `cuda_backend.flash_attention_vjp`.
    mask_mod, score_mod, score_mod_vjp, block_mask, aux, scale, block_sizes, stream
        Those of the forward call; `score_mod_vjp` is needed if there is a `score_mod`.
    tier
        As for `flexible_attention`.  The Hopper kernels want D and Dv up to 128, and a `score_mod_vjp`
        linear in the gradient.
    deterministic : bool
        Whether dq repeats bit for bit with the Hopper kernels, too.

    Returns
    -------
    AttentionGradients
        dq, dk and dv, repeating bit for bit; of the Hopper kernels, dq only if it is asked for.

    Raises
    ------
    OptionError
        If there is a `score_mod` without its gradient, or a function does not compile.
    ShapeError, DTypeError, CapacityError, UnsupportedError, BackendUnavailableError
        As `cuda_backend.flash_attention_vjp`.

    Examples
    --------
    >>> import numpy as np, cuda_backend
    >>> x, alone = np.ones((1, 2, 1, 4), np.float32), {"mask_mod": lambda b, h, i, j: i == j}
    >>> if cuda_backend.availability("cudasim") is None:
    ...     out, lse = flexible_attention(x, x, x, return_lse=True, **alone)
    ...     assert flexible_attention_vjp(x, x, x, out, lse, x, **alone).dv[0, :, 0, 0].tolist() == [1, 1]
    """
    known_tier(tier)
    call, lse = prepare_backward(q, k, v, o, lse, do, {"scale": scale})
    refused = reasons(call)
    if refused:
        raise UnsupportedError("flexible_attention_vjp: " + "; ".join(refused))
    if score_mod is not None and score_mod_vjp is None:
        raise OptionError("score_mod_vjp: needed for gradients through score_mod")
    on = stream_of(q, stream)
    arrays, mods = _mods(call, mask_mod, score_mod, score_mod_vjp, block_mask, aux, on)

    def hopper() -> AttentionGradients:
        from cuda_backend.attention.call_flexible_backward_hopper import flexible_attention_vjp_hopper

        if block_sizes is not None:
            raise UnsupportedError("flexible_attention_vjp_hopper: the kernel has no block_sizes")
        given: dict[str, Any] = {"arrays": arrays, "aux": aux, "blocks": block_mask, "scale": scale}
        return flexible_attention_vjp_hopper(
            q, k, v, o, lse, do, mods=mods, deterministic=deterministic, stream=on, **given
        )

    def portable() -> AttentionGradients:
        wanted, optional = features(call, on, lse=False)
        wanted = wanted._replace(mods=mods)
        sizes = _tile_sizes(block_mask, backward_variant(call, wanted, block_sizes, None), block_sizes)
        variant = backward_variant(call, wanted, sizes, None)
        inputs = {name: view(name, array, on) for name, array in call.tensors.items()}
        inputs["lse"] = view("lse", np.asarray(lse, np.float32) if is_host(lse) else lse, on)
        results = {name: empty(inputs[name].shape, call.dtype, call.tensors["q"], on) for name in "qkv"}
        outputs = {name: given for name, (given, _) in results.items()}
        options = [*_with_mods(call, variant, optional, arrays, aux, block_mask, on), *numbers(call.rule)]
        queue_backward(call, variant, inputs, outputs, options, on)
        return AttentionGradients(*(result() for _, result in results.values()))

    return by_tier(tier, q, hopper, portable)


def _mods(
    call: Call, mask_mod: Any, score_mod: Any, score_mod_vjp: Any, given: BlockMask | None, aux: Any, on: int
) -> tuple[tuple[View, ...], Mods]:
    """Check the functions as the reference does; return their arrays as a kernel sees them, and both."""
    if score_mod_vjp is not None and score_mod is None:
        raise OptionError("score_mod_vjp: given, but there is no score_mod")
    views = aux_views(aux, on)
    mask = None if mask_mod is None else as_mod("mask_mod", mask_mod)
    if given is not None:
        shape = call.rule.shape
        mask = checked_block_mask(given, mask, shape.B, shape.Hq, shape.Tq, shape.Tk)
    score = None if score_mod is None else as_mod("score_mod", score_mod, ("score",))
    vjp = None if score_mod_vjp is None else as_mod("score_mod_vjp", score_mod_vjp, ("gradient", "score"))
    if all(map(is_host, aux)):
        shape, arrays = call.rule.shape, tuple(map(np.asarray, aux))
        for leading, mod in enumerate((mask, score, vjp)):
            if mod is not None:
                check_reads(mod, leading, (shape.B, shape.Hq, shape.Tq, shape.Tk), arrays)
    return views, Mods(mask, score, vjp, tuple((array.dtype, len(array.shape)) for array in views))


def _tile_sizes(given: BlockMask | None, default: Variant, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Return the tiles of a kernel: those asked for, or its own, cut so that they divide a mask's."""
    if asked is not None or given is None:
        return asked or (default.Br, default.Bc)
    Br, Bc = given.block_sizes
    return math.gcd(Br, default.Br), math.gcd(Bc, default.Bc)


def _with_mods(
    call: Call,
    variant: Variant,
    optional: list[Any],
    arrays: tuple[View, ...],
    aux: tuple[Any, ...],
    given: BlockMask | None,
    on: int,
) -> list[Any]:
    """Return the optional arguments of a kernel with the states of its tiles, and the functions' arrays."""
    *others, tiles, nothing = optional
    features: Features = variant.features
    if features.mods.mask is not None:
        shape, sizes = call.rule.shape, (variant.Br, variant.Bc)
        if given is None:
            where = shape.B, shape.Hq, shape.Tq, shape.Tk
            states = tile_states(features.mods, arrays, aux, where, sizes, on)
        else:
            states = _uploaded(given, sizes, on)
        full = shape.B, shape.Hq, -(-shape.Tq // variant.Br), -(-shape.Tk // variant.Bc)
        tiles = broadcast(states, full)
    return [*others, tiles, arrays or nothing]


@functools.lru_cache(maxsize=64)
def _uploaded(given: BlockMask, sizes: tuple[int, int], on: int) -> View:
    return view("block_mask", given.spread(sizes).states, on)
