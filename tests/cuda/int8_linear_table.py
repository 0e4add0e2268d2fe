"""LLM.int8() on a Hopper GPU beside PyTorch's float16 linear: ``python -m tests.cuda.int8_linear_table``.

Layers are compared with the definition in float64 before they are timed.  It ends after 58 s.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.cuda.need_gpu import need_gpu

# M, K, N
TIMED = (
    (4096, 8192, 1024), (4096, 8192, 2048), (16_384, 8192, 1024), (16_384, 8192, 2048), (4096, 4096, 4096),
    (16_384, 8192, 8192), (16, 4096, 4096), (1, 8192, 8192), (1, 4096, 4096), (16, 8192, 8192),
    (32, 4096, 4096), (64, 4096, 11_008), (256, 8192, 1024),
)  # fmt: skip
CHECKED = (
    (200, 1504, 4360), (129, 304, 9000), (300, 4096, 8192), (700, 1000, 4104), (1, 8192, 1100),
    (16, 4096, 512), (5, 1000, 300), (33, 512, 4096), (64, 256, 130), (2, 28_672, 1024), (16, 8192, 8200),
)  # fmt: skip
OUTLIERS = (0, 1, 17, 40, 1100)
THRESHOLD, LIMIT_S = 6.0, 58


def jobs(processors: int) -> set[tuple[str, Any]]:
    """Return the kernels that the shapes ask for, by name and variant."""
    from cuda_backend.int8 import quantize_hopper
    from cuda_backend.int8.variant_hopper import choose, choose_few, one_kernel_wins

    found: set[tuple[str, Any]] = set()
    for M, K, N in (*TIMED, *CHECKED):
        for outliers in ("released", "paper") if (M, K, N) in CHECKED[:1] else ("released",):
            product = choose("float16", outliers, M, N, K, processors)
            found.add(("product", product._replace(beside=True)))
        few = choose_few("float16", M, N, K, processors) if one_kernel_wins(M, N, K) else None
        if few is not None:
            found.add(("layer_few", few))
        found.add(("quantize", quantize_hopper.choose("float16", "cells", K % 8 == 0, K)))
    return found


def compile_one(job: tuple[str, Any]) -> None:
    """Leave a kernel on disk."""
    from cuda_backend.context import current_device
    from cuda_backend.int8.launches_hopper import function_of

    function_of(*job, current_device())


def layer(seed: int, M: int, K: int, N: int, outliers: int) -> tuple[Any, Any]:
    """Return x with so many outlier columns, and a weight [K, N]."""
    import torch

    make: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    make["generator"] = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(M, K, **make).clamp_(-5, 5)
    columns = torch.randperm(K, device="cuda", generator=make["generator"])[:outliers]
    inliers = (torch.rand(M, 1, **make) < 0.3).to(x.dtype)  # rows that are small in these columns too
    x[:, columns] = (20 + x[:, columns]) * (1 - 0.9 * inliers)
    return x, torch.randn(K, N, **make) / K**0.5


def planned(x: Any, weight: Any, convention: str = "released", given: Any = None) -> Any:
    """Return the plan of a layer."""
    from cuda_backend.arrays import torch_layout
    from cuda_backend.context import current_device
    from cuda_backend.int8.plan_hopper import linear_plan
    from cuda_backend.launch import stream_of

    layouts = [None if each is None else torch_layout(each) for each in (given, weight.absmax)]
    return linear_plan(
        torch_layout(x), torch_layout(weight.codes), *layouts, None, THRESHOLD, convention,
        stream_of(x, None), current_device(),
    )  # fmt: skip


def run(plan: Any, x: Any, weight: Any, out: Any, given: Any = None) -> Any:
    """Queue a layer."""
    met = 0 if given is None else given.data_ptr()
    plan.run(x.data_ptr(), weight.codes.data_ptr(), weight.absmax.data_ptr(), met, 0, out.data_ptr())
    return out


def problem(found: Any, x: Any, weight: Any, convention: str = "released", given: Any = None) -> str | None:
    """Return how 64 rows of a result differ from the definition in float64 by more than rounding."""
    import torch

    magnitudes = x.float().abs()
    cells = magnitudes >= THRESHOLD if convention == "released" else magnitudes > THRESHOLD
    columns = cells.any(0)
    rows = torch.randperm(len(x), device="cuda")[:64]
    skipped = cells[rows] if convention == "released" else columns
    absmax = torch.where(skipped, 0, magnitudes[rows]).amax(1)
    # PyTorch divides by a number, and a number by what it has, with two roundings: by tensors with one.
    steps = (x[rows].float() * (torch.full_like(absmax, 127) / absmax)[:, None]).round()
    codes = torch.where((steps.abs() <= 127) & ~columns, steps, 0).double()
    total = (codes @ weight.codes.double()).float()
    y = total * absmax[:, None] * weight.absmax * torch.tensor(1 / 127**2, device="cuda")
    met = (
        weight.codes.float() * (weight.absmax / torch.full_like(weight.absmax, 127))
        if given is None
        else given
    )
    left, right = x[rows][:, columns].double(), met[columns].half().double()
    terms = y.abs().double() + left.abs() @ right.abs()
    limit = 2.0**-10 * terms + 2.0**-23 * (4 + int(columns.sum())) * terms + 2.0**-24
    wrong = (found[rows].double() - y.double() - left @ right).abs() > limit
    return f"{int(wrong.sum())} of {wrong.numel()} numbers" if bool(wrong.any()) else None


def check() -> Iterator[str]:
    """Compare layers with the definition, in memory full of NaN, twice."""
    import torch

    import cuda_backend

    for M, K, N in CHECKED:
        for outliers in OUTLIERS:
            x, w = layer(K + outliers, M, K, N, min(outliers, K))
            weight = cuda_backend.prepare_weight(w)
            plan = planned(x, weight)
            out = torch.full((M, N), float("nan"), device="cuda", dtype=x.dtype)
            for _ in range(2):
                run(plan, x, weight, out)
            wrong = problem(out, x, weight)
            if wrong:
                yield f"{(M, K, N)}, {outliers} outliers: {wrong}"
    M, K, N = CHECKED[0]
    for outliers in OUTLIERS:
        x, w = layer(outliers, M, K, N, min(outliers, K))
        weight = cuda_backend.prepare_weight(w)
        out = torch.empty(M, N, device="cuda", dtype=x.dtype)
        run(planned(x, weight, "paper", w), x, weight, out, w)
        wrong = problem(out, x, weight, "paper", w)
        if wrong:
            yield f"paper, {outliers} outliers: {wrong}"


def timed(M: int, K: int, N: int) -> str:
    """Return a row of the table."""
    import torch

    import cuda_backend
    from cuda_backend.timing import input_sets, interleaved

    sets = []
    for seed in range(input_sets(2 * M * K + K * N)):
        x, w = layer(seed, M, K, N, max(1, K // 1000))
        sets.append((x, w.T.contiguous(), cuda_backend.prepare_weight(w)))
        del w
    out = torch.empty(M, N, device="cuda", dtype=torch.float16)
    plan = planned(*sets[0][::2])

    def ours(i: int) -> Any:
        x, _, weight = sets[i % len(sets)]
        return run(plan, x, weight, out)

    def theirs(i: int) -> Any:
        x, turned, _ = sets[i % len(sets)]
        return torch.nn.functional.linear(x, turned)

    for i in range(1, len(sets)):  # descriptors of all sets, copied once
        ours(i)
    wrong = problem(ours(0), *sets[0][::2])
    if wrong:
        return f"{M:6}{K:7}{N:7}  {wrong}"
    found = interleaved({"fp16": theirs, "int8": ours}, rounds=9)
    us = {name: 1e6 * each.device_s for name, each in found.items()}
    times = "".join(f"{each:9.1f}" for each in us.values())
    return f"{M:6}{K:7}{N:7}{times}{us['fp16'] / us['int8']:9.2f}"


def main() -> None:
    """Print problems, then a table."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    start = time.monotonic()
    import torch

    with ProcessPoolExecutor(16, mp_context=multiprocessing.get_context("spawn")) as pool:
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        slowest_first = sorted(jobs(processors), key=lambda job: ("Wide" not in repr(job), repr(job)))
        list(pool.map(compile_one, slowest_first))
    sys.stdout.write(f"{torch.cuda.get_device_name()}; compiled after {time.monotonic() - start:.0f} s\n")
    sys.stdout.flush()
    problems = 0
    for line in check():
        problems += 1
        sys.stdout.write(f"WRONG {line}\n")
    sys.stdout.write(f"{problems} problems in checks after {time.monotonic() - start:.0f} s\n")
    sys.stdout.write("     M      K      N     fp16  int8 us  times fp16\n")
    for shape in TIMED:
        sys.stdout.write(timed(*shape) + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    need_gpu()
    main()
