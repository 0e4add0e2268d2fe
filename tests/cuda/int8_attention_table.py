"""Attention in int8 on Hopper beside fp16, piece by piece: ``python -m tests.cuda.int8_attention_table``.

Every line is printed when it is known, so that a kernel that never ends is seen by the line that is missing.
Codes are made inside the timing; "codes" are they alone.  Errors are rms, of sampled rows against float64.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from cuda_backend.attention import int8_call_hopper
from cuda_backend.attention.int8_forward_hopper import choose
from tests.cuda.need_gpu import need_gpu

SHAPES = ((1, 16, 8192, 128), (1, 16, 16384, 128), (4, 16, 8192, 128))
SMALL = ((1, 1, 1, 128), (1, 2, 200, 128), (2, 2, 700, 64), (1, 4, 2048, 128))
BEGAN = time.perf_counter()


def ready(task: tuple[str, int, bool]) -> float:
    """Compile a kernel in a process of its own, into the folder that others read; return the seconds."""
    import torch

    from cuda_backend import flash_attention_hopper
    from cuda_backend.attention import int8_codes_call_hopper, int8_codes_hopper
    from cuda_backend.context import current_device

    start = time.perf_counter()
    what, width, causal = task
    device = current_device()
    if what == "fp16":
        x = torch.randn(1, 4096, 16, width, device="cuda").half()
        flash_attention_hopper(x, x, x, causal=causal)
        torch.cuda.synchronize()
    elif what == "codes":
        int8_codes_call_hopper._function("sums", "f16", device)
        int8_codes_call_hopper._function("codes", int8_codes_hopper.Codes("f16", 64, False), device)
        int8_codes_call_hopper._function("codes", int8_codes_hopper.Codes("f16", 128, True), device)
    else:
        int8_call_hopper._function(choose("f16", width, causal), device)
    return time.perf_counter() - start


def main() -> None:
    """Print what each piece takes."""
    both = False, True
    kernels = ("int8", 128), ("int8", 64), ("fp16", 128)
    tasks = [(*kernel, causal) for kernel in kernels for causal in both] + [("codes", 128, False)]
    with ProcessPoolExecutor(len(tasks), mp_context=get_context("spawn")) as pool:
        for task, seconds in zip(tasks, pool.map(ready, tasks), strict=True):
            _say(f"{task}: compiled in {seconds:.1f} s")
    import torch

    from cuda_backend import flash_attention_hopper, int8_attention_hopper
    from cuda_backend.attention import int8_call
    from cuda_backend.attention.int8_codes_call_hopper import coded
    from cuda_backend.timing import interleaved

    generator = torch.Generator("cuda").manual_seed(0)

    def arrays(B: int, H: int, N: int, D: int) -> list[Any]:
        x = [torch.randn(B, N, H, D, device="cuda", dtype=torch.float16, generator=generator) for _ in "qkv"]
        x[1] += 2 * torch.randn(1, 1, H, D, device="cuda", dtype=torch.float16, generator=generator)
        return x

    for shape in SMALL:
        for causal in both:
            q, k, v = arrays(*shape)
            exact = _exact(q, k, v, causal)
            outs = [int8_attention_hopper(q, k, v, causal=causal) for _ in range(3)]
            torch.cuda.synchronize()
            same = all(torch.equal(outs[0], out) for out in outs)
            _say(f"{shape} {causal} error {_error(outs[0], exact):.1e}, repeats: {same}")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for shape in SHAPES:
        for causal in both:
            q, k, v = arrays(*shape)

            def codes(_: int, q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                return int8_call.prepare("table", q, k, v, causal, None, True, (64, 128), None, coded=coded)

            def int8(_: int, q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                return int8_attention_hopper(q, k, v, causal=causal)

            def fp16(_: int, q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                return flash_attention_hopper(q, k, v, causal=causal)

            turned = tuple(x.transpose(1, 2) for x in (q, k, v))

            def default(_: int, turned: Any = turned, causal: bool = causal) -> Any:
                return sdpa(turned[0], turned[1], turned[2], is_causal=causal)

            functions: dict[str, Callable[[int], Any]] = {
                "int8": int8,
                "codes": codes,
                "fp16": fp16,
                "torch": default,
            }
            exact = _exact(q, k, v, causal)
            errors = {name: f" (error {_error(functions[name](0), exact):.1e})" for name in ("int8", "fp16")}
            found = interleaved(functions, rounds=9)
            base = found["fp16"].device_s
            texts = [
                f"{name} {1e6 * t.device_s:.0f} us, {base / t.device_s:.3f} times{errors.get(name, '')}"
                for name, t in found.items()
            ]
            host = f"host {1e6 * found['int8'].host_s:.0f} us"
            _say(f"{shape} {'causal' if causal else 'full'}: {'; '.join(texts)}; {host}")


def _exact(q: Any, k: Any, v: Any, causal: bool) -> tuple[Any, Any]:
    """Return the sampled rows, and attention in them in float64."""
    import torch

    N, D = q.shape[1], q.shape[3]
    rows = torch.arange(0, N, max(1, N // 9), device="cuda")
    parts = []
    for h in range(q.shape[2]):
        scores = torch.einsum("bid,bjd->bij", q[:, rows, h].double(), k[:, :, h].double()) / D**0.5
        if causal:
            scores.masked_fill_(torch.arange(N, device="cuda")[None, None] > rows[None, :, None], -torch.inf)
        parts.append(scores.softmax(-1) @ v[:, :, h].double())
    return rows, torch.stack(parts, 2)


def _error(out: Any, exact: tuple[Any, Any]) -> float:
    rows, truth = exact
    mine = out[:, rows].double()
    return float((mine - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def _say(line: str) -> None:
    sys.stdout.write(f"{time.perf_counter() - BEGAN:5.1f} s  {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    need_gpu()
    main()
