"""`cuda_backend.ptx.wgmma` on a `Machine`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from cuda_backend.ptx import wgmma
from tests.cuda.hopper_machine import KINDS, LANES, Machine, Product, one, operand


def products(machine: Machine) -> Any:
    """Return `cuda_backend.ptx.wgmma`."""

    def commit() -> None:
        machine.own.groups.append(machine.own.open)
        machine.own.open = []

    def wait(pending: int, _count: int) -> Any:
        def done(_accumulators: Any) -> None:
            groups = machine.own.groups
            while len(groups) > pending:
                for product in groups.pop(0):
                    product.finish()

        return done

    def issue(accumulators: Any, old: Any, compute: Any) -> None:
        machine.own.open.append(Product(accumulators, old, compute, machine.late))

    def product_shared(
        n: int, kind: str, a_offsets: Any, b_offsets: Any, *, a_turned: bool = False, b_turned: bool = False
    ) -> Any:
        def product(accumulators: Any, a: int, b: int) -> None:
            assert accumulators.shape == (n // 2, 128)
            block = machine.block

            def compute() -> Any:
                left = [operand(block, a + at, 64, a_turned, KINDS[kind]) for at in a_offsets]
                right = [operand(block, b + at, n, b_turned, KINDS[kind]) for at in b_offsets]
                return np.concatenate(left, 1) @ np.concatenate(right, 1).T

            issue(accumulators, np.float32(0), compute)

        return product

    def product_registers(n: int, kind: str, b_offsets: Any) -> Any:
        def product(accumulators: Any, a: Any, b: int) -> None:
            assert accumulators.shape == (n // 2, 128)
            assert a.shape == (4 * len(b_offsets), 128)
            block, depth = machine.block, 16 * len(b_offsets)
            left = np.empty((64, depth), np.float32)
            rows, columns = operand_places(depth)
            left[rows, columns] = np.ascontiguousarray(a.T).view(KINDS[kind]).astype(np.float32).T

            def compute() -> Any:
                right = [operand(block, b + at, n, True, KINDS[kind]) for at in b_offsets]
                return left @ np.concatenate(right, 1).T

            issue(accumulators, accumulators.copy(), compute)

        return product

    def descriptor_mn_major(leading_bytes: int) -> Any:
        return lambda address: 1 << 62 | 64 << 32 | leading_bytes >> 4 << 16 | one(address) >> 4

    return SimpleNamespace(
        fence=lambda: None,
        commit=commit,
        wait=wait,
        k_major_steps=wgmma.k_major_steps,
        product_shared=product_shared,
        product_registers=product_registers,
        descriptor_mn_major=descriptor_mn_major,
        descriptor_k_major=descriptor_mn_major(16),
    )


def operand_places(depth: int) -> tuple[Any, Any]:
    """Return rows and columns of A in registers, [depth // 2, 128] numbers in the order of words and halves.

    PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16": word i % 4 of a step of 16 holds row + 8 (i %
    2), columns from 2 (lane % 4) + 8 (i // 2).
    """
    half = np.arange(depth // 2)[:, None]
    word, lane = half // 2, LANES % 32
    rows = 16 * (LANES // 32) + lane // 4 + 8 * (word % 2)
    columns = 16 * (word // 4) + 8 * (word % 4 // 2) + 2 * (lane % 4) + half % 2
    return np.broadcast_to(rows, columns.shape), columns
