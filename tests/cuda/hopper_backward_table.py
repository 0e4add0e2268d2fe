"""The table of the Hopper backward kernels: ``python -m tests.cuda.hopper_backward_table [both] [fp16]``.

"backward" times the gradients alone, "both" the forward and the backward pass.  Operations: 10 B H N² D for
the gradients, 14 with the forward pass, half of it under a causal mask.  Timed as `hopper_table` does.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

from tests.cuda.hopper_table import BACKENDS, EXPECTED_RATE, FORMATS, GRAPH_S, MOST_CALLS, ROWS, seconds

WORK = {"backward": 10, "both": 14}
FLOORS = {"cuDNN": (0.9, 1.0), "FA2": (1.4, 1.6)}  # the floor and the target of the geometric mean


def _ours(part: str, arrays: Any, *, causal: bool, deterministic: bool) -> Callable[[], Any]:
    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    q, k, v, do = arrays
    out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)

    def call() -> Any:
        found = out, lse
        if part == "both":
            found = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
        return flash_attention_vjp_hopper(q, k, v, *found, do, causal=causal, deterministic=deterministic)

    return call


def _theirs(part: str, arrays: Any, backend: str, *, causal: bool) -> Callable[[], Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, do = arrays
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    turned = do.transpose(1, 2)
    how: dict[str, Any] = {"is_causal": causal, "enable_gqa": q.shape[2] != k.shape[2]}

    def forward() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(*leaves, **how)

    kept = forward() if part == "backward" else None

    def call() -> Any:
        out = forward() if kept is None else kept
        return torch.autograd.grad(out, leaves, turned, retain_graph=kept is not None)

    return call


def main(parts: list[str], formats: list[str]) -> None:
    """Print TFLOP/s for each row, and geometric means."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    rows = [row for row in ROWS if row[-1] <= 128]
    for part in parts:
        ratios: dict[str, list[float]] = {name: [] for name in (*BACKENDS, "deterministic")}
        for kind, (B, H, kv_heads, N, D), causal in itertools.product(formats, rows, (False, True)):
            dtype = getattr(torch, FORMATS[kind])
            arrays = [torch.randn(B, N, n, D, device="cuda", dtype=dtype) for n in (H, kv_heads, kv_heads, H)]
            contestants = {
                name: _theirs(part, arrays, backend, causal=causal) for name, backend in BACKENDS.items()
            }
            contestants["deterministic"] = _ours(part, arrays, causal=causal, deterministic=True)
            contestants["ours"] = _ours(part, arrays, causal=causal, deterministic=False)
            work = WORK[part] * B * H * N * N * D / (2 if causal else 1)
            calls = max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work)))
            found = seconds(contestants, calls, stream)
            for name, values in ratios.items():
                values.append(found[name] / found["ours"])
            rates = "  ".join(f"{name} {1e-12 * work / time:.0f}" for name, time in found.items())
            mask = "causal" if causal else "full"
            sys.stdout.write(f"{part} {kind} {(B, H, kv_heads, N, D)} {mask}: {rates}\n")
            sys.stdout.flush()
        for name, values in ratios.items():
            mean = math.exp(sum(map(math.log, values)) / len(values))
            wanted = "floor {}, target {}".format(*FLOORS[name]) if name in FLOORS else "what it costs"
            sys.stdout.write(
                f"{part}: ours / {name}: geometric mean {mean:.3f}, least {min(values):.3f}; {wanted}\n"
            )


if __name__ == "__main__":
    said = sys.argv[1:]
    main([x for x in said if x in WORK] or list(WORK), [x for x in said if x in FORMATS] or list(FORMATS))
