"""Ways to write scores down, beside each other: ``python -m tests.cuda.alibi_tries``.  To be removed."""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from cuda_backend.arrays import poisoned_outputs
from cuda_backend.attention import call_flexible_hopper, plan_flexible_hopper, traced, traced_values
from refimpl.attention import mods
from tests.cuda.flexible_hopper_forms import CAP, Form, our_blocks
from tests.cuda.flexible_hopper_table import ROWS, call_of, dense_rate, live_scores, tiles_of, truth
from tests.cuda.hopper_table import seconds

SECONDS = 50.0


class Way(NamedTuple):
    base: int  # 1: of columns, 2: of rows, too
    group: bool
    fold: bool
    load: bool
    approx: bool = False


WAYS = {
    "old": Way(0, False, False, False),
    "base": Way(1, True, False, False),
    "fold": Way(1, True, True, False),
    "rows": Way(2, True, True, False),
    "load": Way(2, True, True, True),
    "approx": Way(2, True, True, True, True),
}
OF = {
    "ALiBi": ("old", "base", "fold", "rows", "load"),
    "softcap": ("old", "load", "approx"),
    "softcap 50": ("old", "load", "approx"),
    "causal": ("old",),
}
CASES = [("ALiBi", 64), ("ALiBi", 128), ("softcap", 64), ("softcap", 128), ("causal", 64), ("causal", 128)]
CASES += [("softcap 50", 64)]
SPREAD = {"softcap 50": 4.0}  # queries times this: scores of up to 25, which a cap of 50 bends


def in_way(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    way = WAYS[name]
    plan = functools.lru_cache(maxsize=None)(vars(plan_flexible_hopper.make_flexible_plan)["__wrapped__"])
    function = functools.cache(vars(plan_flexible_hopper._function)["__wrapped__"])

    def made() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(traced, "BASE", way.base)
            patch.setattr(traced, "LOAD", way.load)
            patch.setattr(traced, "APPROX", way.approx)
            patch.setattr(traced_values, "GROUP", way.group)
            patch.setattr(plan_flexible_hopper, "FOLDED", (2.0**-16, 2.0**16) if way.fold else (1.0, 0.0))
            patch.setattr(plan_flexible_hopper, "_function", function)
            patch.setattr(call_flexible_hopper, "make_flexible_plan", plan)
            return call()

    return made


def form_of(name: str) -> Form:
    slopes = 2.0 ** (-0.5 * torch.arange(1, 17, device="cuda", dtype=torch.float32))

    def alibi(score: Any, _b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - slopes[h] * (i - j).abs()

    cap = 50.0 if name.endswith("50") else CAP

    def bent(score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
        return cap * torch.tanh(score / cap)

    if name.startswith("ALiBi"):
        return Form(name, 4, 16, 4096, mods.causal, mods.alibi(), (slopes,), mods.causal, alibi)
    if name == "causal":
        return Form(name, 4, 16, 4096, mods.causal, None, (), mods.causal, None)
    return Form(name, 4, 16, 4096, mods.causal, mods.softcap(cap), (), mods.causal, bent)


def arrays(name: str, form: Form, D: int) -> list[Any]:
    torch.manual_seed(0)
    found = [torch.randn(form.B, form.N, form.H, D, device="cuda", dtype=torch.float16) for _ in range(3)]
    found[0] *= SPREAD.get(name, 1.0)
    return found


def rounded(form: Form, q: Any, k: Any, v: Any, rows: Any) -> Any:
    """Return the same computation in float16: products in float32, whatever is kept rounded."""
    B, N, H, D = q.shape
    out = torch.empty(B, len(rows), H, D, device="cuda", dtype=torch.float16)
    i, j = rows[:, None], torch.arange(N, device="cuda")[None]
    for b, h in itertools.product(range(B), range(H)):
        score = (q[b, rows, h] @ k[b, :, h].T) * D**-0.5
        if form.their_score is not None:
            score = form.their_score(score, b, h, i, j).half()
        score = score.masked_fill(~form.their_mask(b, h, i, j), -math.inf)
        out[b, :, h] = torch.softmax(score, -1) @ v[b, :, h]
    return out


def prepare(name: str, D: int, way: str) -> None:
    form = form_of(name)
    stream: Any = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        q, k, v = arrays(name, form, D)
        in_way(way, call_of(form, q, k, v, our_blocks(form), stream.cuda_stream))()
        torch.cuda.synchronize()


def row(name: str, D: int, dense: float, stream: Any) -> None:
    form = form_of(name)
    q, k, v = arrays(name, form, D)
    own = call_of(form, q, k, v, our_blocks(form), stream.cuda_stream)
    calls = {way: in_way(way, own) for way in OF[name]}
    errors: dict[str, tuple[float, float]] = {}
    with torch.cuda.stream(stream):
        rows = torch.randperm(form.N, device="cuda")[:ROWS].sort().values
        rows[0], rows[-1] = 0, form.N - 1
        exact = truth(form, q, k, v, rows)

        def error(found: Any) -> tuple[float, float]:
            apart = found.double() - exact
            return float(apart.abs().max()), float(apart.square().mean().sqrt())

        limit = error(rounded(form, q, k, v, rows))
        first = None
        for way, call in calls.items():
            with poisoned_outputs():
                found = call()
            torch.cuda.synchronize()
            first = found if first is None else first
            apart = float((found.float() - first.float()).abs().max())
            errors[way] = error(found[:, rows])
            fine = all(x <= 2 * y for x, y in zip(errors[way], limit, strict=True))
            if not (fine and apart < 0.02 and bool(torch.isfinite(found).all())):
                sys.stdout.write(f"WRONG {name} D={D} {way}: from the first {apart:.1e}\n")
    work = 4 * D * live_scores(form, tiles_of(form, D))
    times = seconds(calls, 4, stream)
    sys.stdout.write(f"{name} D={D}: float16's errors {limit[0]:.1e} {limit[1]:.2e}\n")
    for way, taken in times.items():
        sys.stdout.write(
            f"  {way:7} {1e3 * taken:.4f} ms  {work / taken / dense:.3f} of dense  "
            f"errors {errors[way][0]:.1e} {errors[way][1]:.2e}\n"
        )
    sys.stdout.flush()


def main(arguments: list[str]) -> None:
    if arguments:
        prepare(arguments[0], int(arguments[1]), arguments[2])
        return
    began = time.perf_counter()
    watch = threading.Timer(SECONDS + 8, os._exit, (1,))
    watch.daemon = True
    watch.start()
    tasks = [(name, str(D), way) for name, D in CASES for way in OF[name]]
    command = [sys.executable, "-m", "tests.cuda.alibi_tries"]
    workers = [subprocess.Popen([*command, *task], stderr=subprocess.PIPE, text=True) for task in tasks]
    for task, worker in zip(tasks, workers, strict=True):
        try:
            _, said = worker.communicate(timeout=max(0.1, began + 30 - time.perf_counter()))
        except subprocess.TimeoutExpired:
            worker.kill()
            said = "took too long"
        if worker.returncode:
            sys.stdout.write(f"{task}: {said.strip()[-600:]}\n")
    sys.stdout.write(f"compiled after {time.perf_counter() - began:.0f} s\n")
    sys.stdout.flush()
    stream: Any = torch.cuda.Stream()
    dense = {D: dense_rate(D, stream) for D in (64, 128)}
    sys.stdout.write(f"dense {1e-12 * dense[64]:.0f} (D=64), {1e-12 * dense[128]:.0f} TFLOP/s\n")
    for name, D in CASES:
        if time.perf_counter() - began > SECONDS:
            sys.stdout.write("out of time\n")
            break
        try:
            row(name, D, dense[D], stream)
        except Exception as error:
            sys.stdout.write(f"{name} D={D}: {type(error).__name__}: {str(error)[-600:]}\n")
        torch.cuda.empty_cache()
    sys.stdout.write(f"{time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main(sys.argv[1:])
