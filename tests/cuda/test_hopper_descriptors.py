"""Descriptors in the arguments of a launch, and tile counters, with a driver that only remembers: no GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend import capture
from cuda_backend.attention import counters, descriptors
from refimpl.errors import UnsupportedError

ADDRESS = 0x4000


class Driver:
    """Descriptors whose address is their first word, one allocation of counters, and a switch for capture."""

    def __init__(self) -> None:
        self.capturing = self.exchanged = 0
        self.asked: list[tuple[int, bytes]] = []

    def lasting(self, size: int, content: bytes) -> int:
        self.asked.append((size, content))
        return ADDRESS

    def cuStreamIsCapturing(self, _: int) -> tuple[int, int]:
        return 0, self.capturing

    def cuTensorMapReplaceAddress(self, member: Any, address: int) -> tuple[int]:
        self.exchanged += 1
        ctypes.c_uint64.from_address(int(member.getPtr())).value = address
        return (0,)

    def CUtensorMap(self, *, _ptr: int) -> Any:
        return SimpleNamespace(getPtr=lambda: _ptr)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(descriptors, "driver", fake)
    monkeypatch.setattr(capture, "driver", fake)
    monkeypatch.setattr(counters, "lasting", fake.lasting)
    monkeypatch.setattr(counters, "CAPTURED", 3)
    counters.tile_counters.cache_clear()
    return fake


def test_launches_of_a_stream_share_a_counter_and_graphs_have_their_own(driver: Driver) -> None:
    found = counters.tile_counters(7, 0)
    assert driver.asked == [(4 * 8, bytes(4 * 8))], "all are 0"
    assert found.address() == found.address() == ADDRESS
    driver.capturing = 1
    captured = [found.address() for _ in range(3)]
    assert captured == [ADDRESS + 8, ADDRESS + 16, ADDRESS + 24]
    with pytest.raises(UnsupportedError, match="3 launches"):
        found.address()
    driver.capturing = 0
    assert found.address() == ADDRESS
    assert counters.tile_counters(7, 0) is found


def test_the_first_call_on_a_stream_may_be_captured(driver: Driver) -> None:
    driver.capturing = 1
    assert counters.tile_counters(7, 0).address() == ADDRESS + 8
    driver.capturing = 0
    assert counters.tile_counters(7, 0).address() == ADDRESS


def test_addresses_are_exchanged_in_place(driver: Driver) -> None:
    """Each descriptor is encoded once; later calls change its address, and only if it is another."""
    encoded: list[int] = []

    def encoder(index: int) -> Any:
        def encode(address: int) -> Any:
            encoded.append(index)
            buffer = ctypes.create_string_buffer(address.to_bytes(8, "little") + bytes([index]) * 120, 128)
            return SimpleNamespace(getPtr=lambda: ctypes.addressof(buffer))

        return encode

    memory = ctypes.create_string_buffer(384)
    encode = descriptors.encode_together([encoder(1), encoder(2), encoder(3)], ctypes.addressof(memory))
    for addresses, exchanged in (((16, 32, 48), 0), ((1 << 40, 32, 64), 2), ((1 << 40, 32, 64), 2)):
        encode(addresses)
        expected = [a.to_bytes(8, "little") + bytes([i]) * 120 for i, a in enumerate(addresses, 1)]
        assert memory.raw == b"".join(expected)
        assert driver.exchanged == exchanged
    assert encoded == [1, 2, 3]
