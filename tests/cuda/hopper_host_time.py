"""Host time of the Hopper forward kernel beside PyTorch's: ``python -m tests.cuda.hopper_host_time``.

Wall clock over 1000 calls, each with arrays at new addresses, of an attention that takes the GPU less time
than the host; and the first call of a process, with nothing on disk and with the compiled kernel there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from tests.cuda.need_gpu import need_gpu

CALLS, ROUNDS, SHAPE = 1000, 7, (1, 128, 4, 128)
FIRST = """
import time, torch
from cuda_backend import flash_attention_hopper
x = torch.randn(1, 1024, 4, 128, device="cuda").half()
torch.cuda.synchronize()
start = time.perf_counter()
flash_attention_hopper(x, x, x, causal=True)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_calls() -> None:
    """Print the seconds of the first call of a process."""
    with tempfile.TemporaryDirectory() as folder:
        for what, cache in (
            ("nothing on disk", "first"),
            ("kernel on disk", "first"),
            ("nothing on disk, again", "second"),
        ):
            environment = {**os.environ, "FRUGAL_KERNEL_CACHE": os.path.join(folder, cache)}
            run = subprocess.run(
                [sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, check=True
            )
            _say(f"first call, {what}: {float(run.stdout):.3f} s")


def calls() -> None:
    """Print a table of microseconds."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from cuda_backend import flash_attention, flash_attention_hopper

    sets = torch.randn(CALLS, 3, *SHAPE, device="cuda").half()
    arrays = [tuple(sets[n, i] for i in range(3)) for n in range(CALLS)]
    swapped = [tuple(x.transpose(1, 2) for x in three) for three in arrays]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def timed(call: Callable[..., Any], sets: list[Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for three in sets:
            call(*three)
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return elapsed / len(sets) * 1e6

    def pinned(backend: Any) -> Callable[[list[Any]], float]:
        def run(sets: list[Any]) -> float:
            with sdpa_kernel(backend):
                return timed(sdpa, sets)

        return run

    contestants: dict[str, tuple[Callable[[list[Any]], float], list[Any]]] = {
        "flash_attention_hopper": (lambda sets: timed(flash_attention_hopper, sets), arrays),
        "flash_attention, tier='hopper'": (
            lambda sets: timed(lambda q, k, v: flash_attention(q, k, v, tier="hopper"), sets),
            arrays,
        ),
        "with log-sum-exp": (
            lambda sets: timed(lambda q, k, v: flash_attention_hopper(q, k, v, return_lse=True), sets),
            arrays,
        ),
        "SDPA FA2": (pinned(SDPBackend.FLASH_ATTENTION), swapped),
        "SDPA cuDNN": (pinned(SDPBackend.CUDNN_ATTENTION), swapped),
        "SDPA default": (lambda sets: timed(sdpa, sets), swapped),
    }
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, (run, given) in contestants.items():
            rows[name].append((run(given), run(given[:1] * CALLS)))
    _say(f"{'microseconds a call':32} new arrays   the same")
    for name, measured in rows.items():
        new, same = (median(column) for column in zip(*measured[1:], strict=True))
        _say(f"{name:32} {new:10.1f} {same:10.1f}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    need_gpu()
    calls()
    first_calls()
