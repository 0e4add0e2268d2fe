"""The cache of TMA descriptors, with a driver that only remembers: no GPU needed."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend.attention import descriptors
from refimpl.errors import UnsupportedError


class Driver:
    """Device memory as a dictionary, and a switch for capture."""

    def __init__(self) -> None:
        self.memory: dict[int, bytes] = {}
        self.capturing = 0

    def cuMemAlloc(self, _: int) -> tuple[int, int]:
        return 0, 4096

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, _: int) -> tuple[int]:
        self.memory[target] = ctypes.string_at(source, size)
        return (0,)

    def cuStreamIsCapturing(self, _: int) -> tuple[int, int]:
        return 0, self.capturing

    def cuTensorMapReplaceAddress(self, member: Any, address: int) -> tuple[int]:
        ctypes.c_uint64.from_address(int(member.getPtr())).value = address
        return (0,)

    def CUtensorMap(self, *, _ptr: int) -> Any:
        return SimpleNamespace(getPtr=lambda: _ptr)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(descriptors, "driver", fake)
    monkeypatch.setattr(descriptors, "SETS", 4)
    return fake


def made(number: int) -> Any:
    """Return what makes a set of two descriptors full of `number` on the host."""
    buffer = ctypes.create_string_buffer(bytes([number]) * 256, 256)
    return lambda _addresses: ctypes.addressof(buffer)


def test_a_set_stays_until_four_others_have_come(driver: Driver) -> None:
    cache = descriptors.DescriptorCache(0, 2)
    places = [cache.address(n, (n, n), made(n)) for n in range(4)]
    assert len(set(places)) == 4
    assert cache.address(0, (0, 0), made(99)) == places[0]  # found: not encoded again
    assert cache.address(4, (4, 4), made(4)) == places[1]  # 1 was used least recently
    for key, place in ((0, places[0]), (4, places[1]), (2, places[2]), (3, places[3])):
        assert driver.memory[place] == bytes([key]) * 256


def test_what_a_graph_reads_is_never_replaced(driver: Driver) -> None:
    cache = descriptors.DescriptorCache(0, 2)
    kept = cache.address(0, (0, 0), made(0))
    driver.capturing = 1
    assert cache.address(0, (0, 0), made(0)) == kept
    with pytest.raises(UnsupportedError, match="before"):
        cache.address(1, (1, 1), made(1))
    driver.capturing = 0
    assert kept not in [cache.address(n, (n, n), made(n)) for n in range(1, 12)]
    assert driver.memory[kept] == bytes(256)


def test_other_addresses_and_other_layouts_are_other_sets(driver: Driver) -> None:
    cache = descriptors.DescriptorCache(0, 2)
    places = {cache.address(kind, (a, b), made(1)) for kind in (0, 1) for a, b in ((16, 32), (32, 16))}
    assert len(places) == 4


def test_addresses_are_exchanged_in_place(driver: Driver) -> None:
    """Each descriptor is encoded once; later calls change nothing of it but its address."""
    encoded: list[int] = []

    def encoder(index: int) -> Any:
        def encode(address: int) -> Any:
            encoded.append(index)
            buffer = ctypes.create_string_buffer(address.to_bytes(8, "little") + bytes([index]) * 120, 128)
            return SimpleNamespace(getPtr=lambda: ctypes.addressof(buffer))

        return encode

    encode = descriptors.encode_together([encoder(1), encoder(2), encoder(3)])
    for addresses in ((16, 32, 48), (1 << 40, 16, 64)):
        start = encode(addresses)
        assert start % 64 == 0  # as CUtensorMap wants it
        expected = [a.to_bytes(8, "little") + bytes([i]) * 120 for i, a in enumerate(addresses, 1)]
        assert ctypes.string_at(start, 384) == b"".join(expected)
    assert encoded == [1, 2, 3]
