"""A launch whose arguments are packed once: a block of descriptors, addresses, numbers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

from cuda_backend.attention.descriptors import ALIGNMENT
from cuda_backend.context import checked, driver

__all__ = ["Packed"]


class Packed:
    """A launch whose arguments are packed once, but for the addresses among them.

    Parameters
    ----------
    function, config
        As ``cuLaunchKernelEx`` takes them.
    maps_bytes : int
        Of a block of descriptors before all other arguments.
    layout : str
        Of the arguments behind it, as `struct` says it: uint64 addresses first.
    settled : sequence
        The arguments that are no addresses.
    """

    def __init__(
        self, function: Any, config: Any, maps_bytes: int, layout: str, settled: Sequence[float]
    ) -> None:
        kinds = [letter for count, letter in _runs(layout) for _ in range(count)]
        count = kinds.count("Q")
        self._addresses = struct.Struct(f"{count}Q")
        self._settled = struct.Struct("=" + "".join(kinds[count:]))
        size = maps_bytes + self._addresses.size + self._settled.size
        self._memory = (ctypes.c_char * (size + ALIGNMENT))()
        self._start = -ctypes.addressof(self._memory) % ALIGNMENT
        self.maps = ctypes.addressof(self._memory) + self._start
        self._first = self._start + maps_bytes
        self._settled.pack_into(self._memory, self._first + self._addresses.size, *settled)
        places, at = [self.maps] if maps_bytes else [], self.maps + maps_bytes
        for kind in kinds:
            places.append(at)
            at += 8 if kind == "Q" else 4
        self._places = (ctypes.c_void_p * len(places))(*places)
        self.function, self._config = function, config

    def __call__(self, *addresses: int) -> None:
        """Queue the kernel; the driver has copied the arguments when this returns."""
        self._addresses.pack_into(self._memory, self._first, *addresses)
        checked(driver.cuLaunchKernelEx(self._config, self.function, ctypes.addressof(self._places), 0))


def _runs(layout: str) -> list[tuple[int, str]]:
    """Return counts and letters of a layout.

    >>> _runs("7Q2f12i")
    [(7, 'Q'), (2, 'f'), (12, 'i')]
    """
    found, digits = [], ""
    for letter in layout:
        if letter.isdigit():
            digits += letter
        else:
            found.append((int(digits), letter))
            digits = ""
    return found
