"""The product of codes for many rows on Hopper, played: its own source, all roles of all blocks at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from cuda_backend.attention import schedule_hopper
from cuda_backend.int8 import (
    aside_hopper,
    epilogue_hopper,
    gemm_consumer_hopper,
    gemm_hopper,
    gemm_layout_hopper,
    gemm_producer_hopper,
    outliers_hopper,
)
from cuda_backend.int8.variant_hopper import CHUNK, STEP, Wide
from refimpl import quant
from refimpl.numerics import round_to
from refimpl.registry import Case
from tests.cuda.divergence import rewritten
from tests.cuda.happens_before import Clocked
from tests.cuda.hopper_assembly import products
from tests.cuda.int8_hopper_played import KINDS
from tests.cuda.int8_judge import beyond_rounding, case_of, differing
from tests.cuda.warps_played import families
from tests.cuda.watched_memory import Arena, SharedBlock

# In this order: each imports from those before it.
MODULES = {
    "ring": schedule_hopper, "layout": gemm_layout_hopper, "outliers": outliers_hopper,
    "epilogue": epilogue_hopper, "aside": aside_hopper, "producer": gemm_producer_hopper,
    "consumer": gemm_consumer_hopper, "gemm": gemm_hopper,
}  # fmt: skip
BASE = 1024  # where the kernel's part of shared memory begins
A, B, X_ASIDE, W_ASIDE = range(4)  # descriptors
WARPS = 4

Mutant = Mapping[str, tuple[str, str]]


class Asked(NamedTuple):
    """A product: of `number` outliers, or without marks of any; `room` of them lie side by side."""

    kind: str
    block_n: int
    M: int
    N: int
    K: int
    blocks: int
    number: int | None = None
    outliers: str = "released"
    room: int = 64
    biased: bool = True
    beside: bool = False
    halves: bool = True

    @property
    def variant(self) -> Wide:
        """What is compiled for it."""
        aligned = KINDS[self.kind].itemsize * self.N % 16 == 0
        beside = self.beside or self.number is not None
        return Wide(self.kind, self.outliers, aligned, self.block_n, beside, self.halves)


def layer(asked: Asked) -> Case:
    """Return a call of the layer with so many outliers: the last column, where two lists meet, others."""
    M, K, number = asked.M, asked.K, asked.number
    dtype = "float16" if asked.kind == "int32" else asked.kind
    case = case_of(
        K, dtype, T=M, K=K, N=asked.N, outliers="none", convention=asked.outliers, bias=asked.biased,
        threshold=None if number is None else 6.0,
    )  # fmt: skip
    x = case.args[0].copy()
    half = 16 * -(-K // 32)
    edges = [K - 1, half, half - 1]
    columns = [*edges, *np.setdiff1d(np.random.default_rng(K).permutation(K), edges, assume_unique=True)]
    for i, column in enumerate(columns[: number or 0]):
        x[i % M, column] = (9.0 + i) * (-1) ** i
    return case.replace(x, case.args[1])


class Problem:
    """Arrays of a product, in global memory."""

    def __init__(self, asked: Asked, arena: Arena) -> None:
        M, N, K, kind = asked.M, asked.N, asked.K, KINDS[asked.kind]
        rng = np.random.default_rng(M + N + K)
        pitch = -(-K // 16) * 16
        self.case = layer(asked)
        self.parts = self.case.replace(return_parts=True).call(quant.llm_int8_linear_fused)
        self.found = self.parts.outliers
        assert self.found.size == (asked.number or 0)
        a, b = (rng.integers(-127, 128, (rows, pitch)).astype(np.int8) for rows in (M, N))
        a[:, :K], b[:, :K] = self.parts.x_codes, self.parts.weight_codes.T
        # Of an outlier the quantiser leaves any code, but where it leaves whole columns out.
        a[:, self.found] = 0 if asked.outliers == "paper" else rng.integers(-128, 128, (M, self.found.size))
        self.a, self.b, self.x, self.weight = (arena.place(each) for each in (a, b, *self.case.args))
        self.a_absmax, self.b_absmax = map(arena.place, (self.parts.x_absmax, self.parts.weight_absmax))
        self.bias = arena.place(self.case.kwargs.get("bias", np.zeros(0, np.float16)))
        self.marks = arena.place(np.isin(np.arange(pitch), self.found).astype(np.uint8), watched=True)
        self.indices = arena.place(np.full(K, -1, np.int32))
        self.counters = arena.place(np.zeros(4, np.int32), watched=True)
        empty = [np.full((rows, 3 * asked.room), 0x55, np.uint8) for rows in (M, N)]
        self.asides = [arena.place(each, watched=True) for each in empty]
        self.out = arena.place(np.full((M, N), -1, kind))

    def matrices(self, asked: Asked) -> list[Any]:
        """Return what descriptors say: bytes, rows and bytes of a box."""
        a, b = (codes[:, : asked.K].view(np.uint8) for codes in (self.a, self.b))
        x, w = self.asides
        m, n = asked.variant.block_m, asked.block_n
        return [(a, m, STEP), (b, n, STEP), (x, m, 2 * CHUNK), (w, n, 2 * CHUNK)]

    def arguments(self, asked: Asked) -> list[Any]:
        """Return arguments of the kernel."""
        M, N, K, variant = asked.M, asked.N, asked.K, asked.variant
        rows, columns = -(-M // variant.block_m), -(-N // variant.block_n)
        steps = max(variant.last, -(-K // STEP))
        met = (self.weight, 2 * N, 2) if asked.outliers == "paper" else (self.b, 1, self.b.strides[0])
        addresses = (
            *(128 * i for i in range(4)), self.out, self.a_absmax, self.b_absmax,
            self.bias if asked.biased else 0, self.indices, 0 if asked.number is None else self.marks,
            self.x, 2 * K, 2, *met, self.a, self.a.strides[0], *self.asides, self.counters,
        )  # fmt: skip
        numbers = (rows * columns, rows, columns, steps, M, N, asked.room, K)
        return [
            *(np.uint64(each if isinstance(each, int) else each.ctypes.data) for each in addresses),
            *map(np.int32, numbers),
        ]

    def expected(self, asked: Asked) -> Any:
        """Return the definition's product, outliers added as the kernel says: by chunks, then one by one.

        The sum of a chunk is taken to be exact, and rounded once with what it is added to.
        """
        a, b = (codes[:, : asked.K].astype(np.int64) for codes in (self.a, self.b))
        total = a @ b.T - a[:, self.found] @ b[:, self.found].T
        if asked.kind == "int32":
            return total.astype(np.int32)
        kind = KINDS[asked.kind]
        bias = self.bias.astype(np.float32) if asked.biased else None
        y = quant.dequantize_product(
            total.astype(np.int32), self.a_absmax, self.b_absmax, dtype=np.dtype(np.float32), bias=bias
        )
        if asked.outliers == "paper":
            weight = self.weight.T
        else:
            factor = self.b_absmax / np.float32(127)
            weight = round_to(self.b[:, : asked.K].astype(np.float32) * factor[:, None], kind)
        far, near = self.x.astype(np.float64), weight.astype(np.float64)
        together = self.found[: asked.room]
        parts = [together[i : i + CHUNK] for i in range(0, together.size, CHUNK)]
        for part in [*parts, *self.found[asked.room :, None]]:
            y = (y + far[:, part] @ near[:, part].T).astype(np.float32)
        return round_to(y, kind)

    def wrong(self, asked: Asked) -> str | None:
        """Return how the output differs: from what is expected by a bit, from the reference by its policy."""
        expected = self.expected(asked)
        bits = np.dtype(f"u{expected.itemsize}")
        places = np.argwhere(self.out.view(bits) != expected.view(bits))
        if len(places):
            return f"{len(places)} differ, the first at {places[0].tolist()}"
        if asked.kind == "int32":
            return None
        found = self.parts._replace(out=self.out)
        if not self.found.size:
            return differing(found, self.parts)
        return beyond_rounding(found, self.parts, self.case, 1)


def played(asked: Asked, mutant: Mutant | None = None, *, late: bool = False, seed: int = 0) -> str | None:
    """Return how the output differs from the definition; what else is wrong is an error.

    `mutant` says for some of `MODULES`, for "wgmma" or "wgmma_halves", what stands there in place of a part
    of the source.
    """
    machine = Clocked(late=late, seed=seed)
    machine.counts["blocks"] = asked.blocks
    arena = Arena(machine)
    problem, variant = Problem(asked, arena), asked.variant
    machine.maps = problem.matrices(asked)
    build, at = built(machine, arena, asked, mutant or {})
    kernel, arguments = build(variant), problem.arguments(asked)
    machine.names = {
        **{BASE + at.full + 8 * i: f"stage {i} to be full" for i in range(variant.stages)},
        **{BASE + at.empty + 8 * i: f"stage {i} to be empty" for i in range(variant.stages)},
        BASE + at.columns_full: "scales", BASE + at.columns_empty: "scales to be read",
        BASE + at.ready: "outliers",
    }  # fmt: skip

    def role(name: str, first: int, lanes: int) -> Callable[[], None]:
        def run() -> None:
            threading.current_thread().name = name
            machine.begin(name)
            machine.own.thread = np.arange(first, first + lanes, dtype=np.int32)
            machine.own.behind_earlier_grids, machine.own.hidden = False, []
            machine.own.apart = False  # whether lanes have stored since they met
            with np.errstate(all="ignore"):
                kernel(*arguments)

        return run

    roles: list[Any] = []
    for number in range(asked.blocks):
        lanes = [32] * WARPS + [128] * ((variant.threads - 32 * WARPS) // 128)
        block = SharedBlock(machine, number, variant.shared_bytes, len(lanes))
        for i, each in enumerate(lanes):
            what = f"warp {i}" if i < WARPS else f"consumer {i - WARPS}"
            roles.append((block, each, role(f"block {number}, {what}", sum(lanes[:i]), each)))
    machine.run(roles)
    for block in {id(block): block for block, _, _ in roles}.values():
        for place, barrier in block.barriers.items():
            whole = barrier.missing == barrier.arrivals and barrier.bytes == 0
            assert whole, f"{machine.names[place]}: a phase has not ended"
    assert not problem.marks.any(), "marks stay"
    assert not problem.counters.any(), "counters stay"
    assert np.all(arena.stored(problem.out) == 1), "an output is not stored once"
    shares = -(-asked.M // 32) - (-asked.N // 32) if asked.number else 0
    assert arena.passed == shares, "shares are not passed on once"
    return problem.wrong(asked)


def built(machine: Clocked, arena: Arena, asked: Asked, mutant: Mutant) -> tuple[Any, Any]:
    """Return the kernel's ``build``, for this machine, and its layout."""
    made: dict[str, Any] = {}
    with patch.dict(sys.modules):
        for name, module in MODULES.items():
            made[name] = sys.modules[module.__name__] = rewritten(module, *mutant.get(name, ("", "")))
    found = families(machine, arena, early={B}, made={X_ASIDE, W_ASIDE}) | products(machine, mutant)
    for each in made.values():
        vars(each).update({name: family for name, family in found.items() if hasattr(each, name)})
    made["aside"].LISTED = asked.room  # what is not side by side is not in shared memory
    return made["gemm"].build, made["layout"].layout_of(asked.variant)
