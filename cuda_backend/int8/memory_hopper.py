"""The memory that calls on one stream share."""

from __future__ import annotations

from threading import Lock

from cuda_backend.capture import lasting
from cuda_backend.int8.descriptors_hopper import Descriptors
from cuda_backend.once import once_each

__all__ = ["ALIGNMENT", "Arena", "Shared", "padded", "shared_by"]

ALIGNMENT = 256


def padded(size: int, multiple: int = 16) -> int:
    """Return the least multiple of `multiple` that is not less than `size`, and not 0."""
    return max(1, -(-size // multiple)) * multiple


class Arena:
    """Room in the memory of a stream, counted first and given addresses when all of it is known."""

    def __init__(self) -> None:
        self.size = 0

    def reserve(self, size: int) -> int:
        """Return where `size` bytes start, relative to the memory that `size` of the arena asks for."""
        start = self.size
        self.size += padded(size, ALIGNMENT)
        return start


class Shared:
    """Descriptors and memory of calls that run one after the other: those on a stream, or captured on it.

    Memory grows and is never given back: plans and graphs hold its addresses.  What kernels find in `zeros`
    is 0, and they leave it so; what they find in `scratch` means nothing.  Graphs captured on one stream
    share theirs wherever they are replayed, so none may run beside another; beside calls there they may.
    """

    def __init__(self, stream: int, captured: bool) -> None:
        self.descriptors = Descriptors(stream, captured)
        self.lock = Lock()
        self._held = {"zeros": (0, 0), "scratch": (0, 0)}

    def zeros(self, size: int) -> int:
        """Return the address of at least `size` bytes that are 0 between calls."""
        return self._memory("zeros", size)

    def scratch(self, size: int) -> int:
        """Return the address of at least `size` bytes."""
        return self._memory("scratch", size)

    def _memory(self, name: str, size: int) -> int:
        address, held = self._held[name]
        if size > held:
            held = max(size, 2 * held)
            address = lasting(held, bytes(held) if name == "zeros" else b"")
            self._held[name] = address, held
        return address


@once_each
def shared_by(stream: int, _device: int, captured: bool) -> Shared:
    """Return what calls on `stream` share, or those that are captured on it."""
    return Shared(stream, captured)
