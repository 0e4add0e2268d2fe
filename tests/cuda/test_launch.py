"""What a function may use of shared memory, with a driver that refuses a launch as the true one does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cuda_backend import launch
from cuda_backend.int8 import launches_hopper
from cuda_backend.weight_only import plan
from cuda_backend.weight_only.variant import Variant

DEFAULT = 48 << 10
REFUSED = SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")


class Driver:
    """Functions, each with the most dynamic shared memory that it may be launched with."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self) -> None:
        self.allowed: dict[Any, int] = {}
        self.launched: list[int] = []

    def cuFuncGetAttribute(self, _attribute: str, function: Any) -> tuple[Any, int]:
        return None, self.allowed.get(function, DEFAULT)

    def cuFuncSetAttribute(self, function: Any, _attribute: str, size: int) -> tuple[Any]:
        self.allowed[function] = size
        return (None,)

    def cuLaunchKernel(self, function: Any, *numbers: Any) -> tuple[Any]:
        shared = numbers[6]
        if shared > self.allowed.get(function, DEFAULT):
            return (REFUSED,)
        self.launched.append(shared)
        return (None,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    for module in (launch, launches_hopper):
        monkeypatch.setattr(module, "driver", found)
    return found


def test_what_was_allowed_stays_allowed(driver: Driver) -> None:
    for size, allowed in ((1 << 10, DEFAULT), (200 << 10, 200 << 10), (100 << 10, 200 << 10)):
        assert launch.allow_shared_memory("kernel", size) == "kernel"
        assert driver.allowed.get("kernel", DEFAULT) == allowed


@pytest.mark.parametrize("K", [256, 14336])
def test_plans_of_other_sizes_share_a_kernel(monkeypatch: pytest.MonkeyPatch, driver: Driver, K: int) -> None:
    """Three tokens, then one, then three again: the plan of the first call is still good."""
    for name, value in {
        "SIMULATOR": False, "_function": lambda *_: "kernel", "_processors": lambda: 132,
        "for_hopper": lambda: False,
    }.items():  # fmt: skip
        monkeypatch.setattr(plan, name, value)
    variant = Variant("int8", "f16", 8, wide=False, resident=True)
    plans = {M: plan.plan_with(variant, ("int8", "f16"), (M, K, 17), (2 * K, 1, 2), 0) for M in (3, 1)}
    for M in (3, 1, 3):
        plans[M].enqueue(0, [0] * 9)
    assert driver.launched == [variant.shared_bytes(M, K) for M in (3, 1, 3)]
