"""Plans of decoding: which kernel a layer takes, its launch, and tables that stay on the GPU."""

from __future__ import annotations

import functools
import importlib
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda
from cuda_backend.arrays import View, view
from cuda_backend.context import is_hopper
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.launch import allow_shared_memory, shared_memory_bytes, simulation
from cuda_backend.weight_only.variant import (
    ROWS,
    SHARED_LIMIT,
    Grid,
    Stream,
    Variant,
    Wide,
    choose,
    choose_nf4_hopper,
    deep,
)  # fmt: skip
from refimpl.numerics import Array
from refimpl.quant.double_quantization import dynamic_map
from refimpl.quant.nf4 import LEVELS

__all__ = ["Plan", "address_of", "for_hopper", "pair_table", "plan_of", "plan_with"]

ADDRESSES = 9
SIMULATED_BLOCKS, SIMULATED_WARPS = 2, 2
MODULES = {Variant: "decode", Stream: "stream_nf4", Wide: "wide_nf4"}


class Plan(NamedTuple):
    """A launch but for its addresses; `lock` is held while they are written and not yet read.

    `tables` are the addresses of levels, of which int8 has none.
    """

    launch: Any
    lock: Any
    tables: list[int]

    def enqueue(self, stream: int, addresses: list[int]) -> None:
        """Queue the kernel on `stream`; nothing waits."""
        with self.lock:
            self.launch(stream, *addresses)


def for_hopper() -> bool:
    """Return whether to use what compute capability 9.0 has; the simulator plays all of it."""
    return SIMULATOR or is_hopper()


@functools.lru_cache(maxsize=1024)
def plan_of(
    weight: str, kind: str, M: int, K: int, N: int, pitch: int, groups: int, share: int, device: int
) -> Plan:
    """Return the plan of a layer, `pitch` bytes from a token to the next; `groups`, `share` by kernel."""
    variant = _chosen(weight, kind, M, K, N)
    return plan_with(variant, (weight, kind), (M, K, N), (pitch, groups, share), device)


def _processors() -> int:
    return SIMULATED_BLOCKS if SIMULATOR else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def _chosen(weight: str, kind: str, M: int, K: int, N: int) -> Variant | Stream | Wide:
    limit = shared_memory_bytes() or SHARED_LIMIT
    if weight == "nf4" and for_hopper():
        return choose_nf4_hopper(kind, M, K, N, _processors(), limit)
    return choose(weight, kind, M, K, limit)


def plan_with(
    variant: Variant | Stream | Wide,
    formats: tuple[str, str],
    sizes: tuple[int, int, int],
    layout: tuple[int, int, int],
    device: int,
) -> Plan:
    """Return the plan of a layer with a given kernel; arguments are those of `plan_of`, in its order."""
    (weight, kind), (M, K, N), (pitch, groups, share) = formats, sizes, layout
    early = for_hopper()
    if isinstance(variant, Variant):
        variant = variant._replace(early=early)
    if SIMULATOR:
        variant = variant._replace(warps=SIMULATED_WARPS)
    grid = variant.grid(M, K, N, _processors())
    tables = [address_of(table) for table in _tables(kind, device)] if weight == "nf4" else [0, 0]
    numbers = [M, N, K // deep(weight), -(-N // ROWS), pitch, groups or grid.parts, share]
    if SIMULATOR:
        return Plan(_simulated(variant, grid, numbers), Lock(), tables)
    from cuda_backend.int8.launches_hopper import Launch

    function = allow_shared_memory(_function(variant, device), grid.shared_bytes)
    launch = Launch(
        function, ADDRESSES, numbers, blocks=grid.blocks, threads=variant.threads,
        shared_bytes=grid.shared_bytes, early=early,
    )  # fmt: skip
    return Plan(launch, Lock(), tables)


def _simulated(variant: Any, grid: Grid, numbers: list[int]) -> Any:
    """Return what plays the kernel with Python threads."""
    kernel = cuda.jit(_module(variant).build(variant))

    def launch(_stream: int, *addresses: int) -> None:
        arguments = [*map(np.uint64, addresses), *map(np.int32, numbers)]
        with simulation():
            kernel[grid.blocks, variant.threads, 0, grid.shared_bytes](*arguments)

    return launch


@functools.cache
def _function(variant: Any, device: int) -> Any:
    return load(
        f"weight_only_{MODULES[type(variant)]}", variant, device, functools.partial(_compiled, variant)
    )


def _compiled(variant: Any) -> Image:
    module = _module(variant)
    return compiled(module.build(variant), module.SIGNATURE, threads=variant.threads, blocks=variant.blocks)


def _module(variant: Any) -> Any:
    """Return the file of a kernel, which is not needed if the kernel is on disk."""
    return importlib.import_module(f"cuda_backend.weight_only.{MODULES[type(variant)]}")


def pair_table(kind: str) -> Array:
    """Return the two levels of each byte of NF4 codes as a word, that of the high nibble in its low half.

    >>> hex(pair_table("f16")[0xF7])
    '0x3c00'
    """
    if kind == "f16":
        halves = LEVELS.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        bits = LEVELS.view(np.uint32)  # to nearest even, as `refimpl.numerics.round_to`
        halves = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)) >> np.uint32(16)
    byte = np.arange(256)
    pairs: Array = halves[byte >> 4] | halves[byte & 15] << np.uint32(16)
    return pairs


@functools.cache
def _tables(kind: str, _device: int) -> list[View]:
    """Return pairs of levels, and levels of absmax codes, on the current GPU; they stay there."""
    found = [view("levels", table, 0) for table in (pair_table(kind), np.array(dynamic_map()))]
    if not SIMULATOR:
        cuda.synchronize()
    return found


def address_of(item: View) -> int:
    """Return where an array lies, on the GPU or as the simulator has it."""
    return int(item.owner.ctypes.data) if SIMULATOR else item.address
