"""One short run on a Hopper GPU: what turns of wide heads cost, before and after they were made cheaper.

``FRUGAL_TEST_GPU=1 python -m tests.cuda.wide_turns_run`` compiles all kernels side by side, holds small cases
to float64, and times the fast kernel beside three: "old" looks for the turn behind the products and passes it
at once, with a fence in all lanes and one more in lane 0; "one fence" leaves the first of them out; "new" is
the package's.  "new" runs twice, which says what is noise.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from cuda_backend import cubins
from cuda_backend.attention import call_backward_hopper
from cuda_backend.attention import plan_backward_hopper as plan

# B, H, key heads, N, D, Dv
ROWS = (
    (4, 16, 16, 4096, 256, 256), (1, 16, 16, 16384, 256, 256), (2, 32, 8, 4096, 256, 256),
    (4, 16, 16, 4096, 192, 128),
)  # fmt: skip
MASKS, KINDS, WIDTHS = (False, "top_left"), ("fast", "new", "one fence", "old"), ((256, 256), (192, 128))
LENGTHS = ((1, 1, 2, 2), (1000, 1000, 4, 2), (300, 65, 4, 1), (65, 300, 2, 2), (700, 2000, 2, 2))
HERE = "cuda_backend.attention."
LOOK = "look(words, added, turn(key_block, step, block, sizes))\n"
LET, INDENT = "let(words, added, lane)\n", 20 * " "
ADD = "add_queries(dq, sums, added, thread)\n"


def _module(name: str, changes: list[tuple[str, str]]) -> ModuleType:
    """Return a copy of a module with places of its source changed."""
    original = importlib.import_module(HERE + name)
    source = inspect.getsource(original)
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}"
        source = source.replace(old, new)
    copy = ModuleType(original.__name__)
    exec(compile(source, str(original.__file__), "exec"), vars(copy))
    return copy


def _old_builders() -> dict[str, Any]:
    """Return consumers that look and pass where they add."""
    at_once = ADD + INDENT + LET + INDENT + "added = int32(-1)\n"
    keys = _module(
        "keys_wide_backward_hopper",
        [
            (INDENT + LET + INDENT + "dp_done(dp)\n", INDENT + "dp_done(dp)\n"),
            (INDENT + LOOK, ""),
            (INDENT + ADD, INDENT + LOOK + INDENT + at_once),
        ],
    )
    values = _module(
        "values_wide_backward_hopper",
        [
            (INDENT + LET + INDENT + "scores_done(s)\n", INDENT + "scores_done(s)\n"),
            (INDENT + LOOK, ""),
            (INDENT + ADD, INDENT + LOOK + INDENT + at_once),
        ],
    )
    return {
        "build_keys_consumer": keys.build_keys_consumer,
        "build_values_consumer": values.build_values_consumer,
    }


def _old_pass() -> Any:
    from cuda_backend.ptx.assembly import instruction, types

    return instruction(
        "pass_turn_of_warp",
        types.void,
        {"address": types.uint64, "lane": types.int32},
        "{ .reg .pred first; setp.eq.s32 first, $1, 0; fence.acq_rel.gpu; bar.warp.sync 0xffffffff; "
        "@first red.release.gpu.global.add.s32 [$0], 1; }",
        "l,r",
        "As it was.",
    )


@functools.cache
def planner(kind: str) -> Callable[..., Any]:
    """Return `make_backward_plan` of a kind of turns; its kernels have a folder of their own."""
    from cuda_backend.attention import wide_backward_hopper as wide
    from cuda_backend.ptx import turns

    @functools.cache
    def make(*arguments: Any) -> Any:
        names = vars(wide)
        kept = {name: names[name] for name in ("build_keys_consumer", "build_values_consumer")}
        passing, variable = turns.pass_turn_of_warp, os.environ.get(cubins.VARIABLE)
        if kind != "new":
            names.update(_old_builders())
            folder = cubins.folder() or Path("kernels")
            os.environ[cubins.VARIABLE] = str(folder.with_name(f"kernels-{kind.replace(' ', '-')}"))
        if kind == "old":
            vars(turns)["pass_turn_of_warp"] = _old_pass()
        plan._function.cache_clear()
        try:
            return plan.make_backward_plan.__wrapped__(*arguments)
        finally:
            names.update(kept)
            vars(turns)["pass_turn_of_warp"] = passing
            os.environ.pop(cubins.VARIABLE, None)
            if variable is not None:
                os.environ[cubins.VARIABLE] = variable
            plan._function.cache_clear()

    return make


def under(kind: str, call: Callable[[], Any]) -> Any:
    """Call with a kind of turns."""
    kept = vars(call_backward_hopper)["make_backward_plan"]
    vars(call_backward_hopper)["make_backward_plan"] = planner(kind)
    try:
        return call()
    finally:
        vars(call_backward_hopper)["make_backward_plan"] = kept


CASES = [
    (widths, causal, kind)
    for widths, causal, kind in itertools.product(WIDTHS, MASKS, KINDS)
    if kind in ("fast", "new") or widths == (256, 256)
]


def warm(number: int) -> None:
    """Compile one of `CASES`; the folder of kernels keeps it."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    (width, value_width), causal, kind = CASES[number]
    q = torch.ones(1, 64, 1, width, device="cuda").half()
    v = torch.ones(1, 64, 1, value_width, device="cuda").half()
    out, lse = flash_attention_hopper(q, q, v, causal=causal, return_lse=True)
    how = {"causal": causal, "deterministic": kind != "fast"}
    call = functools.partial(flash_attention_vjp_hopper, q, q, v, out, lse, v, **how)
    under("new" if kind == "fast" else kind, call)
    torch.cuda.synchronize()


def say(text: str) -> None:
    """Print a line now."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def verify() -> None:
    """Hold cases to float64, and twenty calls to the first one."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper
    from tests.cuda.test_backward_hopper_device import inputs, judge

    for widths in WIDTHS:
        said = []
        for sizes, causal in itertools.product(LENGTHS, MASKS):
            try:
                judge("float16", (2, *sizes, *widths), causal, deterministic=True)
                said.append("right")
            except AssertionError as error:
                said.append(f"WRONG {(sizes, causal)} {str(error)[:80]}")
        for causal in MASKS:
            q, k, v, do = inputs("float16", (2, 2000, 2000, 8, 2, *widths))
            out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
            given, how = (q, k, v, out, lse, do), {"causal": causal, "deterministic": True}
            first = flash_attention_vjp_hopper(*given, **how)
            alike = all(
                torch.equal(x, y)
                for _ in range(20)
                for x, y in zip(first[:3], flash_attention_vjp_hopper(*given, **how)[:3], strict=True)
            )
            said.append("repeats" if alike else "DIFFERS")
        say(f"{widths}: {', '.join(sorted(set(said)))}")


def measure() -> None:
    """Print TFLOP/s, and how many times as long as the fast kernel takes each of the others."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper
    from tests.cuda.hopper_table import EXPECTED_RATE, GRAPH_S, MOST_CALLS, seconds

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    for (B, H, kv_heads, N, D, Dv), causal in itertools.product(ROWS, MASKS):
        q, k, v, do = (
            torch.randn(B, N, heads, width, device="cuda", dtype=torch.float16)
            for heads, width in ((H, D), (kv_heads, D), (kv_heads, Dv), (H, Dv))
        )
        out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
        call = functools.partial(flash_attention_vjp_hopper, q, k, v, out, lse, do, causal=causal)
        turn = functools.partial(call, deterministic=True)
        contestants: dict[str, Any] = {"fast": call, "new": functools.partial(under, "new", turn)}
        if Dv == D:
            contestants |= {kind: functools.partial(under, kind, turn) for kind in KINDS[2:]}
        contestants["new again"] = contestants["new"]
        work = 2 * B * H * N * N * (3 * D + 2 * Dv) / (2 if causal else 1)
        calls = max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work)))
        found = seconds(contestants, calls, stream)
        rates = "  ".join(
            f"{name} {1e-12 * work / took:.0f} ({took / found['fast']:.2f})" for name, took in found.items()
        )
        say(f"{(B, H, kv_heads, N, D, Dv)} {'causal' if causal else 'full'}: {rates}")


def main() -> None:
    """Compile, verify, measure."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.cuda.wide_turns_run"]
    running = [subprocess.Popen([*command, str(case)]) for case in range(len(CASES))]
    failed = [CASES[case] for case, process in enumerate(running) if process.wait()]
    say(f"compiled in {time.monotonic() - start:.0f} s, failed: {failed}")
    verify()
    say(f"verified after {time.monotonic() - start:.0f} s")
    measure()
    say(f"ended after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:]:
        warm(int(sys.argv[1]))
    else:
        main()
