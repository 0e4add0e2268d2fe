"""The Hopper backward call with its three launches played: host memory for the GPU's, a machine for it."""

from __future__ import annotations

import ctypes
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cuda_backend.arrays import View
from cuda_backend.attention import (
    around_backward_hopper,
    backward_hopper,
    call_backward_hopper,
    call_flexible_backward_hopper,
    consumer_backward_hopper,
    dropout_hopper,
    exchange_wide_backward_hopper,
    gradient_hopper,
    keys_wide_backward_hopper,
    lists_backward_hopper,
    mods_backward_hopper,
    packed,
    plan_backward_hopper,
    plan_hopper,
    producer_backward_hopper,
    producer_hopper,
    remembered,
    schedule_backward_hopper,
    schedule_hopper,
    stages_backward_hopper,
    tile_states,
    values_wide_backward_hopper,
    wide_backward_hopper,
)
from cuda_backend.attention.padding import needs_copy
from cuda_backend.attention.variant_backward_hopper import CONSUMERS
from cuda_backend.attention.variant_wide_backward_hopper import WideBackwardVariant
from tests.cuda.flexible_backward_played import install_functions, play_lists
from tests.cuda.hopper_instructions import install
from tests.cuda.hopper_machine import KINDS, Block, Machine, fragment
from tests.cuda.int8_hopper_played import aligned, viewed
from tests.cuda.int8_hopper_played import at as at_address

MODULES = {
    "dropout": dropout_hopper, "lists": lists_backward_hopper, "mods": mods_backward_hopper,
    "around": around_backward_hopper, "consumer": consumer_backward_hopper, "gradient": gradient_hopper,
    "values": values_wide_backward_hopper, "keys": keys_wide_backward_hopper,
    "exchange": exchange_wide_backward_hopper, "wide": wide_backward_hopper,
    "producer": producer_backward_hopper, "stages": stages_backward_hopper,
    "loads": producer_hopper,
    "schedule": schedule_backward_hopper, "place": schedule_hopper,
}  # fmt: skip
BASE = 1024
TYPES: dict[str, Any] = {"uint64": ctypes.c_uint64, "int32": ctypes.c_int32, "float32": ctypes.c_float}
NUMBERS = {"uint64": np.uint64, "int32": np.int32, "float32": np.float32}


def played(
    monkeypatch: pytest.MonkeyPatch,
    *,
    late: bool = False,
    seed: int = 0,
    processors: int = 2,
    quick: bool = True,
    mutant: tuple[str, str, str] | None = None,
) -> list[str]:
    """Let what the call launches be played; return names as they come.

    `mutant` names one of `MODULES`, a line of it, and what stands there instead.

    `quick` says that the kernels before and after, which are no whole warpgroups, are NumPy's.
    """
    launched: list[str] = []
    machine = Machine(late=late, seed=seed)
    modules = dict(MODULES)
    if mutant is not None:
        modules[mutant[0]] = mutated(*mutant)
        changed = vars(modules[mutant[0]])
        for user, name in itertools.product(modules.values(), changed["__all__"]):
            # Others have functions of the same name; of this module they may be the last mutant's.
            if getattr(getattr(user, name, None), "__module__", None) == changed["__name__"]:
                monkeypatch.setattr(user, name, changed[name])
    install(monkeypatch, machine, list(modules.values()))
    install_functions(monkeypatch, machine, modules["mods"], modules["consumer"])
    counter = np.zeros(2, np.int32)
    kept: dict[str, Any] = {}

    def launch(config: Any, function: Any, pointers: int, extra: int) -> tuple[int]:
        name, variant = function
        signature = {
            "prepare": around_backward_hopper.PREPARE_SIGNATURE,
            "main": backward_hopper.SIGNATURE,
            "finish": around_backward_hopper.FINISH_SIGNATURE,
        }[name].args
        kinds = [str(kind) for kind in signature]
        if name == "main" and variant.mods is not None:
            kinds = ["block", *["uint64"] * variant.addresses, *["float32"] * 3, *["int32"] * 12]
        places = (ctypes.c_void_p * len(kinds)).from_address(pointers)
        values = [
            NUMBERS[kind](TYPES[kind].from_address(place or 0).value)
            for kind, place in zip(kinds, places, strict=True)
            if kind in TYPES
        ]
        launched.append(name)
        blocks, threads, shared, _, together = config
        machine.counts = {"blocks": blocks, "meet": CONSUMERS}
        if name == "main":
            assert (threads, shared) == (variant.threads, variant.shared_bytes)
            assert together == waits_for_later(variant, values[-12:], blocks), "a launch that is cooperative"
            machine.maps = kept["maps"]
            {True: play_main, False: play_lists}[variant.mods is None](machine, modules, variant, values)
            assert not counter.any(), "the counter is for the next launch, too"
        elif quick:
            {"prepare": prepare, "finish": finish}[name](variant, values, blocks)
        else:
            kernel = getattr(modules["around"], f"build_{name}")(variant)
            play_threads(machine, kernel, values, blocks, threads, shared)
        return (0,)

    def encoder(shape: Sequence[int], strides: Sequence[int], dtype: str, rows: int) -> Any:
        assert rows <= 256
        return lambda address: (array_at(address, shape, strides, dtype), rows)

    def row_encoder(rows: int, columns: int) -> Any:
        return lambda address: at_address(address, (rows, columns), np.float32)

    def encode_together(encoders: Any, place: int) -> Any:
        assert place % 64 == 0

        def encode(addresses: Any) -> None:
            kept["maps"] = [encode(address) for encode, address in zip(encoders, addresses, strict=True)]

        return encode

    @contextmanager
    def workspace(size: int, _stream: int) -> Iterator[int]:
        kept["room"] = aligned((size,), np.uint8)
        yield int(kept["room"].ctypes.data)

    @contextmanager
    def aligned_rows(given: View, _stream: int) -> Iterator[View]:
        if not needs_copy(given):
            yield given
            return
        pitch = -(-given.shape[3] // 8) * 8
        copy = aligned((*given.shape[:3], pitch), np.uint16)
        copy[..., : given.shape[3]] = given.owner.view(np.uint16)
        kept[str(id(copy))] = copy
        yield given._replace(strides=copy.strides, address=copy.ctypes.data)

    def empty(shape: tuple[int, ...], dtype: str, _like: Any, _stream: int) -> Any:
        kind = KINDS["f16" if dtype == "float16" else "bf16"]
        array = aligned(shape, kind)
        return View(shape, array.strides, dtype, array.ctypes.data, array), lambda: array

    device = SimpleNamespace(compute_capability=(9, 0), MULTIPROCESSOR_COUNT=processors)
    cuda = SimpleNamespace(get_current_device=lambda: device)
    counters = SimpleNamespace(address=lambda: int(counter.ctypes.data))
    for name, value in {
        "cuda": cuda, "workspace": workspace,
        "encoder": encoder, "row_encoder": row_encoder, "encode_together": encode_together,
        "tile_counters": lambda *_: counters,
        "early_config": lambda *numbers, together=False: (*numbers, together),
        "_function": lambda name, variant, _: (name, variant),
    }.items():  # fmt: skip
        monkeypatch.setattr(plan_backward_hopper, name, value)
    monkeypatch.setattr(plan_hopper, "cuda", cuda)
    monkeypatch.setattr(packed, "driver", SimpleNamespace(cuLaunchKernelEx=launch))
    for name, value in {
        "view": viewed, "empty": empty, "aligned_rows": aligned_rows, "current_device": lambda: 0,
        "stream_of": lambda *_: 0, "wait_for": lambda *_: None, "cuda": cuda,
    }.items():  # fmt: skip
        for module in (call_backward_hopper, call_flexible_backward_hopper):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(tile_states, "view", viewed)
    monkeypatch.setattr(remembered, "_answers", OrderedDict())
    plan_backward_hopper.make_backward_plan.cache_clear()
    return launched


def mutated(name: str, line: str, instead: str) -> ModuleType:
    """Return one of `MODULES` with a part of its source exchanged."""
    original = MODULES[name]
    source = inspect.getsource(original)
    assert source.count(line) == 1, f"{line!r} stands {source.count(line)} times in {name}"
    module = ModuleType(original.__name__)
    exec(compile(source.replace(line, instead), str(original.__file__), "exec"), vars(module))
    return module


def array_at(address: int, shape: Sequence[int], strides: Sequence[int], dtype: str) -> Any:
    """Return [B, T, H, D] numbers in memory of the host."""
    size = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 2
    kind = KINDS["f16" if dtype == "float16" else "bf16"]
    where: Any = (ctypes.c_char * size).from_address(address)
    return np.ndarray(tuple(shape), kind, where, strides=tuple(strides))


def play_main(machine: Machine, modules: dict[str, Any], variant: Any, values: list[Any]) -> None:
    """Run the roles of all blocks of the kernel in the middle, as `backward_hopper` deals them out."""
    dk, dv, sums, words, counter, seed, threshold, scale, factor, kept, *numbers = values
    problem = tuple(numbers)
    schedule = modules["schedule"].build_backward_schedule(variant)
    produce = modules["producer"].build_backward_producer(variant, schedule)
    if isinstance(variant, WideBackwardVariant):
        start = modules["wide"].build_wide_start(variant)
        consume_values = modules["values"].build_values_consumer(variant, schedule)
        consume_keys = modules["keys"].build_keys_consumer(variant, schedule)
        thread, drop = np.arange(128, dtype=np.int32), (seed, threshold, kept)
        warpgroups: list[tuple[int, Callable[[], None]]] = [
            (128, lambda: consume_values(BASE, thread, dv, sums, words, scale, drop, problem)),
            (128, lambda: consume_keys(BASE, thread, dk, sums, words, factor, kept, problem)),
        ]
    else:
        start = modules["producer"].build_start(variant)
        write = modules["producer"].build_writer(variant, schedule)
        consume = modules["consumer"].build_backward_consumer(variant, schedule)

        def consumer(w: int) -> Callable[[], None]:
            thread = np.arange(128, dtype=np.int32) + 128 * (w + 1)
            drop = seed, threshold, kept
            return lambda: consume(BASE, thread, dk, dv, scale, factor, drop, problem, ())

        warpgroups = [(1, lambda: write(BASE, sums, words, problem))]
        warpgroups += [(128, consumer(w)) for w in range(CONSUMERS)]
    roles: list[Any] = []
    for number in range(machine.counts["blocks"]):
        block = Block(number, variant.shared_bytes, CONSUMERS)
        machine.own.block = block
        start(BASE)
        roles.append((block, 1, lambda: produce(BASE, np.uint64(0), counter, problem)))
        roles += [(block, lanes, role) for lanes, role in warpgroups]
    machine.run(roles)
    if variant.deterministic:
        line_bytes = variant.shares * variant.share_bytes
        turns: dict[int, list[int]] = {}
        for target, tile in machine.additions:
            turns.setdefault(target, []).append(tile)
        each = 8 if isinstance(variant, WideBackwardVariant) else 1  # warps, or the thread of the producer
        for target, tiles in turns.items():
            line = (target - sums) // line_bytes
            declared = declared_order(variant, problem, machine.counts["blocks"], line)
            assert tiles == declared(tiles), "they add in the order that is declared"
            passed = at_address(int(words) + 4 * int(line), (1,), np.int32)[0]
            assert passed == each * len(tiles), "who adds passes the turn, once"


def declared_order(
    variant: Any, problem: Sequence[Any], grid: int, line: int
) -> Callable[[list[int]], list[int]]:
    """Return what sorts tiles as they are to add to a tile of dQ, number `line`.

    As they are drawn; without a mask, if all of a head run side by side, as they arrive: they begin at places
    evenly around the ring of blocks of queries.
    """
    if not waits_for_later(variant, problem, grid):
        return sorted
    per_head, blocks = int(problem[1]), int(problem[6])

    def arrival(tile: int) -> int:
        beginning = -(tile % per_head) * (blocks // per_head)
        return (int(line) - beginning) % blocks

    return lambda tiles: sorted(tiles, key=arrival)


def waits_for_later(variant: Any, problem: Sequence[Any], grid: int) -> bool:
    """Return whether blocks of keys wait for some that are drawn after them."""
    per_head, blocks = int(problem[1]), int(problem[6])
    in_turn_without_mask = variant.deterministic and not variant.causal and variant.mods is None
    return in_turn_without_mask and per_head <= min(blocks, grid)


def play_threads(
    machine: Machine, kernel: Callable[..., None], values: list[Any], blocks: int, threads: int, shared: int
) -> None:
    """Run a kernel block by block, each of its threads alone."""

    def role(number: int) -> Callable[[], None]:
        def run() -> None:
            machine.own.thread = number
            kernel(*values)

        return run

    for number in range(blocks):
        block = Block(number, shared, threads)
        machine.run([(block, 1, role(thread)) for thread in range(threads)])


def prepare(variant: Any, values: list[Any], lines: int) -> None:
    """Do what the kernel before does."""
    o_at, do_at, lse_at, shifts_at, deltas_at, sums_at, words_at = (int(value) for value in values[:7])
    strides, (blocks, heads, tq, width) = (
        [int(value) for value in values[7:13]],
        (int(value) for value in values[13:]),
    )
    batch, rows = lines // (heads * blocks), blocks * variant.block_m
    dtype = "float16" if variant.kind == "f16" else "bfloat16"
    o, do = (
        array_at(at, (batch, tq, heads, width), (*steps, 2), dtype).astype(np.float64)
        for at, steps in ((o_at, strides[:3]), (do_at, strides[3:]))
    )
    lse = at_address(lse_at, (batch, heads, tq), np.float32)
    shifts, deltas = (at_address(at, (batch, heads, rows), np.float32) for at in (shifts_at, deltas_at))
    shifts[...], deltas[...] = -np.inf, 0
    seen = lse > -np.inf
    shifts[:, :, :tq] = np.where(seen, -lse / np.log(2), -np.inf)
    deltas[:, :, :tq] = np.where(seen, (o * do).sum(-1).transpose(0, 2, 1), 0)
    at_address(sums_at, (lines, variant.shares * variant.share_bytes // 4), np.float32)[...] = 0
    at_address(words_at, (lines,), np.int32)[...] = 0


def finish(variant: Any, values: list[Any], lines: int) -> None:
    """Do what the kernel after does: dQ from the order in which consumers hold it."""
    sums_at, dq_at, scale, *numbers = values
    blocks, heads, tq, width = (int(number) for number in numbers)
    batch, columns = lines // (heads * blocks), variant.dq_columns
    rows, places = fragment(columns)
    shares = at_address(int(sums_at), (lines, variant.shares, columns // 8, 128, 4), np.float32)
    tiles = np.empty((lines, variant.shares, 64, columns), np.float32)
    tiles[..., rows, places] = shares.transpose(0, 1, 2, 4, 3).reshape(*tiles.shape[:2], columns // 2, 128)
    if variant.swapped:
        tiles = tiles.transpose(0, 3, 1, 2)
    elif not variant.row_split:
        tiles = tiles.transpose(0, 2, 1, 3)
    dq = tiles.reshape(batch, heads, blocks * variant.block_m, variant.d)[:, :, :tq, :width] * scale
    at_address(int(dq_at), (batch, tq, heads, width), KINDS[variant.kind])[...] = dq.transpose(0, 2, 1, 3)
