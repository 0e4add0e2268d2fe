"""Calling the Hopper backward kernels with functions of the user's."""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import ITEMSIZE, Layout, View, absent, empty, is_host, library_of, view
from cuda_backend.attention.lists_hopper import resized
from cuda_backend.attention.padding import aligned_rows
from cuda_backend.attention.plan_backward_hopper import (
    Inputs,
    Outputs,
    backward_reasons,
    enqueue_backward,
    make_backward_plan,
    together,
)
from cuda_backend.attention.plan_hopper import KINDS
from cuda_backend.attention.remembered import remembered
from cuda_backend.attention.ruled_masks import divides, ruled
from cuda_backend.attention.tile_lists import Draw, key_tile_lists
from cuda_backend.attention.tile_states import known_block_mask
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_backward_hopper import LARGEST_WIDTH, BackwardVariant, choose_backward
from cuda_backend.context import current_device
from cuda_backend.launch import wait_for
from refimpl.attention import AttentionGradients
from refimpl.attention.block_mask import BlockMask
from refimpl.attention.scores import AttentionShape
from refimpl.attention.user_functions import Mod
from refimpl.errors import DTypeError, OptionError, UnsupportedError
from refimpl.numerics import widen
from refimpl.validation import finite

__all__ = ["flexible_attention_vjp_hopper", "flexible_variant"]

CALLER = "flexible_attention_vjp_hopper"


class Uploaded(NamedTuple):
    """`TileLists` on the GPU."""

    records: View
    entries: View
    turns: View


def flexible_attention_vjp_hopper(
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    lse: Any,
    do: Any,
    /,
    *,
    mods: Mods,
    arrays: tuple[View, ...],
    aux: tuple[Any, ...],
    blocks: BlockMask | None = None,
    scale: float | None,
    deterministic: bool = False,
    stream: int,
    variant: BackwardVariant | None = None,
) -> AttentionGradients:
    """Return the gradients of `flexible_attention` on the tensor cores of a Hopper GPU.

    Parameters
    ----------
    q, k, v, o, lse, do : array
        As for `flash_attention_vjp_hopper`.
    mods : Mods
        The functions, checked.
    arrays, aux : tuple
        Arrays of the functions on the GPU, and as the caller gave them.
    blocks : BlockMask, optional
        States of tiles, of any size, that are known already; they have the last word over the mask.
    scale
        As for `refimpl.attention.flexible_attention`.
    deterministic : bool
        Whether dQ repeats bit for bit; dK and dV always do.
    stream : int
        A CUstream of the current context.
    variant : BackwardVariant, optional
        In place of `flexible_variant`'s, for measurements.

    Returns
    -------
    AttentionGradients
        As `flash_attention_vjp_hopper`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; if the gradient of the score is not linear.
    UnsupportedError
        With the reasons.

    Notes
    -----
    Lists of tiles are made once for each mask, while the arrays that it reads stay as they are, and for each
    block mask.  A gradient of a score is asked for with gradient 1, and multiplied: it must be linear, as
    gradients are; one that is not is refused if three scores at the first place show it.

    References
    ----------
    .. [1] Dong et al., 2024, arXiv:2412.05496, section 4.
    .. [2] Shah et al., 2024, arXiv:2407.08608, section 3.
    """
    if mods.score is not None and mods.vjp is None:
        raise OptionError("score_mod_vjp: needed for gradients through score_mod")
    device = current_device()
    if mods.vjp is not None:
        _refuse_what_is_not_linear(mods.vjp, mods.aux)
    if scale is not None:
        finite("scale", scale)
    if is_host(lse):
        lse = widen(np.asarray(lse)).astype(np.float32, copy=False)
    given = {"q": q, "k": k, "v": v, "o": o, "do": do, "lse": lse}
    libraries = {name: library_of(array) for name, array in given.items()}
    if len(set(libraries.values())) > 1:
        raise DTypeError(f"q, k, v, o, lse and do: expected arrays of one library, got {libraries}")
    views = [view(name, array, stream) for name, array in given.items()]
    wait_for([*views, *arrays], stream)
    with ExitStack() as copies:
        aligned = [copies.enter_context(aligned_rows(x, stream)) for x in views[:5]]
        inputs = Inputs._make((*aligned, views[5]))
        found = backward_reasons(inputs, causal=False, scale=scale)
        # Wider heads have a kernel of their own, which asks no functions.
        found += [
            f"{axis} is {x.shape[3]}; the kernel with functions takes up to {LARGEST_WIDTH}"
            for axis, x in (("D", inputs.q), ("Dv", inputs.v))
            if x.shape[3] > LARGEST_WIDTH
        ]
        if found:
            raise UnsupportedError(f"{CALLER}: {'; '.join(found)}")
        layouts = tuple(x.layout for x in inputs)
        chosen = variant or flexible_variant(layouts, mods, deterministic=deterministic)
        if blocks is not None and not divides(blocks, (chosen.block_m, chosen.block_n)):
            mods, arrays = ruled(mods, arrays, blocks, layouts[0], stream)
            chosen = chosen._replace(mods=mods)
        lists = _lists(layouts, chosen, mods, arrays, aux, blocks, stream)
        plan = make_backward_plan(layouts, False, scale, deterministic, stream, device, chosen)
        made = [empty(shape, plan.dtype, q, stream) for shape in plan.shapes]
        outputs = Outputs(*(place.address for place, _ in made))
        words = [word for array in arrays or (absent("float32", 1),) for word in _array_words(array)]
        more = (*(table.address for table in lists), *words)
        enqueue_backward(plan, Inputs(*(x.address for x in inputs)), outputs, more)
    dq, dk, dv = (
        result() if place.shape[3] == x.shape[3] else result()[..., : x.shape[3]]
        for (place, result), x in zip(made, views, strict=False)
    )
    return AttentionGradients(dq, dk, dv)


def flexible_variant(layouts: tuple[Layout, ...], mods: Mods, *, deterministic: bool) -> BackwardVariant:
    """Return the kernel for arrays of these layouts: `choose_backward`'s, with functions."""
    q, _, v = layouts[:3]
    chosen = choose_backward(KINDS[q[2]], q[0][3], v[0][3], causal=False, deterministic=deterministic)
    return chosen._replace(mods=mods)


def _array_words(given: View) -> tuple[int, ...]:
    """Return an array as a kernel of Numba's takes it: two pointers of Numba's own, size, and so on."""
    size = int(np.prod(given.shape, dtype=np.int64))
    return 0, 0, size, ITEMSIZE[given.dtype], given.address, *given.shape, *given.strides


def _lists(
    layouts: tuple[Layout, ...],
    variant: BackwardVariant,
    mods: Mods,
    arrays: tuple[View, ...],
    aux: tuple[Any, ...],
    blocks: BlockMask | None,
    stream: int,
) -> Uploaded:
    """Return the lists of a call, made once for a mask while what it reads stays as it is."""
    (B, Tq, Hq, D), (_, Tk, Hkv, _), (_, _, _, Dv) = (layout[0] for layout in layouts[:3])
    sizes, mask = (variant.block_m, variant.block_n), None if blocks is not None else mods.mask

    def make() -> Uploaded:
        known = None
        if blocks is not None:
            known = BlockMask(resized(blocks, sizes), sizes, blocks.lengths)
        elif mask is not None:
            known = known_block_mask(mods, arrays, aux, (B, Hq, Tq, Tk), sizes, stream)
        section = together(variant, B * Hkv, Hq // Hkv * -(-Tq // variant.block_m))
        processors = int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
        draw = Draw(processors, section, variant.deterministic)
        made = key_tile_lists(known, AttentionShape(B, Tq, Tk, Hq, Hkv, D, Dv), sizes, draw)
        return Uploaded(
            *(view(name, table, stream) for name, table in zip(Uploaded._fields, made, strict=True))
        )

    read = aux if mask is not None and mask.takes_aux else ()
    question = "key lists", layouts[:3], variant._replace(mods=None), mask, blocks, stream
    found: Uploaded = remembered(question, read, make)
    return found


@functools.lru_cache(maxsize=256)
def _refuse_what_is_not_linear(vjp: Mod, kinds: tuple[tuple[str, int], ...]) -> None:
    """Refuse a gradient of a score that is not proportional to what comes in, as far as numbers tell."""
    aux = tuple(np.ones((2,) * axes, dtype) for dtype, axes in kinds)
    for score in (-0.75, 0.5, 3.0):
        try:
            one, other = (float(vjp.call((x, score), (0, 0, 0, 0), aux)) for x in (1.0, -2.5))
        except Exception:  # whatever it wants, it does not work on numbers of the host
            return
        if math.isfinite(one) and not math.isclose(other, -2.5 * one, rel_tol=1e-4, abs_tol=1e-30):
            raise OptionError(
                "score_mod_vjp: expected a function that is linear in the gradient, "
                f"got {one} for 1 and {other} for -2.5 at score {score}"
            )
