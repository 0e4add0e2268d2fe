"""The Hopper backward kernel, its source run on a played machine, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_backend.attention import (
    consumer_backward_hopper,
    gradient_hopper,
    producer_backward_hopper,
    schedule_backward_hopper,
    schedule_hopper,
)
from cuda_backend.attention.variant_backward_hopper import CONSUMERS, BackwardVariant, choose_backward
from refimpl.attention import flash_attention_vjp, scaled_dot_product_attention
from tests.cuda.hopper_instructions import install
from tests.cuda.hopper_machine import KINDS, Block, Machine

MODULES = (
    consumer_backward_hopper, gradient_hopper, producer_backward_hopper, schedule_backward_hopper, schedule_hopper
)  # fmt: skip
BASE = 1024


def play(
    monkeypatch: pytest.MonkeyPatch,
    variant: BackwardVariant,
    arrays: tuple[Any, ...],
    lse: Any,
    out: Any,
    *,
    offset: int,
    late: bool = False,
    blocks: int = 2,
    seed: int = 0,
) -> tuple[Any, Any, Any]:
    """Return dQ, dK and dV of q, k, v, dO as the kernel computes them."""
    machine = Machine(late=late, seed=seed)
    install(monkeypatch, machine, MODULES)
    q, k, v, do = arrays
    (B, Tq, Hq, D), (_, Tk, Hkv, Dv) = q.shape, v.shape
    bm, d = variant.block_m, variant.d
    query_blocks, key_blocks = -(-Tq // bm), -(-Tk // variant.block_n)
    shifts = np.full((B * Hq, query_blocks * bm), -np.inf, np.float32)
    deltas = np.zeros_like(shifts)
    with np.errstate(invalid="ignore"):
        found = -lse.astype(np.float64).reshape(B * Hq, Tq) / np.log(2)
    shifts[:, :Tq] = np.where(found == np.inf, -np.inf, found)
    rows = (do.astype(np.float64) * out.astype(np.float64)).sum(-1).transpose(0, 2, 1)
    deltas[:, :Tq] = rows.reshape(B * Hq, Tq)
    sums = np.zeros((B * Hq, query_blocks, bm * d), np.float32)
    words, counter = np.zeros((B * Hq, query_blocks), np.int32), np.zeros(2, np.int32)
    dk = np.full((B, Tk, Hkv, -(-D // 8) * 8), np.nan, KINDS[variant.kind])
    dv = np.full((B, Tk, Hkv, -(-Dv // 8) * 8), np.nan, KINDS[variant.kind])
    machine.maps = [(q, bm), (k, variant.block_n), (v, variant.block_n), (do, bm)]
    tiles = key_blocks * B * Hkv
    machine.counts = {"blocks": min(blocks, tiles), "meet": CONSUMERS}
    problem = (
        tiles, key_blocks, 1, Hkv, B * Hkv, Hq // Hkv, query_blocks, Tq, Tk, offset, dk.shape[3], dv.shape[3]
    )  # fmt: skip
    problem = tuple(np.int32(number) for number in problem)
    address = [np.uint64(x.ctypes.data) for x in (dk, dv, shifts, deltas, sums, words, counter)]
    schedule = schedule_backward_hopper.build_backward_schedule(variant)
    start = producer_backward_hopper.build_start(variant)
    produce = producer_backward_hopper.build_backward_producer(variant, schedule)
    write = producer_backward_hopper.build_writer(variant, schedule)
    consume = consumer_backward_hopper.build_backward_consumer(variant, schedule)
    factor = np.float32(D**-0.5)
    scale = np.float32(factor * np.log2(np.e))
    roles: list[Any] = []
    for number in range(machine.counts["blocks"]):
        block = Block(number, variant.shared_bytes, CONSUMERS)
        machine.own.block = block
        start(BASE)

        def consumer(w: int) -> Any:
            thread = np.arange(128, dtype=np.int32) + 128 * (w + 1)
            return lambda: consume(BASE, thread, address[0], address[1], scale, factor, problem)

        roles.append((block, 1, lambda: produce(BASE, np.uint64(0), address[2], address[3], address[6], problem)))
        roles.append((block, 1, lambda: write(BASE, address[4], address[5], problem)))
        roles += [(block, 128, consumer(w)) for w in range(CONSUMERS)]
    machine.run(roles)
    assert not counter.any(), "the counter is for the next launch, too"
    dq = unfolded(sums, variant) * factor
    dq = dq.reshape(B, Hq, query_blocks * bm, d)[:, :, :Tq, :D].transpose(0, 2, 1, 3)
    return dq, dk[..., :D].astype(np.float32), dv[..., :Dv].astype(np.float32)


def unfolded(sums: Any, variant: BackwardVariant) -> Any:
    """Return dQ [heads, rows, d] from the order in which consumers hold it."""
    from tests.cuda.hopper_machine import fragment

    heads, blocks = sums.shape[:2]
    columns = variant.dq_columns
    rows, places = fragment(columns)
    shares = sums.reshape(heads, blocks, CONSUMERS, columns // 8, 128, 4)
    tiles = np.empty((heads, blocks, CONSUMERS, 64, columns), np.float32)
    values = shares.transpose(0, 1, 2, 3, 5, 4).reshape(heads, blocks, CONSUMERS, columns // 2, 128)
    tiles[..., rows, places] = values
    if variant.swapped:
        tiles = tiles.transpose(0, 1, 4, 2, 3)
    elif not variant.row_split:
        tiles = tiles.transpose(0, 1, 3, 2, 4)
    return tiles.reshape(heads, blocks * variant.block_m, variant.d)


def difference(
    monkeypatch: pytest.MonkeyPatch, variant: BackwardVariant, sizes: Any, causal: Any, **how: Any
) -> float:
    """Return the largest error of a gradient, as a part of its largest number."""
    B, Tq, Tk, Hq, Hkv, D, Dv = sizes
    rng = np.random.default_rng(7)
    shapes = (B, Tq, Hq, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv), (B, Tq, Hq, Dv)
    arrays = tuple(rng.standard_normal(shape).astype(KINDS[variant.kind]) for shape in shapes)
    q, k, v, do = (x.astype(np.float64) for x in arrays)
    forward = scaled_dot_product_attention(q, k, v, causal=causal, return_lse=True)
    truth = flash_attention_vjp(q, k, v, forward.out, forward.lse, do, causal=causal)
    offset = Tk - Tq if causal == "bottom_right" else 0
    found = play(monkeypatch, variant, arrays, forward.lse, forward.out, offset=offset, **how)
    errors = []
    for gradient, name in zip(found, ("dq", "dk", "dv"), strict=True):
        exact = getattr(truth, name)
        assert not np.isnan(gradient).any(), name
        errors.append(float(np.abs(gradient - exact).max() / (np.abs(exact).max() or 1.0)))
    return max(errors)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("causal", [False, "top_left"])
@pytest.mark.parametrize("d", [64, 128])
def test_square(monkeypatch: pytest.MonkeyPatch, d: int, causal: Any, late: bool) -> None:
    variant = choose_backward("f16", d, d, bool(causal))
    assert difference(monkeypatch, variant, (1, 200, 200, 1, 1, d, d), causal, late=late) < 2e-3


SHAPES = {
    "one of everything": ((1, 1, 1, 1, 1, 8, 8), False),
    "ragged, grouped, more keys": ((2, 70, 300, 4, 2, 64, 64), "bottom_right"),
    "ragged, grouped, more queries": ((1, 300, 70, 2, 1, 64, 64), "bottom_right"),
    "keys that no query sees": ((1, 130, 400, 1, 1, 64, 64), "top_left"),
    "narrow heads": ((1, 70, 140, 2, 1, 40, 24), "top_left"),
    "unequal heads": ((1, 150, 140, 1, 1, 72, 128), False),
    "wide and ragged": ((1, 161, 257, 2, 1, 128, 128), "bottom_right"),
}


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(monkeypatch: pytest.MonkeyPatch, shape: str, deterministic: bool, kind: str) -> None:
    sizes, causal = SHAPES[shape]
    variant = choose_backward(kind, sizes[5], sizes[6], bool(causal), deterministic=deterministic)
    error = difference(monkeypatch, variant, sizes, causal, late=deterministic, blocks=3)
    assert error < (2e-3 if kind == "f16" else 2e-2)


@pytest.mark.parametrize("block_m", [64, 80, 96])
def test_turned_dq(monkeypatch: pytest.MonkeyPatch, block_m: int) -> None:
    for ds_stages in (1, 2):
        variant = choose_backward("f16", 128, 128, True)._replace(
            block_m=block_m, swapped=True, ds_stages=ds_stages
        )
        assert difference(monkeypatch, variant, (1, 170, 257, 2, 1, 128, 128), "bottom_right") < 2e-3
