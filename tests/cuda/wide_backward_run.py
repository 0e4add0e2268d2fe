"""One short run on a Hopper GPU of the backward kernels for heads wider than 128: right, and how fast.

``FRUGAL_TEST_GPU=1 python -m tests.cuda.wide_backward_run`` compiles all kernels side by side, holds small
cases to float64 as `test_backward_hopper_device` does, times two shapes beside PyTorch's backends, and says
what the sums of dQ cost: the same kernel without adding them.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import time
from typing import Any

from tests.cuda.need_gpu import need_gpu

WIDTHS = ((256, 256), (192, 128))
MASKS = (False, "bottom_right")
LENGTHS = ((1, 1), (65, 300), (300, 65), (1000, 1000))
SHAPE = 4, 16, 4096  # B, H, N


def variants(widths: tuple[int, int], causal: Any) -> dict[str, Any]:
    """Return options of what is timed."""
    from cuda_backend.attention.variant_wide_backward_hopper import choose_wide_backward

    chosen = choose_wide_backward("f16", widths[0], widths[1], bool(causal))
    found: dict[str, Any] = {
        "ours": {},
        "deterministic": {"deterministic": True},
        "one stage": {"variant": chosen._replace(stages=1)},
    }
    if widths == (192, 128):
        found["three stages"] = {"variant": chosen._replace(stages=3)}
    return found


def kernels() -> list[tuple[tuple[int, int], Any, str]]:
    """Return all that is to be compiled: widths, mask, name of the options."""
    return [
        (widths, causal, name)
        for widths, causal in itertools.product(WIDTHS, MASKS)
        for name in variants(widths, causal)
    ]


def warm(number: int) -> None:
    """Compile one of `kernels`; the folder of kernels keeps it."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper

    (d, d_v), causal, name = kernels()[number]
    q, v = (torch.ones(1, 64, 1, width, device="cuda").half() for width in (d, d_v))
    out, lse = flash_attention_hopper(q, q, v, causal=causal, return_lse=True)
    flash_attention_vjp_hopper(q, q, v, out, lse, v, causal=causal, **variants((d, d_v), causal)[name])
    torch.cuda.synchronize()


def verify() -> None:
    """Hold every case to float64."""
    from tests.cuda.test_backward_hopper_device import judge

    for widths, causal, name in kernels():
        said = []
        for tq, tk in LENGTHS:
            try:
                judge("float16", (2, tq, tk, 4, 2, *widths), causal, **variants(widths, causal)[name])
                said.append("right")
            except AssertionError as error:
                said.append(f"WRONG {str(error)[:120]}")
        sys.stdout.write(f"{widths} {causal} {name}: {', '.join(said)}\n")
        sys.stdout.flush()


def without_sums() -> None:
    """Let the consumers throw their columns of dQ away, in kernels not yet compiled."""
    from cuda_backend._numba import device_function
    from cuda_backend.attention import (
        exchange_wide_backward_hopper,
        keys_wide_backward_hopper,
        values_wide_backward_hopper,
    )
    from cuda_backend.attention import plan_backward_hopper as plan

    os.environ["FRUGAL_KERNEL_CACHE"] = "off"
    original = exchange_wide_backward_hopper.build_queries

    def build(variant: Any, consumer: int) -> Any:
        @device_function
        def add(_dq: Any, _sums: Any, _words: Any, _line: Any, _turn: Any, _thread: Any) -> None:
            pass

        return original(variant, consumer)[0], add

    for module in (keys_wide_backward_hopper, values_wide_backward_hopper):
        vars(module)["build_queries"] = build
    plan._function.cache_clear()
    plan.make_backward_plan.cache_clear()


def measure() -> None:
    """Print TFLOP/s."""
    import torch

    from cuda_backend import flash_attention_hopper, flash_attention_vjp_hopper
    from tests.cuda.hopper_backward_table import _theirs
    from tests.cuda.hopper_table import BACKENDS, seconds

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    B, H, N = SHAPE
    for ablated, widths, causal in [
        *itertools.product((False,), WIDTHS, MASKS),
        *itertools.product((True,), WIDTHS, (False,)),
    ]:
        d, d_v = widths
        q, k, v, do = (
            torch.randn(B, N, H, width, device="cuda", dtype=torch.float16) for width in (d, d, d_v, d_v)
        )
        out, lse = flash_attention_hopper(q, k, v, causal=causal, return_lse=True)
        call = functools.partial(flash_attention_vjp_hopper, q, k, v, out, lse, do, causal=causal)
        if ablated:
            without_sums()
            contestants: dict[str, Any] = {"without sums": call}
        else:
            options = variants(widths, causal)
            contestants = {name: functools.partial(call, **how) for name, how in options.items()}
            for name, backend in BACKENDS.items():
                rival = _theirs("backward", (q, k, v, do), backend, causal=bool(causal))
                if rival is not None:
                    contestants[name] = rival
        work = 2 * B * H * N * N * (3 * d + 2 * d_v) / (2 if causal else 1)
        found = seconds(contestants, 3, stream)
        rates = "  ".join(f"{name} {1e-12 * work / time:.0f}" for name, time in found.items())
        sys.stdout.write(f"{widths} {causal}: {rates}\n")
        sys.stdout.flush()


def main() -> None:
    """Compile, verify, measure."""
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.cuda.wide_backward_run"]
    running = [subprocess.Popen([*command, str(case)]) for case in range(len(kernels()))]
    failed = [case for case, process in enumerate(running) if process.wait()]
    sys.stdout.write(f"compiled in {time.monotonic() - start:.0f} s, failed: {failed}\n")
    if not failed:
        verify()
        measure()
    sys.stdout.write(f"ended after {time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    need_gpu()
    if sys.argv[1:]:
        warm(int(sys.argv[1]))
    else:
        main()
