"""Bytes of HBM and L2 that kernels move, counted by Nsight Compute and written for `frugal validate`.

``run FILE`` calls every case twice, of which ``ncu --profile-from-start off`` records the second; FILE gets
what was run, in order.  ``write FILE COLD WARM FOLDER`` makes one dated file of it and of two CSV reports.
`tests.cuda.measure` does both on a GPU.

A case starts with an empty kernel whose grid has as many blocks as its number, from 1 on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from memsim.measured.counted_traffic import SCHEDULES, schedule_of
from memsim.measured.measured_files import document, file_name, toml_text
from memsim.measured.nsight import between_markers, parse_report
from tests.cuda import algorithm_1
from tests.cuda.need_gpu import need_arguments, need_gpu

__all__ = ["MARKER", "cases", "run", "traffic_document"]

MARKER = "measurement_marker"
# B, H, N, D
SIZES = (
    (64, 16, 1024, 64),
    (8, 16, 4096, 64),
    (16, 16, 1024, 128),
    (4, 16, 4096, 128),
    (1, 16, 16384, 128),
    (2, 4, 512, 64),  # all of it stays in the L2
)
PRODUCTS = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16384, 4096, 4096),
    (4096, 28672, 8192),
    (1024, 1024, 1024),
)
OWN, PYTORCH = ("own kernels on {}", "own kernels"), ("PyTorch's kernels on {}", "PyTorch's kernels")
SHARED, RESERVED, THREADS = 233_472, 1024, 2048  # of a multiprocessor of sm_90; reserved for each block
MOST_SCORES = 40e9  # bytes of four matrices of scores that a GPU should have room for
Named = tuple[str, dict[str, Any], Callable[[], Any]]
Case = tuple[dict[str, Any], Callable[[], Any]]


def cases(card: str, processors: int) -> Iterator[Case]:
    """Yield what to run: its description, with the schedule that it should follow, and the call."""
    for sizes in SIZES:
        shape = dict(zip("BHND", sizes, strict=True))
        for (stack, rows), found in ((OWN, _own(shape, processors)), (PYTORCH, _pytorch(shape, processors))):
            for schedule, tiles, call in found:
                yield _case(stack.format(card), rows, schedule, shape, tiles), call
    for product in PRODUCTS:
        shape = dict(zip("MNK", product, strict=True))
        tiles, call = _int8(**shape, processors=processors)
        yield _case(OWN[0].format(card), OWN[1], "int8_gemm", shape, tiles), call
    shape = {"B": 64, "H": 16, "N": 1024, "D": algorithm_1.WIDTH, "e": 4}
    tiles, call = _algorithm_1(shape, processors)
    yield _case(OWN[0].format(card), OWN[1], "flash1_forward", shape, tiles), call


def _case(
    stack: str, rows: str, function: str, shape: dict[str, int], tiles: dict[str, Any]
) -> dict[str, Any]:
    kind = function.removeprefix("cudnn_").removeprefix("fa2_")
    names = [kind, f"flash2_{kind}"]
    if rows == PYTORCH[1] and not function.startswith("cudnn_"):
        names = [f"pytorch_{name}" for name in names] + names
    schedule = next(name for name in names if name in SCHEDULES)
    found = {"stack": stack, "set": rows, "function": function, "schedule": schedule, "shape": shape}
    shared = {name: tiles[name] for name in tiles.keys() & {"shared"}}  # by a block that loads through the L1
    return found | {"tiles": {name: tiles[name] for name in tiles if name not in shared}} | shared


def _own(shape: dict[str, int], processors: int) -> Iterator[Named]:
    """Yield this project's attention: Hopper and portable, forward and backward, full and causal."""
    import cuda_backend
    from cuda_backend.attention.plan_hopper import section_of
    from cuda_backend.attention.variant_backward import BackwardVariant
    from cuda_backend.attention.variant_hopper import choose
    from cuda_backend.attention.variant_portable import Features, Variant
    from cuda_backend.attention.variant_portable import choose as choose_portable
    from cuda_backend.launch import shared_memory_bytes

    B, H, N, D = shape.values()
    q, k, v = (drawn((B, N, H, D)) for _ in range(3))
    for causal in (False, True):
        variant = choose("f16", D, D, causal, rows=N, heads=B * H, processors=processors)
        section = section_of(B * H, 4 * N * D) if causal else 1
        tiles = {"rows": variant.block_m, "columns": variant.block_n, "section": section}
        mask: Any = "top_left" if causal else False
        tiles |= {"workers": processors, "causal": causal}
        yield "hopper_forward", tiles, partial(cuda_backend.flash_attention_hopper, q, k, v, causal=mask)
    room = shared_memory_bytes()
    options: dict[str, Any] = {
        "block_sizes": None,
        "sram": None,
        "capacity": None if room is None else room // 4,
    }
    forward = choose_portable("float16", D, D, Features(lse=True), form=Variant, **options)
    tiles = _resident(forward, processors) | {"lse": True}
    call = partial(cuda_backend.flash_attention, q, k, v, return_lse=True)
    yield "portable_forward", tiles, call
    back = choose_portable("float16", D, D, Features(), form=BackwardVariant, **options)
    o, lse = call()
    do = drawn((B, N, H, D))
    yield (
        "portable_backward",
        _resident(back, processors),
        partial(cuda_backend.flash_attention_vjp, q, k, v, o, lse, do),
    )


def _resident(variant: Any, processors: int) -> dict[str, int]:
    """Return the tiles, how many blocks run at once, and what memory each of them shares.

    Shared memory and threads allow so many.  These kernels load through the L1, to which that memory is lost.
    """
    together = max(1, min(SHARED // (variant.shared_bytes + RESERVED), THREADS // variant.threads))
    workers = processors * together
    return {"rows": variant.Br, "columns": variant.Bc, "workers": workers, "shared": variant.shared_bytes}


def _pytorch(shape: dict[str, int], processors: int) -> Iterator[Named]:
    """Yield eager attention in the operations of Algorithms 0 and 3, and two backends of SDPA.

    FlashAttention 2 has tiles of 128 x 128, 64 keys where heads are wider than 64; forward its registers
    leave room for two blocks.  Of cuDNN's kernels, whose sources are closed, only that queries (backward
    keys) are outside is taken for granted.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, H, N, D = shape.values()
    q, k, v, do = (drawn((B, H, N, D)) for _ in range(4))
    flat = [x.view(B * H, N, D) for x in (q, k, v, do)]
    tiles = {"rows": 128, "workers": processors}
    if 8 * B * H * N * N < MOST_SCORES:
        yield "standard_forward", tiles, partial(_eager, *flat[:3])
        weights = torch.softmax(flat[0] @ flat[1].transpose(1, 2), -1)
        yield "standard_backward", tiles, partial(_eager_backward, (*flat, weights))
        del weights
    for name, backend, blocks in (("fa2", "FLASH_ATTENTION", 2), ("cudnn", "CUDNN_ATTENTION", 1)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(*leaves)
        forward = {"rows": 128, "columns": 128 if D <= 64 else 64, "workers": blocks * processors}
        function = f"{name}_forward"
        few = 0.8 * blocks * processors > B * H * -(-N // 64)  # num_splits_heuristic of its flash_api.cpp
        if name == "fa2" and few:
            function = f"{name}_split"
            columns = 256 if D <= 64 else 128
            forward |= {"rows": 64, "columns": columns, "splits": -(-N // columns)}
        yield function, forward, partial(_sdpa, getattr(SDPBackend, backend), q, k, v)
        backward = {"rows": 128 if D <= 64 else 64, "columns": 128, "workers": processors}
        yield f"{name}_backward", backward, partial(torch.autograd.grad, out, leaves, do, retain_graph=True)


def _eager(q: Any, k: Any, v: Any) -> Any:
    import torch

    return torch.softmax(q @ k.transpose(1, 2), -1) @ v


def _eager_backward(operands: tuple[Any, ...]) -> Any:
    import torch

    q, k, v, do, weights = operands
    dp = do @ v.transpose(1, 2)
    dv = weights.transpose(1, 2) @ do
    ds = torch._softmax_backward_data(dp, weights, -1, weights.dtype)
    return ds @ k, ds.transpose(1, 2) @ q, dv


def _sdpa(backend: Any, q: Any, k: Any, v: Any) -> Any:
    import torch
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _int8(M: int, N: int, K: int, processors: int) -> tuple[dict[str, Any], Callable[[], Any]]:
    import torch

    import cuda_backend
    from cuda_backend.int8.gemm_layout_hopper import GROUP
    from cuda_backend.int8.variant_hopper import STEP, choose

    wide: Any = choose("float16", "released", M, N, K, processors)
    a, b = (torch.randint(-127, 128, size, dtype=torch.int8, device="cuda") for size in ((M, K), (N, K)))
    scales = [torch.ones(size, device="cuda") for size in (M, N)]
    call = partial(
        cuda_backend.scaled_int8_matmul, a, b.t(), a_absmax=scales[0], b_absmax=scales[1], dtype="float16"
    )
    tiles = {"rows": wide.block_m, "columns": wide.block_n, "depth": STEP, "group": GROUP}
    return tiles | {"workers": processors}, call


def _algorithm_1(shape: dict[str, int], processors: int) -> tuple[dict[str, Any], Callable[[], Any]]:
    import torch

    heads, N, D = shape["B"] * shape["H"], shape["N"], shape["D"]
    q, k, v, o = torch.randn(4, heads, N, D, device="cuda")
    statistics = torch.empty(2, heads, N, device="cuda")
    kernel = algorithm_1.build()
    together = SHARED // (algorithm_1.SHARED + RESERVED)
    tiles = {"rows": N, "columns": algorithm_1.KEYS, "workers": processors * together, "initialize": True}
    tiles["shared"] = algorithm_1.SHARED

    def call() -> None:
        kernel[heads, algorithm_1.THREADS](q, k, v, o, *statistics, D**-0.5)

    return tiles, call


def drawn(shape: tuple[int, ...]) -> Any:
    """Return normal numbers in float16 on the GPU."""
    import torch

    return torch.randn(shape, device="cuda", dtype=torch.float16)


def run(file: Path) -> None:
    """Run every case; one that fails is left out, and says why."""
    import torch

    from cli.commands.bench import recognised
    from cuda_backend._numba import cuda
    from cuda_backend.timing import device_name
    from memsim.hardware import hardware_names

    def measurement_marker() -> None:
        return

    mark = cuda.jit(measurement_marker)

    card = recognised(device_name(), hardware_names()) or "unknown"
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    profiler: Any = torch.cuda.profiler
    done = []
    for number, (case, call) in enumerate(cases(card, processors), 1):
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # a library refuses in ways of its own; the other cases can run
            sys.stderr.write(f"{case}: {type(error).__name__}: {error}\n")
            continue
        profiler.start()
        mark[number, 1]()
        call()
        torch.cuda.synchronize()
        profiler.stop()
        done.append({"number": number, **case})
    file.write_text(json.dumps({"hardware": card, "cases": done}), encoding="utf-8")


def traffic_document(ran: dict[str, Any], reports: dict[str, str], tool: str) -> dict[str, Any]:
    """Return what a file of counted traffic holds, from the reports of cold and warm caches."""
    found = []
    for cache, report in reports.items():
        launches = between_markers(parse_report(report), MARKER)
        for case in ran["cases"]:
            described = {key: value for key, value in case.items() if key != "number"}
            ran_there = launches.get(case["number"], ())
            kernels = [{"name": one.kernel[:80], **one.bytes} for one in ran_there if one.bytes]
            if kernels:
                described |= {"cache": cache, "kernels": _matched(kernels, described)}
                found.append(described)
    return document("traffic", ran["hardware"], tool, case=found)


def _matched(kernels: list[dict[str, Any]], case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the kernels one by one if the schedule has as many, otherwise their sum.

    PyTorch launches a kernel again for what is beyond the reach of 32 bits; those are one.
    """
    wanted = len(schedule_of(case)[0])
    if len(kernels) != wanted:
        kernels = [_sum(list(same)) for _, same in groupby(kernels, key=itemgetter("name"))]
    return kernels if len(kernels) == wanted else [_sum(kernels) | {"name": f"{len(kernels)} kernels"}]


def _sum(kernels: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in kernels[0] if name != "name"]
    return {"name": kernels[0]["name"], **{name: sum(one.get(name, 0) for one in kernels) for name in names}}


def main(arguments: list[str]) -> None:
    """Run the cases, or write the file."""
    if arguments[0] == "run":
        run(Path(arguments[1]))
        return
    ran, cold, warm = (Path(name).read_text(encoding="utf-8") for name in arguments[1:4])
    tool = "Nsight Compute, --clock-control none"
    found = traffic_document(json.loads(ran), {"cold": cold, "warm": warm}, tool)
    (Path(arguments[4]) / file_name(found)).write_text(toml_text(found), encoding="utf-8")


if __name__ == "__main__":
    words = need_arguments("run FILE", "write FILE COLD WARM FOLDER")
    if words[0] == "run":
        need_gpu()
    main(words)
