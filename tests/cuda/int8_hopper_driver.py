"""A driver that only remembers: what Hopper int8 calls hand to it, read from memory as it would."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend.int8 import (
    few_hopper,
    gemm_hopper,
    gemm_narrow_hopper,
    launches_hopper,
    layer_few_hopper,
    memory_hopper,
    outliers_hopper,
    pack_hopper,
    plan_hopper,
    product_hopper,
    quantize_hopper,
    rows_hopper,
)
from cuda_backend.int8.plan_hopper import linear_plan, product_plan, rows_plan
from cuda_backend.int8.variant_hopper import Narrow

MAPS, MEMORY = 0xAAAA00, {"zeros": 1 << 40, "scratch": 1 << 41}
MODULES = {
    "product": gemm_hopper,
    "narrow": gemm_narrow_hopper,
    "outliers": outliers_hopper,
    "quantize": quantize_hopper,
    "pack": pack_hopper,
    "layer_few": layer_few_hopper,
}


def remembered(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Return the list of launches, which grows; plans made before are forgotten."""
    found: list[SimpleNamespace] = []

    def values_of(name: str, pointers: int) -> list[int]:
        signature = MODULES[name].SIGNATURE.args  # type: ignore[attr-defined]
        kinds = [ctypes.c_uint64 if str(kind) == "uint64" else ctypes.c_int32 for kind in signature]
        places = (ctypes.c_void_p * len(kinds)).from_address(pointers)
        return [kind.from_address(place or 0).value for kind, place in zip(kinds, places, strict=True)]

    def remember(function: Any, blocks: int, threads: int, shared: int, stream: int, pointers: int) -> None:
        name, variant = function
        kernel = "narrow" if isinstance(variant, Narrow) else name
        item = SimpleNamespace(name=kernel, variant=variant, blocks=blocks, threads=threads, stream=stream)
        item.shared, item.values, item.cluster, item.early = shared, values_of(kernel, pointers), 1, False
        item.sharing = False
        found.append(item)

    def launch(function: Any, gx: int, gy: int, gz: int, tx: int, *rest: Any) -> tuple[int]:
        ty, tz, shared, stream, pointers, extra = rest
        assert (gy, gz, ty, tz, extra) == (1, 1, 1, 1, 0)
        remember(function, gx, tx, shared, stream, pointers)
        return (0,)

    def launch_clustered(config: Any, function: Any, pointers: int, extra: int) -> tuple[int]:
        assert (config.gridDimY, config.gridDimZ, extra, config.numAttrs) == (1, 1, 0, len(config.attrs))
        remember(function, config.gridDimX, config.blockDimX, config.sharedMemBytes, config.hStream, pointers)
        said = {each.id: each.value for each in config.attrs}
        found[-1].cluster = said[4].clusterDim.x if 4 in said else 1
        found[-1].early = said[6].programmaticStreamSerializationAllowed == 1 if 6 in said else False
        found[-1].sharing = said[14].sharedMemCarveout == 100 if 14 in said else False
        return (0,)

    def attribute() -> Any:
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    driver = SimpleNamespace(
        cuLaunchKernel=launch,
        cuLaunchKernelEx=launch_clustered,
        CUlaunchAttribute=attribute,
        CUlaunchAttributeID=SimpleNamespace(
            CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4,
            CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6,
            CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT=14,
        ),
        CUlaunchConfig=SimpleNamespace,
    )
    shared = SimpleNamespace(
        descriptors=SimpleNamespace(place=lambda number, addresses, encoders: MAPS),
        lock=memory_hopper.Lock(),
        zeros=lambda size: MEMORY["zeros"],
        scratch=lambda size: MEMORY["scratch"],
    )
    device = SimpleNamespace(compute_capability=(9, 0), MULTIPROCESSOR_COUNT=132)
    cuda = SimpleNamespace(get_current_device=lambda: device)
    monkeypatch.setattr(launches_hopper, "driver", driver)
    for module in (product_hopper, few_hopper):
        monkeypatch.setattr(module, "encoder", lambda *_: None)
    monkeypatch.setattr(plan_hopper, "shared_by", lambda *_: shared)
    monkeypatch.setattr(plan_hopper, "capturing", lambda _: False)
    for module in (plan_hopper, rows_hopper):
        monkeypatch.setattr(module, "cuda", cuda)
    for module in (product_hopper, rows_hopper, few_hopper):
        monkeypatch.setattr(module, "function_of", lambda name, variant, device: (name, variant))
    forget_plans()
    return found


def forget_plans() -> None:
    """Forget plans, whose functions are not a GPU's."""
    for plan in (linear_plan, product_plan, rows_plan):
        plan.cache_clear()
