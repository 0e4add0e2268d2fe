"""Which rows are copied for the copy engine and where to, with a driver that copies in the host's memory."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import View
from cuda_backend.attention import padding


def seen(array: np.ndarray[Any, Any]) -> View:
    return View(array.shape, array.strides, array.dtype.name, array.ctypes.data, array)


def rows(width: int, *, heads: int = 2) -> np.ndarray[Any, Any]:
    return np.arange(3 * 5 * heads * width).reshape(3, 5, heads, width).astype(np.float16)


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (rows(64), False),
        (rows(60), True),
        (rows(1), True),
        (rows(64)[..., :60], False),  # the width is odd, the steps are not
        (rows(60)[:, ::2], False),  # refused: no one distance between rows
        (rows(60)[:1, :, :1], False),  # two axes of one element; tokens are 240 bytes apart
        (rows(62)[:, :, 1:][:1], False),  # 248 bytes from token to token, 124 wanted
        (rows(62, heads=1)[1:2], True),
        (rows(16).transpose(0, 1, 3, 2), False),  # refused: the last axis is not contiguous
    ],
)
def test_what_is_copied(array: np.ndarray[Any, Any], wanted: bool) -> None:
    assert padding.needs_copy(seen(array)) is wanted


class Driver:
    """Rows copied one by one, and what was freed."""

    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUDA_MEMCPY2D = SimpleNamespace
    CUdeviceptr = int

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(b"\xff" * 100_000, 100_000)
        self.freed: list[tuple[int, int]] = []

    def cuMemAllocAsync(self, size: int, _: int) -> tuple[int, int]:
        assert size <= 100_000
        return 0, ctypes.addressof(self.memory)

    def cuMemFreeAsync(self, address: int, stream: int) -> tuple[int]:
        self.freed.append((address, stream))
        return (0,)

    def cuMemcpy2DAsync(self, copy: Any, _: int) -> tuple[int]:
        assert copy.srcMemoryType == copy.dstMemoryType == 2
        for row in range(copy.Height):
            source, target = copy.srcDevice + row * copy.srcPitch, copy.dstDevice + row * copy.dstPitch
            ctypes.memmove(target, source, copy.WidthInBytes)
        return (0,)


@pytest.mark.parametrize("width", [1, 7, 60, 255])
def test_rows_arrive_further_apart(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(padding, "driver", driver)
    monkeypatch.setattr(padding, "current_device", lambda: 0)
    array = rows(width)
    with padding.aligned_rows(seen(array), 7) as given:
        assert not driver.freed
        assert given.shape == array.shape
        assert all(step % 16 == 0 for step in given.strides[:3])
        found = np.lib.stride_tricks.as_strided(
            np.frombuffer(driver.memory, np.float16), given.shape, given.strides
        )
        assert np.array_equal(found, array)
    assert driver.freed == [(given.address, 7)]


def test_others_pass_as_they_are() -> None:
    for array in (rows(64), rows(60)[:0], rows(60)[0], rows(60)[:, ::2]):
        view = seen(array)
        with padding.aligned_rows(view, 0) as given:
            assert given is view
