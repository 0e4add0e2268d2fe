"""One short run on a Hopper GPU of the deterministic backward kernels: right, alike, and what turns cost.

``FRUGAL_TEST_GPU=1 python -m tests.cuda.backward_turns_run`` compiles all kernels side by side, holds small
cases to float64 as `test_backward_hopper_device` does, runs two calls beside each other, and times the fast
kernel beside four: blocks of keys that begin together or apart, and turns that are seen and passed behind
fences of all memory ("old") or of what the copy engine does.  A call that hangs ends with the process, behind
``timeout``.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cuda_backend import cubins
from cuda_backend.attention import call_backward_hopper, plan_hopper
from cuda_backend.attention import plan_backward_hopper as plan
from cuda_backend.attention import producer_backward_hopper as producer

# B, H, key heads, N, D
ROWS = (
    (4, 16, 16, 4096, 128), (16, 16, 16, 1024, 128), (1, 16, 16, 16384, 128), (4, 32, 8, 4096, 128),
    (1, 32, 32, 1024, 128), (1, 32, 32, 2048, 128),
    (8, 16, 16, 4096, 64), (64, 16, 16, 1024, 64), (1, 32, 32, 1024, 64), (1, 32, 32, 2048, 64),
    (4, 16, 16, 4096, 256), (1, 16, 16, 16384, 256),
)  # fmt: skip
WIDTHS, MASKS = (64, 128, 256), (False, "top_left")
LENGTHS = ((1, 1, 2, 2), (1000, 1000, 4, 2), (300, 65, 4, 1), (65, 300, 2, 2), (700, 4097, 2, 2))
NEW, OLD = "new", "old"


def old_adder(variant: Any, turn: Callable[..., Any]) -> Callable[..., None]:
    """Return the adder with fences of all memory at each look and pass, one share of dQ behind the other."""
    from cuda_backend._numba import device_function
    from cuda_backend.ptx import barrier, bulk, turns
    from cuda_backend.ptx.assembly import types

    share_bytes, places, shares, uint64 = variant.share_bytes, variant.places, variant.shares, types.uint64
    dq_tile, dq_full, dq_empty = places.dq_tile, places.dq_full, places.dq_empty

    @device_function
    def add(base: Any, sums: Any, words: Any, line: Any, parity: Any, where: Any) -> None:
        word = words + uint64(line) * uint64(4)
        for w in range(shares):
            barrier.wait(base + dq_full + 8 * w, parity)
            if w == 0:
                mine = turn(*where)
                while turns.word_seen(word) != mine:
                    pass
            target = sums + uint64(line) * uint64(shares * share_bytes) + uint64(w * share_bytes)
            bulk.add_floats(target, base + dq_tile + w * share_bytes, share_bytes)
            bulk.commit()
            bulk.wait_read()
            barrier.arrive(base + dq_empty + 8 * w)
        bulk.wait_added()
        turns.pass_turn(word)

    return add


@functools.cache
def planner(turns: str, apart: bool) -> Callable[..., Any]:
    """Return `make_backward_plan` of other turns or beginnings; old kernels have a folder of their own."""

    @functools.cache
    def make(*arguments: Any) -> Any:
        kept = vars(plan)["spacing_of"], vars(producer)["build_adder"], os.environ.get(cubins.VARIABLE)
        if not apart:
            vars(plan)["spacing_of"] = lambda *_: 0
        if turns == OLD:
            vars(producer)["build_adder"] = old_adder
            folder = cubins.folder() or Path("kernels")
            os.environ[cubins.VARIABLE] = str(folder.with_name("kernels-of-old-turns"))
        plan._function.cache_clear()
        try:
            return plan.make_backward_plan.__wrapped__(*arguments)
        finally:
            vars(plan)["spacing_of"], vars(producer)["build_adder"], variable = kept
            os.environ.pop(cubins.VARIABLE, None)
            if variable is not None:
                os.environ[cubins.VARIABLE] = variable
            plan._function.cache_clear()

    return make


def under(turns: str, apart: bool, call: Callable[[], Any]) -> Any:
    """Call with other turns or beginnings."""
    kept = vars(call_backward_hopper)["make_backward_plan"]
    vars(call_backward_hopper)["make_backward_plan"] = planner(turns, apart)
    try:
        return call()
    finally:
        vars(call_backward_hopper)["make_backward_plan"] = kept


def cases() -> list[tuple[int, Any, str]]:
    """Return all that is to be compiled: width, mask, kind of turns or "fast"."""
    found: list[tuple[int, Any, str]] = [
        *itertools.product(WIDTHS, MASKS, ("fast", NEW)), *itertools.product(WIDTHS[:2], MASKS, (OLD,))
    ]  # fmt: skip
    return found


def warm(number: int) -> None:
    """Compile one of `cases`; the folder of kernels keeps it."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    width, causal, kind = cases()[number]
    q = torch.ones(1, 64, 1, width, device="cuda").half()
    out, lse = flash_attention_hopper(q, q, q, causal=causal, return_lse=True)
    how = {"causal": causal, "deterministic": kind != "fast"}
    call = functools.partial(flash_attention_vjp_hopper, q, q, q, out, lse, q, **how)
    under(OLD if kind == OLD else NEW, False, call)  # that is no cooperative launch
    torch.cuda.synchronize()


def try_cooperative() -> None:
    """If the driver refuses a cooperative launch that begins early, do without the early beginning."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    x = torch.ones(1, 512, 2, 128, device="cuda").half()
    out, lse = flash_attention_hopper(x, x, x, return_lse=True)
    for attempt in ("cooperative, early", "cooperative", "neither"):
        try:
            flash_attention_vjp_hopper(x, x, x, out, lse, x, deterministic=True)
            torch.cuda.synchronize()
        except Exception as error:
            say(f"{attempt}: REFUSED {type(error).__name__} {str(error)[:200]}")
            without_early_beginning(together=attempt == "cooperative, early")
        else:
            say(f"{attempt}: taken")
            return


def without_early_beginning(*, together: bool) -> None:
    """Let launches wait for the end of the launch before them, and be cooperative if they are `together`."""
    original = plan_hopper.early_config

    def config(*numbers: Any, together: bool = False, wanted: bool = together) -> Any:
        found = original(*numbers, together=together)
        if together:
            found.attrs = [found.attrs[1]] if wanted else [found.attrs[0]]
            found.numAttrs = 1
        return found

    vars(plan)["early_config"] = config
    plan.make_backward_plan.cache_clear()


def say(text: str) -> None:
    """Print a line now."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def verify() -> None:
    """Hold cases to float64, and twenty calls to the first one."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper
    from tests.cuda.test_backward_hopper_device import inputs, judge

    for width in WIDTHS:
        said = []
        for tq, tk, heads, groups in LENGTHS:
            for causal in MASKS:
                try:
                    judge("float16", (2, tq, tk, heads, groups, width, width), causal, deterministic=True)
                    said.append("right")
                except AssertionError as error:
                    said.append(f"WRONG {(tq, tk, causal)} {str(error)[:80]}")
        for causal in MASKS:
            q, k, v, do = inputs("float16", (2, 2000, 2000, 8, 2, width, width))
            out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
            given, how = (q, k, v, out, lse, do), {"causal": causal, "deterministic": True}
            first = flash_attention_vjp_hopper(*given, **how)
            alike = all(
                torch.equal(x, y)
                for _ in range(20)
                for x, y in zip(first[:3], flash_attention_vjp_hopper(*given, **how)[:3], strict=True)
            )
            said.append("repeats" if alike else "DIFFERS")
        say(f"{width}: {', '.join(sorted(set(said)))}")


def beside() -> None:
    """Run two deterministic calls on two streams, a hundred times: neither may wait for ever."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    try_cooperative()
    x = torch.randn(2, 2048, 8, 128, device="cuda", dtype=torch.float16)
    out, lse = flash_attention_hopper(x, x, x, return_lse=True)
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for stream in streams * 100:
        with torch.cuda.stream(stream):
            flash_attention_vjp_hopper(x, x, x, out, lse, x, deterministic=True)
    torch.cuda.synchronize()


def measure() -> None:
    """Print TFLOP/s, and how many times as long as the fast kernel takes each of the others."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper
    from tests.cuda.hopper_table import EXPECTED_RATE, GRAPH_S, MOST_CALLS, seconds

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    for (B, H, kv_heads, N, D), causal in itertools.product(ROWS, MASKS):
        q, k, v, do = (
            torch.randn(B, N, n, D, device="cuda", dtype=torch.float16) for n in (H, kv_heads, kv_heads, H)
        )
        out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
        call = functools.partial(flash_attention_vjp_hopper, q, k, v, out, lse, do, causal=causal)
        turn = functools.partial(call, deterministic=True)
        contestants: dict[str, Any] = {"fast": call}
        kinds = [("new", NEW, True)]
        kinds += [("together", NEW, False)] if not causal else []
        kinds += [("old", OLD, True)] if D <= 128 else []
        kinds += [("old, together", OLD, False)] if D <= 128 and not causal else []
        for name, turns, apart in kinds:
            contestants[name] = functools.partial(under, turns, apart, turn)
        work = 10 * B * H * N * N * D / (2 if causal else 1)
        calls = max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work)))
        found = seconds(contestants, calls, stream)
        rates = "  ".join(
            f"{name} {1e-12 * work / took:.0f} ({took / found['fast']:.2f})" for name, took in found.items()
        )
        say(f"{(B, H, kv_heads, N, D)} {'causal' if causal else 'full'}: {rates}")


def main() -> None:
    """Compile, verify, measure, run beside each other."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.cuda.backward_turns_run"]
    running = [subprocess.Popen([*command, str(case)]) for case in range(len(cases()))]
    failed = [case for case, process in enumerate(running) if process.wait()]
    say(f"compiled in {time.monotonic() - start:.0f} s, failed: {failed}")
    try_cooperative()
    verify()
    say(f"verified after {time.monotonic() - start:.0f} s")
    measure()
    say(f"measured after {time.monotonic() - start:.0f} s")
    try:
        ended = subprocess.run([*command, "beside"], timeout=15, check=False).returncode
        say(f"two streams: {'both end' if ended == 0 else f'ERROR {ended}'}")
    except subprocess.TimeoutExpired:
        say("two streams: HANG")
    say(f"ended after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:] == ["beside"]:
        beside()
    elif sys.argv[1:]:
        warm(int(sys.argv[1]))
    else:
        main()
