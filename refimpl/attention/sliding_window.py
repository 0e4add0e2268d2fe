"""Sliding-window attention: every token sees the tokens next to it, as a convolution does."""

from __future__ import annotations

from typing import Any, Literal, Unpack

import numpy as np

from refimpl.attention.dense import (
    AttentionGradients,
    AttentionOutput,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.attention.patterns import dense_case, self_shape
from refimpl.attention.samples import attention_terms
from refimpl.attention.samples_sparse import EDGES, OPTIONS, SHAPE, sample_pattern
from refimpl.attention.scores import AttentionOptions
from refimpl.errors import OptionError
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = [
    "sliding_window_attention",
    "sliding_window_attention_vjp",
    "window_mask",
    "window_radius",
]


def window_radius(
    window: int, /, *, convention: Literal["longformer_paper", "longformer_code", "mistral"]
) -> int:
    """Return the radius that a source's window stands for: the sources count windows in three ways.

    Parameters
    ----------
    window : int
        The source's number.
    convention : {"longformer_paper", "longformer_code", "mistral"}
        "longformer_paper": w in all, w/2 on each side [1]_, as `attention_window` in transformers;
        "longformer_code": w on each side, as `attention_window` in the authors' repository; "mistral": w keys
        with the query's own, all of them before it [2]_, to be used with a causal mask.

    Returns
    -------
    int
        Keys seen on each side.

    Raises
    ------
    OptionError
        If a total is odd, a window is negative, or one that holds the query's own key is empty.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1.
    .. [2] Jiang et al., 2023, arXiv:2310.06825, section 2, Figure 1.

    Examples
    --------
    >>> window_radius(512, convention="longformer_paper"), window_radius(4096, convention="mistral")
    (256, 4095)
    """
    if convention == "mistral":
        return whole("window", window) - 1
    if convention == "longformer_code":
        return whole("window", window, 0)
    if convention != "longformer_paper":
        raise OptionError(
            f"convention: expected 'longformer_paper', 'longformer_code' or 'mistral', got {convention!r}"
        )
    if whole("window", window, 0) % 2:
        raise OptionError(f"window: a total of w/2 on each side must be even, got {window}")
    return window // 2


def window_mask(length: int, radius: int) -> BoolArray:
    """Return where ``|i - j| <= radius``, shape (length, length).

    Examples
    --------
    >>> window_mask(4, 1).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1],
           [0, 0, 1, 1]])
    """
    i = np.arange(length)
    mask: BoolArray = np.abs(i[:, None] - i) <= radius
    return mask


def sample_window(rng: np.random.Generator, *, radius: int, **shape: Any) -> Case:
    """Return a call of sliding-window attention.

    Examples
    --------
    >>> shape = dict(B=1, T=4, Hkv=1, group=1, D=2, Dv=2)
    >>> sample_window(np.random.default_rng(0), radius=1, **shape).kwargs
    {'radius': 1}
    """
    return sample_pattern(rng, **shape).replace(radius=radius)


def _as_dense(case: Case) -> Case:
    """Return the same call of dense attention."""
    radius = whole("radius", case.kwargs["radius"], 0)
    return dense_case(case, window_mask(self_shape(*case.args[:3]).Tq, radius), "radius")


@technique(
    "attention.sliding_window",
    entries=(18,),
    kind="function",
    source=Source("Beltagy et al. 2020", "arXiv:2004.05150", "section 3.1, 'Sliding Window'"),
    axes={**SHAPE, "radius": (0, 9)},
    options=OPTIONS,
    edges=tuple(
        {**edge, "radius": radius}
        for edge, radius in zip(EDGES, (0, 2, 1, 3, 5, 40, 2, 0, 17, 4), strict=False)
    ),
    sample=sample_window,
    terms=lambda case: attention_terms(_as_dense(case)),
    vjp="refimpl.attention.sliding_window:sliding_window_attention_vjp",
)
def sliding_window_attention(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    radius: int,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> FloatArray | AttentionOutput:
    """Return attention in which token i sees token j only if ``|i - j| <= radius``.

    Parameters
    ----------
    q, k, v : ndarray of float, shapes (B, T, Hq, D), (B, T, Hkv, D), (B, T, Hkv, Dv)
        As for `scaled_dot_product_attention`, queries and keys of one sequence.
    radius : int
        Tokens seen on each side, from 0 on.  The paper's w is a total, ``w = 2 radius``, its authors'
        ``attention_window`` is the radius, Mistral's window has ``radius + 1`` keys: see `window_radius`.
    return_lse : bool
        Also return the log-sum-exp of each row.
    **options
        Those of `scaled_dot_product_attention`.  With a causal mask the lower half of the band is left.

    Returns
    -------
    ndarray or AttentionOutput
        As `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `scaled_dot_product_attention`, if `radius` is negative, or if q and k differ in length.

    Notes
    -----
    ``N (2 radius + 1) - radius (radius + 1)`` scores take part, for radius < N.  **Special cases**

    - At the ends of the sequence the window is cut off and the weights of what is left sum to 1; nothing
      wraps around, and nothing is padded with zeros inside the softmax.
    - With radius 0 the output is v; from radius T - 1 on it is full attention.

    References
    ----------
    .. [1] Beltagy et al., 2020, arXiv:2004.05150, section 3.1, "Sliding Window".

    Examples
    --------
    With equal keys, the mean over the window:

    >>> x, v = np.ones((1, 4, 1, 8)), np.array([0.0, 3.0, 6.0, 0.0]).reshape(1, 4, 1, 1)
    >>> sliding_window_attention(x, x, v, radius=1).ravel()
    array([1.5, 3. , 3. , 3. ])
    """
    case = Case((q, k, v), {**options, "radius": radius, "return_lse": return_lse})
    result: FloatArray | AttentionOutput = _as_dense(case).call(scaled_dot_product_attention)
    return result


def sliding_window_attention_vjp(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    do: FloatArray,
    /,
    *,
    radius: int,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Return the gradients of `sliding_window_attention`: those of dense attention under the band.

    Examples
    --------
    >>> x = np.ones((1, 3, 1, 4))
    >>> sliding_window_attention_vjp(x, x, x, x, radius=0).dv[0, :, 0, 0]
    array([1., 1., 1.])
    """
    case = _as_dense(Case((q, k, v), {**options, "radius": radius}))
    return scaled_dot_product_attention_vjp(q, k, v, do, **case.kwargs)
