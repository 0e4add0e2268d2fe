"""Decoding on the GPU at hand beside a copy and PyTorch: ``python -m tests.cuda.decode_table``.

Hq 32, Hkv 8, D 128, caches of 32k and 128k keys, batches of 1 and 16, whole and in pages.  A rate counts the
bytes of K and V, read once; the copy beside it moves as many, half of them read.  Caches that the L2 cache
could hold a part of are rotated.  Kernels are compiled by processes side by side first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from cuda_backend.attention.decode_variant_ampere import MOST_PARTS
from tests.cuda.need_gpu import need_gpu

HQ, HKV, D = 32, 8, 128
CACHES = ((1, 32768), (16, 32768), (1, 131072), (16, 131072))
ROTATED_BYTES = 512 << 20
SECONDS = 55.0  # of the whole run: what comes later is left out
EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# B, Tq, Hq, Hkv, D, keys, lengths, page or 0, splits, dtype
CHECKS: tuple[tuple[Any, ...], ...] = (
    (3, 1, 32, 8, 128, 4100, (4100, 0, 1777), 0, None, "float16"),
    (1, 1, 32, 8, 128, 32768, None, 0, None, "float16"),
    (2, 1, 32, 8, 128, 1000, (1000, 17), 0, 7, "float16"),
    (2, 1, 32, 8, 128, 1000, (1000, 17), 0, 1, "float16"),
    (2, 4, 32, 8, 128, 3000, (3000, 3), 0, None, "float16"),
    (2, 5, 32, 8, 128, 3000, (2999, 700), 0, None, "float16"),
    (3, 1, 32, 8, 128, 5120, (5001, 33, 0), 16, None, "float16"),
    (3, 1, 32, 8, 128, 5120, (5001, 33, 0), 64, None, "float16"),
    (3, 2, 32, 8, 128, 5120, (5120, 256, 1), 256, 3, "bfloat16"),
    (2, 1, 32, 8, 128, 2000, (2000, 1999), 0, None, "bfloat16"),
    (2, 3, 8, 8, 64, 2000, (2000, 100), 0, None, "bfloat16"),
    (2, 1, 32, 8, 128, 20000, (20000, 900), 0, 70, "float16"),
)
# Keys of a turn, warps, blocks of a multiprocessor, stages, bytes ahead into the L2 cache; none begins early.
VARIANTS: tuple[tuple[Any, ...], ...] = (
    (16, 4, 2, 3, 0), (16, 4, 2, 3, 128), (16, 4, 2, 3, 256), (16, 8, 1, 3, 0), (32, 4, 1, 3, 0),
    (16, 4, 2, 2, 0), (16, 2, 4, 3, 0),
)  # fmt: skip
WAVES = (1, 2, 4, 8)


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def sdpa(*args: Any, **options: Any) -> Any:
    """Return PyTorch's attention."""
    import torch

    return torch.nn.functional.scaled_dot_product_attention(*args, **options)


def inputs(case: tuple[Any, ...], seed: int = 0) -> tuple[list[Any], dict[str, Any], Any, Any]:
    """Return arguments, options, and the output and log-sum-exp in float32 that they should give."""
    import torch

    B, Tq, Hq, Hkv, width, keys, lengths, page, splits, dtype = case
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", generator=generator).to(getattr(torch, dtype))

    q, k, v = 3 * normal(B, Tq, Hq, width), normal(B, keys, Hkv, width), normal(B, keys, Hkv, width)
    count = torch.tensor(lengths or [keys] * B, device="cuda")
    last = count[:, None] - Tq + torch.arange(Tq, device="cuda")  # the last key of each query
    mask = (torch.arange(keys, device="cuda") <= last[..., None])[:, None]
    wide = [x.float().transpose(1, 2) for x in (q, k, v)]
    wide[1:] = [x.repeat_interleave(Hq // Hkv, 1) for x in wide[1:]]
    out = sdpa(*wide, attn_mask=mask).nan_to_num(0.0)
    scores = (wide[0] @ wide[1].transpose(2, 3) * width**-0.5).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    beyond = torch.arange(keys, device="cuda") >= count[:, None]
    for x in (k, v):  # what lies behind a length is never read
        x[beyond] = torch.nan
    options = {"splits": splits, "return_lse": True}
    if lengths is not None or page:
        options["k_lengths"] = count
    if not page:
        return [q, k, v], options, out.transpose(1, 2), lse
    total = B * keys // page
    order = torch.randperm(total + 3, device="cuda", generator=generator)[:total]
    pages = []
    for x in (k, v):
        lying = torch.full((total + 3, page, Hkv, width), torch.nan, device="cuda", dtype=x.dtype)
        lying[order] = x.reshape(total, page, Hkv, width)
        pages.append(lying)
    table = order.reshape(B, -1)
    table = torch.where(torch.arange(keys // page, device="cuda") * page < count[:, None], table, -1)
    return [q, *pages, table.to(torch.int32)], options, out.transpose(1, 2), lse


def verdict(case: tuple[Any, ...]) -> tuple[bool, str]:
    """Compare with PyTorch in float32; return whether all is right, and what was found."""
    import torch

    import cuda_backend
    from cuda_backend.arrays import poisoned_outputs

    args, options, out, lse = inputs(case)
    function = cuda_backend.paged_attention if len(args) == 4 else cuda_backend.split_kv_attention
    with poisoned_outputs():
        found = [function(*args, **options, tier="ampere") for _ in range(2)]
    torch.cuda.synchronize()
    error = float((found[0].out.float() - out).abs().max() / out.abs().max()) / EPSILON[case[-1]]
    seen = torch.isfinite(lse)
    of_lse = float((found[0].lse - lse)[seen].abs().max())
    same = bool((torch.isfinite(found[0].lse) == seen).all())
    again = all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))
    words = f"{error:.2f} roundings, log-sum-exp {of_lse:.1e}, repeats {again}, -inf {same}"
    return error < 4 and of_lse < 1e-3 and same and again, words


def check(cases: tuple[tuple[Any, ...], ...] = CHECKS) -> int:
    """Say what is found of each case; return how many are wrong."""
    wrong = 0
    for case in cases:
        try:
            good, words = verdict(case)
        except Exception as problem:  # the others may still say something
            good, words = False, f"{type(problem).__name__}: {problem}"
        wrong += not good
        say(f"{'ok' if good else 'WRONG'} {case}: {words}")
    return wrong


def whole_and_paged(B: int, keys: int, dtype: str) -> Iterator[tuple[str, Any]]:
    """Yield contestants as functions of the number of the call."""
    import torch

    import cuda_backend

    kind = getattr(torch, dtype)
    cache_bytes = 4 * B * keys * HKV * D
    sets = max(1, min(4, ROTATED_BYTES // cache_bytes))
    q = torch.randn(B, 1, HQ, D, device="cuda").to(kind)
    caches = [
        [torch.randn(B, keys, HKV, D, device="cuda", dtype=kind) for _ in range(2)] for _ in range(sets)
    ]
    lengths = torch.full((B,), keys, device="cuda", dtype=torch.int32)

    def whole(i: int) -> Any:
        return cuda_backend.split_kv_attention(q, *caches[i % sets], tier="ampere")

    yield "whole", whole
    for page in (16, 64, 256):
        table = torch.randperm(B * keys // page, device="cuda").to(torch.int32).view(B, -1)

        def paged(i: int, page: int = page, table: Any = table) -> Any:
            pages = [x.view(-1, page, HKV, D) for x in caches[i % sets]]
            return cuda_backend.paged_attention(q, *pages, table, k_lengths=lengths, tier="ampere")

        yield f"pages of {page}", paged
    copies = [torch.empty_like(caches[0][0]) for _ in range(min(2, sets))]

    def copy(i: int) -> Any:
        return copies[i % len(copies)].copy_(caches[i % sets][i // sets % 2])

    yield "copy", copy
    turned = [[x.transpose(1, 2) for x in cache] for cache in caches]

    def rival(i: int) -> Any:
        return sdpa(q.transpose(1, 2), *turned[i % sets], enable_gqa=True)

    if dtype == "float16" and B * keys < 1 << 21:
        yield "PyTorch SDPA", rival
    if dtype == "float16" and keys == 32768:
        for variant in VARIANTS:
            if variant in _broken:
                continue
            yield f"variant {variant}", partial(_variant, variant, None, q, caches)
        for waves in WAVES:
            splits = min(MOST_PARTS, max(1, round(waves * 264 / (B * HKV))))
            yield f"splits {splits}", partial(_variant, VARIANTS[0], splits, q, caches)


def _variant(fields: tuple[int, ...], splits: int | None, q: Any, caches: Any, i: int) -> Any:
    """Launch one variant of the kernel, with memory that stays."""
    k, v = caches[i % len(caches)]
    plan, out, work = _memory(fields, splits, q, k, v)
    from cuda_backend.attention.decode_call_ampere import enqueue

    enqueue(
        "variant",
        plan,
        [q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, out.data_ptr(), 0, work.data_ptr()],
        0,
        0,
    )


_kept: dict[Any, Any] = {}
_broken: set[tuple[int, ...]] = set()  # variants that do not compile


def _memory(fields: tuple[Any, ...], splits: int | None, q: Any, k: Any, v: Any) -> Any:
    import torch

    from cuda_backend.arrays import torch_layout
    from cuda_backend.attention.decode_call_ampere import make_plan
    from cuda_backend.attention.decode_variant_ampere import DecodeVariant

    key = fields, splits, k.shape
    if key not in _kept:
        variant = DecodeVariant("f16", D, D, 8, False, *fields)
        plan = make_plan("variant", *map(torch_layout, (q, k, v)), None, None, splits, None, 0, variant)
        _kept[key] = plan, torch.empty_like(q), torch.empty(max(1, plan.work_floats), device="cuda")
    return _kept[key]


def compiled(which: str) -> None:
    """Compile and load what one process is asked for, so that it is on disk."""
    import torch

    torch.zeros(1, device="cuda")
    if which.startswith("v"):
        q = torch.zeros(1, 1, HQ, D, device="cuda", dtype=torch.float16)
        k = torch.zeros(1, 64, HKV, D, device="cuda", dtype=torch.float16)
        _memory(VARIANTS[int(which[1:])], 1, q, k, k)
        return
    import cuda_backend

    args, options, _, _ = inputs(CHECKS[int(which)])
    function = cuda_backend.paged_attention if len(args) == 4 else cuda_backend.split_kv_attention
    function(*args, **options, tier="ampere")
    torch.cuda.synchronize()


def main() -> int:
    """Compile, check, time."""
    begin = time.monotonic()
    os.environ.setdefault("FRUGAL_KERNEL_CACHE", tempfile.mkdtemp())
    # Checks that need a kernel of their own, and variants.
    needed = ["0", "4", "6", "8", "9", "10", *(f"v{i}" for i in range(1, len(VARIANTS)))]
    command = [sys.executable, "-m", "tests.cuda.decode_table"]
    running = [(w, subprocess.Popen([*command, w], stderr=subprocess.PIPE, text=True)) for w in needed]
    for which, process in running:
        _, errors = process.communicate()
        if process.returncode:
            say(f"compiling {which} failed: {errors[-1500:]}")
            if which.startswith("v"):
                _broken.add(VARIANTS[int(which[1:])])
    say(f"compiled after {time.monotonic() - begin:.1f} s")
    wrong = check()
    say(f"checked after {time.monotonic() - begin:.1f} s, {wrong} wrong")
    import torch

    from cuda_backend.timing import device_name, interleaved

    say(device_name())
    for dtype in ("float16", "bfloat16"):
        for B, keys in CACHES:
            if time.monotonic() - begin > SECONDS:
                say("out of time")
                return wrong
            moved = 4 * B * keys * HKV * D
            contestants = dict(whole_and_paged(B, keys, dtype))
            found = interleaved(contestants, rounds=7, calls=8)
            of_copy = moved / found["copy"].device_s
            for name, timing in found.items():
                rate, best = moved / timing.device_s, moved / timing.least_s
                say(
                    f"{dtype} B={B} keys={keys} {name}: {1e6 * timing.device_s:.1f} us, "
                    f"{1e-12 * rate:.3f} TB/s, {100 * rate / of_copy:.0f} % of the copy, "
                    f"best {1e-12 * best:.3f}, "
                    f"host {1e6 * timing.host_s:.0f} us"
                )
            _kept.clear()
            del contestants
            torch.cuda.empty_cache()
    say(f"done after {time.monotonic() - begin:.1f} s")
    return wrong


if __name__ == "__main__":
    need_gpu()
    if len(sys.argv) > 1:
        compiled(sys.argv[1])
    else:
        sys.exit(main())
