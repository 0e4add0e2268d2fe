"""What a Hopper launch hands to the driver, and what is refused, with a driver that only remembers."""

from __future__ import annotations

import ctypes
import heapq
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import View
from cuda_backend.attention import plan_hopper
from cuda_backend.attention.call_hopper import (
    flash_attention_hopper,
    launch_hopper,
    refuse,
    supports_hopper,
)
from cuda_backend.attention.forward import flash_attention
from refimpl.errors import BackendUnavailableError, DTypeError, OptionError, ShapeError, UnsupportedError

COUNTER = 0xC0
# forward_hopper.SIGNATURE: the descriptors; out, lse, counter; scale, ten integers.
TYPES: list[Any] = [
    ctypes.c_uint64 * 48,
    *[ctypes.c_uint64] * 3,
    ctypes.c_float,
    *[ctypes.c_int32] * 10,
]


def dense(*shape: int, dtype: str = "float16", address: int = 1 << 20) -> View:
    strides = [2]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return View(shape, tuple(strides), dtype, address, None)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    """Launches, with their arguments read from memory as the driver does."""
    found: list[SimpleNamespace] = []

    def launch(config: Any, function: Any, pointers: int, extra: int) -> tuple[int]:
        assert (config.gridDimY, config.gridDimZ, config.blockDimY, config.blockDimZ, extra) == (
            1,
            1,
            1,
            1,
            0,
        )
        assert config.numAttrs == 1
        assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
        places = (ctypes.c_void_p * len(TYPES)).from_address(pointers)
        assert places[0] is not None
        assert places[0] % 64 == 0
        block, *values = (kind.from_address(place or 0) for kind, place in zip(TYPES, places, strict=True))
        found.append(
            SimpleNamespace(
                function=function,
                blocks=config.gridDimX,
                threads=config.blockDimX,
                shared=config.sharedMemBytes,
                stream=config.hStream,
                maps=[block[0], block[16], block[32]],
                values=[value.value for value in values],
            )
        )
        return (0,)

    def encode_together(_: Any, place: int) -> Any:
        """Descriptors that are nothing but an address."""

        def encode(addresses: tuple[int, ...]) -> None:
            for index, address in enumerate(addresses):
                ctypes.c_uint64.from_address(place + 128 * index).value = address

        return encode

    device = SimpleNamespace(compute_capability=(9, 0), MULTIPROCESSOR_COUNT=132)
    driver = SimpleNamespace(
        cuLaunchKernelEx=launch,
        CUlaunchAttribute=SimpleNamespace,
        CUlaunchAttributeValue=SimpleNamespace,
        CUlaunchConfig=SimpleNamespace,
        CUstream=int,
        CUlaunchAttributeID=SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6),
    )
    monkeypatch.setattr(plan_hopper, "driver", driver)
    monkeypatch.setattr(plan_hopper, "cuda", SimpleNamespace(get_current_device=lambda: device))
    monkeypatch.setattr(plan_hopper, "encoder", lambda *_: None)
    monkeypatch.setattr(plan_hopper, "encode_together", encode_together)
    counter = SimpleNamespace(address=lambda: COUNTER)
    monkeypatch.setattr(plan_hopper, "tile_counters", lambda stream, device: counter)
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
    assert found.maps == [1 << 20] * 3
    assert found.values[:3] == [0x5000, 0x6000, COUNTER]
    assert found.values[3] == pytest.approx(0.25 / np.log(2), rel=1e-7)
    assert found.values[4:] == [per_head * 16, per_head, 16, 8, 16, 4, 300, 700, 400, 64]
    assert (found.blocks, found.threads, found.stream) == (48, 384, 7)
    assert found.shared == found.function.shared_bytes
    assert found.function.causal


def test_a_second_call_brings_new_addresses_only(launched: list[SimpleNamespace]) -> None:
    arrays = [dense(1, 256, 4, 64, address=at) for at in (0x1000, 0x2000, 0x3000, 0x4000)]
    others = [dense(1, 256, 4, 64, address=at) for at in (0x1010, 0x2010, 0x3010, 0x4010)]
    for q, k, v, out in (arrays, others):
        launch_hopper(q, k, v, out, None, causal=False, scale=None, stream=0)
    assert [found.maps for found in launched] == [[0x1000, 0x2000, 0x3000], [0x1010, 0x2010, 0x3010]]
    first, second = (found.values for found in launched)
    assert (first[0], second[0]) == (0x4000, 0x4010)
    assert first[1:] == second[1:]
    assert second[1] == 0
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
        (dense(1, 9, 2, 60), dense(1, 9, 2, 60), dense(1, 9, 2, 64), {}, UnsupportedError, "q has strides"),
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
@pytest.mark.parametrize("width", [8, 9])  # rows of an odd width are copied before anything else
def test_the_simulator_is_refused(width: int) -> None:
    x = np.ones((1, 4, 2, width), np.float16)
    with pytest.raises(BackendUnavailableError, match="simulates CUDA"):
        flash_attention_hopper(x, x, x)


def test_values_of_an_odd_width_get_longer_rows(launched: list[SimpleNamespace]) -> None:
    """60 of 64 columns lie right for the copy engine; what the kernel stores are multiples of 8 columns."""
    part = dense(1, 256, 4, 64)._replace(shape=(1, 256, 4, 60))
    launch_hopper(part, part, part, dense(1, 256, 4, 64), None, causal=False, scale=None, stream=0)
    plan = plan_hopper.make_plan(*[part.layout] * 3, False, None, 0, 0)
    assert (plan.out_shape, plan.out_is_like_q) == ((1, 256, 4, 64), False)
    (found,) = launched
    assert found.values[3] == pytest.approx(60**-0.5 / np.log(2), rel=1e-7)
    assert found.values[-1] == 64


@pytest.mark.parametrize("heads", [1, 7, 12, 16, 64, 127])
@pytest.mark.parametrize("megabytes", [0, 1, 5, 8, 100])
def test_sections_are_within_the_cache_and_almost_alike(heads: int, megabytes: int) -> None:
    section = plan_hopper.section_of(heads, megabytes << 20)
    assert 1 <= section <= heads
    assert section == 1 or section * megabytes << 20 <= plan_hopper.SECTION_BYTES
    assert (-heads) % section < max(1, -(-heads // section))


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"softcap": 30.0}, UnsupportedError, "no softcap"),
        ({"dropout_p": 0.1, "rng": 3}, UnsupportedError, "no dropout_p"),
        ({"attn_mask": np.ones((2, 2), bool), "bias": None}, UnsupportedError, "no attn_mask"),
        ({"block_sizes": (8, 8)}, UnsupportedError, "no block_sizes"),
        ({"blocksize": 8}, TypeError, "no such option: blocksize"),
    ],
)
def test_options_that_the_kernel_lacks(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        refuse(options)


def test_defaults_and_a_generator_without_dropout_change_nothing() -> None:
    refuse({"softcap": None, "dropout_p": 0.0, "rng": 7, "attn_mask": None})


@pytest.mark.cudasim
def test_the_tier_is_named_or_refused() -> None:
    x = np.ones((1, 4, 2, 8), np.float16)
    assert np.array_equal(flash_attention(x, x, x, tier="auto"), flash_attention(x, x, x))
    with pytest.raises(BackendUnavailableError, match="simulates CUDA"):
        flash_attention(x, x, x, tier="hopper")
    with pytest.raises(UnsupportedError, match="no softcap; tier='portable'"):
        flash_attention(x, x, x, tier="hopper", softcap=3.0)
    with pytest.raises(OptionError, match="expected one of portable, hopper, auto"):
        flash_attention(x, x, x, tier="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "tokens", "width", "block_n", "most"),
    [
        (128, 4096, 64, 128, 0.02),
        (64, 4096, 128, 128, 0.01),
        (16, 16384, 128, 128, 0.01),
        (64, 4096, 256, 80, 0.01),
        (32, 2048, 128, 128, 0.04),
    ],
)
def test_sections_leave_few_processors_idle(
    heads: int, tokens: int, width: int, block_n: int, most: float
) -> None:
    """Tiles in the kernel's order, each to who is free first: the share of time that waits for the last."""
    section = plan_hopper.section_of(heads, 4 * tokens * width)
    free = [0.0] * 132
    for start in range(0, heads, section):
        for end_row in range(tokens, 0, -128):
            for _ in range(start, min(start + section, heads)):
                steps = -(-end_row // block_n) + 1  # one for the start and the end of a tile
                heapq.heappush(free, heapq.heappop(free) + steps)
    assert 1 - sum(free) / len(free) / max(free) < most
