"""The Hopper kernel with functions of the user's, on a played machine.

The rows of the softmax and the end of a tile, which the dense kernel has too, are NumPy's here.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cuda_backend.attention import (
    consumer_flexible_hopper,
    modifiers_hopper,
    producer_flexible_hopper,
    producer_hopper,
    schedule_hopper,
    softmax_hopper,
)
from cuda_backend.attention.lists_hopper import ROWS, key_lists
from cuda_backend.attention.user_device import Mods
from cuda_backend.attention.variant_flexible_hopper import FlexibleVariant, candidates
from refimpl.attention.block_mask import FULL, block_mask
from refimpl.attention.user_functions import as_mod, where_allowed
from tests.cuda.hopper_instructions import install
from tests.cuda.hopper_machine import KINDS, Block, Machine, fragment, memory

MODULES = {
    "consumer": consumer_flexible_hopper,
    "modifiers": modifiers_hopper,
    "producer": producer_flexible_hopper,
    "start": producer_hopper,
}
BASE = 1024
Mutant = tuple[str, str, str]


def played(
    monkeypatch: pytest.MonkeyPatch,
    q: Any,
    k: Any,
    v: Any,
    *,
    mask_mod: Any = None,
    score_mod: Any = None,
    aux: tuple[Any, ...] = (),
    scale: float | None = None,
    which: int = 0,
    late: bool = False,
    blocks: int = 2,
    short: bool = False,
    words: bool = False,
    folded: bool = False,
    mutant: Mutant | None = None,
) -> tuple[Any, Any]:
    """Return the output and the log-sum-exps that the kernel makes, in float32.

    `which` is that of the candidates for tiles; `short` says that the mask stands in the kernel for each
    score, `words` that what it allows is read, `folded` that scores stay over the scale; `mutant` names one
    of `MODULES`, a part of it, and what stands there instead.
    """
    (B, Tq, H, D), (_, Tk, kv_heads, Dv) = q.shape, v.shape
    kind = "f16" if q.dtype == np.float16 else "bf16"
    tiles, _ = candidates(kind, D, Dv)[which]
    given = Mods(
        None if mask_mod is None else as_mod("mask_mod", mask_mod),
        None if score_mod is None else as_mod("score_mod", score_mod, ("score",)),
    )
    variant = FlexibleVariant(tiles, given, ragged=Tk % tiles.block_n != 0, words=words, folded=folded)
    states = np.full((1, 1, -(-Tq // ROWS), -(-Tk // tiles.block_n)), FULL, np.uint8)
    if mask_mod is not None:
        states = block_mask(mask_mod, B, H, Tq, Tk, block_sizes=(ROWS, tiles.block_n), aux=aux).states
    work, steps, partial = key_lists(states, tiles.consumers, B, H, 1, ragged=variant.ragged)
    work, steps = aligned(work), aligned(steps)
    masks = words_of(given.mask, partial, Tq, Tk, tiles.block_n, aux)
    machine = Machine(late=late)
    blocks = min(blocks, len(work))
    machine.counts = {"blocks": blocks, "meet": tiles.consumers}
    rows = (tiles.block_m, tiles.block_n, tiles.block_n)
    machine.maps = list(zip((q, k, v), rows, strict=True))
    modules = dict(MODULES)
    if mutant is not None:
        modules[mutant[0]] = mutated(*mutant)
    out, lse = np.full((B, Tq, H, Dv), np.nan, np.float32), np.full((B, H, Tq), np.nan, np.float32)
    install(monkeypatch, machine, [*modules.values(), softmax_hopper, schedule_hopper])
    stand_in(monkeypatch, modules, out, lse, KINDS[kind], Tk)
    monkeypatch.setattr(modules["modifiers"], "is_short", lambda *_: short)
    counter = np.zeros(2, np.int32)
    problem = tuple(map(np.int32, (len(work), H, H // kv_heads, Tq, Tk, Dv)))
    factor = D**-0.5 if scale is None else scale
    numbers = np.float32(factor), np.float32(np.log2(np.e) * (factor if score_mod is None or folded else 1))
    start = modules["start"].build_start(tiles)
    produce = modules["producer"].build_flexible_producer(variant)
    consume = modules["consumer"].build_flexible_consumer(variant)
    lists = np.uint64(counter.ctypes.data), np.uint64(work.ctypes.data), np.uint64(steps.ctypes.data)

    def consumer(w: int) -> Callable[[], None]:
        thread = np.arange(128, dtype=np.int32) + 128 * (w + 1)
        return lambda: consume(BASE, thread, None, None, np.uint64(masks.ctypes.data), *numbers, aux, problem)

    roles: list[Any] = []
    for number in range(blocks):
        block = Block(number, BASE + tiles.shared_bytes, tiles.consumers)
        machine.own.block = block
        start(BASE)
        roles.append((block, 1, lambda: produce(BASE, np.uint64(0), *lists, problem)))
        roles += [(block, 128, consumer(w)) for w in range(tiles.consumers)]
    machine.run(roles)
    assert not counter.any(), "the counter is 0 for the next launch"
    return out, lse


def words_of(mask: Any, partial: Any, Tq: int, Tk: int, block_n: int, aux: tuple[Any, ...]) -> Any:
    """Return what `mask_words` does."""
    row, column = fragment(block_n)  # [accumulator, thread]
    place = np.arange(len(row))
    bits = np.uint32(1) << (2 * (place // 4) + place % 2).astype(np.uint32)
    found = np.zeros((len(partial), 128, 2), np.uint32)
    for number, (b, h, rows, tile) in enumerate(partial.tolist()):
        if number == 0:
            continue
        i, j = np.minimum(64 * rows + row, Tq - 1), block_n * tile + column
        allowed = j < Tk
        if mask is not None:
            indices = np.array(b), np.array(h), i, np.minimum(j, Tk - 1)
            allowed = allowed & where_allowed(mask, indices, aux)
        for half in range(2):
            here = place % 4 // 2 == half
            found[number, :, half] = np.where(allowed[here], bits[here, None], 0).sum(0)
    return found


def aligned(array: Any) -> Any:
    """Return a copy that starts at a multiple of 16 bytes."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def mutated(name: str, part: str, instead: str) -> ModuleType:
    """Return one of `MODULES` with a part of its source exchanged."""
    original = MODULES[name]
    source = inspect.getsource(original)
    assert part in source, f"{part!r} does not stand in {name}"
    module = ModuleType(original.__name__)
    exec(compile(source.replace(part, instead), str(original.__file__), "exec"), vars(module))
    return module


def stand_in(
    monkeypatch: pytest.MonkeyPatch,
    modules: dict[str, ModuleType],
    out: Any,
    lse: Any,
    kind: Any,
    tk: int,
) -> None:
    """Give modules what works on all lanes at once."""

    def softmax_row(s: Any, first: Any, scale: Any, old_max: Any, old_sum: Any) -> Any:
        own = np.concatenate([s[int(first) :: 4], s[int(first) + 1 :: 4]])
        most = np.maximum(own.max(0).reshape(-1, 4).max(1).repeat(4), old_max)
        shift = np.where(np.isneginf(most), np.float32(0), most)
        with np.errstate(invalid="ignore"):
            factor = np.exp2((old_max - shift) * scale, dtype=np.float32)
            for e in (int(first), int(first) + 1):
                s[e::4] = np.exp2((s[e::4] - shift) * scale, dtype=np.float32)
        total = s[int(first) :: 4].sum(0) + s[int(first) + 1 :: 4].sum(0)
        return most, old_sum * factor + total, factor

    def pack_scores(p: Any, s: Any) -> None:
        pairs = np.stack([s[::2], s[1::2]], -1).astype(kind)
        p[...] = np.ascontiguousarray(pairs).view(np.uint32)[..., 0]

    def finish(
        o: Any, rows: Any, scale: Any, _out: Any, _lse: Any, row: Any, head: Any, _lane: Any, problem: Any
    ) -> None:
        heads, tq, columns = (int(number) for number in problem)
        where, column = fragment(len(o) * 2)
        first = int(row[0]) - int(where[0, 0])
        tile = np.empty((64, len(o) * 2), np.float32)
        tile[where, column] = o
        (max_low, sum_low, max_high, sum_high), low, high = rows, where[0], where[2]
        most, total = np.full(64, -np.inf, np.float32), np.zeros(64, np.float32)
        most[low], most[high] = max_low, max_high
        np.add.at(total, low, sum_low)
        np.add.at(total, high, sum_high)
        b, h = divmod(int(head), heads)
        count = max(0, min(64, tq - first))
        with np.errstate(divide="ignore", invalid="ignore"):
            out[b, first : first + count, h] = (
                np.where(total > 0, 1 / total, 0)[:count, None] * tile[:count, :columns]
            )
            lse[b, h, first : first + count] = ((most * scale + np.log2(total)) * np.log(2))[:count]

    def rescale(o: Any, low: Any, high: Any) -> None:
        with np.errstate(invalid="ignore"):
            o[0::4], o[1::4], o[2::4], o[3::4] = o[0::4] * low, o[1::4] * low, o[2::4] * high, o[3::4] * high

    def of_lanes(mod: Any, leading: tuple[Any, ...], indices: tuple[Any, ...], aux: Any) -> list[Any]:
        """Return what a function says of each lane alone."""
        lanes = np.broadcast_arrays(*leading, *indices, np.zeros(128))[:-1]
        kinds = [float] * len(leading) + [int] * 4
        return [
            mod.call(tuple(entry[: len(leading)]), tuple(entry[len(leading) :]), aux)
            for entry in (
                tuple(k(x) for k, x in zip(kinds, row, strict=True)) for row in zip(*lanes, strict=True)
            )
        ]

    def each_mask(mod: Any, _arrays: Any) -> Any:
        def asked(b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
            return True if mod is None else np.array(of_lanes(mod, (), (b, h, i, j), aux), bool)

        return asked

    def each_score(mod: Any, _arrays: Any, folded: bool) -> Any:
        """Return a function of a score, which holds the floats to the indices."""

        def asked(
            product: Any, scales: Any, b: Any, h: Any, i: Any, j: Any,
            x: Any, y: Any, r: Any, c: Any, aux: Any,
        ) -> Any:  # fmt: skip
            assert np.all(np.minimum(x + r, out.shape[1] - 1) == i)
            assert np.all(np.minimum(y + c, tk - 1) == j)
            scale, inverse = scales
            found = np.array(of_lanes(mod, (product * scale,), (b, h, i, j), aux), np.float32)
            return found * inverse if folded else found

        return asked

    def load_8(array: Any, _first: Any, address: Any) -> None:
        array[:2] = np.stack([memory(int(place), 8).view(array.dtype) for place in address], 1)

    consumer, modifiers = modules["consumer"], modules["modifiers"]
    vars(modifiers)["copy"].load_8 = load_8
    replaced = {
        "build_softmax": lambda _: (None, softmax_row, pack_scores),
        "build_output": lambda _: (rescale, None, None),
        "build_finish": lambda _: finish,
        "build_modifiers": modifiers.build_modifiers,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(consumer, name, value)
    for name, value in {"traced_mask": each_mask, "traced_score": each_score, "rolled": lambda: None}.items():
        monkeypatch.setattr(modifiers, name, value)
    for module, (name, function) in itertools.product(
        (consumer, modifiers), (("min", np.minimum), ("max", np.maximum))
    ):
        monkeypatch.setattr(module, name, function, raising=False)
