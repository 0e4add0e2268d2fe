"""PyTorch on a Hopper GPU, for tests of kernels that nothing else runs."""

from __future__ import annotations

from typing import Any

import pytest

import cuda_backend

__all__ = ["hopper_torch"]


def hopper_torch() -> Any:
    """Return PyTorch; skip the test that asks where there is none, or no Hopper GPU."""
    reason = cuda_backend.availability("cuda")
    if reason:
        pytest.skip(reason)
    torch = pytest.importorskip("torch")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU")
    return torch
