"""Flexible attention on Hopper beside compiled FlexAttention: ``python -m tests.cuda.flexible_hopper_table``.

Arguments choose widths and forms: ``64 128 sliding BigBird``.  Each of ours is checked, with outputs full of
NaN before it, against PyTorch in float64 on rows drawn at random: at most twice FlexAttention's error.  Then
both are timed in turn as `hopper_table` does.  "of dense" is the rate on live tiles as a share of that of the
dense Hopper kernel, full attention over 8192 tokens.  It stops by itself after `SECONDS`.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from cuda_backend.arrays import poisoned_outputs, view
from cuda_backend.attention.call_flexible_hopper import flexible_attention_hopper
from cuda_backend.attention.lists_hopper import live_tiles, resized
from cuda_backend.attention.plan_flexible_hopper import make_lists
from cuda_backend.attention.user_device import Mods
from refimpl.attention.user_functions import as_mod
from tests.cuda.flexible_hopper_forms import Form, forms, our_blocks, their_blocks
from tests.cuda.hopper_table import EXPECTED_RATE, GRAPH_S, MOST_CALLS, seconds

SECONDS, PREPARED = 85.0, 45.0
ROWS = 24  # of a head, compared with float64
NOISE = 2e-4  # of outputs: where FlexAttention happens to be exact


def call_of(form: Form, q: Any, k: Any, v: Any, blocks: Any, stream: int) -> Any:
    """Return our call, without arguments."""
    arrays = tuple(view(f"aux[{index}]", array, stream) for index, array in enumerate(form.aux))
    given = Mods(
        None if form.mask is None else as_mod("mask_mod", form.mask),
        None if form.score is None else as_mod("score_mod", form.score, ("score",)),
        None,
        tuple((array.dtype, len(array.shape)) for array in arrays),
    )
    return partial(
        flexible_attention_hopper, q, k, v, mods=given, arrays=arrays, aux=form.aux, blocks=blocks,
        scale=None, return_lse=False, stream=stream,
    )  # fmt: skip


def truth(form: Form, q: Any, k: Any, v: Any, rows: Any) -> Any:
    """Return rows of the output in float64, [B, rows, H, D]."""
    import torch

    B, N, H, D = q.shape
    out = torch.empty(B, len(rows), H, D, device="cuda", dtype=torch.float64)
    i, j = rows[:, None], torch.arange(N, device="cuda")[None]
    for b in range(B):
        for h in range(H):
            score = q[b, rows, h].double() @ k[b, :, h].double().T * D**-0.5
            if form.their_score is not None:
                score = form.their_score(score, b, h, i, j)
            if form.their_mask is not None:
                score = score.masked_fill(~form.their_mask(b, h, i, j), -math.inf)
            out[b, :, h] = torch.softmax(score, -1) @ v[b, :, h].double()
    return out


def dense_rate(D: int, stream: Any) -> float:
    """Return the FLOP/s of the dense Hopper kernel."""
    import torch

    from cuda_backend import flash_attention_hopper

    q, k, v = (torch.randn(2, 8192, 16, D, device="cuda", dtype=torch.float16) for _ in range(3))
    found = seconds({"dense": partial(flash_attention_hopper, q, k, v)}, 2, stream)
    return 4 * 2 * 16 * 8192**2 * D / found["dense"]


def row(form: Form, D: int, compiled: Any, dense: float, stream: Any) -> float:
    """Check and time one form; print a line; return FlexAttention's time over ours."""
    import torch

    q, k, v = (torch.randn(form.B, form.N, form.H, D, device="cuda", dtype=torch.float16) for _ in range(3))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    blocks, rivals = our_blocks(form), their_blocks(form)
    own = call_of(form, q, k, v, blocks, stream.cuda_stream)
    rival = partial(compiled, *turned, score_mod=form.their_score, block_mask=rivals)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with poisoned_outputs():
            found = own()
        torch.cuda.synchronize()
        middle = time.perf_counter()
        theirs = rival().transpose(1, 2)
        torch.cuda.synchronize()
        compiling = middle - start, time.perf_counter() - middle
        rows = torch.randperm(form.N, device="cuda")[:ROWS].sort().values
        rows[0], rows[-1] = 0, form.N - 1
        exact = truth(form, q, k, v, rows)
        errors = [float((x[:, rows].double() - exact).abs().max()) for x in (found, theirs)]
        apart = float((found.float() - theirs.float()).abs().max())
    right = errors[0] <= 2 * errors[1] + NOISE and apart < 0.02 and bool(torch.isfinite(found).all())
    layouts = view("q", q, 0).layout, view("v", v, 0).layout
    states: Any = (
        (lambda keys: np.full((1, 1, form.N // 64, form.N // keys), 2, np.uint8))
        if blocks is None
        else (lambda keys: resized(blocks, (64, keys)))
    )
    tiles = make_lists(*layouts, states, stream.cuda_stream).tiles
    live = live_tiles(states(tiles.block_n), tiles.consumers)
    scores = (
        float(np.broadcast_to(live, (form.B, form.H, *live.shape[2:])).sum()) * tiles.block_m * tiles.block_n
    )
    work = 4 * D * scores
    calls = max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work)))
    times = seconds({"FlexAttention": rival, "ours": own}, calls, stream)
    ratio, share = times["FlexAttention"] / times["ours"], work / times["ours"] / dense
    sys.stdout.write(
        f"{form.name} B={form.B} H={form.H} N={form.N} D={D} tiles {tiles.block_m}x{tiles.block_n} "
        f"live {live.mean():.3f}: ours {1e3 * times['ours']:.3f} ms  FlexAttention "
        f"{1e3 * times['FlexAttention']:.3f} ms  ratio {ratio:.2f}  "
        f"{1e-12 * work / times['ours']:.0f} TFLOP/s, {share:.2f} of dense  "
        f"errors {errors[0]:.1e} {errors[1]:.1e} apart {apart:.1e} "
        f"{'ok' if right else 'WRONG'}  (first calls {compiling[0]:.1f} s {compiling[1]:.1f} s)\n"
    )
    sys.stdout.flush()
    return ratio if right else math.nan


def prepare(form: Form, D: int, compiled: Any, stream: Any) -> None:
    """Call both once, so that the disk has their kernels."""
    import torch

    q, k, v = (torch.randn(form.B, form.N, form.H, D, device="cuda", dtype=torch.float16) for _ in range(3))
    with torch.cuda.stream(stream):
        call_of(form, q, k, v, our_blocks(form), stream.cuda_stream)()
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        compiled(*turned, score_mod=form.their_score, block_mask=their_blocks(form))
        torch.cuda.synchronize()


def compile_beforehand(names: Sequence[str], widths: Sequence[int]) -> None:
    """Compile all kernels in as many processes, which leave them in the caches on disk."""
    command = [sys.executable, "-m", "tests.cuda.flexible_hopper_table", "--prepare"]
    cases = list(itertools.product(names, widths))
    workers = [
        subprocess.Popen([*command, name, str(D)], stderr=subprocess.PIPE, text=True) for name, D in cases
    ]
    end = time.monotonic() + PREPARED
    for case, worker in zip(cases, workers, strict=True):
        try:
            _, said = worker.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            said = "took too long"
        if worker.returncode:
            sys.stdout.write(f"{case}: {said.strip()[-800:]}\n")


def main(arguments: Sequence[str]) -> None:
    """Print the table, and geometric means."""
    import torch
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    began = time.perf_counter()
    widths = [int(word) for word in arguments if word.isdigit()] or [128, 64]
    words = [word for word in arguments if word.isalpha()]
    torch.manual_seed(0)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    wanted = [form for form in forms() if not words or any(form.name.startswith(word) for word in words)]
    if "--prepare" in arguments:
        prepare(wanted[0], widths[0], torch.compile(flex_attention, dynamic=False), stream)
        return
    # A kernel that hangs cannot be interrupted: the process ends all the same.
    watch = threading.Timer(SECONDS + 10, os._exit, (1,))
    watch.daemon = True
    watch.start()
    compile_beforehand([form.name.split()[0] for form in wanted], widths)
    sys.stdout.write(f"compiled after {time.perf_counter() - began:.0f} s\n")
    sys.stdout.flush()
    for D in widths:
        dense = dense_rate(D, stream)
        sys.stdout.write(f"dense D={D}: {1e-12 * dense:.0f} TFLOP/s\n")
        ratios = []
        for form in wanted:
            if time.perf_counter() - began > SECONDS:
                sys.stdout.write("out of time\n")
                break
            torch._dynamo.reset()
            compiled = torch.compile(flex_attention, dynamic=False)
            try:
                ratios.append(row(form, D, compiled, dense, stream))
            except Exception as error:  # the other rows are of use all the same
                sys.stdout.write(f"{form.name} D={D}: {type(error).__name__}: {str(error)[-600:]}\n")
            torch.cuda.empty_cache()
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            sys.stdout.write(f"D={D}: geometric mean {mean:.2f} times FlexAttention, {len(ratios)} forms\n")
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main(sys.argv[1:])
