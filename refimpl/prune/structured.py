"""Structured pruning of neurons: hidden units masked, and the smaller layer that gives the same output."""

from __future__ import annotations

import numpy as np

from refimpl.errors import DTypeError, ShapeError
from refimpl.numerics import Array, BoolArray, FloatArray, round_to, widen
from refimpl.registry import Case, Source, implements, technique
from refimpl.transformer.activations import Activation
from refimpl.transformer.ffn import FFNGradients, ffn, ffn_vjp
from refimpl.validation import as_array, bind_axes, floating

__all__ = ["compacted_ffn", "kept_units", "masked_ffn", "masked_ffn_vjp", "sample_mask"]


def sample_mask(rng: np.random.Generator, n: int, kept: str) -> BoolArray:
    """Return a mask of n units: "some" of them, "all" or "none".

    Examples
    --------
    >>> sample_mask(np.random.default_rng(0), 2, "none")
    array([False, False])
    """
    return {"all": np.ones(n, bool), "none": np.zeros(n, bool)}.get(kept, rng.random(n) < 0.6)


def kept_units(keep: Array, size: int) -> BoolArray:
    """Return a mask of units, checked.

    Raises
    ------
    ShapeError, DTypeError
        If it is not `size` booleans.

    Examples
    --------
    >>> kept_units([True, False], 2)
    array([ True, False])
    """
    keep = as_array("keep", keep)
    if keep.dtype != np.bool_:
        raise DTypeError(f"keep: expected booleans, got {keep.dtype}")
    if keep.shape != (size,):
        raise ShapeError(f"keep: expected shape ({size},), got {keep.shape}")
    return keep


def sample_ffn_units(rng: np.random.Generator, *, T: int, M: int, F: int, kept: str, bias: bool) -> Case:
    """Return a call of `masked_ffn`.

    Examples
    --------
    >>> shape = dict(T=2, M=3, F=4, kept="all", bias=False)
    >>> [a.shape for a in sample_ffn_units(np.random.default_rng(0), **shape).args]
    [(2, 3), (3, 4), (4, 3), (4,)]
    """
    x, w_1, w_2 = (rng.standard_normal(shape) for shape in ((T, M), (M, F), (F, M)))
    options = {"b_1": rng.standard_normal(F), "b_2": rng.standard_normal(M)} if bias else {}
    return Case((x, w_1, w_2, sample_mask(rng, F, kept)), options)


def _ffn_terms(case: Case) -> tuple[int, FloatArray]:
    x, w_1, w_2 = (np.abs(array) for array in case.args[:3])
    b_1, b_2 = (np.abs(case.kwargs.get(name, np.zeros(1))) for name in ("b_1", "b_2"))
    return sum(w_1.shape) + 4, (x @ w_1 + b_1) @ w_2 + b_2


@technique(
    "prune.structured",
    entries=(79,),
    kind="function",
    source=Source("Xia et al. 2023", "arXiv:2310.06694", "section 2.1: masks over units"),
    axes={"T": (1, 4), "M": (1, 5), "F": (1, 6)},
    options={"kept": ("some", "all", "none"), "bias": (False, True)},
    edges=(
        {"T": 0, "kept": "some"},
        {"T": 1, "M": 1, "F": 1, "kept": "all"},
        {"T": 2, "M": 3, "F": 5, "kept": "none", "bias": True},
        {"T": 2, "M": 3, "F": 5, "kept": "all", "bias": True},
    ),
    sample=sample_ffn_units,
    terms=_ffn_terms,
    vjp="refimpl.prune.structured:masked_ffn_vjp",
)
def masked_ffn(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    keep: BoolArray,
    /,
    *,
    b_1: FloatArray | None = None,
    b_2: FloatArray | None = None,
    activation: Activation = "relu",
) -> FloatArray:
    """Return a feed-forward layer whose hidden units outside `keep` give nothing.

    Parameters
    ----------
    x, w_1, w_2, b_1, b_2, activation
        As for `refimpl.transformer.ffn`.
    keep : ndarray of bool, shape (F,)
        Which hidden units stay.

    Returns
    -------
    ndarray of float, shape (..., M)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, are not real, or `keep` is not boolean.

    Notes
    -----
    A unit's row of W_2 is masked, not its activation's input: the bias of a removed unit goes with it, which
    matters for activations that are not 0 at 0.  The last bias stays.

    References
    ----------
    .. [1] Xia et al., 2023, arXiv:2310.06694, section 2.1.

    Examples
    --------
    >>> masked_ffn(np.ones((1, 1)), np.ones((1, 2)), np.array([[1.0], [5.0]]), np.array([True, False]))
    array([[1.]])
    """
    return ffn(x, w_1, _masked(w_2, keep), b_1=b_1, b_2=b_2, activation=activation)


def masked_ffn_vjp(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    keep: BoolArray,
    dy: FloatArray,
    /,
    *,
    b_1: FloatArray | None = None,
    b_2: FloatArray | None = None,
    activation: Activation = "relu",
) -> FFNGradients:
    """Return the gradients of `masked_ffn`: those of the layer, 0 for what belongs to a removed unit.

    Parameters
    ----------
    x, w_1, w_2, keep, b_1, b_2, activation
        As for `masked_ffn`.
    dy : ndarray of float, shape (..., M)
        Gradient of the output.

    Returns
    -------
    FFNGradients

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `masked_ffn`.

    Examples
    --------
    >>> one, keep = np.ones((1, 1)), np.array([True, False])
    >>> masked_ffn_vjp(one, np.ones((1, 2)), np.ones((2, 1)), keep, one).dw_1
    array([[1., 0.]])
    """
    found = ffn_vjp(x, w_1, _masked(w_2, keep), dy, b_1=b_1, b_2=b_2, activation=activation)
    return found._replace(dw_2=_masked(found.dw_2, keep))


@implements("prune.structured", backend="numpy")
def compacted_ffn(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    keep: BoolArray,
    /,
    *,
    b_1: FloatArray | None = None,
    b_2: FloatArray | None = None,
    activation: Activation = "relu",
) -> FloatArray:
    """Return `masked_ffn` from the smaller layer: columns of W_1 and rows of W_2 taken out.

    Examples
    --------
    >>> compacted_ffn(np.ones((1, 1)), np.ones((1, 2)), np.array([[1.0], [5.0]]), np.array([True, False]))
    array([[1.]])
    """
    keep = kept_units(keep, np.shape(w_2)[0])
    small = None if b_1 is None else b_1[keep]
    return ffn(x, w_1[:, keep], w_2[keep], b_1=small, b_2=b_2, activation=activation)


def _masked(w: FloatArray, keep: BoolArray) -> FloatArray:
    """Return a matrix with the rows of removed units set to 0."""
    (w,) = floating(w_2=w)
    bind_axes({"w_2": (w, "F M")})
    wide = widen(w)
    return round_to(wide * kept_units(keep, w.shape[0])[:, None].astype(wide.dtype), w.dtype)
