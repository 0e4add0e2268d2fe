"""Operations and HBM traffic of the blocked sparse attentions, from the shapes of their tiles.

Each algorithm reads a tile's queries, keys and values once, multiplies twice and writes its outputs.  The
shapes follow from the pattern and the block size; they are found here without building a tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from refimpl.numerics import Array
from refimpl.registry import Case, prices

__all__ = [
    "bigbird_flops",
    "bigbird_tiles",
    "bigbird_traffic",
    "dilated_tiles",
    "dilated_window_flops",
    "dilated_window_traffic",
    "global_tiles",
    "global_tokens_flops",
    "global_tokens_traffic",
    "group_tiles",
    "longformer_flops",
    "longformer_traffic",
    "shifted_groups_flops",
    "shifted_groups_traffic",
    "sliding_window_flops",
    "sliding_window_traffic",
    "window_tiles",
]

Shapes = list[tuple[int, int, int]]  # queries and keys of a tile, and how many heads have such a one

_SLIDING_WINDOW = "refimpl.attention.sliding_window_banded:sliding_window_attention_banded"
_DILATED_WINDOW = "refimpl.attention.dilated_window:dilated_window_attention_banded"
_GLOBAL_TOKENS = "refimpl.attention.global_tokens:global_tokens_attention_blocked"
_LONGFORMER = "refimpl.attention.longformer:longformer_attention_blocked"
_BIGBIRD = "refimpl.attention.bigbird_blocked:bigbird_attention_blocked"
_SHIFTED_GROUPS = "refimpl.attention.shifted_groups:shifted_groups_attention_grouped"


def _looks_back_only(options: Any) -> bool:
    """Return whether a causal mask hides all later keys, whatever the padding."""
    padded = options.get("q_lengths") is not None or options.get("k_lengths") is not None
    return bool(options.get("causal", False)) and not (options.get("causal") == "bottom_right" and padded)


def _band(length: int, case: Case) -> tuple[Array, Array, Array, Array]:
    """Return first query, end of the queries, first key and end of the keys of each tile of a band."""
    from refimpl.attention.sliding_window_banded import SHORTEST_BLOCK

    radius = case.kwargs["radius"]
    block = case.kwargs.get("block_size") or max(radius, SHORTEST_BLOCK)
    start = np.arange(0, length, block)
    stop = np.minimum(start + block, length)
    last = stop if _looks_back_only(case.kwargs) else np.minimum(stop + radius, length)
    return start, stop, np.maximum(start - radius, 0), last


def window_tiles(case: Case) -> Shapes:
    """Return the tiles of ``sliding_window_attention_banded``."""
    B, T, H, _ = case.args[0].shape
    start, stop, low, high = _band(T, case)
    return [(n, m, B * H) for n, m in zip((stop - start).tolist(), (high - low).tolist(), strict=True)]


def dilated_tiles(case: Case) -> Shapes:
    """Return the tiles of ``dilated_window_attention_banded``: a band for each class of positions."""
    B, T, H, _ = case.args[0].shape
    shapes: Shapes = []
    for gap in np.broadcast_to(case.kwargs["dilation"], (H,)).tolist():
        for first in range(min(gap, T)):
            start, stop, low, high = _band(-(-(T - first) // gap), case)
            shapes += [(n, m, B) for n, m in zip((stop - start).tolist(), (high - low).tolist(), strict=True)]
    return shapes


def global_tiles(case: Case) -> Shapes:
    """Return the tiles of ``global_tokens_attention_blocked`` and of ``longformer_attention_blocked``."""
    from refimpl.attention.sliding_window_banded import SHORTEST_BLOCK

    B, T, H, _ = case.args[0].shape
    block = case.kwargs.get("block_size") or max(case.kwargs["radius"], SHORTEST_BLOCK)
    backward = _looks_back_only(case.kwargs)
    shapes: Shapes = []
    for hub in np.broadcast_to(case.kwargs["is_global"], (B, T)):
        before = np.concatenate([[0], np.cumsum(hub)])  # global tokens before each position
        for start, stop, low, high in zip(*(side.tolist() for side in _band(T, case)), strict=True):
            local = stop - start - int(before[stop] - before[start])
            beside = before[low] + (0 if backward else before[T] - before[high])
            if local:
                shapes.append((local, high - low + int(beside), H))
        hubs = np.flatnonzero(hub)
        for first in range(0, len(hubs), block):
            some = hubs[first : first + block]
            shapes.append((len(some), int(some[-1]) + 1 if backward else T, H))
    return shapes


def bigbird_tiles(case: Case) -> Shapes:
    """Return the tiles of ``bigbird_attention_blocked``: what a block of queries sees, each block once."""
    (B, T, H, _), options = case.args[0].shape, case.kwargs
    size, window = options.get("block_size", 64), options.get("window_blocks", 3)
    count = -(-T // size)
    sizes = [min(size, T - size * i) for i in range(count)]
    always = {block % count for block in options.get("global_blocks", (0, -1)) if count}
    plan, backward = options.get("plan"), _looks_back_only(options)
    plan = np.full((1, count, 0), -1) if plan is None else plan
    shapes: Shapes = []
    for i, queries in enumerate(sizes):
        near = {j for j in range(count) if 2 * abs(i - j) < window}
        for drawn in plan[:, i].tolist():
            keys = set(range(count)) if i in always else near | always | {j for j in drawn if j >= 0}
            tokens = sum(sizes[j] for j in keys if j <= i or not backward)
            shapes.append((queries, tokens, B * H // len(plan)))
    return shapes


def group_tiles(case: Case) -> Shapes:
    """Return the tiles of ``shifted_groups_attention_grouped``: groups, in pieces of their queries."""
    from refimpl.attention.shifted_groups import BLOCK

    (B, T, H, _), size = case.args[0].shape, case.kwargs["group_size"]
    whole = [size] * (T // size)
    cut = case.kwargs.get("ends", "roll") == "no_wrap" and T > 0
    shifted = [size // 2, *whole[1:], size // 2] if cut else whole
    shapes: Shapes = []
    for heads, lengths in ((H // 2, whole), (H - H // 2, shifted)):
        for length in lengths:
            for first in range(0, length, BLOCK):
                stop = min(first + BLOCK, length)
                keys = stop if case.kwargs.get("causal", False) else length
                shapes.append((stop - first, keys, B * heads))
    return shapes


def _flops(case: Case, shapes: Iterable[tuple[int, int, int]]) -> dict[str, int]:
    width = case.args[0].shape[3] + case.args[2].shape[3]
    return {"flops": sum(2 * n * m * copies for n, m, copies in shapes) * width}


def _traffic(case: Case, shapes: Iterable[tuple[int, int, int]]) -> dict[str, int]:
    D, Dv, size = case.args[0].shape[3], case.args[2].shape[3], case.args[0].dtype.itemsize
    shapes = list(shapes)
    read = sum((n * D + m * (D + Dv)) * copies for n, m, copies in shapes)
    written = sum(n * Dv * copies for n, _, copies in shapes)
    return {
        "elements_read": read,
        "elements_written": written,
        "bytes_read": read * size,
        "bytes_written": written * size,
    }


@prices("attention.sliding_window", counts="flops", of=_SLIDING_WINDOW)
def sliding_window_flops(case: Case) -> dict[str, int]:
    """Return the operations of ``sliding_window_attention_banded``."""
    return _flops(case, window_tiles(case))


@prices("attention.sliding_window", counts="hbm", of=_SLIDING_WINDOW)
def sliding_window_traffic(case: Case) -> dict[str, int]:
    """Return the four counters of ``sliding_window_attention_banded``."""
    return _traffic(case, window_tiles(case))


@prices("attention.dilated_window", counts="flops", of=_DILATED_WINDOW)
def dilated_window_flops(case: Case) -> dict[str, int]:
    """Return the operations of ``dilated_window_attention_banded``."""
    return _flops(case, dilated_tiles(case))


@prices("attention.dilated_window", counts="hbm", of=_DILATED_WINDOW)
def dilated_window_traffic(case: Case) -> dict[str, int]:
    """Return the four counters of ``dilated_window_attention_banded``."""
    return _traffic(case, dilated_tiles(case))


@prices("attention.global_tokens", counts="flops", of=_GLOBAL_TOKENS)
def global_tokens_flops(case: Case) -> dict[str, int]:
    """Return the operations of ``global_tokens_attention_blocked``."""
    return _flops(case, global_tiles(case))


@prices("attention.global_tokens", counts="hbm", of=_GLOBAL_TOKENS)
def global_tokens_traffic(case: Case) -> dict[str, int]:
    """Return the four counters of ``global_tokens_attention_blocked``."""
    return _traffic(case, global_tiles(case))


@prices("attention.longformer", counts="flops", of=_LONGFORMER)
def longformer_flops(case: Case) -> dict[str, int]:
    """Return the operations of ``longformer_attention_blocked``."""
    return _flops(case, global_tiles(case))


@prices("attention.longformer", counts="hbm", of=_LONGFORMER)
def longformer_traffic(case: Case) -> dict[str, int]:
    """Return the four counters of ``longformer_attention_blocked``."""
    return _traffic(case, global_tiles(case))


@prices("attention.bigbird", counts="flops", of=_BIGBIRD)
def bigbird_flops(case: Case) -> dict[str, int]:
    """Return the operations of ``bigbird_attention_blocked``."""
    return _flops(case, bigbird_tiles(case))


@prices("attention.bigbird", counts="hbm", of=_BIGBIRD)
def bigbird_traffic(case: Case) -> dict[str, int]:
    """Return the four counters of ``bigbird_attention_blocked``."""
    return _traffic(case, bigbird_tiles(case))


@prices("attention.shifted_groups", counts="flops", of=_SHIFTED_GROUPS)
def shifted_groups_flops(case: Case) -> dict[str, int]:
    """Return the operations of ``shifted_groups_attention_grouped``."""
    return _flops(case, group_tiles(case))


@prices("attention.shifted_groups", counts="hbm", of=_SHIFTED_GROUPS)
def shifted_groups_traffic(case: Case) -> dict[str, int]:
    """Return the four counters of ``shifted_groups_attention_grouped``."""
    return _traffic(case, group_tiles(case))
