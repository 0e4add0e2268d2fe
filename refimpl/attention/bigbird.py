"""BigBird: blocks of queries that see random blocks of keys, a window of them, and a few global ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from refimpl.attention.bigbird_mixing import diameter, spectral_gap
from refimpl.attention.bigbird_plan import bigbird_block_mask, checked_plan
from refimpl.attention.block_sparse import expanded_mask
from refimpl.attention.dense import (
    AttentionGradients,
    AttentionOutput,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.attention.patterns import dense_case, self_shape
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_sparse import BIGBIRD_EDGES, OPTIONS, SHAPE, sample_bigbird
from refimpl.attention.scores import AttentionOptions
from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = ["bigbird_attention", "bigbird_attention_vjp", "diameter", "spectral_gap"]


_LAYOUT: dict[str, Any] = {"block_size": 64, "window_blocks": 3, "global_blocks": (0, -1), "plan": None}


def _mask(
    length: int,
    heads: int,
    block_size: int,
    window_blocks: int,
    global_blocks: Sequence[int],
    plan: IntArray | None,
) -> BoolArray:
    """Return the mask of scores, shape (heads or 1, length, length)."""
    num_blocks = -(-length // whole("block_size", block_size))
    chosen = checked_plan(plan, heads, num_blocks)
    mask = bigbird_block_mask(num_blocks, chosen, window_blocks=window_blocks, global_blocks=global_blocks)
    return expanded_mask(mask, (block_size, block_size), length, length)


def _as_dense(case: Case) -> Case:
    """Return the same call of dense attention."""
    shape = self_shape(*case.args[:3])
    layout = {name: case.kwargs.get(name, default) for name, default in _LAYOUT.items()}
    return dense_case(case, _mask(shape.Tq, shape.Hq, **layout), *_LAYOUT)


@technique(
    "attention.bigbird",
    entries=(21,),
    kind="function",
    source=Source("Zaheer et al. 2020", "arXiv:2007.14062", "section 2 and appendix D (blocked form)"),
    axes={**SHAPE, "block_size": (1, 5), "random_blocks": (0, 2)},
    options={
        **OPTIONS,
        "window_blocks": (0, 1, 3, 5),
        "ends": ("both", "first", "none"),
        "draws": ("plan", "anywhere"),
    },
    edges=BIGBIRD_EDGES,
    sample=sample_bigbird,
    terms=lambda case: attention_terms(_as_dense(case)),
    vjp="refimpl.attention.bigbird:bigbird_attention_vjp",
)
def bigbird_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: Sequence[int] = (0, -1),
    plan: IntArray | None = None,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention over random, neighbouring and global blocks of keys.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, Dv)
        As for `scaled_dot_product_attention`, queries and keys of one sequence.
    block_size : int
        b, tokens of a block; the last block may be shorter.
    window_blocks : int
        w, blocks around a query's own, itself included: an odd number, or 0 for no window.
    global_blocks : sequence of int
        Blocks that see everything and that everything sees, counted from the end if negative.  Default: the
        first and the last, the paper's "internal" construction (ITC).
    plan : ndarray of int, shape (Hq or 1, ceil(T / b), r), optional
        Random blocks of keys for each block of queries, -1 for none; `bigbird_plan` draws them.
    return_lse : bool
        Also return the log-sum-exp of each row.
    **options
        Those of `scaled_dot_product_attention`.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention`, and if the layout does not fit the sequence.

    Notes
    -----
    A query outside the global blocks sees ``(2 + w + r) b`` keys: 512 with the paper's b = 64, w = r = 3.
    **Special cases**

    - A block that is in the window, global and in the plan, or two of these, counts once.  So block 1 and the
      last but one, whose window holds a global block, see a block less.
    - Without window, global blocks and plan nothing is seen, and the output is 0.
    - The authors' dense mask (``full_bigbird_mask``) marks the last block of 4096 tokens and is then cut, so
      shorter sequences have no global last block there; their blocked code, and this, do have one.

    References
    ----------
    .. [1] Zaheer et al., 2020, arXiv:2007.14062, section 2 (graph) and appendix D (blocks).

    Examples
    --------
    >>> import numpy as np
    >>> from refimpl.attention import bigbird_plan
    >>> x = np.random.default_rng(0).standard_normal((1, 640, 2, 4))
    >>> plan = bigbird_plan(10, heads=2, rng=0)
    >>> bigbird_attention(x, x, x, plan=plan).shape
    (1, 640, 2, 4)
    """
    layout = {
        "block_size": block_size,
        "window_blocks": window_blocks,
        "global_blocks": global_blocks,
        "plan": plan,
    }
    case = Case((q, k, v), {**layout, **options, "return_lse": return_lse})
    result: FloatArray | AttentionOutput = _as_dense(case).call(scaled_dot_product_attention)
    return result


def bigbird_attention_vjp(
    q: FloatArray, k: FloatArray, v: FloatArray, do: FloatArray, /, **options: Any
) -> AttentionGradients:
    """Return the gradients of `bigbird_attention`: those of dense attention under its mask.

    Parameters
    ----------
    q, k, v, do : ndarray of float
        As for `scaled_dot_product_attention_vjp`.
    **options
        Those of `bigbird_attention`.

    Returns
    -------
    AttentionGradients
        As `scaled_dot_product_attention_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((1, 3, 1, 4))
    >>> bigbird_attention_vjp(x, x, x, x, block_size=1, window_blocks=1, global_blocks=()).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    return scaled_dot_product_attention_vjp(q, k, v, do, **_as_dense(Case((q, k, v), options)).kwargs)
