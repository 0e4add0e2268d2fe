"""Flexible attention and decoding on the GPU at hand.

``FRUGAL_TEST_GPU=1 python -m tests.cuda.flexible_benchmark``: each of ours is checked against PyTorch before
it is timed, by events, on random data.  Not yet run on a device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

import cuda_backend
from refimpl.attention import mods
from tests.cuda.int8_benchmark import milliseconds

B, H, N, D = 4, 16, 4096, 64
CACHES = ((8, 32, 8, 32768, 128), (64, 32, 8, 4096, 128))  # B, Hq, Hkv, Tk, D
PAGE, SPLITS = 64, 16
CLOSE = 2e-2  # float16 outputs of size 1


def bent(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Softcap for FlexAttention, which traces tensors."""
    import torch

    return 20.0 * torch.tanh(score / 20.0)


def forms() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield a name, our options and FlexAttention's."""
    window = mods.both(mods.causal, mods.sliding(256))
    yield "causal", {"mask_mod": mods.causal}, {"mask": lambda b, h, i, j: j <= i}
    yield "causal window 256", {"mask_mod": window}, {"mask": lambda b, h, i, j: (j <= i) & (i - j <= 256)}
    yield "softcap 20", {"score_mod": mods.softcap(20.0)}, {"score": bent}


def check(name: str, found: Any, expected: Any) -> None:
    """Stop where an output is wrong: a wrong kernel has no speed."""
    error = float((found.float() - expected.float()).abs().max())
    if not error < CLOSE:
        raise SystemExit(f"{name}: off by {error}")


def flexible() -> None:
    """Print our times beside those of compiled FlexAttention."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (torch.randn(B, N, H, D, device="cuda", dtype=torch.float16) for _ in range(3))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    for name, ours, theirs in forms():
        blocks = None
        if "mask" in theirs:
            blocks = create_block_mask(theirs["mask"], None, None, N, N, device="cuda")

        def rival(blocks: Any = blocks, theirs: Any = theirs) -> Any:
            return compiled(*turned, score_mod=theirs.get("score"), block_mask=blocks)

        def own(ours: Any = ours) -> Any:
            return cuda_backend.flexible_attention(q, k, v, **ours)

        check(name, own(), rival().transpose(1, 2))
        print(f"{name}: frugal {milliseconds(own):.3f} ms, FlexAttention {milliseconds(rival):.3f} ms")  # noqa: T201


def decoding() -> None:
    """Print the bandwidth of decoding, whole and paged, beside that of a copy of as many bytes."""
    import torch

    for batch, heads, kv_heads, length, width in CACHES:
        q = torch.randn(batch, 1, heads, width, device="cuda", dtype=torch.float16)
        k, v = (torch.randn(batch, length, kv_heads, width, device="cuda", dtype=q.dtype) for _ in range(2))
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*turned, enable_gqa=True).transpose(1, 2)
        pages = [x.view(-1, PAGE, kv_heads, width) for x in (k, v)]
        table = torch.arange(len(pages[0]), device="cuda").view(batch, -1)
        lengths = torch.full((batch,), length, device="cuda")

        def whole(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return cuda_backend.split_kv_attention(q, k, v, splits=SPLITS)

        def paged(q: Any = q, pages: Any = pages, table: Any = table, lengths: Any = lengths) -> Any:
            return cuda_backend.paged_attention(q, *pages, table, k_lengths=lengths, splits=SPLITS)

        copied = torch.empty_like(k)
        moved = (
            2 * math.prod(k.shape) * np.dtype(np.float16).itemsize
        )  # K and V read; a copy reads and writes

        def copy(k: Any = k, copied: Any = copied) -> Any:
            return copied.copy_(k)

        for name, f in (("split-KV", whole), ("paged", paged), ("copy", copy)):
            if f is not copy:
                check(name, f(), expected)
            rate = moved / milliseconds(f) / 1e9
            print(f"B={batch} Hq={heads} Hkv={kv_heads} Tk={length} D={width} {name}: {rate:.2f} TB/s")  # noqa: T201


if __name__ == "__main__":
    flexible()
    decoding()
    sys.exit(0)
