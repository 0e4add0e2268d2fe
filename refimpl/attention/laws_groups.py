"""Laws of LongLoRA's shifted groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.attention.laws_sparse import output_of, plain, seen, without_lse
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Attention = Callable[..., Any]


@law("attention.shifted_groups")
def heads_that_stay_see_their_group(f: Attention, case: Case, close: Close) -> None:
    """The first half of the heads is dense attention on each group alone."""
    case, size = plain(without_lse(case)), case.kwargs["group_size"]
    q, k, v = case.args
    stay = q.shape[2] // 2
    whole = output_of(case, f)
    close = close.on(case)
    for start in range(0, q.shape[1], size):
        part = case.without("group_size", "ends").replace(*(x[:, start : start + size] for x in (q, k, v)))
        alone = output_of(part, scaled_dot_product_attention)
        close(whole[:, start : start + size, :stay], alone[:, :, :stay], f"the group from {start} on")


@law("attention.shifted_groups")
def shifted_heads_see_half_a_group_further(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """A shifted head sees the tokens of its group in the sequence moved by g/2, cut or joined at the ends."""
    case, size = plain(case), case.kwargs["group_size"]
    length, rolls = case.args[0].shape[1], case.kwargs["ends"] == "roll"
    mask = seen(f, case)[:, case.args[0].shape[2] // 2 :]
    group = (np.arange(length) + size // 2) // size
    if rolls:  # the half group before the start is that after the end
        group %= max(length // size, 1)
    require(np.all(mask == (group[:, None] == group)), "a shifted head sees other tokens than its group's")


@law("attention.shifted_groups")
def causal_groups_hide_what_comes_later_in_them(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """Under a causal mask a token sees those before it in its group; "roll" puts the end before the start."""
    case, size = plain(case), case.kwargs["group_size"]
    length, heads = case.args[0].shape[1], case.args[0].shape[2]
    both, causal = seen(f, case), seen(f, case.replace(causal=True))
    place = np.arange(length)
    rolled = np.where(place < size // 2, place + length, place)
    for h in range(heads):
        order = rolled if case.kwargs["ends"] == "roll" and h >= heads // 2 else place
        earlier = order <= order[:, None]
        require(
            np.all(causal[:, h] == (both[:, h] & earlier)), f"head {h} sees what comes later in its group"
        )


@law("attention.shifted_groups")
def two_layers_join_neighboring_groups(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """In two layers heads that stay and shifted ones carry a token into the near halves of both neighbors."""
    case, size = plain(case), case.kwargs["group_size"]
    if case.args[0].shape[2] < 2 or 0 in case.args[0].shape[:2]:
        return
    one = seen(f, case)[0].any(axis=0).astype(np.int64)
    tokens = np.arange(case.args[0].shape[1])
    start = tokens[:, None] // size * size - size // 2
    near = (tokens >= start) & (tokens < start + 2 * size)
    require(np.all((one @ one)[near] > 0), "a token does not reach the groups beside its own")


@law("attention.shifted_groups")
def one_group_without_a_shift_is_full_attention(f: Attention, case: Case, close: Close) -> None:
    """The heads that stay, in a group that is the whole sequence, are dense attention, causal or not."""
    case, length = without_lse(case), case.args[0].shape[1]
    if length == 0:
        return
    case = case.replace(group_size=length)
    stay = case.args[0].shape[2] // 2
    full = output_of(case.without("group_size", "ends"), scaled_dot_product_attention)
    close.on(case)(output_of(case, f)[:, :, :stay], full[:, :, :stay], "one group against dense attention")
