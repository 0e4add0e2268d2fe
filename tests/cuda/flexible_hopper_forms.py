"""What `flexible_hopper_table` measures: masks and scores, ours and FlexAttention's, and their tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from refimpl.attention import mods
from refimpl.attention.bigbird_plan import bigbird_block_mask, bigbird_plan
from refimpl.attention.block_mask import DEAD, FULL, PARTIAL, BlockMask

BIGBIRD_BLOCK, CAP = 64, 20.0
ROWS_AT_ONCE = 4096


class Form(NamedTuple):
    """One row of the table: our functions, then those that PyTorch traces, with their arrays closed over."""

    name: str
    B: int
    H: int
    N: int
    mask: Callable[..., Any] | None
    score: Callable[..., Any] | None
    aux: tuple[Any, ...]
    their_mask: Callable[..., Any] | None
    their_score: Callable[..., Any] | None
    by_head: bool = False
    by_sequence: bool = False


def means(ratios: Mapping[str, float]) -> str:
    """Return geometric means by the page's rule: softcap left out, with and without BigBird."""
    five = {name: ratio for name, ratio in ratios.items() if name != "softcap"}
    four = {name: ratio for name, ratio in five.items() if name != "BigBird"}
    found = (
        math.exp(sum(map(math.log, some.values())) / len(some)) if some else math.nan for some in (five, four)
    )
    return "geometric mean of {} forms {:.2f}, without BigBird {:.2f}".format(len(five), *found)


def sliding_causal(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """The query's own place and the 1024 before it."""
    return (j <= i) & (i - j <= 1024)


def sinks(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Causal within chunks of 2048 tokens, and the first 128 keys for all."""
    return ((i // 2048 == j // 2048) | (j < 128)) & (j <= i)


def forms() -> Iterator[Form]:
    """Yield the forms; arrays are on the GPU."""
    import torch

    yield Form("sliding 1024", 1, 16, 32768, sliding_causal, None, (), sliding_causal, None)

    blocks = 16384 // BIGBIRD_BLOCK
    plan = bigbird_plan(blocks, heads=16, rng=0)
    seen = bigbird_block_mask(blocks, plan, window_blocks=3, global_blocks=(0, -1))
    table = torch.from_numpy(seen).cuda()

    def bigbird(_b: Any, h: Any, i: Any, j: Any) -> Any:
        return table[h, i // BIGBIRD_BLOCK, j // BIGBIRD_BLOCK]

    ours = mods.bigbird(BIGBIRD_BLOCK)
    yield Form("BigBird", 1, 16, 16384, ours, None, (table,), bigbird, None, by_head=True)

    generator = np.random.default_rng(1)
    starts = generator.choice(np.arange(1, 16384), (2, 11), replace=False)
    numbers = (np.arange(16384) >= np.sort(starts)[..., None]).sum(1).astype(np.int32)
    documents = torch.from_numpy(numbers).cuda()

    def same(b: Any, _h: Any, i: Any, j: Any) -> Any:
        return documents[b, i] == documents[b, j]

    yield Form("documents", 2, 16, 16384, mods.documents(), None, (documents,), same, None, by_sequence=True)

    slopes = 2.0 ** (-0.5 * torch.arange(1, 17, device="cuda", dtype=torch.float32))

    def alibi(score: Any, _b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - slopes[h] * (i - j).abs()

    yield Form("ALiBi", 4, 16, 4096, mods.causal, mods.alibi(), (slopes,), mods.causal, alibi)

    def bent(score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
        return CAP * torch.tanh(score / CAP)

    yield Form("softcap", 4, 16, 4096, mods.causal, mods.softcap(CAP), (), mods.causal, bent)
    yield Form("sinks", 1, 16, 16384, sinks, None, (), sinks, None)


def states_of(form: Form, rows: int, columns: int) -> Any:
    """Return the states of tiles of `rows` x `columns`, by their mask on the GPU."""
    import torch

    assert form.their_mask is not None
    found = []
    key = torch.arange(form.N, device="cuda")
    for b in range(form.B if form.by_sequence else 1):
        for h in range(form.H if form.by_head else 1):
            for start in range(0, form.N, ROWS_AT_ONCE):
                query = torch.arange(start, min(start + ROWS_AT_ONCE, form.N), device="cuda")
                allowed = form.their_mask(b, h, query[:, None], key[None])
                tiles = allowed.view(len(query) // rows, rows, form.N // columns, columns)
                some, every = tiles.any(3).any(1), tiles.all(3).all(1)
                found.append(torch.where(every, FULL, torch.where(some, PARTIAL, DEAD)).to(torch.uint8))
    shape = (
        form.B if form.by_sequence else 1,
        form.H if form.by_head else 1,
        form.N // rows,
        form.N // columns,
    )
    return torch.cat(found).view(shape)


def our_blocks(form: Form) -> BlockMask | None:
    """Return the states for our lists."""
    if form.mask is None:
        return None
    return BlockMask(states_of(form, 64, 64).cpu().numpy(), (64, 64), (form.N, form.N))


def their_blocks(form: Form) -> Any:
    """Return FlexAttention's block mask, with tiles of its default size."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask as TheirBlockMask

    if form.their_mask is None:
        return None
    states = states_of(form, 128, 128)
    listed: list[Any] = []
    for wanted in (PARTIAL, FULL):
        dense = (states == wanted).int()
        listed += [
            dense.sum(-1).to(torch.int32),
            torch.argsort(dense, dim=-1, descending=True, stable=True).to(torch.int32),
        ]
    return TheirBlockMask.from_kv_blocks(
        listed[0],
        listed[1],
        listed[2],
        listed[3],
        BLOCK_SIZE=(128, 128),
        mask_mod=form.their_mask,
        seq_lengths=(form.N, form.N),
    )
