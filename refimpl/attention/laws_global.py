"""Laws of attention with global tokens or blocks: Longformer's and BigBird's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.block_sparse import block_sparse_flash
from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.attention.global_tokens import global_tokens_attention
from refimpl.attention.laws_sparse import changed, output_of, plain, seen, without_lse
from refimpl.attention.sliding_window import sliding_window_attention
from refimpl.numerics import Array
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Attention = Callable[..., Any]


def _hub(case: Case) -> Array:
    """Return which tokens are global, shape (B, T)."""
    return np.broadcast_to(case.kwargs["is_global"], case.args[0].shape[:2])


@law("attention.global_tokens")
def window_and_hubs_are_seen_and_no_more(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """Two tokens see each other if and only if they are near or one is global: the mask is symmetric."""
    case, length = plain(case), case.args[0].shape[1]
    mask, hub = seen(f, case), _hub(case)
    i = np.arange(length)
    near = np.abs(i[:, None] - i) <= case.kwargs["radius"]
    expected = near | hub[:, :, None] | hub[:, None, :]
    require(np.all(mask == expected[:, None]), "a query sees other keys than near and global ones")


@law("attention.global_tokens")
def one_hub_joins_everything_in_two_steps(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """With a global token any two tokens are at most two layers apart."""
    case, length = plain(case), case.args[0].shape[1]
    if length == 0:
        return
    hub = np.arange(length) == length // 2
    one = seen(f, case.replace(is_global=hub)).astype(np.int64)
    require(np.all(one @ one > 0), "two tokens do not meet through the global one")


@law("attention.global_tokens")
def nothing_but_hubs_is_full_attention(f: Attention, case: Case, close: Close) -> None:
    """With every token global it is dense attention; with none it is the window."""
    case, length = without_lse(case), case.args[0].shape[1]
    every = case.replace(is_global=np.ones(length, dtype=bool))
    full = output_of(case.without("is_global", "radius"), scaled_dot_product_attention)
    close.on(every)(output_of(every, f), full, "every token global against dense attention")
    none = case.replace(is_global=np.zeros(length, dtype=bool))
    window = output_of(case.without("is_global"), sliding_window_attention)
    close.on(none)(output_of(none, f), window, "no token global against the window")


@law("attention.longformer")
def tied_projections_are_global_tokens(f: Attention, case: Case, close: Close) -> None:
    """With both sets of projections alike it is attention with global tokens, as at initialization."""
    case = without_lse(case)
    q, k, v = case.args[:3]
    tied = case.replace(q, k, v, q, k, v)
    close.on(tied)(output_of(tied, f), output_of(case.replace(q, k, v), global_tokens_attention), "tied")


@law("attention.longformer")
def global_queries_take_the_second_projections(f: Attention, case: Case, close: Close) -> None:
    """Global queries get dense attention over the second set; local ones never read it."""
    case, hub = without_lse(case), _hub(case)
    out = output_of(case, f)
    full = case.without("radius", "is_global").replace(*case.args[3:])
    close.on(case)(out[hub], output_of(full, scaled_dot_product_attention)[hub], "global queries")
    everywhere = np.ones(hub.shape[1], dtype=bool)
    other = case.replace(*case.args[:3], *(changed(x, everywhere) for x in case.args[3:]))
    close(output_of(other, f)[~hub], out[~hub], "local queries, the second projections changed")


@law("attention.longformer")
def local_queries_take_the_first_projections(f: Attention, case: Case, close: Close) -> None:
    """Local queries get global-token attention over the first set, global keys among theirs."""
    case, hub = without_lse(case), _hub(case)
    first = case.replace(*case.args[:3])
    close.on(case)(output_of(case, f)[~hub], output_of(first, global_tokens_attention)[~hub], "local queries")


def _bigbird(case: Case) -> tuple[int, int, set[int]]:
    """Return the block size, the number of blocks, and the global blocks."""
    size = case.kwargs["block_size"]
    blocks = -(-case.args[0].shape[1] // size)
    return size, blocks, {block % blocks for block in case.kwargs["global_blocks"] if blocks}


@law("attention.bigbird")
def blocks_see_random_window_and_global_ones(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """A query sees the blocks of the plan, of its window and the global ones, each once, and no others."""
    case, (size, blocks, always) = plain(case), _bigbird(case)
    reach, plan = case.kwargs["window_blocks"] // 2, case.kwargs["plan"]
    mask = seen(f, case)
    for h, i in np.ndindex(mask.shape[1], mask.shape[2]):
        own = i // size
        window = {own + step for step in range(-reach, reach + 1)} if case.kwargs["window_blocks"] else set()
        expected = window | always | set(plan[h % len(plan), own].tolist())
        expected = set(range(blocks)) if own in always else expected
        keys = [j // size in expected for j in range(mask.shape[3])]
        require(np.all(mask[:, h, i] == keys), f"query {i} of head {h} does not see the blocks {expected}")


@law("attention.bigbird")
def global_queries_have_full_attention(f: Attention, case: Case, close: Close) -> None:
    """A query of a global block gets what dense attention gives it."""
    case, (size, _, always) = without_lse(case), _bigbird(case)
    rows = np.isin(np.arange(case.args[0].shape[1]) // size, sorted(always))
    layout = ("block_size", "window_blocks", "global_blocks", "plan")
    full = output_of(case.without(*layout), scaled_dot_product_attention)
    close.on(case)(output_of(case, f)[:, rows], full[:, rows], "global queries against dense attention")


@law("attention.bigbird")
def bigbird_is_block_sparse_attention(f: Attention, case: Case, close: Close) -> None:
    """Algorithm 5 of FlashAttention gives the same, with the blocks that are seen as its tiles."""
    case, (size, blocks, _) = without_lse(case), _bigbird(case)
    if blocks == 0 or case.args[0].shape[0] == 0:
        return
    starts = np.arange(blocks) * size
    tiles = seen(f, plain(case))[:, :, starts[:, None], starts]
    flash = case.without("window_blocks", "global_blocks", "plan", "block_size").replace(
        block_mask=tiles, block_sizes=(size, size)
    )
    close.on(case)(
        output_of(case, f), output_of(flash, block_sparse_flash), "against block-sparse tiles", factor=2.0
    )


@law("attention.bigbird")
def blocks_of_one_token_are_a_window(f: Attention, case: Case, close: Close) -> None:
    """With blocks of one token, nothing random and nothing global it is sliding-window attention."""
    layout = {"block_size": 1, "window_blocks": 5, "global_blocks": (), "plan": None}
    case = without_lse(case).replace(**layout)
    window = case.without(*layout).replace(radius=2)
    close.on(case)(output_of(case, f), output_of(window, sliding_window_attention), "against the window")
