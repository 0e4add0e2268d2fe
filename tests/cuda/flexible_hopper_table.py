"""Flexible attention on Hopper beside compiled FlexAttention: ``python -m tests.cuda.flexible_hopper_table``.

Arguments choose widths and forms: ``64 128 sliding BigBird``.  Each of ours is checked, with outputs full of
NaN before it, against PyTorch in float64 on rows drawn at random: at most twice FlexAttention's error.  Then
all are timed in turn as `hopper_table` does.  "of dense" is the rate on live tiles as a share of that of the
dense Hopper kernel, full attention over 8192 tokens: tiles of 128 x 128, or 192 x 128, that are not dead.
With ``--all`` the call is timed in several ways, `WAYS`.  It stops by itself after `SECONDS`.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from cuda_backend.arrays import poisoned_outputs, view
from cuda_backend.attention import mask_words, plan_flexible_hopper, remembered
from cuda_backend.attention.call_flexible_hopper import flexible_attention_hopper
from cuda_backend.attention.lists_hopper import live_tiles, resized
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_flexible_hopper import candidates
from refimpl.attention.user_functions import as_mod
from tests.cuda.flexible_hopper_forms import Form, forms, means, our_blocks, their_blocks
from tests.cuda.hopper_table import EXPECTED_RATE, GRAPH_S, MOST_CALLS, seconds
from tests.cuda.need_gpu import need_gpu

SECONDS, PREPARED = 85.0, 45.0
ROWS = 24  # of a head, compared with float64
NOISE = 2e-4  # of outputs: where FlexAttention happens to be exact

# Which tiles a call may use, and how many bytes of masks are kept: "asked" asks the mask for every score.
Way = tuple[Callable[[int], bool], int]
WAYS: dict[str, Way] = {
    "ours": (lambda keys: True, mask_words.MOST_BYTES),
    "asked": (lambda keys: keys > 64, 0),
    "words": (lambda keys: keys > 64, mask_words.MOST_BYTES),
    "64 keys": (lambda keys: keys <= 64, mask_words.MOST_BYTES),
}


def in_way(way: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that is made in one of `WAYS`, with a memory of its own."""
    import pytest

    fits, most = WAYS[way]
    answers: OrderedDict[Any, Any] = OrderedDict()
    chosen: Any = lambda kind, D, Dv: [  # noqa: E731
        entry for entry in candidates(kind, D, Dv) if fits(entry[0].block_n)
    ]

    def made() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(remembered, "_answers", answers)
            patch.setattr(plan_flexible_hopper, "candidates", chosen)
            patch.setattr(plan_flexible_hopper, "MOST_BYTES", most)
            return call()

    return made


def tiles_of(form: Form, D: int) -> tuple[int, int]:
    """Return the tiles whose scores count as work: of the dense kernel, whichever leave fewer scores."""
    if form.mask is None:
        return 128, 128
    sizes = ((128, 128), (192, 128)) if D <= 64 else ((128, 128),)
    return min(sizes, key=lambda size: live_scores(form, size))


def live_scores(form: Form, sizes: tuple[int, int]) -> float:
    """Return how many scores tiles have that are not dead."""
    blocks = our_blocks(form)
    if blocks is None:
        return float(form.B * form.H) * form.N * form.N
    live = live_tiles(resized(blocks, (64, sizes[1])), sizes[0] // 64)
    return float(np.broadcast_to(live, (form.B, form.H, *live.shape[2:])).sum()) * sizes[0] * sizes[1]


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


def row(form: Form, D: int, compiled: Any, dense: float, stream: Any, ways: Sequence[str]) -> float:
    """Check and time one form; print a line for each way; return FlexAttention's time over ours."""
    import torch

    q, k, v = (torch.randn(form.B, form.N, form.H, D, device="cuda", dtype=torch.float16) for _ in range(3))
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    blocks, rivals = our_blocks(form), their_blocks(form)
    own = call_of(form, q, k, v, blocks, stream.cuda_stream)
    calls = {way: in_way(way, own) for way in ways}
    rival = partial(compiled, *turned, score_mod=form.their_score, block_mask=rivals)
    with torch.cuda.stream(stream):
        torch.cuda.synchronize()
        theirs = rival().transpose(1, 2)
        rows = torch.randperm(form.N, device="cuda")[:ROWS].sort().values
        rows[0], rows[-1] = 0, form.N - 1
        exact = truth(form, q, k, v, rows)
        limit = 2 * float((theirs[:, rows].double() - exact).abs().max()) + NOISE
        wrong, errors = set(), {}
        for way, call in calls.items():
            with poisoned_outputs():
                found = call()
            torch.cuda.synchronize()
            errors[way] = float((found[:, rows].double() - exact).abs().max())
            apart = float((found.float() - theirs.float()).abs().max())
            if not (errors[way] <= limit and apart < 0.02 and bool(torch.isfinite(found).all())):
                wrong.add(way)
    sizes = tiles_of(form, D)
    scores = live_scores(form, sizes)
    work = 4 * D * scores
    count = max(2, min(MOST_CALLS, int(GRAPH_S * EXPECTED_RATE / work)))
    times = seconds({"FlexAttention": rival, **calls}, count, stream)
    density = scores / (form.B * form.H * form.N**2)
    sys.stdout.write(
        f"{form.name} B={form.B} H={form.H} N={form.N} D={D} tiles {sizes[0]}x{sizes[1]} live {density:.3f}: "
        f"FlexAttention {1e3 * times['FlexAttention']:.3f} ms\n"
    )
    for way in ways:
        taken = times[way]
        sys.stdout.write(
            f"  {way}: {1e3 * taken:.3f} ms  ratio {times['FlexAttention'] / taken:.2f}  "
            f"{1e-12 * work / taken:.0f} TFLOP/s, {work / taken / dense:.2f} of dense  "
            f"error {errors[way]:.1e} of {limit:.1e} {'WRONG' if way in wrong else 'ok'}\n"
        )
    sys.stdout.flush()
    return math.nan if "ours" in wrong else times["FlexAttention"] / times["ours"]


def prepare(form: Form, D: int, compiled: Any, stream: Any, ways: Sequence[str]) -> None:
    """Call ours in some ways, or without any the rival, once, so that the disk has the kernels."""
    import torch

    q, k, v = (torch.randn(form.B, form.N, form.H, D, device="cuda", dtype=torch.float16) for _ in range(3))
    with torch.cuda.stream(stream):
        own = call_of(form, q, k, v, our_blocks(form), stream.cuda_stream)
        for way in ways:
            in_way(way, own)()
        if not ways:
            turned = [x.transpose(1, 2) for x in (q, k, v)]
            compiled(*turned, score_mod=form.their_score, block_mask=their_blocks(form))
        torch.cuda.synchronize()


def compile_beforehand(names: Sequence[str], widths: Sequence[int], more: Sequence[str]) -> None:
    """Compile all kernels in as many processes, which leave them in the caches on disk."""
    command = [sys.executable, "-m", "tests.cuda.flexible_hopper_table", "--prepare", *more]
    cases = list(itertools.product(names, widths, ("--ours", "--theirs")))
    workers = [
        subprocess.Popen([*command, name, str(D), whose], stderr=subprocess.PIPE, text=True)
        for name, D, whose in cases
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
    more = ["--all"] if "--all" in arguments else []
    ways = list(WAYS) if more else ["ours"]
    widths = [int(word) for word in arguments if word.isdigit()] or [128, 64]
    words = [word for word in arguments if word.isalpha()]
    torch.manual_seed(0)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    wanted = [form for form in forms() if not words or any(form.name.startswith(word) for word in words)]
    if "--prepare" in arguments:
        prepare(
            wanted[0],
            widths[0],
            torch.compile(flex_attention, dynamic=False),
            stream,
            ways if "--ours" in arguments else [],
        )
        return
    # A kernel that hangs cannot be interrupted: the process ends all the same.
    watch = threading.Timer(SECONDS + 10, os._exit, (1,))
    watch.daemon = True
    watch.start()
    compile_beforehand([form.name.split()[0] for form in wanted], widths, more)
    sys.stdout.write(f"compiled after {time.perf_counter() - began:.0f} s\n")
    sys.stdout.flush()
    for D in widths:
        dense = dense_rate(D, stream)
        sys.stdout.write(f"dense D={D}: {1e-12 * dense:.0f} TFLOP/s\n")
        ratios: dict[str, float] = {}
        for form in wanted:
            if time.perf_counter() - began > SECONDS:
                sys.stdout.write("out of time\n")
                break
            torch._dynamo.reset()
            compiled = torch.compile(flex_attention, dynamic=False)
            try:
                ratios[form.name] = row(form, D, compiled, dense, stream, ways)
            except Exception as error:  # the other rows are of use all the same
                sys.stdout.write(f"{form.name} D={D}: {type(error).__name__}: {str(error)[-600:]}\n")
            torch.cuda.empty_cache()
        if ratios:
            sys.stdout.write(f"D={D}: FlexAttention's time over ours: {means(ratios)}\n")
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    need_gpu("pytest")
    main(sys.argv[1:])
