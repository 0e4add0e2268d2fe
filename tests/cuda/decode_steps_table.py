"""What each step of the decoding kernel gains: ``python -m tests.cuda.decode_steps_table``, half a minute.

Caches of 32k keys, batches of 1 and 16, whole and in pages of 16, float16.  Each row adds one thing to the
row before it; the first has only the merge of the parts that the kernel of the first table had not.  "behind
an append" is a step as a model takes it: a small kernel writes the newest key, then the cache is read.  A few
checks come first, and each variant is compared with the call that users make.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.cuda import decode_table
from tests.cuda.decode_table import HKV, HQ, D, say, sdpa
from tests.cuda.need_gpu import need_gpu

CACHES = ((1, 32768), (16, 32768))
PAGE = 16
CHECKS = (0, 1, 2, 3, 4, 6, 11)  # of the table
ROTATED_BYTES = 512 << 20
SECONDS = 50.0
CALLS = 200  # in a row, for the time of the host

# Name; keys of a turn, warps, blocks, stages, bytes ahead, early, hinted; parts for batches of 1 and of 16.
STEPS: tuple[tuple[str, tuple[Any, ...], tuple[int, int]], ...] = (
    ("merge in parallel, one fence", (16, 4, 2, 3, 0, False, 0), (33, 33)),
    ("as many turns in each part", (16, 4, 2, 3, 0, False, 0), (32, 2)),
    ("lines of 128 bytes to the L2 cache", (16, 4, 2, 3, 128, False, 0), (32, 2)),
    ("begins early", (16, 4, 2, 3, 128, True, 0), (32, 2)),
    ("hints for 1 turn", (16, 4, 2, 3, 128, True, 1), (32, 2)),
    ("hints for 2 turns", (16, 4, 2, 3, 128, True, 2), (32, 2)),
    ("hints for 4 turns", (16, 4, 2, 3, 128, True, 4), (32, 2)),
    ("8 warps, one block, hints for 2", (16, 8, 1, 3, 128, True, 2), (16, 1)),
    ("32 keys, one block, hints for 1", (32, 4, 1, 3, 128, True, 1), (16, 1)),
    ("4 warps, 2 stages, hints for 2", (16, 4, 2, 2, 128, True, 2), (32, 2)),
)
PAGED = (0, 2, 3, 7, 8)  # steps timed with pages too, without hints
_broken: set[tuple[int, bool]] = set()


def plan(step: int, paged: bool, splits: int | None, layouts: list[Any]) -> Any:
    """Return the launch of a step for q, k, v, table and lengths."""
    from cuda_backend.attention.decode_call_ampere import make_plan
    from cuda_backend.attention.decode_variant_ampere import DecodeVariant

    fields = STEPS[step][1]
    if paged:
        fields = (*fields[:-1], 0)
    variant = DecodeVariant("f16", D, D, 8, paged, *fields)
    return make_plan("step", *layouts, splits, None, 0, variant)


def compiled(which: str) -> None:
    """Compile and load what one process is asked for, so that it is on disk."""
    import torch

    from cuda_backend.arrays import torch_layout

    torch.zeros(1, device="cuda")
    if which.startswith("c"):
        decode_table.compiled(which[1:])
        return
    paged = which.startswith("p")
    q = torch.zeros(1, 1, HQ, D, device="cuda", dtype=torch.float16)
    k = torch.zeros(4, PAGE, HKV, D, device="cuda", dtype=torch.float16)
    numbers = torch.zeros(1, 4, device="cuda", dtype=torch.int32)
    more = [torch_layout(numbers), torch_layout(numbers[0, :1])] if paged else [None, None]
    cache = k if paged else k.view(1, -1, HKV, D)
    plan(int(which[1:]), paged, 1, [*map(torch_layout, (q, cache, cache)), *more])


def prepare() -> None:
    """Let processes side by side compile everything."""
    os.environ.setdefault("FRUGAL_KERNEL_CACHE", tempfile.mkdtemp())
    of_steps = [f"w{i}" for i in range(len(STEPS)) if STEPS[i][1] not in [s[1] for s in STEPS[:i]]]
    needed = ["c0", "c4", "c6", *of_steps, *(f"p{i}" for i in PAGED)]
    command = [sys.executable, "-m", "tests.cuda.decode_steps_table"]
    running = [(w, subprocess.Popen([*command, w], stderr=subprocess.PIPE, text=True)) for w in needed]
    for which, process in running:
        _, errors = process.communicate()
        if process.returncode:
            say(f"compiling {which} failed: {errors[-1500:]}")
            if which[0] != "c":
                fields = STEPS[int(which[1:])][1]
                _broken.update((i, which[0] == "p") for i, s in enumerate(STEPS) if s[1] == fields)


def contestants(B: int, keys: int) -> tuple[dict[str, Callable[[int], Any]], list[str]]:
    """Return functions of the number of the call, and which variants are wrong."""
    import torch

    import cuda_backend
    from cuda_backend.arrays import torch_layout
    from cuda_backend.attention.decode_call_ampere import enqueue

    half = torch.float16
    sets = max(1, min(4, ROTATED_BYTES // (4 * B * keys * HKV * D)))
    q = torch.randn(B, 1, HQ, D, device="cuda").to(half)
    caches = [
        [torch.randn(B, keys, HKV, D, device="cuda", dtype=half) for _ in range(2)] for _ in range(sets)
    ]
    pages = [[x.view(-1, PAGE, HKV, D) for x in cache] for cache in caches]
    table = torch.randperm(B * keys // PAGE, device="cuda").to(torch.int32).view(B, -1)
    lengths = torch.full((B,), keys, device="cuda", dtype=torch.int32)
    copies = [torch.empty_like(caches[0][0]) for _ in range(min(2, sets))]
    turned = [[x.transpose(1, 2) for x in cache] for cache in caches]
    newest = torch.randn(B, 1, HKV, D, device="cuda").to(half)

    def whole(i: int) -> Any:
        return cuda_backend.split_kv_attention(q, *caches[i % sets], tier="ampere")

    def with_lengths(i: int) -> Any:
        return cuda_backend.split_kv_attention(q, *caches[i % sets], k_lengths=lengths, tier="ampere")

    def in_pages(i: int) -> Any:
        return cuda_backend.paged_attention(q, *pages[i % sets], table, k_lengths=lengths, tier="ampere")

    def append(i: int) -> Any:
        return caches[i % sets][0][:, -1:].copy_(newest)

    def behind(call: Callable[[int], Any], i: int) -> Any:
        append(i)
        return call(i)

    found: dict[str, Callable[[int], Any]] = {
        "copy": lambda i: copies[i % len(copies)].copy_(caches[i % sets][i // sets % 2]),
        "PyTorch SDPA": lambda i: sdpa(q.transpose(1, 2), *turned[i % sets], enable_gqa=True),
        "whole": whole, "whole, lengths given": with_lengths, f"pages of {PAGE}": in_pages,
        "append": append, "whole behind an append": partial(behind, whole),
    }  # fmt: skip
    wrong = []
    for step, (name, _, splits) in enumerate(STEPS):
        for paged in (False, True):
            if (step, paged) in _broken or (paged and step not in PAGED):
                continue
            given = pages if paged else caches
            more = [torch_layout(x) for x in (table, lengths)] if paged else [None, None]
            layouts = [*map(torch_layout, (q, *given[0])), *more]
            made = plan(step, paged, splits[B > 1], layouts)
            out = torch.full_like(q, torch.nan)
            work = torch.empty(max(1, made.work_floats), device="cuda")
            fixed = [table.data_ptr(), lengths.data_ptr()] if paged else [0, 0]

            def call(
                i: int,
                made: Any = made,
                out: Any = out,
                work: Any = work,
                given: Any = given,
                fixed: Any = fixed,
            ) -> None:
                at = [q.data_ptr(), *(x.data_ptr() for x in given[i % sets]), *fixed]
                enqueue("step", made, [*at, out.data_ptr(), 0, work.data_ptr()], 0, 0)

            label = f"{name}, pages" if paged else name
            call(0)
            expected = in_pages(0) if paged else whole(0)
            error = float((out - expected).abs().max() / expected.abs().max())
            if not error < 4 * decode_table.EPSILON["float16"]:
                wrong.append(f"{label}: {error:.1e}")
            found[label] = call
            if not paged and step == 2:
                found["not early behind an append"] = partial(behind, call)
    return found, wrong


def host_seconds(call: Callable[[int], Any]) -> float:
    """Return the time of a call in a row of many, which the GPU does not hold up."""
    import torch

    call(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(CALLS):
        call(i)
    found = (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    return found


def main() -> int:
    """Compile, check, time."""
    begin = time.monotonic()
    prepare()
    say(f"compiled after {time.monotonic() - begin:.1f} s")
    count = decode_table.check(tuple(decode_table.CHECKS[i] for i in CHECKS))
    say(f"checked after {time.monotonic() - begin:.1f} s, {count} wrong")
    import torch

    from cuda_backend.timing import device_name, interleaved

    say(device_name())
    for B, keys in CACHES:
        if time.monotonic() - begin > SECONDS:
            say("out of time")
            break
        calls, wrong = contestants(B, keys)
        count += len(wrong)
        say(f"B={B}: {len(calls)} contestants, wrong: {wrong}")
        moved = 4 * B * keys * HKV * D
        times = interleaved(calls, rounds=9, calls=8)
        of_copy = times["copy"].device_s
        for name, timing in times.items():
            seconds, least = timing.device_s, timing.least_s
            say(
                f"B={B} {name}: {1e6 * seconds:.1f} us (least {1e6 * least:.1f}), "
                f"{1e-12 * moved / seconds:.3f} TB/s, {100 * of_copy / seconds:.0f} % of the copy"
            )
        for name in ("whole", f"pages of {PAGE}", STEPS[3][0], "copy", "PyTorch SDPA"):
            if name in calls:
                say(f"B={B} host, {CALLS} calls in a row, {name}: {1e6 * host_seconds(calls[name]):.1f} us")
        del calls
        torch.cuda.empty_cache()
    say(f"done after {time.monotonic() - begin:.1f} s")
    return count


if __name__ == "__main__":
    need_gpu()
    if len(sys.argv) > 1:
        compiled(sys.argv[1])
    else:
        sys.exit(main())
