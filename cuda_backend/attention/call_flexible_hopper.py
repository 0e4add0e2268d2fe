"""Calling the Hopper kernel with functions of the user's."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import numpy as np

from cuda_backend.arrays import Layout, View, absent, empty, view
from cuda_backend.attention.lists_hopper import ROWS, resized
from cuda_backend.attention.padding import aligned_rows
from cuda_backend.attention.plan_flexible_hopper import Lists, enqueue, make_flexible_plan, make_lists
from cuda_backend.attention.plan_hopper import MISALIGNED, reasons
from cuda_backend.attention.remembered import knowable, remembered
from cuda_backend.attention.ruled_masks import divides, ruled
from cuda_backend.attention.tile_states import known_block_mask
from cuda_backend.attention.user_device import Mods
from cuda_backend.context import current_device
from cuda_backend.launch import wait_for
from refimpl.attention import AttentionOutput
from refimpl.attention.block_mask import FULL, BlockMask
from refimpl.errors import UnsupportedError
from refimpl.numerics import Array
from refimpl.validation import finite

__all__ = ["flexible_attention_hopper"]

CALLER = "flexible_attention_hopper"


def flexible_attention_hopper(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    mods: Mods,
    arrays: tuple[View, ...],
    aux: tuple[Any, ...],
    blocks: BlockMask | None = None,
    scale: float | None,
    return_lse: bool,
    stream: int,
) -> Any:
    """Return attention with functions of the user's on the tensor cores of a Hopper GPU.

    Parameters
    ----------
    q, k, v : array of float16 or bfloat16
        As for `flash_attention_hopper`.
    mods : Mods
        The functions, checked; the gradient of a score is not read.
    arrays, aux : tuple
        Arrays of the functions on the GPU, and as the caller gave them.
    blocks : BlockMask, optional
        States of tiles, of any size, that are known already; they have the last word over the mask.
    scale, return_lse
        As for `refimpl.attention.flexible_attention`.
    stream : int
        A CUstream of the current context.

    Returns
    -------
    array or AttentionOutput
        As `flash_attention_hopper`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference.
    UnsupportedError
        With the reasons of `supports_hopper`.

    Notes
    -----
    Lists of key tiles are made once for each mask, while the arrays that it reads stay as they are, and for
    each block mask, and so are the bits of what a mask allows in partial tiles, if they fit
    `mask_words.MOST_BYTES`; beyond that the kernel asks the mask for each score.

    References
    ----------
    .. [1] Dong et al., 2024, arXiv:2412.05496, section 4.
    """
    device, mods = current_device(), mods._replace(vjp=None)
    if scale is not None:
        finite("scale", scale)
    views = [view(name, array, stream) for name, array in zip("qkv", (q, k, v), strict=True)]
    wait_for([*views, *arrays], stream)
    with ExitStack() as copies:
        aligned = [copies.enter_context(aligned_rows(given, stream)) for given in views]
        # With a score_mod the sign of the scale does not matter.
        found = reasons(*aligned, causal=False, scale=None if mods.score is not None else scale)
        if any(given.address % 16 for given in aligned):
            found.append(MISALIGNED)
        if found:
            raise UnsupportedError(f"{CALLER}: {'; '.join(found)}")
        layouts = aligned[0].layout, aligned[1].layout, aligned[2].layout
        lists = _lists(layouts, mods, arrays, aux, blocks, stream)
        if lists.words is not None:  # one kernel for all masks
            mods = mods._replace(mask=None)
        elif blocks is not None and not divides(blocks, (ROWS, lists.tiles.block_n)):
            mods, arrays = ruled(mods, arrays, blocks, layouts[0], stream)
        if not any(mod is not None and mod.takes_aux for mod in (mods.mask, mods.score)):
            mods, arrays = mods._replace(aux=()), ()
        which = lists.tiles, lists.words is not None, lists.work_items
        plan = make_flexible_plan(*layouts, scale, mods, *which, stream, device)
        out, out_result = empty(plan.out_shape, plan.dtype, q, stream)
        lse, lse_result = empty(plan.lse_shape, "float32", q, stream) if return_lse else (None, None)
        addresses = aligned[0].address, aligned[1].address, aligned[2].address
        given = arrays or (absent("float32", 1),)
        enqueue(plan, addresses, out.address, 0 if lse is None else lse.address, lists, given)
    columns = views[2].shape[3]
    result = out_result() if columns == plan.out_shape[3] else out_result()[..., :columns]
    return result if lse_result is None else AttentionOutput(result, lse_result())


def _lists(
    layouts: tuple[Layout, Layout, Layout],
    mods: Mods,
    arrays: tuple[View, ...],
    aux: tuple[Any, ...],
    blocks: BlockMask | None,
    stream: int,
) -> Lists:
    """Return the lists of a call, made once for a mask while what it reads stays as it is."""
    q, _, v = layouts
    mask, (B, Tq, Hq, _), Tk = mods.mask, q[0], v[0][1]

    @functools.cache
    def states(keys: int) -> Array:
        if blocks is not None:
            return resized(blocks, (ROWS, keys))
        if mask is None:
            return np.full((1, 1, -(-Tq // ROWS), -(-Tk // keys)), FULL, np.uint8)
        # Asked once: tiles of 128 keys are made of those of 64.
        sizes = (ROWS, 64 if keys % 64 == 0 else keys)
        return resized(known_block_mask(mods, arrays, aux, (B, Hq, Tq, Tk), sizes, stream), (ROWS, keys))

    read = aux if mask is not None and mask.takes_aux else ()
    if blocks is not None and not knowable(read):  # with lists that are, the mask is asked in the kernel
        mods, read = Mods(), ()
    question = "lists", q, v, mods.mask, mods.aux if read else (), blocks, stream

    def make() -> Lists:
        if blocks is None or mods.mask is None:
            return make_lists(q, v, states, stream, mods, arrays)
        return make_lists(q, v, states, stream, *ruled(mods, arrays, blocks, q, stream))

    found: Lists = remembered(question, read, make)
    return found
