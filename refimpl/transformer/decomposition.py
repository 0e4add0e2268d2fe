"""A feed-forward layer as a sum over groups of its hidden units: the groups only add up."""

from __future__ import annotations

from typing import get_args

import numpy as np

from refimpl.numerics import FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.activations import Activation, activate
from refimpl.transformer.ffn import sample_ffn
from refimpl.transformer.linear import linear
from refimpl.validation import bind_axes, floating, whole

__all__ = ["ffn_decomposition", "ffn_terms"]


def _sample(
    rng: np.random.Generator, *, T: int, M: int, F: int, parts: int, activation: str, bias: bool
) -> Case:
    return sample_ffn(rng, T=T, M=M, F=F, activation=activation, bias=bias).replace(parts=parts)


@technique(
    "transformer.ffn_decomposition",
    entries=(12,),
    kind="identity",
    source=Source("Ren et al. 2022", "arXiv:2205.10036", "section 2, FFN"),
    axes={"T": (0, 4), "M": (1, 5), "F": (1, 8), "parts": (1, 9)},
    options={"activation": get_args(Activation), "bias": (False, True)},
    edges=({"T": 0}, {"T": 1, "M": 1, "F": 1, "parts": 1}, {"F": 7, "parts": 3}, {"F": 4, "parts": 4}),
    sample=_sample,
)
def ffn_decomposition(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    /,
    *,
    parts: int,
    b_1: FloatArray | None = None,
    b_2: FloatArray | None = None,
    activation: Activation = "gelu",
) -> FloatArray:
    """Return a feed-forward layer as ``sum_h act(x W_1[:, h] + b_1[h]) W_2[h, :] + b_2``, h in groups.

    Parameters
    ----------
    x, w_1, w_2, b_1, b_2, activation
        As for `ffn`; with one group a hidden unit (``parts = F``) this is the sum as printed.
    parts : int
        Groups of neighbouring hidden units, as equal as can be.  More than F leaves some of them empty.

    Returns
    -------
    ndarray of float, shape (..., M')
        Equal to `ffn`.

    Raises
    ------
    ShapeError, DTypeError
        As for `ffn`.
    OptionError
        If `parts` is below 1.

    Notes
    -----
    ``b_2`` is added once, outside the sum.  The groups are what tensor parallelism gives to ranks, and what
    fine-grained experts and structured pruning leave out.

    References
    ----------
    .. [1] Ren et al., 2022, "Exploring extreme parameter compression for pre-trained language models",
       arXiv:2205.10036 (ICLR 2022, whose program names Wang first).

    Examples
    --------
    >>> eye = np.eye(2)
    >>> ffn_decomposition(np.array([[1.0, 3.0]]), eye, eye, parts=2, b_2=np.ones(2), activation="relu")
    array([[2., 4.]])
    """
    (x,) = floating(x=x)
    total = ffn_terms(x, w_1, w_2, parts=parts, b_1=b_1, activation=activation).sum(axis=0)
    if b_2 is not None:
        (b_2,) = floating(b_2=b_2)
        bind_axes({"w_2": (np.asarray(w_2), "F N"), "b_2": (b_2, "N")})
        total = total + widen(b_2).astype(total.dtype)
    return round_to(total, x.dtype)


def ffn_terms(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    /,
    *,
    parts: int,
    b_1: FloatArray | None = None,
    activation: Activation = "gelu",
) -> FloatArray:
    """Return what each group of hidden units adds, shape (parts, ..., M'), in the wide dtype.

    Parameters
    ----------
    x, w_1, w_2, parts, b_1, activation
        As for `ffn_decomposition`.

    Returns
    -------
    ndarray of float, shape (parts, ..., M')
        Removing group i from the layer subtracts term i and nothing else.

    Examples
    --------
    >>> eye = np.eye(2)
    >>> ffn_terms(np.array([[1.0, 3.0]]), eye, eye, parts=2, activation="relu")[:, 0]
    array([[1., 0.],
           [0., 3.]])
    """
    whole("parts", parts)
    given = {"x": x, "w_1": w_1, "w_2": w_2} | ({} if b_1 is None else {"b_1": b_1})
    arrays = {name: widen(a) for name, a in zip(given, floating(**given), strict=True)}
    bind_axes({"w_1": (arrays["w_1"], "M F"), "w_2": (arrays["w_2"], "F N")})
    hidden = activate(activation, linear(arrays["x"], arrays["w_1"], arrays.get("b_1"), name="w_1"))
    # Each group by itself: its columns of W_1 and its rows of W_2.
    ends = np.cumsum([len(group) for group in np.array_split(np.arange(hidden.shape[-1]), parts)])[:-1]
    wide = hidden.astype(wide_dtype(hidden.dtype), copy=False)  # terms are summed before they are rounded
    pairs = zip(np.split(wide, ends, axis=-1), np.split(arrays["w_2"], ends, axis=0), strict=True)
    return np.stack([linear(units, rows, name="w_2") for units, rows in pairs])
