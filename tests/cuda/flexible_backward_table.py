"""Gradients of flexible attention: ``python -m tests.cuda.flexible_backward_table [64] [128] [form]``.

Each kernel is first checked on a short ragged problem with grouped heads against PyTorch's autograd in
float64, its outputs full of NaN before: the error is at most a few roundings of the format.  Then, at the
size that is timed, against compiled FlexAttention's gradients; then both are timed in turn as `hopper_table`
does.  Kernels are compiled by other processes meanwhile.  It stops by itself after `SECONDS`.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from functools import partial
from typing import Any

import numpy as np

from cuda_backend.arrays import poisoned_outputs, view
from cuda_backend.attention.call_flexible_backward_hopper import flexible_attention_vjp_hopper
from cuda_backend.attention.plan_backward_hopper import _function
from cuda_backend.attention.variant_backward_hopper import choose_backward
from cuda_backend.context import current_device
from tests.cuda.flexible_backward_forms import FORMS, Form, form_of, functions, our_blocks, their_blocks
from tests.cuda.flexible_hopper_forms import means
from tests.cuda.hopper_table import EXPECTED_RATE, GRAPH_S, MOST_CALLS, seconds
from tests.cuda.need_gpu import need_gpu

SECONDS = 92.0
SHORT = (2, 4, 2, 700)  # B, Hq, Hkv, N
CLOSE, ALIKE = 4e-3, 1.5e-2  # of the largest gradient: to float64, to another kernel in float16
ROWS_AT_ONCE = 4096


def variant_of(name: str, D: int, *, deterministic: bool) -> Any:
    """Return the kernel of a form."""
    return choose_backward("f16", D, D, False, deterministic=deterministic)._replace(mods=functions(name))


def ours(form: Form, given: Any, blocks: Any, stream: Any, *, deterministic: bool) -> Any:
    """Return our call, without arguments."""
    arrays = tuple(view("aux", array, stream.cuda_stream) for array in form.aux)
    return partial(
        flexible_attention_vjp_hopper, *given, mods=form.mods, arrays=arrays, aux=form.aux, blocks=blocks,
        scale=None, deterministic=deterministic, stream=stream.cuda_stream,
    )  # fmt: skip


def scores(form: Form, q: Any, k: Any, b: int, h: int, rows: Any) -> Any:
    """Return scores of rows of a head, [rows, N], in the dtype of q."""
    import torch

    i, j = rows[:, None], torch.arange(k.shape[0], device="cuda")[None]
    score = q @ k.T * q.shape[1] ** -0.5
    if form.their_score is not None:
        score = form.their_score(score, b, h, i, j)
    return score.masked_fill(~form.their_mask(b, h, i, j), -math.inf)


def log_sum_exp(form: Form, q: Any, k: Any) -> Any:
    """Return that of each row [B, H, N], in float32."""
    import torch

    B, N, H, _ = q.shape
    lse = torch.empty(B, H, N, device="cuda", dtype=torch.float32)
    for b in range(B):
        for h in range(H):
            for start in range(0, N, ROWS_AT_ONCE):
                rows = torch.arange(start, min(start + ROWS_AT_ONCE, N), device="cuda")
                found = scores(form, q[b, rows, h].float(), k[b, :, h].float(), b, h, rows)
                lse[b, h, rows] = torch.logsumexp(found, -1)
    return lse


def apart(found: Any, exact: Any) -> float:
    """Return the largest difference of a gradient, as a part of its largest number; NaN if there is one."""
    return max(
        float((x.double() - y.double()).abs().max() / y.double().abs().max())
        for x, y in zip(found, exact, strict=True)
    )


def short(name: str, D: int, stream: Any) -> tuple[float, float, bool]:
    """Return the errors of both kernels on a short problem, and whether the deterministic one repeats."""
    import torch

    B, Hq, Hkv, N = SHORT
    form = form_of(name, B, Hq, N)
    q, do = (torch.randn(B, N, Hq, D, device="cuda", dtype=torch.float16) for _ in range(2))
    k, v = (torch.randn(B, N, Hkv, D, device="cuda", dtype=torch.float16) for _ in range(2))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    rows = torch.arange(N, device="cuda")
    out, lse = (
        torch.empty(B, N, Hq, D, device="cuda", dtype=torch.float64),
        torch.empty(B, Hq, N, device="cuda"),
    )
    total: Any = 0.0
    for b in range(B):
        for h in range(Hq):
            own = h // (Hq // Hkv)
            found = scores(form, leaves[0][b, :, h], leaves[1][b, :, own], b, h, rows)
            lse[b, h] = torch.logsumexp(found.detach(), -1).float()
            head = torch.softmax(found, -1) @ leaves[2][b, :, own]
            out[b, :, h] = head.detach()
            total = total + (head * do[b, :, h].double()).sum()
    exact = torch.autograd.grad(total, leaves)
    given = q, k, v, out.half(), lse, do
    errors, repeats = [], True
    for deterministic in (False, True):
        variant = choose_backward("f16", D, D, False)
        blocks = our_blocks(form, (variant.block_m, variant.block_n), B, Hq, N)
        call = ours(form, given, blocks, stream, deterministic=deterministic)
        with poisoned_outputs():
            results = [call()[:3] for _ in range(1 + deterministic)]
        torch.cuda.synchronize()
        errors.append(apart(results[0], exact))
        repeats = repeats and all(torch.equal(x, y) for x, y in zip(results[0], results[-1], strict=True))
    return errors[0], errors[1], repeats


def row(name: str, D: int, compiled: Any, stream: Any) -> float:
    """Check and time one form; print a line; return FlexAttention's time over ours."""
    import torch

    began = time.perf_counter()
    fast, turned_error, repeats = short(name, D, stream)
    checked = time.perf_counter()
    B, H, N = FORMS[name]
    form = form_of(name, B, H, N)
    q, k, v, do = (torch.randn(B, N, H, D, device="cuda", dtype=torch.float16) for _ in range(4))
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    out = compiled(*leaves, score_mod=form.their_score, block_mask=their_blocks(form, B, H, N))
    rival = partial(torch.autograd.grad, out, leaves, do.transpose(1, 2), retain_graph=True)
    theirs = [x.transpose(1, 2) for x in rival()]
    torch.cuda.synchronize()
    middle = time.perf_counter()
    variant = variant_of(name, D, deterministic=False)
    sizes = variant.block_m, variant.block_n
    blocks = our_blocks(form, sizes, B, H, N)
    given = q, k, v, out.detach().transpose(1, 2).contiguous(), log_sum_exp(form, q, k), do
    calls: dict[str, Any] = {"FlexAttention": rival}
    errors = []
    for label, deterministic in (("ours", False), ("in turn", True)):
        calls[label] = ours(form, given, blocks, stream, deterministic=deterministic)
        with poisoned_outputs():
            found = calls[label]()[:3]
        torch.cuda.synchronize()
        errors.append(apart(found, theirs))
    right = max(fast, turned_error) < CLOSE and repeats and max(errors) < ALIKE
    live = float(np.broadcast_to(blocks.states != 0, (B, H, *blocks.states.shape[2:])).sum())
    work = 10 * D * live * sizes[0] * sizes[1]
    times = seconds(calls, max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work))), stream)
    ratio = times["FlexAttention"] / times["ours"]
    sys.stdout.write(
        f"{name} B={B} H={H} N={N} D={D} live {blocks.density:.3f}: ours {1e3 * times['ours']:.3f} ms  "
        f"in turn {1e3 * times['in turn']:.3f}  FlexAttention {1e3 * times['FlexAttention']:.3f}  "
        f"ratio {ratio:.2f}  {1e-12 * work / times['ours']:.0f} TFLOP/s  errors {fast:.1e} "
        f"{turned_error:.1e} apart {errors[0]:.1e} {errors[1]:.1e} {'repeats' if repeats else 'DIFFERS'} "
        f"{'ok' if right else 'WRONG'}  ({checked - began:.1f} s, theirs {middle - checked:.1f} s)\n"
    )
    sys.stdout.flush()
    return ratio if right else math.nan


def main(words: list[str]) -> None:
    """Print the table, and geometric means."""
    import torch
    import torch._dynamo
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    began = time.perf_counter()
    widths = [int(word) for word in words if word.isdigit()] or [64, 128]
    names = [name for name in FORMS if name in words or not set(words) & set(FORMS)]
    module = "tests.cuda.flexible_backward_table"
    helpers = {
        name: subprocess.Popen([sys.executable, "-m", module, "compile", name, *map(str, widths)])
        for name in names
    }
    torch._functorch.config.donated_buffer = False  # a backward pass is timed again and again
    torch.manual_seed(0)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.set_stream(stream)
    for D in widths:
        ratios: dict[str, float] = {}
        for name in names:
            if time.perf_counter() - began > SECONDS:
                sys.stdout.write("out of time\n")
                break
            torch._dynamo.reset()
            compiled = torch.compile(flex_attention, dynamic=False)
            helpers[name].wait()
            try:
                ratios[name] = row(name, D, compiled, stream)
            except Exception as error:  # the other rows are of use all the same
                sys.stdout.write(f"{name} D={D}: {type(error).__name__}: {str(error)[-600:]}\n")
            torch.cuda.empty_cache()
        if ratios:
            sys.stdout.write(f"D={D}: FlexAttention's time over ours: {means(ratios)}\n")
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


def compile_all(words: list[str]) -> None:
    """Compile the kernels of forms, for the cache on disk."""
    device = current_device()
    for D in (int(word) for word in words if word.isdigit()):
        for name in FORMS:
            if name in words:
                for deterministic in (False, True):
                    _function("main", variant_of(name, D, deterministic=deterministic), device)


if __name__ == "__main__":
    need_gpu()
    (compile_all if "compile" in sys.argv else main)(sys.argv[1:])
