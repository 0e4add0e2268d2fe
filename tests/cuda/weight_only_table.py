"""Decoding with quantised weights, verified and timed: ``python -m tests.cuda.weight_only_table``.

Every kernel that a layer in NF4 could take, whichever `choose_nf4_hopper` takes (marked with a star), and the
one for int8, beside torch's product in float16.  The method is `cuda_backend.timing`'s: rounds in turn, L2
flushed, sets of weights that rotate.  "error" is the largest, over the largest output, against float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from cuda_backend.weight_only.variant import Stream, Variant, Wide, choose, choose_nf4_hopper
from tests.cuda.need_gpu import need_gpu

LIMIT, PROCESSORS = 232_448, 132
SHAPES = ((8192, 28672), (28672, 8192), (16384, 16384), (4096, 32000), (4096, 4096))


def candidates(M: int, K: int, N: int) -> dict[str, Any]:
    """Return the kernels that fit: by name, with their launch as `plan_with` takes it."""
    taken = choose_nf4_hopper("f16", M, K, N, PROCESSORS)
    columns = 2 if M <= 2 else 4 if M <= 4 else 8
    found: list[Any] = [Wide("f16", 8 if M <= 8 else 16), choose("nf4", "f16", M, K)]
    if M <= 8:
        found.insert(0, Stream("f16", columns))
    named = {}
    for variant in found:
        if variant.grid(M, K, N, PROCESSORS).shared_bytes <= LIMIT:
            star = " *" if variant == taken else ""
            named[f"nf4 {type(variant).__name__.lower().replace('variant', 'portable')}{star}"] = variant
    return named


def ready(variant: Any) -> None:
    """Compile a kernel in a process of its own, into the folder that others read."""
    from cuda_backend.context import current_device
    from cuda_backend.weight_only.plan import _function

    _function(variant._replace(early=True) if isinstance(variant, Variant) else variant, current_device())


def main() -> None:
    """Print a table for each number of tokens and each shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    given = parser.parse_args()
    began = time.perf_counter()
    cases = [(int(M), K, N) for K, N in SHAPES[: given.shapes] for M in given.tokens.split(",")]
    kinds = {variant: None for case in cases for variant in candidates(*case).values()}
    kinds |= {choose("int8", "f16", M, K): None for M, K, _ in cases}
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        list(pool.map(ready, kinds))
    _say(f"{len(kinds)} kernels compiled after {time.perf_counter() - began:.1f} s")
    _say(f"{'':16}" + f"{'us':>8}{'least':>8}{'TB/s':>7}{'times fp16':>12}{'host us':>9}  error")
    for case in cases:
        _shape(*case)
        _say(f"    after {time.perf_counter() - began:.1f} s")


def _shape(M: int, K: int, N: int) -> None:
    import torch

    from cuda_backend import int8_linear_decode, nf4_linear_decode, prepare_int8_groups, prepare_nf4
    from cuda_backend.timing import input_sets, interleaved
    from cuda_backend.torch_ops import draw
    from cuda_backend.weight_only.plan import plan_with
    from refimpl.quant import Int8Groups, NF4Weight

    blocks, around = N * K // 64, 2 * M * (K + N)
    sizes = {"nf4": N * K // 2 + blocks + 4 * (blocks // 256 + 1), "int8": N * K + N * K // 32}
    sizes = {name: size + around for name, size in sizes.items()}
    xs, stored, ready_nf4, ready_int8 = [], [], [], []
    for seed in range(input_sets(sizes["nf4"])):
        stored.append(NF4Weight(
            draw((N * K // 2,), "uint8", seed), draw((blocks,), "uint8", 100 + seed),
            draw((-(-blocks // 256),), "float32", 200 + seed), draw((1,), "float32", 300 + seed),
            (N, K), (64, 256), True,
        ))  # fmt: skip
        ready_nf4.append(prepare_nf4(stored[-1]))
        codes, scale = draw((N, K), "int8", 500 + seed).T, draw((K // 128, N), "float32", 600 + seed)
        groups = Int8Groups(codes, scale)
        ready_int8.append((groups, prepare_int8_groups(groups)))
        xs.append(draw((M, K), "float16", 400 + seed))
    weights = torch.randn(3, N, K, dtype=torch.float16, device="cuda")
    count = len(xs)
    contestants: dict[str, Callable[[int], Any]] = {
        "torch fp16": lambda i: torch.nn.functional.linear(xs[0], weights[i % 3]),
        "int8": lambda i: int8_linear_decode(xs[i % count], ready_int8[i % count][1]),
        "nf4": lambda i: nf4_linear_decode(xs[i % count], ready_nf4[i % count]),
    }
    out = torch.empty(M, N, dtype=torch.float16, device="cuda")
    for name, variant in candidates(M, K, N).items():
        plan = plan_with(variant, ("nf4", "f16"), (M, K, N), (2 * K, 0, 8), 0)

        def call(i: int, plan: Any = plan) -> Any:
            x, weight = xs[i % count], ready_nf4[i % count]
            parts = [t.data_ptr() for t in (weight.codes, weight.absmax_codes, weight.scale, weight.offset)]
            plan.enqueue(0, [*parts, *plan.tables, x.data_ptr(), 0, out.data_ptr()])
            return out

        contestants[name] = call
    truths = {"nf4": _nf4_product(xs[0], stored[0]), "int8": _int8_product(xs[0], ready_int8[0][0])}
    wrong = {}
    for name, function in contestants.items():
        if name != "torch fp16":
            sys.stdout.write(f"[{name}] ")  # a kernel that never ends is the last one named
            sys.stdout.flush()
            out.fill_(float("nan"))
            first = function(0).clone()
            out.fill_(float("nan"))
            truth = truths[name.split()[0]]
            error = float((first.double() - truth).abs().max() / truth.abs().max())
            right = error < 2**-10 and torch.equal(first, function(0))
            wrong[name] = f"{error:.1e}" + ("" if right else " WRONG")
    times = interleaved(contestants, rounds=9)
    _say(f"\n{M} x {K} x {N}")
    for name, found in times.items():
        us, ratio = 1e6 * found.device_s, times["torch fp16"].device_s / found.device_s
        size = sizes.get(name.split()[0], 2 * N * K + around)
        _say(
            f"{name:16}{us:8.1f}{1e6 * found.least_s:8.1f}{size / us / 1e6:7.2f}"
            f"{ratio:12.2f}{1e6 * found.host_s:9.1f}  {wrong.get(name, '')}"
        )


def _nf4_product(x: Any, stored: Any) -> Any:
    """Return the product in float64, of levels and absmax as the definition has them."""
    import torch

    from refimpl.quant.double_quantization import dynamic_map
    from refimpl.quant.nf4 import LEVELS

    N, K = stored.shape
    values = torch.tensor(np.array(LEVELS)).cuda().double()
    levels = torch.tensor(np.array(dynamic_map(), np.float64)).cuda()
    absmax = levels[stored.absmax_codes.int()] * stored.scale.double().repeat_interleave(256)[: N * K // 64]
    absmax = (absmax + stored.offset.double()).view(N, K // 64, 1)
    found = torch.empty(len(x), N, dtype=torch.float64, device="cuda")
    for start in range(0, N, 4096):
        rows = slice(start, min(N, start + 4096))
        codes = stored.codes.view(N, K // 2)[rows]
        index = torch.stack((codes >> 4, codes & 15), -1).view(-1, K // 64, 64).int()
        found[:, rows] = x.double() @ (values[index] * absmax[rows]).view(-1, K).T
    return found


def _int8_product(x: Any, stored: Any) -> Any:
    import torch

    K, N = stored.codes.shape
    found = torch.zeros(len(x), N, dtype=torch.float64, device="cuda")
    for k in range(0, K, 4096):
        codes = stored.codes[k : k + 4096].double().reshape(-1, 128, N)
        scale = stored.scale[k // 128 : k // 128 + 32].double()
        found += x[:, k : k + 4096].double() @ (codes * scale[:, None]).view(-1, N)
    return found


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    need_gpu()
    main()
