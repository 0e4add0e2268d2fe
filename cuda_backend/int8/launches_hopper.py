"""Launches of the Hopper int8 kernels: arguments packed once, only addresses exchanged from call to call."""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

from cuda_backend.context import checked, driver
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.int8.variant_hopper import Wide
from cuda_backend.launch import allow_shared_memory

__all__ = ["Launch", "function_of"]

SMALL_BLOCK = 256


class Launch:
    """A kernel with a grid and numbers, to be queued with addresses.

    Parameters
    ----------
    function : CUfunction
        Takes `addresses` uint64, then the `numbers` as int32.
    addresses : int
        How many.
    numbers : sequence of int
        The other arguments.
    blocks, threads, shared_bytes : int
        As ``cuLaunchKernel`` takes them.
    cluster : int
        Blocks of a cluster.
    early : bool
        It may start before the launch ahead of it has ended (`cuda_backend.ptx.grid`).
    sharing : bool
        Its multiprocessors are to have as much shared memory as they can, at the cost of L1: blocks of the
        next launch that need it cannot start beside this one where they have less.
    """

    def __init__(
        self,
        function: Any,
        addresses: int,
        numbers: Sequence[int],
        *,
        blocks: int,
        threads: int,
        shared_bytes: int = 0,
        cluster: int = 1,
        early: bool = False,
        sharing: bool = False,
    ) -> None:
        self._addresses = struct.Struct(f"{addresses}Q")
        start = self._addresses.size
        self._arguments = (ctypes.c_char * (start + 4 * len(numbers)))()
        struct.pack_into(f"{len(numbers)}i", self._arguments, start, *numbers)
        base = ctypes.addressof(self._arguments)
        places = [*range(0, start, 8), *range(start, start + 4 * len(numbers), 4)]
        self._places = (ctypes.c_void_p * len(places))(*[base + place for place in places])
        self._pointers = ctypes.addressof(self._places)
        self._function, self._shared_bytes = function, shared_bytes
        self._grid = (blocks, 1, 1, threads, 1, 1)
        attributes = [_cluster_of(cluster)] if cluster > 1 else []
        attributes += [_early()] if early else []
        attributes += [_sharing()] if sharing else []
        self._config = _configured(self._grid, shared_bytes, attributes) if attributes else None

    def __call__(self, stream: int, *addresses: int) -> None:
        """Queue the kernel on `stream`; the driver has copied the arguments when this returns."""
        self._addresses.pack_into(self._arguments, 0, *addresses)
        if self._config is None:
            launched = driver.cuLaunchKernel(
                self._function, *self._grid, self._shared_bytes, stream, self._pointers, 0
            )
        else:
            self._config.hStream = stream
            launched = driver.cuLaunchKernelEx(self._config, self._function, self._pointers, 0)
        checked(launched)


def _cluster_of(blocks: int) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x = blocks
    attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
    return attribute


def _early() -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _sharing() -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    attribute.value.sharedMemCarveout = 100  # percent
    return attribute


def _configured(grid: tuple[int, ...], shared_bytes: int, attributes: list[Any]) -> Any:
    """Return what ``cuLaunchKernelEx`` takes."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = grid[3:]
    config.sharedMemBytes = shared_bytes
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


@functools.cache
def function_of(name: str, variant: Any, device: int) -> Any:
    """Return a kernel on the current GPU, compiled once: "product", "quantize" and other files' names."""
    function = load(f"int8_{name}_hopper", (type(variant).__name__, *variant), device, _maker(name, variant))
    return allow_shared_memory(function, getattr(variant, "shared_bytes", 0))


def _maker(name: str, variant: Any) -> Callable[[], Image]:
    def make() -> Image:
        module = _module(name, variant)
        return compiled(
            module.build(variant),
            module.SIGNATURE,
            threads=getattr(variant, "threads", SMALL_BLOCK),
            blocks=getattr(variant, "resident", 1),
        )

    return make


def _module(name: str, variant: Any) -> Any:
    """Return the file of a kernel, which is not needed if the kernel is on disk."""
    if name == "product":
        name = "gemm" if isinstance(variant, Wide) else "gemm_narrow"
    return importlib.import_module(f"cuda_backend.int8.{name}_hopper")
