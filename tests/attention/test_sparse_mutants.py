"""Sparse attentions that are wrong in one way: the laws and the references must catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import attention, registry
from refimpl.attention.bigbird_mixing import Mixing
from refimpl.attention.patterns import Tile, tiled
from refimpl.testing import check

registry.load()

Function = Callable[..., Any]
MUTANTS: dict[str, tuple[str, Function]] = {}
dense = attention.scaled_dot_product_attention


def mutant(*techniques: str) -> Callable[[Function], Function]:
    def register(f: Function) -> Function:
        for technique in techniques:
            MUTANTS[f"{technique}-{f.__name__}"] = (f"attention.{technique}", f)
        return f

    return register


def _distance(q: Any) -> Any:
    i = np.arange(q.shape[1])
    return i[:, None] - i


@mutant("sliding_window")
def radius_is_the_total(q: Any, k: Any, v: Any, /, *, radius: int, **options: Any) -> Any:
    return attention.sliding_window_attention(q, k, v, radius=radius // 2, **options)


@mutant("sliding_window")
def one_key_less(q: Any, k: Any, v: Any, /, *, radius: int, **options: Any) -> Any:
    return attention.sliding_window_attention(q, k, v, radius=max(radius - 1, 0), **options)


@mutant("sliding_window")
def always_causal(q: Any, k: Any, v: Any, /, *, radius: int) -> Any:
    return attention.sliding_window_attention(q, k, v, radius=radius, causal=True)


@mutant("sliding_window")
def window_wraps_around(q: Any, k: Any, v: Any, /, *, radius: int) -> Any:
    length = max(q.shape[1], 1)
    steps = _distance(q) % length
    return dense(q, k, v, attn_mask=np.minimum(steps, length - steps) <= radius)


@mutant("sliding_window")
def zeros_inside_the_softmax(q: Any, k: Any, v: Any, /, *, radius: int) -> Any:
    """Scores outside the window are 0 and not masked, as with padding by zeros."""
    near = np.abs(_distance(q)) <= radius
    group = q.shape[2] // k.shape[2]
    s = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, group, axis=2)) * q.shape[3] ** -0.5 * near
    return dense(np.zeros_like(q), k, v, bias=s)


@mutant("sliding_window")
def blocks_see_their_own_keys_only(q: Any, k: Any, v: Any, /, *, radius: int) -> Any:
    block = np.arange(q.shape[1]) // 16
    return dense(q, k, v, attn_mask=(np.abs(_distance(q)) <= radius) & (block[:, None] == block))


@mutant("sliding_window")
def band_not_masked_in_its_blocks(q: Any, k: Any, v: Any, /, *, radius: int) -> Any:
    tiles = []
    for start in range(0, q.shape[1], 16):
        rows = np.arange(start, min(start + 16, q.shape[1]))
        columns = np.arange(max(0, start - radius), min(q.shape[1], rows[-1] + 1 + radius))
        tiles.append(Tile(range(q.shape[0]), range(q.shape[2]), rows, columns))
    return tiled(q, k, v, tiles, {})


@mutant("sliding_window")
def last_ragged_block_lost(q: Any, k: Any, v: Any, /, *, radius: int) -> Any:
    out = attention.sliding_window_attention(q, k, v, radius=radius)
    out[:, q.shape[1] // 16 * 16 :] = 0
    return out


@mutant("dilated_window")
def dilation_ignored(q: Any, k: Any, v: Any, /, *, radius: int, dilation: Any, **options: Any) -> Any:
    return attention.sliding_window_attention(q, k, v, radius=radius, **options)


@mutant("dilated_window")
def span_not_widened(q: Any, k: Any, v: Any, /, *, radius: int, dilation: Any) -> Any:
    gaps = np.broadcast_to(dilation, q.shape[2])[:, None, None]
    distance = np.abs(_distance(q))
    return dense(q, k, v, attn_mask=(distance % gaps == 0) & (distance <= radius))


@mutant("dilated_window")
def first_head_speaks_for_all(
    q: Any, k: Any, v: Any, /, *, radius: int, dilation: Any, **options: Any
) -> Any:
    first = int(np.ravel(dilation)[0])
    return attention.dilated_window_attention(q, k, v, radius=radius, dilation=first, **options)


@mutant("dilated_window")
def dilation_counts_what_is_left_out(
    q: Any, k: Any, v: Any, /, *, radius: int, dilation: Any, **options: Any
) -> Any:
    gaps = np.asarray(dilation) + 1
    return attention.dilated_window_attention(q, k, v, radius=radius, dilation=gaps, **options)


@mutant("global_tokens")
def hubs_only_see(q: Any, k: Any, v: Any, /, *, radius: int, is_global: Any) -> Any:
    hub = np.broadcast_to(is_global, q.shape[:2])[:, None, :, None]
    return dense(q, k, v, attn_mask=(np.abs(_distance(q)) <= radius) | hub)


@mutant("global_tokens")
def hubs_are_only_seen(q: Any, k: Any, v: Any, /, *, radius: int, is_global: Any) -> Any:
    hub = np.broadcast_to(is_global, q.shape[:2])[:, None, None, :]
    return dense(q, k, v, attn_mask=(np.abs(_distance(q)) <= radius) | hub)


@mutant("global_tokens")
def hubs_in_the_window_count_twice(q: Any, k: Any, v: Any, /, *, radius: int, is_global: Any) -> Any:
    hub = np.broadcast_to(is_global, q.shape[:2])
    near = np.abs(_distance(q)) <= radius
    twice = np.log(2.0) * (near & hub[:, None, :] & ~hub[:, :, None])[:, None]
    mask = (near | hub[:, :, None] | hub[:, None, :])[:, None]
    return dense(q, k, v, attn_mask=mask, bias=twice)


@mutant("global_tokens")
def first_sequence_speaks_for_all(q: Any, k: Any, v: Any, /, *, is_global: Any, **options: Any) -> Any:
    hub = np.broadcast_to(is_global, q.shape[:2])
    hub = hub[0] if len(hub) else np.zeros(q.shape[1], dtype=bool)
    return attention.global_tokens_attention(q, k, v, is_global=hub, **options)


@mutant("longformer")
def second_projections_unused(q: Any, k: Any, v: Any, qg: Any, kg: Any, vg: Any, /, **options: Any) -> Any:
    return attention.global_tokens_attention(q, k, v, **options)


@mutant("longformer")
def global_keys_from_the_second_set(
    q: Any, k: Any, v: Any, qg: Any, kg: Any, vg: Any, /, *, is_global: Any, **options: Any
) -> Any:
    hub = np.broadcast_to(is_global, q.shape[:2])[..., None, None]
    k, v = np.where(hub, kg, k), np.where(hub, vg, v)
    return attention.longformer_attention(q, k, v, qg, kg, vg, is_global=is_global, **options)


@mutant("longformer")
def global_queries_keep_their_window(
    q: Any, k: Any, v: Any, qg: Any, kg: Any, vg: Any, /, *, radius: int, is_global: Any
) -> Any:
    hub = np.broadcast_to(is_global, q.shape[:2])[..., None, None]
    ours = attention.sliding_window_attention(qg, kg, vg, radius=radius)
    return np.where(hub, ours, attention.global_tokens_attention(q, k, v, radius=radius, is_global=is_global))


@mutant("bigbird")
def random_blocks_forgotten(q: Any, k: Any, v: Any, /, *, plan: Any, **options: Any) -> Any:
    return attention.bigbird_attention(q, k, v, **options)


@mutant("bigbird")
def first_head_draws_for_all(q: Any, k: Any, v: Any, /, *, plan: Any, **options: Any) -> Any:
    return attention.bigbird_attention(q, k, v, plan=plan if plan is None else plan[:1], **options)


@mutant("bigbird")
def random_part_made_symmetric(
    q: Any, k: Any, v: Any, /, *, plan: Any, block_size: int, **options: Any
) -> Any:
    """Blocks that a block draws see it, too."""
    if plan is None or q.shape[1] == 0:
        return attention.bigbird_attention(q, k, v, plan=plan, block_size=block_size, **options)
    heads, count, _ = plan.shape
    wide = np.full((heads, count, count), -1)
    for h, i, draw in np.argwhere(plan >= 0):
        wide[h, i, plan[h, i, draw]] = plan[h, i, draw]
        wide[h, plan[h, i, draw], i] = i
    return attention.bigbird_attention(q, k, v, plan=wide, block_size=block_size, **options)


@mutant("bigbird")
def blocks_counted_as_often_as_named(
    q: Any, k: Any, v: Any, /, *, plan: Any, block_size: int, window_blocks: int, global_blocks: Any
) -> Any:
    """The window of block 1 and its global block: without special handling they count twice."""
    count = -(-q.shape[1] // block_size)
    often = np.zeros((count, count))
    for i, j in np.ndindex(count, count):
        often[i, j] = (2 * abs(i - j) < window_blocks) + (j in {g % count for g in global_blocks})
    for block in global_blocks if count else ():
        often[block] = 1.0
    tokens = np.arange(q.shape[1]) // block_size
    with np.errstate(divide="ignore"):
        bias = np.log(often)[tokens[:, None], tokens]
    if plan is not None and (plan >= 0).any():
        raise NotImplementedError
    return dense(q, k, v, bias=bias)


@mutant("bigbird")
def last_block_not_global(q: Any, k: Any, v: Any, /, *, global_blocks: Any, **options: Any) -> Any:
    """As in the authors' dense form for inputs shorter than the longest."""
    kept = tuple(block for block in global_blocks if block >= 0)
    return attention.bigbird_attention(q, k, v, global_blocks=kept, **options)


@mutant("bigbird")
def global_blocks_do_not_see(
    q: Any, k: Any, v: Any, /, *, plan: Any, block_size: int, window_blocks: int, global_blocks: Any
) -> Any:
    count = -(-q.shape[1] // block_size)
    wide = np.full((q.shape[2], count, 2 + (0 if plan is None else plan.shape[2])), -1)
    if plan is not None:
        wide[:, :, 2:] = plan
    for place, block in enumerate(global_blocks if count else ()):
        wide[:, :, place] = block % count
    return attention.bigbird_attention(
        q, k, v, plan=wide, block_size=block_size, window_blocks=window_blocks, global_blocks=()
    )


@mutant("shifted_groups")
def nothing_shifted(q: Any, k: Any, v: Any, /, *, group_size: int, ends: str) -> Any:
    groups = np.arange(q.shape[1]) // group_size
    return dense(q, k, v, attn_mask=groups[:, None] == groups)


@mutant("shifted_groups")
def every_head_shifted(q: Any, k: Any, v: Any, /, *, group_size: int, ends: str) -> Any:
    parts = [
        attention.shifted_groups_attention(
            q[:, :, [h]], k[:, :, [g]], v[:, :, [g]], group_size=group_size, ends=ends
        )
        for h, g in ((h, h // (q.shape[2] // k.shape[2])) for h in range(q.shape[2]))
    ]
    return np.concatenate(parts, axis=2)


@mutant("shifted_groups")
def the_other_ends(q: Any, k: Any, v: Any, /, *, ends: str, **options: Any) -> Any:
    other = {"roll": "no_wrap", "no_wrap": "roll"}[ends]
    return attention.shifted_groups_attention(q, k, v, ends=other, **options)


@mutant("shifted_groups")
def never_rolled_back(q: Any, k: Any, v: Any, /, *, group_size: int, ends: str, **options: Any) -> Any:
    out = attention.shifted_groups_attention(q, k, v, group_size=group_size, ends=ends, **options)
    middle = q.shape[2] // 2
    return np.concatenate([out[:, :, :middle], np.roll(out[:, :, middle:], -group_size // 2, axis=1)], axis=2)


@mutant("shifted_groups")
def causal_by_position_in_the_roll(
    q: Any, k: Any, v: Any, /, *, causal: Any = False, ends: str, **options: Any
) -> Any:
    if not causal or ends == "no_wrap":
        return attention.shifted_groups_attention(q, k, v, causal=causal, ends=ends, **options)
    lower = np.tri(q.shape[1], dtype=bool) & options.pop("attn_mask", np.True_)
    return attention.shifted_groups_attention(q, k, v, ends=ends, attn_mask=lower, **options)


@mutant("rapid_mixing")
def rows_alone(mask: Any, /) -> Any:
    """The graph as it is directed."""
    return Mixing(attention.spectral_gap(np.tril(mask)), attention.diameter(np.tril(mask)))


@mutant("rapid_mixing")
def loops_removed(mask: Any, /) -> Any:
    return attention.rapid_mixing(mask & ~np.eye(len(mask), dtype=bool))


@mutant("rapid_mixing")
def largest_eigenvalue_by_size(mask: Any, /) -> Any:
    gap, far = attention.rapid_mixing(mask)
    if len(mask) < 2:
        return Mixing(gap, far)
    joined = (mask | mask.T).astype(float)
    degree = np.maximum(joined.sum(axis=1), 1)
    values = np.sort(np.abs(np.linalg.eigvalsh(joined / np.sqrt(degree[:, None] * degree))))
    return Mixing(1.0 - float(values[-2]), far)


@mutant("rapid_mixing")
def adjacency_not_normalized(mask: Any, /) -> Any:
    _, far = attention.rapid_mixing(mask)
    if len(mask) < 2:
        return Mixing(1.0, far)
    values = np.linalg.eigvalsh((mask | mask.T).astype(float))
    return Mixing(float(1 - values[-2] / max(values[-1], 1.0)), far)


@mutant("rapid_mixing")
def parts_forgotten(mask: Any, /) -> Any:
    gap, far = attention.rapid_mixing(mask)
    return Mixing(gap, far if np.isfinite(far) else float(len(mask)))


# What no reference is needed for: a law alone says that these are wrong.
BY_LAW = {
    "sliding_window-window_wraps_around", "sliding_window-one_key_less",
    "sliding_window-blocks_see_their_own_keys_only", "dilated_window-dilation_ignored",
    "dilated_window-span_not_widened", "global_tokens-hubs_only_see", "global_tokens-hubs_are_only_seen",
    "global_tokens-hubs_in_the_window_count_twice", "bigbird-blocks_counted_as_often_as_named",
    "longformer-second_projections_unused", "longformer-global_keys_from_the_second_set",
    "bigbird-random_blocks_forgotten", "bigbird-last_block_not_global", "bigbird-global_blocks_do_not_see",
    "shifted_groups-nothing_shifted", "shifted_groups-every_head_shifted", "shifted_groups-the_other_ends",
    "rapid_mixing-loops_removed", "rapid_mixing-parts_forgotten",
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    technique, f = MUTANTS[name]
    report = check(technique, f, examples=2)
    failed = {outcome.check for outcome in report.failed}
    assert failed - {"coverage"}, f"{name} survived {report.counts()}"
    assert name not in BY_LAW or failed & set(registry.LAWS), f"no law caught {name}, only {failed}"
