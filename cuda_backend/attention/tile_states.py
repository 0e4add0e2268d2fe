"""Which tiles a mask leaves, computed where its arrays are: see `tile_states`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda
from cuda_backend.arrays import View, absent, contiguous, dtype_name, is_host, view
from cuda_backend.attention.remembered import remembered
from cuda_backend.attention.states_portable import StatesVariant, build
from cuda_backend.attention.user_device import Mods
from cuda_backend.launch import launch, stream_of
from refimpl.attention import block_mask as on_host
from refimpl.attention.block_mask import BlockMask
from refimpl.attention.user_functions import as_mod
from refimpl.errors import DTypeError, UnsupportedError
from refimpl.numerics import is_floating, widen

__all__ = [
    "aux_views",
    "block_mask",
    "device_bytes",
    "known_block_mask",
    "queue_states",
    "states_on_device",
    "tile_states",
]

AUX = ("bool", "int32", "int64", "uint8", "float32")
THREADS, SIMULATED_THREADS = 256, 4


def tile_states(
    mods: Mods, arrays: tuple[View, ...], aux: tuple[Any, ...], shape: tuple[int, ...],
    block_sizes: tuple[int, int], on: int,
) -> View:  # fmt: skip
    """Return the state of each tile, `refimpl.attention.block_mask.DEAD`, `PARTIAL` or `FULL`, on the device.

    Parameters
    ----------
    mods : Mods
        Whose mask is asked.
    arrays, aux : tuple
        The arrays that it reads, as a kernel sees them, and as they were given.
    shape : tuple of int
        (B, Hq, Tq, Tk).
    block_sizes : tuple of int
        (Br, Bc): any tile, such as 128 x 176.
    on : int
        The stream.

    Returns
    -------
    View
        uint8, contiguous, (B or 1, Hq or 1, ceil(Tq / Br), ceil(Tk / Bc)): live is ``!= 0``, full ``== 2``.
    """
    mask: Any = mods.mask
    B, Hq, Tq, Tk = shape
    sizes = (B if mask.by_sequence else min(B, 1), Hq if mask.by_head else min(Hq, 1), Tq, Tk)

    def make() -> View:
        if not SIMULATOR:
            return queue_states(mods, arrays, sizes, block_sizes, on)
        hosts = tuple(given.owner for given in arrays)
        return view("states", on_host(mask.function, *sizes, block_sizes=block_sizes, aux=hosts).states, on)

    found: View = remembered((mask, sizes, block_sizes), aux if mask.takes_aux else (), make)
    return found


def queue_states(
    mods: Mods, arrays: tuple[View, ...], sizes: tuple[int, ...], block_sizes: tuple[int, int], on: int
) -> View:
    """Queue the kernel that asks the mask for each score, a block a tile; return what it writes."""
    B, Hq, Tq, Tk = sizes
    tiles = (B, Hq, -(-Tq // block_sizes[0]), -(-Tk // block_sizes[1]))
    states = device_bytes(tiles, on)
    threads = SIMULATED_THREADS if SIMULATOR else THREADS
    variant = StatesVariant(mods._replace(score=None, vjp=None), *block_sizes, threads)
    if math.prod(tiles):
        given = arrays or (absent("float32", 1),)
        launch(
            build(variant), [states, given, np.int64(Tq), np.int64(Tk)],
            blocks=math.prod(tiles), threads=threads, shared_bytes=0, stream=on,
        )  # fmt: skip
    return states


def states_on_device(given: BlockMask, on: int) -> View:
    """Return the states of a block mask where kernels on stream `on` read them, copied once."""

    def make() -> View:
        return view("block_mask", given.states, on)

    found: View = remembered(("states", given, on), (), make)
    return found


def device_bytes(shape: tuple[int, ...], on: int, dtype: str = "uint8") -> View:
    """Allocate an array that outlives the call, written on stream `on`."""
    strides = contiguous(shape, np.dtype(dtype).itemsize)
    if SIMULATOR or 0 in shape:
        return View(shape, strides, dtype, 0, np.zeros(shape, dtype), on)
    owner = cuda.device_array(shape, dtype)
    return View(shape, strides, dtype, int(owner.__cuda_array_interface__["data"][0]), owner, on)


def block_mask(
    mask_mod: Callable[..., Any],
    B: int,
    Hq: int,
    Tq: int,
    Tk: int,
    /,
    *,
    block_sizes: tuple[int, int] = (64, 64),
    aux: tuple[Any, ...] = (),
    stream: Any = None,
) -> BlockMask:
    """Return the states of tiles for ``flexible_attention(block_mask=...)``, computed on the GPU, if any.

    Parameters
    ----------
    mask_mod, B, Hq, Tq, Tk, block_sizes, aux
        As for `refimpl.attention.block_mask`; arrays as for `cuda_backend.flexible_attention`.
    stream : int or stream object, optional
        Where to run.

    Returns
    -------
    BlockMask
        Its states lie on the host, for which this waits.

    Raises
    ------
    OptionError, DTypeError, UnsupportedError, BackendUnavailableError
        As `cuda_backend.flexible_attention`.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     found = block_mask(lambda b, h, i, j: j <= i, 1, 8, 4, 4, block_sizes=(2, 2))
    ...     assert found.states.tolist() == [[[[1, 0], [2, 1]]]]
    """
    mod = as_mod("mask_mod", mask_mod)
    on = stream_of(aux[0] if aux else np.zeros(0), stream)
    arrays = aux_views(aux, on)
    mods = Mods(mod, aux=tuple((given.dtype, len(given.shape)) for given in arrays))
    return known_block_mask(mods, arrays, aux, (B, Hq, Tq, Tk), block_sizes, on)


def known_block_mask(
    mods: Mods, arrays: tuple[View, ...], aux: tuple[Any, ...], shape: tuple[int, ...],
    block_sizes: tuple[int, int], on: int,
) -> BlockMask:  # fmt: skip
    """Return what `tile_states` does, on the host, and the same object while nothing has changed.

    For kernels that walk along lists of tiles, which NumPy makes: `live` and `full` are bool, (B or 1, Hq or
    1, ceil(Tq / Br), ceil(Tk / Bc)).  The first call waits for the GPU.
    """
    mask: Any = mods.mask

    def make() -> BlockMask:
        states = tile_states(mods, arrays, aux, shape, block_sizes, on)
        host: Any = states.owner
        if not SIMULATOR and 0 not in states.shape:
            cuda.synchronize()
            host = states.owner.copy_to_host()
        return BlockMask(host, block_sizes, (shape[2], shape[3]), mask)

    found: BlockMask = remembered(("host", mask, shape, block_sizes), aux if mask.takes_aux else (), make)
    return found


def aux_views(aux: Any, on: int) -> tuple[View, ...]:
    """Return the arrays that functions of the user's read, as kernels see them.

    Raises
    ------
    DTypeError
        If they are no tuple.
    UnsupportedError
        If one has a dtype that the kernels do not take.
    """
    if not isinstance(aux, tuple | list):
        raise DTypeError(f"aux: expected a tuple of arrays, got {type(aux).__name__}")
    views = []
    for index, array in enumerate(aux):
        name = f"aux[{index}]"
        if is_host(array):
            host = np.asarray(array)
            array = widen(host).astype(np.float32) if is_floating(host.dtype) else host
        dtype = array.dtype.name if is_host(array) else dtype_name(name, array)
        if dtype not in AUX:
            raise UnsupportedError(f"{name} is {dtype}; the kernel takes {', '.join(AUX)}")
        views.append(view(name, array, on))
    return tuple(views)
