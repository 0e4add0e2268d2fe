"""What warps do one lane beside the other on a `Clocked` machine: loads, stores, atomics, exchanges, copies.

A lane that the branch at hand leaves out does nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda.divergence import MASKS
from tests.cuda.happens_before import Clocked, cells_of
from tests.cuda.hopper_instructions import barriers, grids, lanes, registers, turns
from tests.cuda.hopper_machine import swizzled
from tests.cuda.hopper_movements import copies as plain_copies
from tests.cuda.hopper_movements import land, started
from tests.cuda.watched_memory import SLACK, Arena


def by_lane(address: Any, found: Any) -> Any:
    """Return what active lanes have found, for all lanes; or the one value of an address that all share."""
    if np.ndim(address) == 0:
        return found[0]
    all_lanes = np.zeros((len(address), *found.shape[1:]), found.dtype)
    all_lanes[MASKS.active(len(address))] = found
    return all_lanes


def active(value: Any) -> Any:
    """Return the value of each active lane, or the one that all share."""
    return np.atleast_1d(value) if np.ndim(value) == 0 else value[MASKS.active(len(value))]


def bytes_of(address: Any, values: Any, kind: Any) -> Any:
    """Return what each active lane stores, [lanes, bytes]."""
    columns = [active(np.broadcast_to(np.asarray(value), np.shape(address))) for value in values]
    data = np.stack([each.reshape(-1) for each in columns], -1)
    return np.ascontiguousarray(data.astype(kind)).view(np.uint8)


def copies(machine: Clocked, arena: Arena) -> Any:
    """Return `cuda_backend.ptx.copy`."""

    def load(kind: Any, result: Any = None) -> Any:
        def from_global(address: Any) -> Any:
            found = arena.load(active(address), np.dtype(kind).itemsize).view(kind)[:, 0]
            return by_lane(address, found.astype(result or kind))

        return from_global

    def load_16(array: Any, first: Any, address: Any) -> None:
        found = arena.load(active(address), 16).view(array.dtype)
        array[int(first) :][:4][:, MASKS.active(array.shape[1])] = found.T

    def store(kind: Any) -> Any:
        def to_global(address: Any, *values: Any) -> None:
            arena.store(active(address), bytes_of(address, values, kind))

        return to_global

    def load_shared(kind: Any, count: int) -> Any:
        def from_shared(address: Any) -> Any:
            block = machine.block
            places = block.places(active(address), count * np.dtype(kind).itemsize)
            block.watch.read(cells_of(places))
            return by_lane(address, np.ascontiguousarray(block.shared[places]).view(kind))

        return from_shared

    def load_shared_16(array: Any, first: Any, address: Any) -> None:
        array[int(first) :][:4] = load_shared(array.dtype, 4)(address).T

    def store_shared(kind: Any) -> Any:
        def to_shared(address: Any, value: Any) -> None:
            block = machine.block
            data = bytes_of(address, [value], kind)
            places = block.places(active(address), data.shape[-1])
            assert np.unique(places).size == places.size, "two lanes store to one place"
            block.shared[places] = data
            block.watch.write(cells_of(places))

        return to_shared

    def fetch_increment(address: Any, bound: Any) -> Any:
        """Take a number: whoever takes a later one has come behind what its taker had done."""
        with machine.changed:
            arena.pass_on(address)
            machine.acquired(arena.told[int(address)])
            return atomics.fetch_increment(address, bound)

    def load_word_fresh(address: Any) -> Any:
        with machine.changed:
            machine.own.passed = arena.passed
            return arena.look(address)

    atomics = plain_copies(machine)
    return SimpleNamespace(
        shared_address=lambda _: np.uint32(SLACK),
        load_word=load(np.int32), load_float=load(np.float32), load_half=load(np.uint16, np.uint32),
        load_byte=load(np.int8, np.int32), load_16=load_16,
        store_global_word=store(np.uint32), store_global_8=store(np.uint32), store_global_16=store(np.uint32),
        store_global_half=store(np.uint16),
        load_shared_word=lambda address: load_shared(np.int32, 1)(address)[..., 0],
        load_shared_16=load_shared_16,
        store_shared_word=store_shared(np.int32), store_shared_float=store_shared(np.float32),
        fetch_add=atomics.fetch_add,
        fetch_increment=fetch_increment, load_word_fresh=load_word_fresh,
    )  # fmt: skip


def matrix_copies(machine: Clocked, arena: Arena, early: set[int], made: set[int]) -> Any:
    """Return `cuda_backend.ptx.matrix_copy`: descriptor ``128 * i`` is ``machine.maps[i]``.

    That is an array of bytes, the rows and the bytes of a box.  Matrices `early` may be read before the grid
    ahead has ended, matrices `made` are written by the kernel itself.
    """

    def load(target: Any, which: Any, at: Any, column: Any, row: Any) -> None:
        number, block = int(which) // 128, machine.block
        assert machine.own.behind_earlier_grids or number in early, "copied before the grid ahead has ended"
        assert MASKS.mask is None or MASKS.mask.sum() == 1, "one thread asks for a copy"
        array, rows, width = machine.maps[number]
        part = array[int(row) : int(row) + rows, int(column) : int(column) + width]
        box = np.zeros((rows, width), np.uint8)
        box[: part.shape[0], : part.shape[1]] = part
        if number in made and part.size:
            arena.copied(part)
        assert int(target) % (8 * width) == 0, "a tile begins where its swizzle does"
        places = swizzled(int(target) + np.arange(box.size), width)
        assert places[0] >= SLACK, "outside shared memory"
        block.watch.write(cells_of(places), block.barriers[int(at)])
        block.shared[places] = 0xFF
        started(machine, int(at), lambda: land(block, places, box.reshape(-1)))

    return SimpleNamespace(load=load, acquire=lambda _: None, prefetch=lambda *_: None)


def warp_registers(machine: Clocked) -> Any:
    """Return `cuda_backend.ptx.registers`, with what warps exchange."""

    def of_warps(value: Any) -> Any:
        return np.broadcast_to(value, (machine.own.lanes,)).reshape(-1, 32)

    def from_lane(value: Any, lane: Any) -> Any:
        """Return the value of a lane: one if all warps have the same, so that branches on it are one's."""
        assert MASKS.mask is None, "lanes of a warp are elsewhere"
        found = of_warps(value)[:, int(lane)]
        return found[0] if np.all(found == found[0]) else np.repeat(found, 32)

    def word_below(value: Any, distance: int) -> Any:
        found = of_warps(value)
        return np.concatenate([found[:, :distance], found[:, :-distance]], 1).reshape(-1)

    def low_bytes(*words: Any) -> Any:
        return np.stack([np.asarray(word).astype(np.uint8) for word in words], -1).view(np.uint32)[..., 0]

    more = {
        "uniform": lambda value: np.int32(value) if np.ndim(value) == 0 else from_lane(value, 0),
        "from_lane": from_lane,
        "word_below": word_below,
        "largest_word": lambda value: of_warps(value).max(),
        "low_bytes": low_bytes,
        "give_registers": lambda _: lambda: None,
        "take_registers": lambda _: lambda: None,
    }
    return SimpleNamespace(**{**vars(registers(machine)), **more})


def warp_barriers(machine: Clocked) -> Any:
    """Return `cuda_backend.ptx.barrier`: each active lane arrives, two warps meet."""
    found = barriers(machine)

    def arrive(address: Any) -> None:
        found.count(address, len(MASKS.active(machine.own.lanes)))

    def named(number: int, threads: int) -> Any:
        assert threads == 64, "what two warps take turns at is where they meet"
        return lambda: found.take_turn(number)

    def warp() -> None:
        assert MASKS.mask is None, "lanes of a warp are elsewhere"
        machine.own.apart = False

    return SimpleNamespace(**{**vars(found), "arrive": arrive, "named": named, "warp": warp})


def clocked_turns(machine: Clocked, arena: Arena) -> Any:
    """Return `cuda_backend.ptx.turns`; who spins rests until a turn is passed."""
    found = turns(machine)

    def word_seen(address: Any) -> Any:
        with machine.changed:
            machine.own.passed = arena.passed
            machine.acquired(arena.told[int(address)])
            return arena.load(address, 4).view(np.int32)[0, 0]

    def pass_turn(address: Any) -> None:
        assert len(MASKS.active(machine.own.lanes)) == 1, "one lane passes a turn"
        assert not machine.own.apart, "a turn is passed for lanes that have not met"
        with machine.changed:
            arena.pass_on(address)
            found.pass_turn(address)
            arena.passed += 1
            machine.changed.notify_all()

    def pass_turns(address: Any, count: Any) -> None:
        with machine.changed:
            for _ in range(int(active(count)[0])):
                pass_turn(address)

    def to_the_copy_engine() -> None:
        if MASKS.mask is None:  # a lane alone tells of its own stores, which are not kept apart
            arena.publish()

    def rest() -> None:
        seen = machine.own.passed
        with machine.changed:
            machine.until(lambda: arena.passed != seen, "a turn to be passed")

    return SimpleNamespace(
        word_seen=word_seen, pass_turn=pass_turn, pass_turns=pass_turns, rest=rest,
        to_the_copy_engine=to_the_copy_engine,
    )  # fmt: skip


def warp_lanes(machine: Clocked) -> Any:
    """Return what stands for `numba.cuda`."""

    def popc(word: Any) -> Any:
        bits = np.unpackbits(np.ascontiguousarray(word, np.uint32).view(np.uint8))
        return bits.reshape(-1, 32).sum(1, dtype=np.int32)

    def ffs(word: Any) -> Any:
        """Return the place of the lowest bit, from 1, and 0 of 0."""
        return np.where(word == 0, 0, popc(word ^ (word - np.uint32(1)))).astype(np.int32)

    class Thread:
        @property
        def x(self) -> Any:
            return machine.own.thread

    more = {"popc": popc, "ffs": ffs, "threadIdx": Thread()}
    return SimpleNamespace(**{**vars(lanes(machine)), **more})


def families(machine: Clocked, arena: Arena, early: set[int], made: set[int]) -> dict[str, Any]:
    """Return what kernels call, by the names they call it by; matrices as `matrix_copies` says."""

    def wait_for_earlier_grids() -> None:
        machine.own.behind_earlier_grids = True

    return {
        "barrier": warp_barriers(machine), "copy": copies(machine, arena), "cuda": warp_lanes(machine),
        "grid": SimpleNamespace(
            **{**vars(grids(machine)), "wait_for_earlier_grids": wait_for_earlier_grids}
        ),
        "matrix_copy": matrix_copies(machine, arena, early, made), "registers": warp_registers(machine),
        "turns": clocked_turns(machine, arena),
    }  # fmt: skip
