"""The table of docs/performance.md for the Hopper kernel: ``python -m tests.cuda.hopper_table [fp16 bf16]``.

Each contestant's calls are captured in a CUDA graph, as many as two milliseconds take and at most ten, so
that kernels shorter than their launch are timed too; graphs are replayed in turn, the median of nine counts.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

from tests.cuda.need_gpu import need_gpu

# B, H, key heads, N, D
ROWS = (
    (64, 16, 16, 1024, 64),
    (8, 16, 16, 4096, 64),
    (16, 16, 16, 1024, 128),
    (4, 16, 16, 4096, 128),
    (1, 16, 16, 16384, 128),
    (4, 16, 16, 4096, 256),
    (4, 32, 8, 4096, 128),
    *((1, 32, 32, N, D) for D in (64, 128) for N in (512, 1024, 2048)),
)
FORMATS = {"fp16": "float16", "bf16": "bfloat16"}
BACKENDS = {"FA2": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
EXPECTED_RATE, GRAPH_S, MOST_CALLS, REPLAYS = 4e14, 2e-3, 10, 9


def seconds(contestants: Mapping[str, Callable[[], Any]], calls: int, stream: Any) -> dict[str, float]:
    """Return the seconds of one call of each."""
    import torch

    graphs = {}
    for name, call in contestants.items():
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name], stream=stream):
                for _ in range(calls):
                    call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _, (name, graph) in itertools.product(range(REPLAYS), graphs.items()):
        with torch.cuda.stream(stream):
            start.record(stream)
            graph.replay()
            end.record(stream)
        end.synchronize()
        times[name].append(1e-3 * start.elapsed_time(end) / calls)
    return {name: median(found) for name, found in times.items()}


def _sdpa(q: Any, k: Any, v: Any, backend: str, *, causal: bool, grouped: bool) -> Any:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def main(formats: list[str]) -> None:
    """Print TFLOP/s for each row, and geometric means."""
    import torch

    from cuda_backend import flash_attention_hopper

    stream = torch.cuda.Stream()
    ratios: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for kind, (B, H, kv_heads, N, D), causal in itertools.product(formats, ROWS, (False, True)):
        dtype = getattr(torch, FORMATS[kind])
        q, k, v = (torch.randn(B, N, n, D, device="cuda", dtype=dtype) for n in (H, kv_heads, kv_heads))
        swapped = [x.transpose(1, 2) for x in (q, k, v)]
        rival = partial(_sdpa, *swapped, causal=causal, grouped=kv_heads != H)
        contestants: dict[str, Callable[[], Any]] = {
            name: partial(rival, backend) for name, backend in BACKENDS.items()
        }
        contestants["ours"] = partial(flash_attention_hopper, q, k, v, causal=causal)
        work = 4 * B * H * N * N * D / (2 if causal else 1)
        calls = max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work)))
        found = seconds(contestants, calls, stream)
        for name in BACKENDS:
            ratios[name].append(found[name] / found["ours"])
        rates = "  ".join(f"{name} {1e-12 * work / time:.0f}" for name, time in found.items())
        mask = "causal" if causal else "full"
        sys.stdout.write(f"{kind} {(B, H, kv_heads, N, D)} {mask}: {rates}\n")
        sys.stdout.flush()
    for name, found_ratios in ratios.items():
        mean = math.exp(sum(map(math.log, found_ratios)) / len(found_ratios))
        sys.stdout.write(f"ours / {name}: geometric mean {mean:.3f}, least {min(found_ratios):.3f}\n")


if __name__ == "__main__":
    need_gpu()
    main(sys.argv[1:] or list(FORMATS))
