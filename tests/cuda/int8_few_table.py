"""LLM.int8() for few rows by other tiles than those chosen: ``python -m tests.cuda.int8_few_table``.

Each way is compared with the definition in float64, and bit for bit with what is chosen, before it is timed.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.cuda.int8_linear_table import compile_one, layer, planned, problem, run
from tests.cuda.need_gpu import need_gpu

# M, K, N, outliers
TIMED = (
    (256, 8192, 1024, 8), (64, 4096, 4096, 4), (64, 4096, 11_008, 4), (16, 4096, 4096, 4),
    (16, 4096, 4096, 40), (64, 4096, 11_008, 40), (32, 4096, 4096, 4), (128, 4096, 4096, 4),
    (64, 8192, 1024, 8), (128, 8192, 1024, 8), (256, 8192, 2048, 8), (16, 8192, 8192, 8),
    (64, 8192, 8192, 8), (16, 4096, 11_008, 4),
)  # fmt: skip
LIMIT_S = 110


def ways(M: int, K: int, N: int, processors: int) -> dict[str, Any]:
    """Return variants by what distinguishes them from the one that is chosen, which is first."""
    from cuda_backend.int8.variant_hopper import choose

    chosen: Any = choose("float16", "released", M, N, K, processors)
    found = {"chosen": chosen, "shared": chosen._replace(alone=False)}
    for name, change in (
        ("blocks/2", {"blocks": chosen.blocks // 2}),
        ("blocks*2", {"blocks": chosen.blocks * 2}),
        ("tokens/2", {"tokens": chosen.tokens // 2}),
        ("both/2", {"tokens": chosen.tokens // 2, "blocks": chosen.blocks // 2}),
    ):
        other = chosen._replace(**change)
        if other.blocks in (1, 2, 4, 8) and other.tokens >= 8:
            tiles = -(-M // other.tokens) * -(-N // other.features)
            found[name] = other._replace(alone=tiles * other.blocks <= processors)
    return found


def jobs(processors: int) -> set[tuple[str, Any]]:
    """Return the kernels that will be asked for."""
    from cuda_backend.int8 import quantize_hopper

    found: set[tuple[str, Any]] = set()
    for M, K, N, _ in TIMED:
        found.update(("product", each._replace(beside=True)) for each in ways(M, K, N, processors).values())
        found.add(("quantize", quantize_hopper.choose("float16", "cells", True, K)))
    return found


def timed(shape: tuple[int, int, int, int], processors: int) -> str:
    """Return a row of the table: microseconds of each way, float16 first."""
    import torch

    import cuda_backend
    from cuda_backend.int8 import plan_hopper
    from cuda_backend.timing import input_sets, interleaved

    M, K, N, outliers = shape
    sets = []
    for seed in range(input_sets(2 * M * K + K * N)):
        x, w = layer(seed, M, K, N, outliers)
        sets.append((x, w.T.contiguous(), cuda_backend.prepare_weight(w)))
        del w
    contestants: dict[str, Any] = {}
    first: Any = None

    def way(plan: Any, out: Any) -> Any:
        def ours(i: int) -> Any:
            x, _, weight = sets[i % len(sets)]
            return run(plan, x, weight, out)

        return ours

    def theirs(i: int) -> Any:
        x, turned, _ = sets[i % len(sets)]
        return torch.nn.functional.linear(x, turned)

    contestants["fp16"] = theirs
    wrong = []
    plans: Any = plan_hopper
    kept = plans.choose
    for name, variant in ways(M, K, N, processors).items():
        plans.choose = lambda *_, variant=variant: variant
        plans.linear_plan.cache_clear()
        out = torch.full((M, N), float("nan"), device="cuda", dtype=torch.float16)
        ours = way(planned(*sets[0][::2]), out)
        plans.choose = kept
        for i in range(1, len(sets)):  # descriptors of all sets, copied once
            ours(i)
        found = ours(0).clone()
        first = found if first is None else first
        said = problem(found, *sets[0][::2]) or ("" if torch.equal(found, first) else "other bits")
        if said:
            wrong.append(f"{name}: {said}")
        contestants[name] = ours
    us = {name: 1e6 * each.device_s for name, each in interleaved(contestants, rounds=9).items()}
    times = "".join(f"  {name} {each:.1f}" for name, each in us.items())
    return f"{M:4}{K:6}{N:6}{outliers:3} {times}  {'; '.join(wrong)}"


def main() -> None:
    """Print the table."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    start = time.monotonic()
    import torch

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    with ProcessPoolExecutor(16, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, sorted(jobs(processors), key=repr)))
    sys.stdout.write(f"{torch.cuda.get_device_name()}; compiled after {time.monotonic() - start:.0f} s\n")
    for shape in TIMED:
        sys.stdout.write(timed(shape, processors) + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    need_gpu()
    main()
