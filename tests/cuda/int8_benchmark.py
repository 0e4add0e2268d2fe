"""Rates of the int8 kernels on the GPU at hand: ``FRUGAL_TEST_GPU=1 python -m tests.cuda.int8_benchmark``.

Each product is checked against PyTorch's before it is timed, by events, on random data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import cuda_backend
from tests.cuda.need_gpu import need_gpu

SHAPES = ((4096, 4096, 4096), (8192, 4096, 4096))  # tokens, K, N
OUTLIER_COLUMNS = 24


def milliseconds(f: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of a call on the GPU."""
    import torch

    for _ in range(3):
        f()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def rows_of(T: int, K: int, N: int) -> list[tuple[str, float, str]]:
    """Return name, time and rate of everything at one shape."""
    import torch

    b = cuda_backend
    x = torch.randn(T, K, device="cuda", dtype=torch.float16).clamp(-5, 5)
    x[:, torch.randperm(K, device="cuda")[:OUTLIER_COLUMNS]] *= 8
    x[0, :OUTLIER_COLUMNS] = 8.0
    weight = torch.randn(K, N, device="cuda", dtype=torch.float16) / K**0.5
    bias = torch.randn(N, device="cuda", dtype=torch.float16)
    stored, rows = b.quantize_columns(weight), b.quantize_rows(x)
    product = b.int8_matmul(rows.codes, stored.codes)
    if not torch.equal(product, torch._int_mm(rows.codes, stored.codes)):
        raise SystemExit("int8_matmul differs from torch._int_mm")
    exact = x.float() @ weight.float() + bias
    for f in (b.llm_int8_linear, b.llm_int8_linear_fused):
        error = (f(x, stored, bias=bias).float() - exact).square().mean().sqrt() / exact.std()
        if not error < 0.03:
            raise SystemExit(f"{f.__name__}: relative error {error:.3g}")

    def bandwidth(nbytes: int) -> Callable[[float], str]:
        return lambda ms: f"{nbytes / ms / 1e6:.0f} GB/s"

    def rate(ms: float) -> str:
        return f"{2 * T * K * N / ms / 1e9:.1f} TOPS"

    read, written = 2 * T * K, T * K + 4 * T
    linear, fused = b.llm_int8_linear, b.llm_int8_linear_fused
    plan: list[tuple[str, Callable[[], Any], Callable[[float], str]]] = [
        ("quantise rows, no threshold", lambda: b.quantize_rows(x), bandwidth(read + written)),
        ("quantise rows, threshold", lambda: b.quantize_rows(x, threshold=6), bandwidth(2 * read + written)),
        ("quantise weight in C order", lambda: b.quantize_columns(weight), bandwidth(3 * K * N)),
        ("int8 product", lambda: b.int8_matmul(rows.codes, stored.codes), rate),
        ("torch._int_mm", lambda: torch._int_mm(rows.codes, stored.codes), rate),
        ("linear fused, threshold 6", lambda: fused(x, stored, bias=bias), rate),
        ("linear fused, no threshold", lambda: fused(x, stored, bias=bias, threshold=None), rate),
        ("linear in steps, threshold 6", lambda: linear(x, stored, bias=bias), rate),
        ("torch float16 linear", lambda: torch.nn.functional.linear(x, weight.T, bias), rate),
    ]  # fmt: skip
    found = []
    for name, call, unit in plan:
        ms = milliseconds(call)
        found.append((name, ms, unit(ms)))
    return found


def main() -> None:
    """Print a table."""
    import torch

    sys.stdout.write(f"{torch.cuda.get_device_name()}, float16, {OUTLIER_COLUMNS} outlier columns\n")
    for shape in SHAPES:
        sys.stdout.write(f"T, K, N = {shape}\n")
        for name, ms, rate in rows_of(*shape):
            sys.stdout.write(f"  {name:36}{ms:9.3f} ms{rate:>14}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    need_gpu()
    main()
