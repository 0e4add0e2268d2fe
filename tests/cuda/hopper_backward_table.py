"""The table of the Hopper backward kernels: ``python -m tests.cuda.hopper_backward_table [PART] [FORMAT]``.

Part "backward" times the gradients alone, "both" the forward and the backward pass; width "wide" takes heads
wider than 128 only, "narrow" the others.  Operations: 2 B H N² (3 D + 2 Dv) for the gradients, 2 B H N² (D +
Dv) more with the forward pass, half of it under a causal mask.  Timed as `hopper_table` does.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

from tests.cuda.hopper_table import BACKENDS, EXPECTED_RATE, FORMATS, GRAPH_S, MOST_CALLS, ROWS, seconds
from tests.cuda.need_gpu import need_gpu

PARTS = ("backward", "both")
FLOORS = {"cuDNN": (0.9, 1.0), "FA2": (1.4, 1.6)}  # the floor and the target of the geometric mean
# B, H, key heads, N, D, Dv
ALL_ROWS = [
    *((*row, row[-1]) for row in ROWS),
    (1, 16, 16, 16384, 256, 256),
    (2, 32, 8, 4096, 256, 256),
    (4, 16, 16, 4096, 192, 192),
    (4, 16, 16, 4096, 192, 128),
]
WIDTHS = {"wide": range(129, 257), "narrow": range(129)}


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


def _theirs(part: str, arrays: Any, backend: str, *, causal: bool) -> Callable[[], Any] | None:
    """Return the call; None if the backend does not take the arrays."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, do = arrays
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    turned = do.transpose(1, 2)
    how: dict[str, Any] = {"is_causal": causal, "enable_gqa": q.shape[2] != k.shape[2]}

    def forward() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(*leaves, **how)

    try:
        kept = forward()
        torch.autograd.grad(kept, leaves, turned, retain_graph=True)
    except RuntimeError:
        return None

    def call() -> Any:
        out = kept if part == "backward" else forward()
        return torch.autograd.grad(out, leaves, turned, retain_graph=part == "backward")

    return call


def main(parts: list[str], formats: list[str], widths: list[str]) -> None:
    """Print TFLOP/s for each row, and geometric means."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    rows = [row for row in ALL_ROWS if any(max(row[4:]) in WIDTHS[name] for name in widths)]
    for part in parts:
        ratios: dict[str, list[float]] = {name: [] for name in (*BACKENDS, "deterministic")}
        for kind, row, causal in itertools.product(formats, rows, (False, True)):
            B, H, kv_heads, N, D, Dv = row
            dtype = getattr(torch, FORMATS[kind])
            arrays = [
                torch.randn(B, N, n, width, device="cuda", dtype=dtype)
                for n, width in ((H, D), (kv_heads, D), (kv_heads, Dv), (H, Dv))
            ]
            contestants = {}
            for name, backend in BACKENDS.items():
                rival = _theirs(part, arrays, backend, causal=causal)
                if rival is not None:
                    contestants[name] = rival
            contestants["deterministic"] = _ours(part, arrays, causal=causal, deterministic=True)
            contestants["ours"] = _ours(part, arrays, causal=causal, deterministic=False)
            products = 3 * D + 2 * Dv + (D + Dv if part == "both" else 0)
            work = 2 * B * H * N * N * products / (2 if causal else 1)
            calls = max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work)))
            found = seconds(contestants, calls, stream)
            for name, values in ratios.items():
                if name in found:
                    values.append(found[name] / found["ours"])
            rates = "  ".join(f"{name} {1e-12 * work / time:.0f}" for name, time in found.items())
            mask = "causal" if causal else "full"
            sys.stdout.write(f"{part} {kind} {row} {mask}: {rates}\n")
            sys.stdout.flush()
        for name, values in ratios.items():
            if not values:
                continue
            mean = math.exp(sum(map(math.log, values)) / len(values))
            wanted = "floor {}, target {}".format(*FLOORS[name]) if name in FLOORS else "what it costs"
            sys.stdout.write(
                f"{part}: ours / {name}: geometric mean {mean:.3f}, least {min(values):.3f}; {wanted}\n"
            )


if __name__ == "__main__":
    need_gpu()
    said = sys.argv[1:]
    chosen = ([x for x in said if x in names] or list(names) for names in (PARTS, FORMATS, WIDTHS))
    main(*chosen)
