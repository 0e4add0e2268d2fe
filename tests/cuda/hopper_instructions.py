"""The instructions of `cuda_backend.ptx` on a `Machine`, under the names that kernels call them by."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.cuda.hopper_machine import KINDS, LANES, Barrier, Machine, memory, one
from tests.cuda.hopper_movements import bulk, copies, matrix_store, tma
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
        return np.full(shape, -1, np.int64).astype(f"i{np.dtype(str(kind)).itemsize}").view(str(kind))

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
        barrier = machine.block.barriers[one(address)]
        with machine.changed:
            if arrivals:
                machine.released(barrier)
            barrier.count(arrivals, size)
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
            machine.until(arrived, f"{machine.names.get(place, place)} to end parity {one(parity)}")
            if block.barriers[place].phase % 2 != one(parity):
                machine.acquired(block.barriers[place])
                return
        wait(address, parity)

    def take_turn(number: Any) -> None:
        machine.pause()
        turn = machine.block.turns[int(number)]
        with machine.changed:
            phase = turn.phase
            machine.released(turn)
            turn.count(1, 0)
            machine.changed.notify_all()
            machine.until(lambda: turn.phase != phase, f"turn {number}")
            machine.acquired(turn)

    def give_turn(number: Any) -> None:
        machine.pause()
        with machine.changed:
            machine.block.turns[int(number)].count(1, 0)
            machine.changed.notify_all()

    def named(_number: int, threads: int) -> Any:
        if threads == 128:
            return machine.pause  # warps of a warpgroup, which is played as one
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
        count=count,
        initialise=initialise,
        publish_initialisation=lambda: None,
        publish_stores=publish_stores,
        expect_bytes=lambda address, size: count(address, 1, int(size)),
        arrive=lambda address: count(address, 1),
        arrive_warp=lambda address, lane: count(address, np.size(lane) // 32),
        wait=wait,
        named=named,
        take_turn=take_turn,
        give_turn=give_turn,
    )


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

    def pass_addition(address: Any) -> None:
        assert not machine.own.added, "the turn is passed before all is added"
        pass_turn(address)

    def wait_for_turn(address: Any, least: Any) -> None:
        while word_seen(address) < least:
            pass

    def pass_turn_of_warp(address: Any, lane: Any) -> None:
        for _ in range(np.size(lane) // 32):
            pass_turn(address)

    return SimpleNamespace(
        addition_seen=word_seen,
        pass_addition=pass_addition,
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
                pair = np.stack(np.broadcast_arrays(low, high), -1).astype(np.float32).astype(KINDS[kind])
            return np.ascontiguousarray(pair).view(np.uint32)[..., 0]

        return pack

    def unpack(kind: str, half: int) -> Any:
        def widen(word: Any) -> Any:
            numbers = np.asarray(word, np.uint32)[..., None].view(KINDS[kind])
            return numbers[..., half].astype(np.float32)

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
