"""LoRA on an embedding, and on projections fused into one matrix, as the released code has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, IntArray, round_to, widen
from refimpl.peft.lora import lora_linear, lora_linear_vjp, scaling
from refimpl.registry import Case, Source, technique
from refimpl.transformer.embedding import embedding, indices, sum_rows
from refimpl.transformer.linear import product
from refimpl.validation import bind_axes, floating

__all__ = [
    "fused_factors",
    "lora_embedding",
    "lora_embedding_vjp",
    "lora_fused_linear",
    "lora_fused_linear_vjp",
]


def sample_embedding(rng: np.random.Generator, *, T: int, V: int, M: int, R: int) -> Case:
    """Return a call of `lora_embedding`.

    Examples
    --------
    >>> [a.shape for a in sample_embedding(np.random.default_rng(0), T=5, V=3, M=4, R=2).args]
    [(3, 2), (2, 4), (3, 4), (5,)]
    """
    arrays = tuple(rng.standard_normal(shape) for shape in ((V, R), (R, M), (V, M)))
    return Case((*arrays, rng.integers(0, V, T)), {"lora_alpha": 2.0})


def _embedding_terms(case: Case) -> tuple[int, FloatArray]:
    a, b, table = (np.abs(array) for array in case.args[:3])
    return a.shape[1] + 2, (table + scaling(2.0, a.shape[1]) * (a @ b))[case.args[3]]


@technique(
    "peft.lora.embedding",
    entries=(60,),
    kind="function",
    source=Source("loralib", "github.com/microsoft/LoRA", "layers.py, Embedding"),
    axes={"T": (0, 6), "V": (1, 5), "M": (1, 5), "R": (0, 3)},
    edges=({"T": 0}, {"T": 1, "V": 1, "M": 1, "R": 1}, {"T": 3, "R": 0}, {"T": 6, "V": 2, "R": 2}),
    sample=sample_embedding,
    terms=_embedding_terms,
    vjp="refimpl.peft.lora_layers:lora_embedding_vjp",
)
def lora_embedding(
    lora_a: FloatArray,
    lora_b: FloatArray,
    table: FloatArray,
    tokens: IntArray,
    /,
    *,
    lora_alpha: float | None = None,
) -> FloatArray:
    """Return rows of ``table + (lora_alpha / R) A B``: a look-up, and a look-up times B.

    Parameters
    ----------
    lora_a, lora_b : ndarray of float, shapes (V, R) and (R, M)
        The trained factors; an embedding starts with A = 0 (`refimpl.peft.lora_init`).
    table : ndarray of float, shape (V, M)
        The frozen embedding.
    tokens : ndarray of int, shape (...)
        Indices.
    lora_alpha : float, optional
        As for `refimpl.peft.lora_linear`.

    Returns
    -------
    ndarray of float, shape (..., M)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, are not real, or a token is no row.

    Notes
    -----
    The released code looks the factor up without merging; where it merges (``Embedding.train``), it adds
    ``B A`` without the transposition that it needs, which fails unless V = M.

    References
    ----------
    .. [1] loralib, layers.py, ``Embedding.forward``.

    Examples
    --------
    >>> a, b, table = np.array([[1.0], [0.0]]), np.array([[0.5, 0.0]]), np.eye(2)
    >>> lora_embedding(a, b, table, np.array([0, 1]))
    array([[1.5, 0. ],
           [0. , 1. ]])
    """
    lora_a, lora_b, table = floating(lora_a=lora_a, lora_b=lora_b, table=table)
    bind_axes({"table": (table, "V M"), "lora_a": (lora_a, "V R"), "lora_b": (lora_b, "R M")})
    base = widen(embedding(table, tokens))
    rows = widen(embedding(lora_a, tokens))
    low = product(rows.reshape(np.size(tokens), rows.shape[-1]), widen(lora_b)).reshape(base.shape)
    return round_to(base + low.dtype.type(scaling(lora_alpha, lora_a.shape[1])) * low, table.dtype)


def lora_embedding_vjp(
    lora_a: FloatArray,
    lora_b: FloatArray,
    table: FloatArray,
    tokens: IntArray,
    dy: FloatArray,
    /,
    *,
    lora_alpha: float | None = None,
) -> tuple[FloatArray, FloatArray]:
    """Return the gradients of the two factors; the table is frozen.

    Examples
    --------
    >>> a, b, table = np.ones((2, 1)), np.ones((1, 1)), np.zeros((2, 1))
    >>> [g.T for g in lora_embedding_vjp(a, b, table, np.array([1, 1]), np.ones((2, 1)))]
    [array([[0., 2.]]), array([[2.]])]
    """
    lora_a, lora_b, table, dy = floating(lora_a=lora_a, lora_b=lora_b, table=table, dy=dy)
    places = indices("tokens", tokens, table.shape[0])
    flat = widen(dy).reshape(places.size, table.shape[1])
    factor = scaling(lora_alpha, lora_a.shape[1])
    drows = product(flat, widen(lora_b).T)
    da = sum_rows(places.reshape(-1), drows * drows.dtype.type(factor), lora_a.shape)
    db = product(widen(lora_a)[places.reshape(-1)].T, flat)
    return round_to(da, table.dtype), round_to(db * db.dtype.type(factor), table.dtype)


def fused_factors(
    lora_a: FloatArray, lora_b: FloatArray, enabled: Sequence[bool]
) -> tuple[FloatArray, FloatArray]:
    """Return factors (K, n R) and (n R, parts N) of the whole fused update, 0 where no part is adapted.

    Parameters
    ----------
    lora_a, lora_b : ndarray of float, shapes (n, K, R) and (n, R, N)
        Factors of the n adapted parts, in order.
    enabled : sequence of bool
        Which parts are adapted: (True, False, True) for Q and V of Q, K, V.

    Returns
    -------
    tuple of two ndarrays

    Raises
    ------
    ShapeError
        If `enabled` does not name n parts.

    Examples
    --------
    >>> fused_factors(np.ones((1, 2, 1)), np.ones((1, 1, 2)), (False, True))[1]
    array([[0., 0., 1., 1.]])
    """
    n, K, R = lora_a.shape
    chosen = np.flatnonzero(np.asarray(enabled, bool))
    if len(chosen) != n:
        raise ShapeError(
            f"enabled: expected {n} adapted parts, as lora_a has, got {len(chosen)} of {enabled}"
        )
    N = lora_b.shape[2]
    wide_b = np.zeros((n * R, len(enabled) * N), lora_b.dtype)
    for index, part in enumerate(chosen):
        wide_b[index * R : (index + 1) * R, part * N : (part + 1) * N] = lora_b[index]
    return lora_a.transpose(1, 0, 2).reshape(K, n * R), wide_b


def sample_fused(rng: np.random.Generator, *, T: int, K: int, N: int, R: int, enabled: str) -> Case:
    """Return a call of `lora_fused_linear`; `enabled` such as "101" says which of three parts are adapted.

    Examples
    --------
    >>> [a.shape for a in sample_fused(np.random.default_rng(0), T=2, K=3, N=4, R=1, enabled="101").args]
    [(2, 3), (2, 3, 1), (2, 1, 4), (3, 12)]
    """
    parts = tuple(letter == "1" for letter in enabled)
    shapes = ((T, K), (sum(parts), K, R), (sum(parts), R, N), (K, len(parts) * N))
    arrays = tuple(rng.standard_normal(shape) for shape in shapes)
    return Case(arrays, {"enabled": parts, "lora_alpha": 2.0})


def _fused_terms(case: Case) -> tuple[int, FloatArray]:
    x, a, b, weight = (np.abs(array) for array in case.args)
    wide_a, wide_b = fused_factors(a, b, case.kwargs["enabled"])
    return sum(weight.shape) + 8, x @ weight + scaling(2.0, a.shape[2]) * (x @ wide_a @ wide_b)


@technique(
    "peft.lora.fused",
    entries=(60,),
    kind="function",
    source=Source("loralib", "github.com/microsoft/LoRA", "layers.py, MergedLinear"),
    axes={"T": (1, 4), "K": (1, 5), "N": (1, 4), "R": (1, 3)},
    options={"enabled": ("101", "111", "010", "000")},
    edges=(
        {"T": 0, "enabled": "101"},
        {"T": 2, "K": 0, "enabled": "101"},
        {"T": 1, "K": 1, "N": 1, "R": 1, "enabled": "111"},
        {"T": 2, "K": 3, "N": 2, "R": 2, "enabled": "000"},
        {"T": 2, "K": 3, "N": 2, "R": 2, "enabled": "001"},
    ),
    sample=sample_fused,
    terms=_fused_terms,
    vjp="refimpl.peft.lora_layers:lora_fused_linear_vjp",
)
def lora_fused_linear(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    /,
    *,
    enabled: Sequence[bool],
    lora_alpha: float | None = None,
) -> FloatArray:
    """Return ``x W`` of projections side by side in one weight, some of them with an update of their own.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Tokens by features.
    lora_a, lora_b : ndarray of float, shapes (n, K, R) and (n, R, N)
        Factors of the n adapted projections.
    weight : ndarray of float, shape (K, parts N)
        Frozen: for example Q, K and V.
    enabled : sequence of bool
        Which of the parts are adapted; n of them.
    lora_alpha : float, optional
        As for `refimpl.peft.lora_linear`.

    Returns
    -------
    ndarray of float, shape (T, parts N)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays or `enabled` do not fit, or are not real.

    Notes
    -----
    The factor is lora_alpha / R, R being the rank of one part: side by side the factors have rank n R.

    References
    ----------
    .. [1] loralib, layers.py, ``MergedLinear``.

    Examples
    --------
    >>> ones = np.ones
    >>> lora_fused_linear(ones((1, 1)), ones((1, 1, 1)), ones((1, 1, 1)), ones((1, 3)), enabled=(0, 1, 0))
    array([[1., 2., 1.]])
    """
    factors = _fused(x, lora_a, lora_b, weight, enabled, lora_alpha)
    return lora_linear(x, *factors, weight)


def lora_fused_linear_vjp(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    dy: FloatArray,
    /,
    *,
    enabled: Sequence[bool],
    lora_alpha: float | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the gradients of x and of the factors of the adapted parts; the weight is frozen.

    Examples
    --------
    >>> ones = np.ones
    >>> arrays = ones((1, 1)), ones((1, 1, 1)), 2 * ones((1, 1, 1)), ones((1, 2)), ones((1, 2))
    >>> [g.item() for g in lora_fused_linear_vjp(*arrays, enabled=(True, False))]
    [4.0, 2.0, 1.0]
    """
    wide_a, wide_b = _fused(x, lora_a, lora_b, weight, enabled, lora_alpha)
    dx, da, db = lora_linear_vjp(x, wide_a, wide_b, weight, dy)
    n, K, R = np.shape(lora_a)
    N = np.shape(lora_b)[2]
    factor = dx.dtype.type(scaling(lora_alpha, R))
    chosen = np.flatnonzero(np.asarray(enabled, bool))
    blocks = [db[i * R : (i + 1) * R, part * N : (part + 1) * N] for i, part in enumerate(chosen)]
    own = np.stack(blocks) if n else np.zeros((0, R, N), dx.dtype)
    return dx, da.reshape(K, n, R).transpose(1, 0, 2), round_to(widen(own) * factor, dx.dtype)


def _fused(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    enabled: Sequence[bool],
    lora_alpha: float | None,
) -> tuple[FloatArray, FloatArray]:
    """Return the factors of the whole update, checked, B times lora_alpha / R."""
    x, lora_a, lora_b, weight = floating(x=x, lora_a=lora_a, lora_b=lora_b, weight=weight)
    size = bind_axes(
        {
            "x": (x, "T K"),
            "lora_a": (lora_a, "n K R"),
            "lora_b": (lora_b, "n R N"),
            "weight": (weight, "K all"),
        }
    )
    if not len(enabled):
        raise OptionError("enabled: expected at least one part")
    if size["all"] != len(enabled) * size["N"]:
        raise ShapeError(f"weight: expected {len(enabled)} parts of {size['N']} outputs, got {size['all']}")
    wide_a, wide_b = fused_factors(lora_a, lora_b, enabled)
    factor = scaling(lora_alpha, size["R"])
    return wide_a, round_to(widen(wide_b) * widen(wide_b).dtype.type(factor), wide_b.dtype)
