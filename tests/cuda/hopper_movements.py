"""The instructions of `cuda_backend.ptx` that move data on a `Machine`: loads, stores, bulk copies, TMA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.cuda.hopper_machine import Machine, memory, one, swizzled


def stored(machine: Machine, address: Any, data: Any) -> None:
    """Store bytes [lanes, size] at a shared address for each lane."""
    size = data.shape[-1]
    places = np.atleast_1d(np.asarray(address, np.int64))[:, None] + np.arange(size)
    assert np.unique(places).size == places.size, "two lanes store to one place"
    machine.block.store(places, data)
    machine.own.unpublished.add(places.tobytes())


def words(*values: Any) -> Any:
    """Return registers of all lanes as bytes [lanes, 4 * number]."""
    columns = [np.atleast_1d(value) for value in values]
    return np.ascontiguousarray(np.stack(columns, -1)).view(np.uint8).reshape(len(columns[0]), -1)


def copies(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.copy`."""

    def load_shared_8(array: Any, first: Any, address: Any) -> None:
        places = np.asarray(address, np.int64)[:, None] + np.arange(8)
        assert np.all(places[:, 0] % 8 == 0)
        found = np.ascontiguousarray(machine.block.shared[places]).view(array.dtype)
        array[one(first)], array[one(first) + 1] = found[:, 0], found[:, 1]

    def store_global_16_where(condition: Any, address: Any, *values: Any) -> None:
        data = words(*values)
        address = np.atleast_1d(address)
        for lane in np.flatnonzero(np.broadcast_to(condition, (len(data),))):
            assert address[lane] % 16 == 0
            memory(int(address[lane]), 16)[...] = data[lane]

    def put(address: Any, *values: Any) -> None:
        data = words(*values)[0]
        assert address % data.size == 0
        memory(int(address), data.size)[...] = data

    def load_16(array: Any, first: Any, address: Any) -> None:
        assert address % 16 == 0
        array[int(first) : int(first) + 4] = memory(int(address), 16).view(array.dtype)

    def load_shared_16(array: Any, first: Any, address: Any) -> None:
        assert np.all(np.asarray(address) % 16 == 0)
        places = np.asarray(address, np.int64)[..., None] + np.arange(16)
        found = np.ascontiguousarray(machine.block.shared[places]).view(array.dtype)
        array[int(first) : int(first) + 4] = found.T

    def add_global_16(address: Any, *values: Any) -> None:
        data = words(*values).view(np.float32)
        address = np.asarray(address, np.uint64)
        assert np.all(address % np.uint64(16) == 0)
        with machine.changed:
            for lane, place in enumerate(address):
                memory(int(place), 16).view(np.float32)[...] += data[lane]
            machine.additions.append((int(address[0]), machine.own.tile))

    def store_shared_half(address: Any, value: Any) -> None:
        machine.block.shared[int(address) :][:2].view(np.uint16)[0] = int(value) & 0xFFFF

    def load_shared_word(address: Any) -> Any:
        machine.own.tile = int(machine.block.shared[one(address) :][:4].view(np.int32)[0])
        return np.int32(machine.own.tile)

    def store_shared_word(address: Any, value: Any) -> None:
        machine.block.shared[one(address) :][:4].view(np.int32)[0] = value

    def old_and(address: Any, change: Any) -> Any:
        with machine.changed:
            word = memory(int(address), 4).view(np.int32)
            old = int(word[0])
            word[0] = change(old)
        return np.int32(old)

    def store_shared_16(address: Any, *values: Any) -> None:
        assert np.all(np.asarray(address) % 16 == 0)
        stored(machine, address, words(*values))

    return SimpleNamespace(
        add_global_16=add_global_16,
        load_shared_8=load_shared_8,
        load_shared_word=load_shared_word,
        load_warp_word=lambda address, _lane: load_shared_word(address),
        store_shared_word=store_shared_word,
        store_shared_16=store_shared_16,
        store_global_16_where=store_global_16_where,
        store_global_word=lambda address, value: old_and(address, lambda _: value),
        store_global_float=lambda address, value: put(address, np.float32(value)),
        store_global_16=put,
        store_shared_half=store_shared_half,
        shared_address=lambda _: np.uint32(0),
        load_16=load_16,
        load_shared_16=load_shared_16,
        load_float=lambda address: memory(int(address), 4).view(np.float32)[0],
        load_word=lambda address: memory(int(address), 4).view(np.int32)[0],
        load_half=lambda address: np.uint32(memory(int(address), 2).view(np.uint16)[0]),
        fetch_add=lambda address, value: old_and(address, lambda old: old + value),
        fetch_increment=lambda address, bound: old_and(address, lambda old: 0 if old >= bound else old + 1),
    )


def bulk(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.bulk`."""

    def load(target: Any, source: Any, size: int, barrier: Any) -> None:
        assert int(target) % 16 == int(source) % 16 == size % 16 == 0
        block = machine.block
        started(machine, int(barrier), lambda: land(block, int(target), memory(int(source), size).copy()))

    def add_floats(target: Any, source: Any, size: int) -> None:
        assert int(target) % 16 == int(source) % 16 == size % 16 == 0
        block, places = machine.block, int(source) + np.arange(size)

        def read() -> Any:
            return np.ascontiguousarray(block.read(places)).view(np.float32)

        machine.own.added.append(
            [int(target), size, read if machine.late else None, None if machine.late else read()]
        )

    def wait_read() -> None:
        for item in machine.own.added:
            item[3] = item[2]() if item[3] is None else item[3]

    def wait_added() -> None:
        wait_read()
        with machine.changed:
            for target, size, _, data in machine.own.added:
                memory(target, size).view(np.float32)[...] += data
                machine.additions.append((target, machine.own.tile))
        machine.own.added.clear()

    return SimpleNamespace(
        load=load, add_floats=add_floats, commit=lambda: None, wait_read=wait_read, wait_added=wait_added
    )


def land(block: Any, target: Any, data: Any) -> int:
    """Let bytes arrive at shared addresses; return how many."""
    places = target + np.arange(data.size) if np.ndim(target) == 0 else target
    block.shared[places], block.dirty[places] = data, False
    return int(data.size)


def started(machine: Machine, barrier: int, copy: Any) -> None:
    """Start a copy that counts its bytes on a barrier."""
    block = machine.block
    if machine.late:
        with machine.changed:
            block.copies.append((barrier, copy))
            machine.changed.notify_all()
        return
    size = copy()
    with machine.changed:
        block.barriers[barrier].count(0, -size)
        machine.changed.notify_all()


def tma(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.tma`; descriptor `number` is ``machine.maps[number]``: an array, box rows."""

    def load_4d_of(number: int) -> Any:
        def load(target: Any, _: Any, barrier: Any, column: Any, row: Any, head: Any, batch: Any) -> None:
            array, rows = machine.maps[number]
            box = np.zeros((rows, 64), array.dtype)
            part = array[int(batch), int(row) : int(row) + rows, int(head), int(column) : int(column) + 64]
            box[: part.shape[0], : part.shape[1]] = part
            assert int(target) % 1024 == 0
            places = swizzled(int(target) + np.arange(rows * 128))
            block = machine.block
            if machine.late:
                block.shared[places] = 0xFF
            data = box.view(np.uint8).reshape(-1)
            started(machine, int(barrier), lambda: land(block, places, data))

        return load

    def load_row_of(number: int) -> Any:
        def load(target: Any, _: Any, barrier: Any, row: Any) -> None:
            data = machine.maps[number][int(row)].copy().view(np.uint8)
            assert int(target) % 128 == 0
            places = int(target) + np.arange(data.size)
            block = machine.block
            if machine.late:
                block.shared[places] = 0xFF
            started(machine, int(barrier), lambda: land(block, places, data))

        return load

    def load_4d(target: Any, which: Any, *rest: Any) -> None:
        load_4d_of(int(which) // 128)(target, which, *rest)

    return SimpleNamespace(
        load_4d=load_4d, load_4d_of=load_4d_of, load_row_of=load_row_of, prefetch_descriptor=lambda _: None
    )


def matrix_store(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.matrix_store`."""

    def store_turned(address: Any, *values: Any) -> None:
        halves = (
            np.stack(values).view(np.uint16).reshape(4, 4, 8, 8)
        )  # block, warp, row, column: lane l: row l // 4
        rows = np.asarray(address).reshape(4, 4, 8)  # warp, block, which column's 16 bytes
        assert np.all(rows % 16 == 0)
        data = np.ascontiguousarray(halves.transpose(1, 0, 3, 2)).view(np.uint8)  # warp, block, column, rows
        stored(machine, rows.reshape(-1), data.reshape(128, 16))

    return SimpleNamespace(store_turned=store_turned)
