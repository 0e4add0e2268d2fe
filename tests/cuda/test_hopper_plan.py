"""What a Hopper launch hands to the driver, and what is refused, with a driver that only remembers."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import View
from cuda_backend.attention import plan_hopper
from cuda_backend.attention.call_hopper import flash_attention_hopper, launch_hopper, supports_hopper
from refimpl.errors import BackendUnavailableError, DTypeError, OptionError, ShapeError, UnsupportedError

MAPS, COUNTER = 0xAAAA00, 0xC0
# forward_hopper.SIGNATURE: three descriptors, out, lse, counter, scale, ten integers.
TYPES = [ctypes.c_uint64] * 6 + [ctypes.c_float] + [ctypes.c_int32] * 10


def dense(*shape: int, dtype: str = "float16", address: int = 1 << 20) -> View:
    strides = [2]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return View(shape, tuple(strides), dtype, address, None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    """Launches, with their arguments read from memory as the driver does."""
    found: list[SimpleNamespace] = []

    def launch(function: Any, gx: int, gy: int, gz: int, tx: int, *rest: Any) -> tuple[int]:
        ty, tz, shared, stream, pointers, extra = rest
        assert (gy, gz, ty, tz, extra) == (1, 1, 1, 1, 0)
        places = (ctypes.c_void_p * len(TYPES)).from_address(pointers)
        values = [kind.from_address(place or 0).value for kind, place in zip(TYPES, places, strict=True)]
        found.append(SimpleNamespace(function=function, blocks=gx, threads=tx, shared=shared, stream=stream))
        found[-1].values = values
        return (0,)

    def address(kind: int, addresses: tuple[int, ...], encode: Callable[..., int]) -> int:
        return MAPS

    device = SimpleNamespace(compute_capability=(9, 0), MULTIPROCESSOR_COUNT=132)
    shared = plan_hopper.Shared(SimpleNamespace(address=address), COUNTER, plan_hopper.Lock())  # type: ignore[arg-type]
    monkeypatch.setattr(plan_hopper, "driver", SimpleNamespace(cuLaunchKernel=launch))
    monkeypatch.setattr(plan_hopper, "cuda", SimpleNamespace(get_current_device=lambda: device))
    monkeypatch.setattr(plan_hopper, "encoder", lambda *_: None)
    monkeypatch.setattr(plan_hopper, "_shared", lambda stream, device: shared)
    monkeypatch.setattr(plan_hopper, "_function", lambda variant, device: variant)
    monkeypatch.setattr("cuda_backend.attention.call_hopper.current_device", lambda: 0)
    plan_hopper.make_plan.cache_clear()
    yield found
    plan_hopper.make_plan.cache_clear()


def test_arguments_are_those_of_the_signature(launched: list[SimpleNamespace]) -> None:
    q, k, v = dense(2, 300, 8, 128), dense(2, 700, 2, 128), dense(2, 700, 2, 64)
    out, lse = dense(2, 300, 8, 64, address=0x5000), dense(2, 8, 300, address=0x6000)
    launch_hopper(q, k, v, out, lse, causal="bottom_right", scale=0.25, stream=7)
    (found,) = launched
    per_head = 3  # tiles of 128 rows
    assert found.values[:6] == [MAPS, MAPS + 128, MAPS + 256, 0x5000, 0x6000, COUNTER]
    assert found.values[6] == pytest.approx(0.25 / np.log(2), rel=1e-7)
    assert found.values[7:] == [per_head * 16, per_head, 16, 8, 16, 4, 300, 700, 400, 64]
    assert (found.blocks, found.threads, found.stream) == (48, 384, 7)
    assert found.shared == found.function.shared_bytes
    assert found.function.causal


def test_a_second_call_brings_new_addresses_only(launched: list[SimpleNamespace]) -> None:
    arrays = [dense(1, 256, 4, 64, address=at) for at in (0x1000, 0x2000, 0x3000, 0x4000)]
    others = [dense(1, 256, 4, 64, address=at) for at in (0x1010, 0x2010, 0x3010, 0x4010)]
    for q, k, v, out in (arrays, others):
        launch_hopper(q, k, v, out, None, causal=False, scale=None, stream=0)
    first, second = (found.values for found in launched)
    assert (first[3], second[3]) == (0x4000, 0x4010)
    assert first[:3] + first[4:] == second[:3] + second[4:]
    assert second[4] == 0
    assert plan_hopper.make_plan.cache_info().misses == 1


def test_streams_and_masks_have_plans_of_their_own(launched: list[SimpleNamespace]) -> None:
    x = dense(1, 256, 4, 64)
    for stream, causal in ((0, False), (5, False), (0, True), (0, "top_left")):
        launch_hopper(x, x, x, x, None, causal=causal, scale=None, stream=stream)  # type: ignore[arg-type]
    assert [found.stream for found in launched] == [0, 5, 0, 0]
    assert [found.function.causal for found in launched] == [False, False, True, True]


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "error", "said"),
    [
        (dense(1, 9, 2, 60), dense(1, 9, 2, 60), dense(1, 9, 2, 64), {}, UnsupportedError, "D is 60"),
        (dense(1, 9, 2, 64), dense(1, 9, 2, 64), dense(1, 9, 2, 264), {}, UnsupportedError, "Dv is 264"),
        (*[dense(1, 9, 2, 64, dtype="float32")] * 3, {}, UnsupportedError, "inputs are float32"),
        (*[dense(1, 9, 2, 64)] * 3, {"scale": -1.0}, UnsupportedError, "scale is -1.0"),
        (*[dense(0, 9, 2, 64)] * 3, {}, UnsupportedError, "an axis is empty"),
        (*[dense(1, 9, 2, 64)._replace(strides=(240, 264, 132, 2))] * 3, {}, UnsupportedError, "has strides"),
        (*[dense(1, 9, 2, 64, address=8)] * 3, {}, UnsupportedError, "multiple of 16 bytes"),
        (dense(1, 9, 3, 64), *[dense(1, 9, 2, 64)] * 2, {}, ShapeError, "Hkv must divide Hq"),
        (dense(1, 9, 64), *[dense(1, 9, 2, 64)] * 2, {}, ShapeError, "q"),
        (dense(1, 9, 2, 64), *[dense(1, 8, 2, 64)] * 2, {"causal": True}, OptionError, "ambiguous"),
        (*[dense(1, 9, 2, 64)] * 3, {"causal": "lower"}, OptionError, "'lower'"),
        (dense(1, 9, 2, 64), *[dense(1, 9, 2, 64, dtype="bfloat16")] * 2, {}, DTypeError, "one dtype"),
    ],
)  # fmt: skip
def test_refusals(
    launched: list[SimpleNamespace], q: View, k: View, v: View, options: Any, error: Any, said: str
) -> None:
    with pytest.raises(error, match=said):
        launch_hopper(q, k, v, q, None, **{"causal": False, "scale": None, "stream": 0, **options})
    if error is UnsupportedError:
        assert any(said in reason for reason in supports_hopper(q, k, v, **options))
    else:
        with pytest.raises(error, match=said):
            supports_hopper(q, k, v, **options)
    assert not launched


def test_other_gpus_are_refused(launched: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = SimpleNamespace(compute_capability=(8, 0), MULTIPROCESSOR_COUNT=108)
    monkeypatch.setattr(plan_hopper, "cuda", SimpleNamespace(get_current_device=lambda: ampere))
    x = dense(1, 9, 2, 64)
    assert supports_hopper(x, x, x) == ["the GPU has compute capability 8.0; the kernel needs 9.0"]


@pytest.mark.cudasim
def test_the_simulator_is_refused() -> None:
    x = np.ones((1, 4, 2, 8), np.float16)
    with pytest.raises(BackendUnavailableError, match="simulates CUDA"):
        flash_attention_hopper(x, x, x)
