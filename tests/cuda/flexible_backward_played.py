"""The Hopper backward kernel with functions of the user's, on the played machine."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cuda_backend.attention.variant_backward_hopper import CONSUMERS
from refimpl.attention.user_functions import modified_scores, where_allowed
from tests.cuda.hopper_machine import Block, Machine, memory, one
from tests.cuda.hopper_movements import stored, words
from tests.cuda.int8_hopper_played import at as at_address

BASE = 1024


def install_functions(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, module: ModuleType, consumer: ModuleType
) -> None:
    """Let functions of the user's be asked for all lanes at once, as the reference asks them."""
    copy: Any = module.copy

    def load_shared_16(array: Any, first: Any, address: Any) -> None:
        places = np.asarray(address, np.int64)[:, None] + np.arange(16)
        found = np.ascontiguousarray(machine.block.shared[places]).view(array.dtype)
        array[one(first) : one(first) + 4] = found.T

    plain = copy.load_shared_16

    def load_either(array: Any, first: Any, address: Any) -> None:
        (load_shared_16 if np.ndim(address) else plain)(array, first, address)

    copy.load_shared_16 = load_either
    copy.store_shared_words = lambda address, *values: stored(machine, address, words(*values))
    copy.load_word = lambda address: memory(int(address), 4).view(np.int32)[0]

    def mask_on_device(mod: Any) -> Any:
        if mod is None:
            return lambda *_: True
        return lambda b, h, i, j, aux: where_allowed(mod, _lanes(b, h, i, j), aux)

    def score_on_device(mod: Any, leading: int = 1) -> Any:
        if mod is None:
            return lambda first, *_: first

        def changed(*given: Any) -> Any:
            numbers = _lanes(*given[:leading], kind=np.float32)
            return modified_scores(mod, numbers, _lanes(*given[leading:-1]), given[-1])

        return changed

    monkeypatch.setattr(vars(consumer)["registers"], "thread", lambda: machine.own.threads, raising=False)
    for name, value in {
        "mask_on_device": mask_on_device, "score_on_device": score_on_device, "min": np.minimum
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value, raising=False)


def _lanes(*values: Any, kind: Any = np.int64) -> tuple[Any, ...]:
    return tuple(np.broadcast_to(np.asarray(value, kind), (128,)) for value in values)


def play_lists(machine: Machine, modules: dict[str, Any], variant: Any, values: list[Any]) -> None:
    """Run the roles of all blocks of the kernel, as `flexible_backward_hopper` deals them out."""
    dk, dv, sums, turn_words, counter, *tables = values[:8]
    arrays, (scale, factor, kept, *numbers) = values[8 : variant.addresses], values[variant.addresses :]
    aux = tuple(_arrays(variant, arrays))
    problem = tuple(numbers)
    schedule = modules["schedule"].build_backward_schedule(variant)
    start = modules["producer"].build_start(variant)
    produce = modules["lists"].build_list_producer(variant, schedule)
    write = modules["lists"].build_list_writer(variant, schedule)
    consume = modules["consumer"].build_backward_consumer(variant, schedule)

    def consumer(w: int) -> Callable[[], None]:
        thread = np.arange(128, dtype=np.int32) + 128 * (w + 1)

        def role() -> None:
            with np.errstate(all="ignore"):  # what is masked is computed, too
                machine.own.threads = thread
                consume(BASE, thread, dk, dv, scale, factor, (0, 0, kept), problem, aux)

        return role

    nothing = np.uint64(0)
    roles: list[Any] = []
    for number in range(machine.counts["blocks"]):
        block = Block(number, variant.shared_bytes, CONSUMERS)
        machine.own.block = block
        start(BASE)
        roles.append((block, 1, lambda: produce(BASE, nothing, counter, problem, tables)))
        roles.append((block, 1, lambda: write(BASE, sums, turn_words, problem, tables)))
        roles += [(block, 128, consumer(w)) for w in range(CONSUMERS)]
    machine.run(roles)
    if variant.deterministic:
        records = at_address(int(tables[0]), (int(numbers[0]), 4), np.int32)
        drawn = {int(tile): place for place, tile in enumerate(records[:, 0])}
        added: dict[int, list[int]] = {}
        for target, tile in machine.additions:
            added.setdefault(target, []).append(drawn[tile])
        assert all(places == sorted(places) for places in added.values()), "nobody waits for who comes later"


def _arrays(variant: Any, given: list[Any]) -> Any:
    """Yield the user's arrays from the words that a kernel gets of them."""
    for dtype, axes in variant.mods.arrays:
        own, given = [int(word) for word in given[: 5 + 2 * axes]], given[5 + 2 * axes :]
        assert own[:2] == [0, 0]
        if own[4] == 0:
            continue
        shape, strides = tuple(own[5 : 5 + axes]), tuple(own[5 + axes :])
        assert own[2] == np.prod(shape)
        assert own[3] == np.dtype(dtype).itemsize
        yield at_address(own[4], shape, dtype, strides)
