"""Variants of the NF4 decoding kernel, verified and timed in turn: ``python -m tests.cuda.nf4_variants``.

Beside each time stands what was predicted for the first shape.  The method is `cuda_backend.timing`'s: rounds
in turn, L2 flushed, sets of weights that rotate.  "stream" reads without computing, "compute" reads the same
unit again and again: neither result means anything, and none is verified.
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

from cuda_backend.weight_only import stream_nf4, wide_nf4
from cuda_backend.weight_only.stream_nf4 import SIGNATURE, Stream, reordered
from cuda_backend.weight_only.wide_nf4 import Wide

LIMIT, PROCESSORS = 232_448, 132
SHAPES = ((8192, 28672), (28672, 8192), (16384, 16384), (4096, 32000))

# Name: the variant for up to two tokens, and the microseconds predicted at 1 x 8192 x 28672.
VARIANTS: dict[str, tuple[Stream, str]] = {
    "even": (Stream("f16", 8), "43"),
    "columns": (Stream("f16", 2), "39"),
    "columns early": (Stream("f16", 2, early=True), "36"),
    "columns 3 deep": (Stream("f16", 2, depth=3), "38"),
    "columns, 2 of 16 in registers": (Stream("f16", 2, permuted=2), "38"),
    "bulk 4": (Stream("f16", 2, depth=4, bulk=True), "37"),
    "bulk 4 two chains": (Stream("f16", 2, depth=4, bulk=True, chains=2), "36"),
    "bulk 4 early": (Stream("f16", 2, depth=4, bulk=True, early=True), "34"),
    "bulk 4 pairs of blocks": (Stream("f16", 2, depth=4, bulk=True, cluster=2), "37"),
    "bulk 4, 4 of 16 in registers": (Stream("f16", 2, depth=4, bulk=True, permuted=4), "36"),
    "bulk 2, 32 warps": (Stream("f16", 2, warps=32, depth=2, bulk=True), "35"),
    "bulk 2, 32 warps, two chains": (Stream("f16", 2, warps=32, depth=2, bulk=True, chains=2), "35"),
    "bulk 2, 32 warps, 4 of 16": (Stream("f16", 2, warps=32, depth=2, bulk=True, permuted=4), "34"),
    "bulk 2, 32 warps, early": (Stream("f16", 2, warps=32, depth=2, bulk=True, early=True), "32"),
    "stream bulk 4": (Stream("f16", 2, depth=4, bulk=True, probe="stream"), "34"),
    "stream columns": (Stream("f16", 2, probe="stream"), "34"),
    "compute bulk 4": (Stream("f16", 2, depth=4, bulk=True, probe="compute"), "30"),
    "compute 32 warps": (Stream("f16", 2, warps=32, depth=2, bulk=True, probe="compute"), "27"),
    "compute 32 warps, 4 of 16": (
        Stream("f16", 2, warps=32, depth=2, bulk=True, permuted=4, probe="compute"), "23",
    ),
}  # fmt: skip


# The same for up to 8 and 16 tokens: microseconds predicted at 16 x 8192 x 28672.
WIDE: dict[str, tuple[Wide, str]] = {
    "wide 16": (Wide("f16", 16), "50"),
    "wide 16 alone": (Wide("f16", 16, cluster=1), "53"),
    "wide 16 early": (Wide("f16", 16, early=True), "48"),
    "wide 8": (Wide("f16", 8), "45"),
}
ALL: dict[str, tuple[Stream | Wide, str]] = {**VARIANTS, **WIDE}


def fitted(variant: Any, M: int, K: int, N: int, processors: int = PROCESSORS) -> tuple[Any, int, int] | None:
    """Return a variant that fits into shared memory, its parts and its blocks; None if it does not."""
    tiles, chunks = -(-N // 16), K // 256
    if M > variant.tokens:
        return None
    if isinstance(variant, Wide):
        clusters = min(-(-tiles // 4), processors // variant.cluster)
        parts = wide_nf4.parts_of(tiles, chunks, clusters, variant.cluster * variant.warps)
        while variant.shared_bytes(parts) > LIMIT:
            variant = variant._replace(depth=variant.depth - 1)
        return variant, parts, clusters * variant.cluster
    clusters = min(tiles, processors // variant.cluster)
    parts = stream_nf4.parts_of(tiles, chunks, clusters, variant.cluster * variant.warps)
    variant = variant._replace(inside=M * K // 64 <= 256)
    while variant.shared_bytes(M, K, parts) > LIMIT:
        if not variant.bulk or variant.depth <= 2:
            return None
        variant = variant._replace(depth=variant.depth - 1)
    return variant, parts, clusters * variant.cluster


def image(variant: Any) -> Any:
    """Compile a variant in a process of its own."""
    from cuda_backend.context import current_device
    from cuda_backend.cubins import compiled

    current_device()
    build = wide_nf4.build if isinstance(variant, Wide) else stream_nf4.build
    return compiled(build(variant), SIGNATURE, threads=variant.threads, blocks=variant.blocks)


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--tokens", default="1,16")
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    given = parser.parse_args()
    began = time.perf_counter()
    cases = [(int(M), K, N) for M in given.tokens.split(",") for K, N in SHAPES[: given.shapes]]
    needed = {}
    for case in cases:
        for name, (variant, _) in (VARIANTS if case[0] <= 2 else ALL).items():
            found = fitted(variant, *case) if any(part in name for part in given.only.split(",")) else None
            if found is not None and not (getattr(variant, "probe", "") and case[0] > 1):
                needed[name, *case] = found
    kinds = list(dict.fromkeys(found[0] for found in needed.values()))
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        images = dict(zip(kinds, pool.map(image, kinds), strict=True))
    _say(f"{len(kinds)} kernels compiled after {time.perf_counter() - began:.1f} s")
    from cuda_backend.context import current_device, driver
    from cuda_backend.cubins import _function
    from cuda_backend.launch import allow_shared_memory

    current_device()
    functions = {}
    for kind, made in images.items():
        functions[kind] = _function(made)
        count = driver.cuFuncGetAttribute(
            driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, functions[kind]
        )[1]
        spilled = driver.cuFuncGetAttribute(
            driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, functions[kind]
        )[1]
        if spilled:
            _say(f"{kind}: {count} registers, {spilled} bytes of local memory")
        allow_shared_memory(functions[kind], LIMIT)
    for case in cases:
        mine = {name: found for (name, *shape), found in needed.items() if tuple(shape) == case}
        _shape(*case, mine, functions)
        _say(f"    after {time.perf_counter() - began:.1f} s")


def _shape(M: int, K: int, N: int, variants: dict[str, Any], functions: dict[Any, Any]) -> None:
    import torch

    from cuda_backend import nf4_linear_decode, prepare_nf4
    from cuda_backend.int8.launches_hopper import Launch
    from cuda_backend.timing import input_sets, interleaved
    from cuda_backend.torch_ops import draw
    from cuda_backend.weight_only.call import pair_table
    from refimpl.quant import NF4Weight
    from refimpl.quant.double_quantization import dynamic_map

    blocks = N * K // 64
    size = N * K // 2 + blocks + 4 * (blocks // 256 + 1) + 2 * M * (K + N)
    levels = torch.tensor(np.array(dynamic_map(), np.float32)).cuda()
    tables = {False: torch.tensor(pair_table("f16").view(np.int32)).cuda()}
    remap, pairs = reordered("f16", np.arange(256, dtype=np.uint8))
    tables[True] = torch.tensor(pairs.view(np.int32)).cuda()
    remapped = torch.tensor(remap).cuda()
    sets = []
    for seed in range(input_sets(size)):
        stored = NF4Weight(
            draw((N * K // 2,), "uint8", seed), draw((blocks,), "uint8", 100 + seed),
            draw((-(-blocks // 256),), "float32", 200 + seed), draw((1,), "float32", 300 + seed),
            (N, K), (64, 256),
        )  # fmt: skip
        ready = prepare_nf4(stored)
        x = draw((M, K), "float16", 400 + seed)
        other = remapped[ready.codes.view(torch.uint8).int()]
        sets.append(
            (
                x,
                stored,
                ready,
                {False: ready.codes, True: other},
                torch.empty(M, N, dtype=torch.float16, device="cuda"),
            )
        )
    truth = _truth(sets[0][0], sets[0][1], levels)
    weights = torch.randn(3, N, K, dtype=torch.float16, device="cuda")
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    sources, target = [torch.empty_like(source) for _ in range(3)], torch.empty_like(source)
    contestants: dict[str, Callable[[int], object]] = {
        "torch fp16": lambda i: torch.nn.functional.linear(sets[0][0], weights[i % 3]),
        "torch copy": lambda i: target.copy_(sources[i % 3]),
        "frugal": lambda i: nf4_linear_decode(sets[i % len(sets)][0], sets[i % len(sets)][2]),
    }
    wrong = {"frugal": _error(nf4_linear_decode(sets[0][0], sets[0][2]), truth)}
    for name, (variant, parts, grid) in variants.items():
        permuted = getattr(variant, "permuted", 0) > 0
        launch = Launch(
            functions[variant], 9, [M, N, K // 256, -(-N // 16), 2 * K, parts, 8], blocks=grid,
            threads=variant.threads, cluster=variant.cluster,
            shared_bytes=variant.shared_bytes(parts) if isinstance(variant, Wide) else variant.shared_bytes(M, K, parts),
            early=variant.early,
        )  # fmt: skip
        addresses = []
        for x, _, ready, codes, out in sets:
            at = [codes[permuted], ready.absmax_codes, ready.scale, ready.offset]
            at += [tables[permuted], levels, x]
            addresses.append([*(t.data_ptr() for t in at), 0, out.data_ptr()])

        def call(i: int, launch: Any = launch, addresses: Any = addresses) -> None:
            launch(0, *addresses[i % len(addresses)])

        sys.stdout.write(f"[{name}] ")  # a kernel that never ends is the last one named
        sys.stdout.flush()
        sets[0][4].fill_(float("nan"))
        call(0)
        torch.cuda.synchronize()
        if not getattr(variant, "probe", ""):
            wrong[name] = _error(sets[0][4], truth)
            again = sets[0][4].clone()
            call(0)
            torch.cuda.synchronize()
            if not torch.equal(again, sets[0][4]):
                wrong[name] = float("inf")
        contestants[name] = call
    times = interleaved(contestants, rounds=15)
    base = times["torch fp16"].device_s
    _say(
        f"\n{M} x {K} x {N}, {size / 1e6:.1f} MB{'':12} us   least  TB/s  of copy  speed-up  host us  error  predicted"
    )
    for name, found in times.items():
        us, said = 1e6 * found.device_s, ALL.get(name, (None, ""))[1]
        error = wrong.get(name)
        mark = "" if error is None else f"{error:.1e}" + ("" if error < 2**-10 else " WRONG")
        shape = f"d{variants[name][0].depth}" if name in variants else ""
        _say(
            f"{name:32} {shape:3} {us:6.1f} {1e6 * found.least_s:6.1f} {size / us / 1e6:6.2f}"
            f" {times['torch copy'].device_s / found.device_s:7.2f} {base / found.device_s:8.2f}"
            f" {1e6 * found.host_s:9.1f}  {mark:8} {said}"
        )


def _truth(x: Any, stored: Any, levels: Any) -> Any:
    """Return the product in float64, of levels and absmax as the definition has them."""
    import torch

    from refimpl.quant.nf4 import LEVELS

    N, K = stored.shape
    values = torch.tensor(np.array(LEVELS)).cuda().double()
    found = torch.empty(len(x), N, dtype=torch.float64, device="cuda")
    for start in range(0, N, 4096):
        stop = min(N, start + 4096)
        codes = stored.codes.view(N, K // 2)[start:stop]
        index = torch.stack((codes >> 4, codes & 15), -1).view(stop - start, K).int()
        flat = torch.arange(start * K // 64, stop * K // 64, device="cuda")
        absmax = levels.double()[stored.absmax_codes[flat].int()] * stored.scale.double()[flat // 256]
        absmax = absmax + stored.offset.double()
        weight = values[index].view(stop - start, K // 64, 64) * absmax.view(stop - start, K // 64, 1)
        found[:, start:stop] = x.double() @ weight.view(stop - start, K).T
    return found


def _error(found: Any, truth: Any) -> float:
    return float((found.double() - truth).abs().max() / truth.abs().max())


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
