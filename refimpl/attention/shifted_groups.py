"""LongLoRA's shifted sparse attention, S²-Attn: groups of tokens, half of the heads moved by half a group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Unpack

import numpy as np

from refimpl.attention.dense import (
    AttentionGradients,
    AttentionOutput,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.attention.patterns import Tile, blocks_of, dense_case, self_shape, tiled, tiled_vjp
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_sparse import GROUP_EDGES, GROUP_OPTIONS, GROUP_SHAPE, sample_groups
from refimpl.attention.scores import AttentionOptions, AttentionShape
from refimpl.errors import OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.registry import Case, Source, implements, technique
from refimpl.validation import whole

__all__ = [
    "shifted_groups_attention",
    "shifted_groups_attention_grouped",
    "shifted_groups_attention_grouped_vjp",
    "shifted_groups_attention_vjp",
    "token_groups",
]

Ends = Literal["roll", "no_wrap"]
BLOCK = 128  # queries of a tile: a group of N/4 tokens has too many scores to hold at once


def token_groups(length: int, group_size: int, *, shifted: bool, ends: Ends) -> list[IntArray]:
    """Return the groups of tokens, each in the order in which a causal mask counts.

    Examples
    --------
    >>> [group.tolist() for group in token_groups(8, 4, shifted=True, ends="roll")]
    [[2, 3, 4, 5], [6, 7, 0, 1]]
    >>> [group.tolist() for group in token_groups(8, 4, shifted=True, ends="no_wrap")]
    [[0, 1], [2, 3, 4, 5], [6, 7]]
    """
    tokens, half = np.arange(length), group_size // 2
    if not shifted:
        return blocks_of(tokens, group_size)
    if ends == "roll":
        return blocks_of(np.roll(tokens, -half), group_size)
    return [tokens[:half], *blocks_of(tokens[half:], group_size)] if length else []


def _groups_of_heads(
    shape: AttentionShape, group_size: int, ends: Ends
) -> list[tuple[list[int], list[IntArray]]]:
    """Return the heads that are not shifted and those that are, each with their groups of tokens."""
    if whole("group_size", group_size) % 2:
        raise OptionError(f"group_size: half of it is the shift, so it must be even, got {group_size}")
    if shape.Tq % group_size:
        raise ShapeError(f"q: group_size must divide T; got T={shape.Tq}, group_size={group_size}")
    if ends not in ("roll", "no_wrap"):
        raise OptionError(f"ends: expected 'roll' or 'no_wrap', got {ends!r}")
    middle = shape.Hq // 2
    return [
        (heads, token_groups(shape.Tq, group_size, shifted=shifted, ends=ends))
        for heads, shifted in ((list(range(middle)), False), (list(range(middle, shape.Hq)), True))
    ]


def _without_causal(options: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Return whether the groups are causal, and the options without that: it counts in a group's order.

    Raises
    ------
    OptionError
        If padding could move the alignment "bottom_right".
    """
    causal = options.get("causal", False)
    if not isinstance(causal, bool | np.bool_) and causal not in ("top_left", "bottom_right"):
        raise OptionError(f"causal: expected False, True, 'top_left' or 'bottom_right', got {causal!r}")
    padded = options.get("q_lengths") is not None or options.get("k_lengths") is not None
    if causal == "bottom_right" and padded:
        raise OptionError(
            "causal: 'bottom_right' has no meaning in groups of padded sequences; say 'top_left'"
        )
    return bool(causal), {name: value for name, value in options.items() if name != "causal"}


def _as_dense(case: Case) -> Case:
    """Return the same call of dense attention, under a mask that differs by head."""
    shape = self_shape(*case.args[:3])
    case_options: dict[str, Any] = dict(case.kwargs)
    causal, rest = _without_causal(case_options)
    mask: BoolArray = np.zeros((shape.Hq, shape.Tq, shape.Tq), dtype=bool)
    for heads, groups in _groups_of_heads(shape, rest["group_size"], rest.get("ends", "roll")):
        for group in groups:
            inside = np.tri(len(group), dtype=bool) if causal else np.ones((len(group),) * 2, dtype=bool)
            mask[np.ix_(np.asarray(heads, np.int64), group, group)] = inside
    return dense_case(Case(case.args, rest), mask, "group_size", "ends")


@technique(
    "attention.shifted_groups",
    entries=(105,),
    kind="function",
    source=Source("Chen et al. 2023", "arXiv:2309.12307", "section 3.2, Algorithm 1"),
    axes=GROUP_SHAPE,
    options=GROUP_OPTIONS,
    edges=GROUP_EDGES,
    sample=sample_groups,
    terms=lambda case: attention_terms(_as_dense(case)),
    vjp="refimpl.attention.shifted_groups:shifted_groups_attention_vjp",
)
def shifted_groups_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    group_size: int,
    ends: Ends = "roll",
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention inside groups of tokens, shifted by half a group for the second half of the heads.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, Dv)
        As for `scaled_dot_product_attention`, queries and keys of one sequence.
    group_size : int
        g, tokens of a group: even, and a divisor of T.  The paper's is T/4.
    ends : {"roll", "no_wrap"}
        What the shift does at the ends.  "roll": the sequence is rolled, so one group joins its end and its
        start, as Algorithm 1 prints it; "no_wrap": the end and the start are groups of g/2 tokens each, as
        the FlashAttention path of the authors' repository has it [2]_.
    return_lse : bool
        Also return the log-sum-exp of each row.
    **options
        Those of `scaled_dot_product_attention`; `causal` counts in the order of a group.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention`, if g is odd or does not divide T, or if q and k differ in length.

    Notes
    -----
    Of H query heads the first ``H // 2`` stay, the others are shifted: one head alone is shifted.  For
    training only: inference takes full attention.  **Special cases**

    - With "roll" and a causal mask the first g/2 tokens see the last g/2, which lie in their future: the mask
      is that of a group, and in the joined group the end comes first.  "no_wrap" is that group cut in two.
    - An odd g has no half; the two paths of the repository round it differently.

    References
    ----------
    .. [1] Chen et al., 2023, arXiv:2309.12307, section 3.2, Algorithm 1.
    .. [2] github.com/dvlab-research/LongLoRA, llama_attn_replace.py, `forward_flashattn` (`cu_q_lens`) and
       `forward_noflashattn` (`roll`).

    Examples
    --------
    One head, shifted, over two groups of two tokens; equal keys give a group's mean:

    >>> x, v = np.ones((1, 4, 1, 8)), np.array([0.0, 1.0, 2.0, 6.0]).reshape(1, 4, 1, 1)
    >>> shifted_groups_attention(x, x, v, group_size=2).ravel()
    array([3. , 1.5, 1.5, 3. ])
    >>> shifted_groups_attention(x, x, v, group_size=2, ends="no_wrap").ravel()
    array([0. , 1.5, 1.5, 6. ])
    """
    pattern = {"group_size": group_size, "ends": ends}
    case = Case((q, k, v), {**options, **pattern, "return_lse": return_lse})
    result: FloatArray | AttentionOutput = _as_dense(case).call(scaled_dot_product_attention)
    return result


def shifted_groups_attention_vjp(
    q: FloatArray, k: FloatArray, v: FloatArray, do: FloatArray, /, **options: Any
) -> AttentionGradients:
    """Return the gradients of `shifted_groups_attention`: those of dense attention under its mask.

    Examples
    --------
    >>> x = np.ones((1, 4, 1, 4))
    >>> shifted_groups_attention_vjp(x, x, x, x, group_size=2).dv[0, :, 0, 0]
    array([1., 1., 1., 1.])
    """
    return scaled_dot_product_attention_vjp(q, k, v, do, **_as_dense(Case((q, k, v), options)).kwargs)


@implements("attention.shifted_groups", backend="numpy")
def shifted_groups_attention_grouped(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    group_size: int,
    ends: Ends = "roll",
    return_lse: bool = False,
    memory: Memory | None = None,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return `shifted_groups_attention`, group by group: O(N g) time, O(N) memory.

    Parameters
    ----------
    q, k, v, group_size, ends, return_lse, **options
        As for `shifted_groups_attention`.
    memory : Memory, optional
        Counts traffic and operations.

    Returns
    -------
    ndarray or AttentionOutput
        As `shifted_groups_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `shifted_groups_attention`.

    References
    ----------
    .. [1] Chen et al., 2023, arXiv:2309.12307, Algorithm 1.

    Examples
    --------
    >>> x = np.random.default_rng(0).standard_normal((1, 40, 2, 4))
    >>> grouped = shifted_groups_attention_grouped(x, x, x, group_size=10)
    >>> bool(np.allclose(grouped, shifted_groups_attention(x, x, x, group_size=10)))
    True
    """
    causal, rest = _without_causal(dict(options))
    tiles = _tiles(self_shape(q, k, v), group_size, ends, causal)
    return tiled(q, k, v, tiles, AttentionOptions(**rest), return_lse=return_lse, memory=memory)  # type: ignore[typeddict-item]


def shifted_groups_attention_grouped_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    group_size: int,
    ends: Ends = "roll",
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `shifted_groups_attention_grouped`, in O(N g) time and O(N) memory.

    Raises
    ------
    UnsupportedError
        With `bias`, whose gradient is as large as the scores.

    Examples
    --------
    >>> x = np.ones((1, 4, 1, 4))
    >>> shifted_groups_attention_grouped_vjp(x, x, x, x, group_size=2).dv[0, :, 0, 0]
    array([1., 1., 1., 1.])
    """
    causal, rest = _without_causal(dict(options))
    tiles = _tiles(self_shape(q, k, v), group_size, ends, causal)
    return tiled_vjp(q, k, v, do, tiles, AttentionOptions(**rest))  # type: ignore[typeddict-item]


def _tiles(shape: AttentionShape, group_size: int, ends: Ends, causal: bool) -> Iterator[Tile]:
    """Yield the groups in tiles of some queries; under a causal mask a tile ends at its last query."""
    for heads, groups in _groups_of_heads(shape, group_size, ends):
        for group in groups:
            for places in blocks_of(np.arange(len(group)), BLOCK):
                keys = np.arange(places[-1] + 1 if causal else len(group))
                allowed = keys <= places[:, None] if causal else None
                yield Tile(range(shape.B), heads, group[places], group[keys], allowed)
