"""Cases on which sparse attentions are judged: those of dense attention, with queries and keys alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.bigbird_plan import bigbird_plan
from refimpl.attention.samples import sample_attention
from refimpl.registry import Case

__all__ = [
    "BIGBIRD_EDGES",
    "EDGES",
    "GLOBAL_EDGES",
    "GROUP_EDGES",
    "GROUP_OPTIONS",
    "GROUP_SHAPE",
    "OPTIONS",
    "SHAPE",
    "sample_bigbird",
    "sample_global",
    "sample_groups",
    "sample_longformer",
    "sample_pattern",
]

SHAPE = {"B": (1, 2), "T": (1, 40), "Hkv": (1, 2), "group": (1, 2), "D": (1, 5), "Dv": (1, 5)}
OPTIONS: dict[str, tuple[str | bool, ...]] = {
    "causal": (False, "top_left", "bottom_right"),
    "extra": ("none", "attn_mask", "lengths", "softcap_and_bias", "all"),
    "return_lse": (False, True),
}

_PLAIN: dict[str, int | str | bool] = {"causal": False, "extra": "none", "return_lse": False}
_SMALL: dict[str, int | str | bool] = {**_PLAIN, "B": 1, "Hkv": 1, "group": 1, "D": 3, "Dv": 2}
EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_SMALL, "T": 1, "D": 1, "Dv": 1},
    {**_SMALL, "B": 0, "T": 5},
    {**_SMALL, "T": 0},
    {**_SMALL, "T": 33, "return_lse": True},  # a ragged last block
    {**_SMALL, "T": 70, "group": 2, "causal": True},
    {**_SMALL, "T": 20},
    {**_SMALL, "T": 24, "extra": "attn_mask", "return_lse": True},  # rows that see nothing
    {**_SMALL, "T": 9, "extra": "ties"},
    {**_SMALL, "T": 18, "extra": "large", "return_lse": True},
    {**_SMALL, "B": 2, "T": 30, "causal": "bottom_right", "extra": "lengths", "return_lse": True},
)


def sample_pattern(rng: np.random.Generator, *, T: int, **shape: Any) -> Case:
    """Return a call of a self-attention of length `T`, without what says the pattern.

    Examples
    --------
    >>> shape = dict(B=1, T=4, Hkv=1, group=1, D=2, Dv=3)
    >>> [array.shape for array in sample_pattern(np.random.default_rng(0), **shape).args]
    [(1, 4, 1, 2), (1, 4, 1, 2), (1, 4, 1, 3)]
    """
    return sample_attention(rng, Tq=T, Tk=T, **shape)


_BIGBIRD: dict[str, int | str | bool] = {
    "block_size": 3,
    "random_blocks": 1,
    "window_blocks": 3,
    "ends": "both",
}
BIGBIRD_EDGES: tuple[dict[str, int | str | bool], ...] = (
    *({**edge, **_BIGBIRD} for edge in EDGES),
    {
        **_SMALL,
        **_BIGBIRD,
        "T": 20,
        "window_blocks": 0,
        "ends": "none",
        "random_blocks": 0,
    },  # nothing is seen
    {**_SMALL, **_BIGBIRD, "T": 4, "block_size": 5},  # one block, ragged, first and last
    {**_SMALL, **_BIGBIRD, "T": 12, "random_blocks": 3},  # fewer blocks left than are to be drawn
)


def sample_bigbird(
    rng: np.random.Generator,
    *,
    block_size: int,
    random_blocks: int,
    window_blocks: int = 3,
    ends: str = "both",
    **shape: Any,
) -> Case:
    """Return a call of BigBird; `ends` says which blocks are global: "both", "first" or "none".

    Examples
    --------
    >>> shape = dict(B=1, T=12, Hkv=1, group=1, D=2, Dv=2)
    >>> sample_bigbird(np.random.default_rng(0), block_size=2, random_blocks=1, **shape).kwargs["plan"].shape
    (1, 6, 1)
    """
    case = sample_pattern(rng, **shape)
    layout: dict[str, Any] = {
        "window_blocks": window_blocks,
        "global_blocks": {"both": (0, -1), "first": (0,), "none": ()}[ends],
    }
    plan = bigbird_plan(
        -(-shape["T"] // block_size),
        heads=case.args[0].shape[2],
        random_blocks=random_blocks,
        rng=int(rng.integers(2**31)),
        **layout,
    )
    return case.replace(block_size=block_size, plan=plan, **layout)


# A length that groups divide: so many groups, each of two halves.
GROUP_SHAPE = {
    **{axis: limits for axis, limits in SHAPE.items() if axis != "T"},
    "groups": (1, 5),
    "half": (1, 4),
}
GROUP_OPTIONS: dict[str, tuple[str | bool, ...]] = {
    **OPTIONS,
    "extra": ("none", "attn_mask", "softcap_and_bias", "dropout"),
    "ends": ("roll", "no_wrap"),
}
GROUP_EDGES: tuple[dict[str, int | str | bool], ...] = (
    {**_SMALL, "groups": 1, "half": 1, "ends": "roll", "D": 1},
    {**_SMALL, "B": 0, "groups": 2, "half": 1, "ends": "no_wrap"},
    {**_SMALL, "groups": 0, "half": 1, "ends": "no_wrap"},
    {**_SMALL, "groups": 3, "half": 2, "ends": "roll", "group": 2, "causal": True},
    {**_SMALL, "groups": 3, "half": 2, "ends": "no_wrap", "group": 2, "causal": True, "return_lse": True},
    {**_SMALL, "groups": 2, "half": 4, "ends": "roll", "group": 3, "extra": "attn_mask"},
    {**_SMALL, "groups": 2, "half": 2, "ends": "roll", "extra": "ties"},
    {**_SMALL, "groups": 3, "half": 3, "ends": "no_wrap", "extra": "large", "return_lse": True},
    {
        **_SMALL,
        "groups": 1,
        "half": 70,
        "ends": "no_wrap",
        "causal": True,
        "D": 1,
    },  # several tiles in a group
    {**_SMALL, "groups": 2, "half": 70, "ends": "roll", "causal": True, "group": 2, "D": 1},
)


def sample_groups(rng: np.random.Generator, *, groups: int, half: int, ends: str, **shape: Any) -> Case:
    """Return a call of shifted groups, of ``2 half`` tokens each.

    Examples
    --------
    >>> shape = dict(B=1, groups=3, half=2, Hkv=1, group=2, D=2, Dv=2)
    >>> sample_groups(np.random.default_rng(0), ends="roll", **shape).kwargs
    {'group_size': 4, 'ends': 'roll'}
    """
    case = sample_pattern(rng, T=2 * groups * half, **shape)
    return case.replace(group_size=2 * half, ends=ends)


GLOBAL_EDGES: tuple[dict[str, int | str | bool], ...] = tuple(
    {**edge, "radius": radius, "hubs": count, "alike": True}
    for edge, radius, count in zip(
        EDGES, (0, 2, 1, 3, 5, 40, 2, 1, 17, 4), (1, 1, 0, 2, 3, 2, 24, 1, 0, 2), strict=True
    )
)


def sample_global(
    rng: np.random.Generator, *, radius: int, hubs: int, alike: bool = True, **shape: Any
) -> Case:
    """Return a call with `hubs` global tokens, the same in every sequence if `alike`.

    Examples
    --------
    >>> shape = dict(B=2, T=4, Hkv=1, group=1, D=2, Dv=2)
    >>> sample_global(np.random.default_rng(0), radius=1, hubs=1, **shape).kwargs["is_global"].shape
    (4,)
    """
    case = sample_pattern(rng, **shape)
    rank = (
        np.argsort(rng.random((shape["B"], shape["T"])), axis=1) if not alike else rng.permutation(shape["T"])
    )
    return case.replace(radius=radius, is_global=rank < hubs)


def sample_longformer(rng: np.random.Generator, **shape: Any) -> Case:
    """Return a call with a second set of projections.

    Examples
    --------
    >>> shape = dict(B=1, T=4, Hkv=1, group=1, D=2, Dv=2, radius=1, hubs=1)
    >>> len(sample_longformer(np.random.default_rng(0), **shape).args)
    6
    """
    case = sample_global(rng, **shape)
    return case.replace(*case.args, *(rng.standard_normal(x.shape) for x in case.args))
