"""The instructions of `cuda_backend.ptx` on a `Machine`, under the names that kernels call them by."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.cuda.hopper_machine import KINDS, LANES, Barrier, Machine, memory, one, swizzled
from tests.cuda.hopper_products import products


def install(monkeypatch: pytest.MonkeyPatch, machine: Machine, modules: Sequence[ModuleType]) -> None:
    """Let the kernels that `modules` build run on `machine`."""
    played = {
        "barrier": barriers(machine), "bulk": bulk(machine), "copy": copies(machine), "grid": grids(machine),
        "matrix_store": matrix_store(machine), "registers": registers(machine), "tma": tma(machine),
        "turns": turns(machine), "wgmma": products(machine), "cuda": lanes(machine),
        "device_function": lambda function: function,
    }  # fmt: skip
    for module in modules:
        for name, family in played.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, family)


def lanes(machine: Machine) -> Any:
    """Return what stands for `numba.cuda`: registers of all lanes."""

    def array(count: int, kind: Any) -> Any:
        shape = (count,) if machine.own.lanes == 1 else (count, machine.own.lanes)
        values = np.full(shape, 0xFFFFFFFF, np.uint32)
        return values.view(np.float32) if "float" in str(kind) else values

    class Block:
        @property
        def x(self) -> int:
            return machine.block.number

    class Thread:
        @property
        def x(self) -> int:
            return int(machine.own.thread)

    return SimpleNamespace(
        local=SimpleNamespace(array=array),
        shared=SimpleNamespace(array=lambda *_: None),
        blockIdx=Block(),
        threadIdx=Thread(),
        gridDim=SimpleNamespace(x=machine.counts.get("blocks", 1)),
        syncthreads=lambda: machine.block.meeting.wait(),
    )


def barriers(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.barrier`."""

    def initialise(address: int, arrivals: int) -> None:
        assert address % 8 == 0
        machine.block.barriers[int(address)] = Barrier(arrivals)

    def count(address: Any, arrivals: int, size: int = 0) -> None:
        machine.pause()
        with machine.changed:
            machine.block.barriers[one(address)].count(arrivals, size)
            machine.changed.notify_all()

    def wait(address: Any, parity: Any) -> None:
        machine.pause()
        place, block = one(address), machine.block
        with machine.changed:
            due = [copy for at, copy in block.copies if at == place]
            block.copies[:] = [item for item in block.copies if item[0] != place]
        for copy in due:
            count(place, 0, -copy())

        def arrived() -> bool:
            with_copies = any(at == place for at, _ in block.copies)
            return block.barriers[place].phase % 2 != one(parity) or with_copies

        with machine.changed:
            machine.until(arrived)
            if block.barriers[place].phase % 2 != one(parity):
                return
        wait(address, parity)

    def named(_number: int, threads: int) -> Any:
        assert threads == 128 * machine.counts["meet"]

        def meet() -> None:
            machine.pause()
            machine.block.meeting.wait()

        return meet

    def publish_stores() -> None:
        block = machine.block
        for places in machine.own.unpublished:
            block.dirty[np.frombuffer(places, np.int64)] = False
        machine.own.unpublished.clear()

    return SimpleNamespace(
        initialise=initialise,
        publish_initialisation=lambda: None,
        publish_stores=publish_stores,
        expect_bytes=lambda address, size: count(address, 1, int(size)),
        arrive=lambda address: count(address, 1),
        arrive_warp=lambda address, lane: count(address, np.size(lane) // 32),
        wait=wait,
        named=named,
    )


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

    def load_4d(target: Any, which: Any, *rest: Any) -> None:
        load_4d_of(int(which) // 128)(target, which, *rest)

    return SimpleNamespace(load_4d=load_4d, load_4d_of=load_4d_of, prefetch_descriptor=lambda _: None)


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


def turns(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.turns`."""

    def word_seen(address: Any) -> Any:
        if machine.problems:
            raise RuntimeError("others have failed")
        time.sleep(0.0005)
        with machine.changed:
            return np.int32(memory(int(address), 4).view(np.int32)[0])

    def pass_turn(address: Any) -> None:
        with machine.changed:
            memory(int(address), 4).view(np.int32)[0] += 1

    def wait_for_turn(address: Any, least: Any) -> None:
        while word_seen(address) < least:
            pass

    def pass_turn_of_warp(address: Any, lane: Any) -> None:
        for _ in range(np.size(lane) // 32):
            pass_turn(address)

    return SimpleNamespace(
        word_seen=word_seen,
        pass_turn=pass_turn,
        wait_for_turn=wait_for_turn,
        pass_turn_of_warp=pass_turn_of_warp,
    )


def grids(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.grid`."""
    nothing = SimpleNamespace(wait_for_earlier_grids=lambda: None, let_next_grid_start=lambda: None)
    return SimpleNamespace(**vars(nothing), blocks=lambda: machine.counts["blocks"])


def registers(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.registers`."""

    def exp2(x: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.exp2(x, dtype=np.float32)

    def fused_multiply_add(x: Any, y: Any, z: Any) -> Any:
        with np.errstate(all="ignore"):
            return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float32)

    def pack_pair(kind: str) -> Any:
        def pack(low: Any, high: Any) -> Any:
            with np.errstate(all="ignore"):
                pair = np.stack([low, high], -1).astype(np.float32).astype(KINDS[kind])
            return np.ascontiguousarray(pair).view(np.uint32)[..., 0]

        return pack

    def unpack(kind: str, half: int) -> Any:
        def widen(word: Any) -> Any:
            return np.array([word], np.uint32).view(KINDS[kind])[half].astype(np.float32)

        return widen

    def exchange(value: Any, mask: int) -> Any:
        if machine.own.lanes > 1:
            return value[LANES ^ mask]
        return machine.block.exchange(machine.own.thread, value, mask)

    def select(condition: Any, then: Any, otherwise: Any) -> Any:
        return np.where(condition != 0, then, otherwise)

    return SimpleNamespace(
        exp2=exp2,
        fused_multiply_add=fused_multiply_add,
        pack_pair=pack_pair,
        select_float=select,
        select_int=select,
        select_word=select,
        exchange_float=exchange,
        exchange_word=exchange,
        unpack_low=lambda kind: unpack(kind, 0),
        unpack_high=lambda kind: unpack(kind, 1),
        uniform=lambda value: np.int32(one(value)),
        quotient=lambda x, y: np.int32(int(x) // int(y)),
        fresh=lambda x: x,
        successor=lambda x: np.int32(x + 1),
        pin=lambda count: lambda _: None,
    )
