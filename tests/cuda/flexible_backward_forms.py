"""What `flexible_backward_table` measures: masks and scores, ours and FlexAttention's, and their tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend.attention.user_device import Mods
from refimpl.attention import mods
from refimpl.attention.bigbird_plan import bigbird_block_mask, bigbird_plan
from refimpl.attention.block_mask import DEAD, FULL, PARTIAL, BlockMask
from refimpl.attention.user_functions import as_mod

BIGBIRD_BLOCK, CAP, WINDOW = 64, 20.0, 1024
ROWS_AT_ONCE = 4096
# Name: sequences, heads, tokens as they are timed.
FORMS = {
    "sliding": (1, 16, 32768), "BigBird": (1, 16, 16384), "documents": (2, 16, 16384),
    "ALiBi": (4, 16, 4096), "softcap": (4, 16, 4096), "sinks": (1, 16, 16384),
}  # fmt: skip


class Form(NamedTuple):
    """Our functions with dtype and axes of their arrays; PyTorch's, with their arrays closed over."""

    mods: Mods
    aux: tuple[Any, ...]
    their_mask: Callable[..., Any]
    their_score: Callable[..., Any] | None = None
    by_head: bool = False
    by_sequence: bool = False


def sliding(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """The query's own place and the `WINDOW` before it."""
    return (j <= i) & (i - j <= WINDOW)


def sinks(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    """Causal within chunks of 2048 tokens, and the first 128 keys for all."""
    return ((i // 2048 == j // 2048) | (j < 128)) & (j <= i)


def alibi(score: Any, _b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
    """As `mods.alibi`, in float32."""
    return score - aux[0][h] * np.float32(abs(i - j))


def functions(name: str) -> Mods:
    """Return our functions of a form: no array is needed to compile them."""
    mask: Any = mods.causal
    aux: Any = ()
    score: Any = None
    vjp: Any = None
    match name:
        case "sliding":
            mask = sliding
        case "BigBird":
            mask, aux = mods.bigbird(BIGBIRD_BLOCK), (("bool", 3),)
        case "documents":
            mask, aux = mods.documents(), (("int32", 2),)
        case "packed":
            mask, aux = mods.ranges(), (("int32", 1),) * 2
        case "ALiBi":
            score, vjp, aux = alibi, mods.alibi_vjp, (("float32", 1),)
        case "softcap":
            score, vjp = mods.softcap(CAP), mods.softcap_vjp(CAP)
        case "sinks":
            mask = sinks
    return Mods(
        as_mod("mask_mod", mask),
        None if score is None else as_mod("score_mod", score, ("score",)),
        None if vjp is None else as_mod("score_mod_vjp", vjp, ("gradient", "score")),
        aux,
    )


def form_of(name: str, B: int, H: int, N: int) -> Form:
    """Return a form with its arrays on the GPU."""
    import torch

    own = functions(name)
    match name:
        case "BigBird":
            blocks = -(-N // BIGBIRD_BLOCK)
            plan = bigbird_plan(blocks, heads=H, rng=0)
            seen = bigbird_block_mask(blocks, plan, window_blocks=3, global_blocks=(0, -1))
            table = torch.from_numpy(seen).cuda()

            def bigbird(_b: Any, h: Any, i: Any, j: Any) -> Any:
                return table[h, i // BIGBIRD_BLOCK, j // BIGBIRD_BLOCK]

            return Form(own, (table,), bigbird, by_head=True)
        case "documents":
            generator = np.random.default_rng(1)
            starts = np.stack([generator.choice(np.arange(1, N), 11, replace=False) for _ in range(B)])
            numbers = (np.arange(N) >= np.sort(starts)[..., None]).sum(1).astype(np.int32)
            document = torch.from_numpy(numbers).cuda()

            def same(b: Any, _h: Any, i: Any, j: Any) -> Any:
                return document[b, i] == document[b, j]

            return Form(own, (document,), same, by_sequence=True)
        case "ALiBi":
            slopes = 2.0 ** (-0.5 * torch.arange(1, H + 1, device="cuda", dtype=torch.float32))

            def biased(score: Any, _b: Any, h: Any, i: Any, j: Any) -> Any:
                return score - slopes[h] * (i - j).abs()

            return Form(own, (slopes,), mods.causal, biased)
        case "softcap":

            def bent(score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
                return CAP * torch.tanh(score / CAP)

            return Form(own, (), mods.causal, bent)
    return Form(own, (), sliding if name == "sliding" else sinks)


def states_of(form: Form, sizes: tuple[int, int], B: int, H: int, N: int) -> Any:
    """Return the states of tiles, by their mask on the GPU."""
    import torch

    rows, columns = sizes
    found = []
    count = -(-N // columns)
    key = torch.arange(count * columns, device="cuda").clamp(max=N - 1)
    for b in range(B if form.by_sequence else 1):
        for h in range(H if form.by_head else 1):
            for start in range(0, N, ROWS_AT_ONCE):
                size = -(-min(ROWS_AT_ONCE, N - start) // rows) * rows
                query = torch.arange(start, start + size, device="cuda").clamp(max=N - 1)
                allowed = form.their_mask(b, h, query[:, None], key[None])
                tiles = allowed.view(size // rows, rows, count, columns)
                some, every = tiles.any(3).any(1), tiles.all(3).all(1)
                found.append(torch.where(every, FULL, torch.where(some, PARTIAL, DEAD)).to(torch.uint8))
    heads = H if form.by_head else 1
    return torch.cat(found).view(B if form.by_sequence else 1, heads, -(-N // rows), count)


def our_blocks(form: Form, sizes: tuple[int, int], B: int, H: int, N: int) -> BlockMask:
    """Return the states for our lists."""
    return BlockMask(states_of(form, sizes, B, H, N).cpu().numpy(), sizes, (N, N))


def their_blocks(form: Form, B: int, H: int, N: int) -> Any:
    """Return FlexAttention's block mask, with tiles of its default size."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask as TheirBlockMask

    states = states_of(form, (128, 128), B, H, N)
    listed: list[Any] = []
    for wanted in (PARTIAL, FULL):
        dense = (states == wanted).int()
        listed += [
            dense.sum(-1).to(torch.int32),
            torch.argsort(dense, dim=-1, descending=True, stable=True).to(torch.int32),
        ]
    how: dict[str, Any] = {"BLOCK_SIZE": (128, 128), "mask_mod": form.their_mask, "seq_lengths": (N, N)}
    counts, indices, full_counts, full_indices = listed
    return TheirBlockMask.from_kv_blocks(counts, indices, full_counts, full_indices, **how)
