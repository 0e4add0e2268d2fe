"""Token embedding and the output head, which may be its transpose (tied weights)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.numerics import Array, FloatArray, IntArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.linear import linear, linear_vjp
from refimpl.validation import as_array, finite, floating

__all__ = [
    "EmbeddingGradients",
    "HeadGradients",
    "embedding",
    "embedding_vjp",
    "indices",
    "output_head",
    "output_head_vjp",
    "sum_rows",
]


class EmbeddingGradients(NamedTuple):
    """Gradient of the table; tokens have none."""

    dtable: FloatArray


class HeadGradients(NamedTuple):
    """Gradients of the hidden states and the table, and of the bias if one was given."""

    dhidden: FloatArray
    dtable: FloatArray
    dbias: FloatArray | None = None


def indices(name: str, value: IntArray, size: int) -> IntArray:
    """Return `value` as an array of integers in [0, size).

    Raises
    ------
    DTypeError
        If it holds no integers.
    OptionError
        If one is outside: NumPy would count negative ones from the end.

    Examples
    --------
    >>> indices("tokens", np.array([0, 4]), 5)
    array([0, 4])
    """
    array = as_array(name, value)
    if not np.issubdtype(array.dtype, np.integer):
        raise DTypeError(f"{name}: expected integers, got {array.dtype}")
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < size):
        raise OptionError(f"{name}: expected numbers in [0, {size}), got {array.min()} to {array.max()}")
    return array


def sum_rows(rows: IntArray, dy: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Return zeros of `shape` with each token's row of `dy` added to its row: a repeated row sums.

    Examples
    --------
    >>> sum_rows(np.array([1, 1]), np.ones((2, 1)), (3, 1))[:, 0]
    array([0., 2., 0.])
    """
    total = np.zeros(shape, wide_dtype(dy.dtype))
    np.add.at(total, rows, widen(dy))
    return total


def _sample(rng: np.random.Generator, *, T: int, V: int, M: int, scaled: bool) -> Case:
    options = {"scale": M**0.5} if scaled else {}
    return Case((rng.standard_normal((V, M)), rng.integers(0, V, T)), options)


@technique(
    "transformer.embedding",
    entries=(106,),
    kind="function",
    source=Source("Vaswani et al. 2017", "arXiv:1706.03762", "section 3.4"),
    axes={"T": (0, 9), "V": (1, 5), "M": (1, 5)},
    options={"scaled": (False, True)},
    edges=({"T": 0}, {"T": 1, "V": 1, "M": 1}, {"T": 9, "V": 2}),
    sample=_sample,
    vjp="refimpl.transformer.embedding:embedding_vjp",
)
def embedding(table: FloatArray, tokens: IntArray, /, *, scale: float = 1.0) -> FloatArray:
    """Return the row of `table` of each token, times `scale`.

    Parameters
    ----------
    table : ndarray of float, shape (V, M)
        One row a token of the vocabulary.
    tokens : ndarray of int, shape (...)
        Token ids in [0, V).
    scale : float
        √M in the original Transformer and in Gemma, 1 in BERT, GPT-2 and LLaMA.

    Returns
    -------
    ndarray of float, shape (..., M)
        In the dtype of `table`.

    Raises
    ------
    OptionError
        If a token is outside the vocabulary; -1 is no token.
    DTypeError
        If tokens are no integers, or the table is not real.
    ShapeError
        If the table has not two axes.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, section 3.4.

    Examples
    --------
    >>> embedding(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 0, 1]))
    array([[3., 4.],
           [1., 2.],
           [3., 4.]])
    """
    (table,) = _table(table)
    rows = widen(table)[indices("tokens", tokens, table.shape[0])]
    return round_to(rows * rows.dtype.type(finite("scale", scale)), table.dtype)


def embedding_vjp(
    table: FloatArray, tokens: IntArray, dy: FloatArray, /, *, scale: float = 1.0
) -> EmbeddingGradients:
    """Return the gradient of ``sum(dy * embedding(table, tokens, scale=scale))``: a token's rows summed.

    Parameters
    ----------
    table, tokens, scale
        As for `embedding`.
    dy : ndarray of float, shape (..., M)
        Gradient of the output.

    Returns
    -------
    EmbeddingGradients
        Rows of tokens that do not occur are 0.

    Examples
    --------
    >>> embedding_vjp(np.zeros((3, 1)), np.array([1, 1]), np.ones((2, 1))).dtable[:, 0]
    array([0., 2., 0.])
    """
    table, dy = _table(table, dy=dy)
    tokens = indices("tokens", tokens, table.shape[0])
    if dy.shape != (*tokens.shape, table.shape[1]):
        raise ShapeError(f"dy: expected shape {(*tokens.shape, table.shape[1])}, got {dy.shape}")
    return EmbeddingGradients(round_to(scale * sum_rows(tokens, dy, table.shape), table.dtype))


def _sample_head(rng: np.random.Generator, *, T: int, V: int, M: int, bias: bool) -> Case:
    options = {"bias": rng.standard_normal(V)} if bias else {}
    return Case((rng.standard_normal((T, M)), rng.standard_normal((V, M))), options)


@technique(
    "transformer.output_head",
    entries=(106,),
    kind="function",
    source=Source("Press and Wolf 2017", "arXiv:1608.05859", "section 3"),
    axes={"T": (0, 5), "V": (1, 6), "M": (1, 6)},
    options={"bias": (False, True)},
    edges=({"T": 0}, {"T": 1, "V": 1, "M": 1}),
    sample=_sample_head,
    vjp="refimpl.transformer.embedding:output_head_vjp",
)
def output_head(hidden: FloatArray, table: FloatArray, /, *, bias: FloatArray | None = None) -> FloatArray:
    """Return the logits ``hidden Eᵀ``: the product of a token's state with every row of a table.

    Parameters
    ----------
    hidden : ndarray of float, shape (..., M)
        States.
    table : ndarray of float, shape (V, M)
        The embedding table itself (tied weights), or a table of its own in the same orientation.
    bias : ndarray of float, shape (V,), optional
        One number a token of the vocabulary (BERT has one).

    Returns
    -------
    ndarray of float, shape (..., V)
        In the common dtype.  No factor: where the embedding is scaled by √M, the head is not.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    DTypeError
        If an array is not real.

    References
    ----------
    .. [1] Press and Wolf, 2017, arXiv:1608.05859, section 3.
    .. [2] Vaswani et al., 2017, arXiv:1706.03762, section 3.4.

    Examples
    --------
    >>> output_head(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    array([[1., 2., 3.]])
    """
    given = {"table": table, "hidden": hidden} | ({} if bias is None else {"bias": bias})
    found = dict(zip(given, _table(**given), strict=True))
    _fits(found["hidden"], found["table"])
    wide = {name: widen(array) for name, array in found.items()}
    if bias is not None and wide["bias"].shape != wide["table"].shape[:1]:
        raise ShapeError(f"bias: expected shape {wide['table'].shape[:1]}, got {wide['bias'].shape}")
    return round_to(linear(wide["hidden"], wide["table"].T, wide.get("bias")), found["table"].dtype)


def output_head_vjp(
    hidden: FloatArray, table: FloatArray, dlogits: FloatArray, /, *, bias: FloatArray | None = None
) -> HeadGradients:
    """Return the gradients of ``sum(dlogits * output_head(hidden, table, bias=bias))``.

    Parameters
    ----------
    hidden, table, bias
        As for `output_head`.
    dlogits : ndarray of float, shape (..., V)
        Gradient of the output.

    Returns
    -------
    HeadGradients
        With tied weights the table has a second gradient, that of the embedding; the two add up.

    Examples
    --------
    >>> output_head_vjp(np.ones((1, 2)), np.eye(2), np.array([[1.0, 0.0]])).dtable
    array([[1., 1.],
           [0., 0.]])
    """
    table, hidden, dlogits = _table(table, hidden=hidden, dlogits=dlogits)
    _fits(hidden, table)
    if dlogits.shape != (*hidden.shape[:-1], table.shape[0]):
        raise ShapeError(f"dlogits: expected shape {(*hidden.shape[:-1], len(table))}, got {dlogits.shape}")
    dhidden, dtable, dbias = linear_vjp(widen(hidden), widen(table).T, widen(dlogits))
    found = dhidden, dtable.T, None if bias is None else dbias
    return HeadGradients(*(None if part is None else round_to(part, table.dtype) for part in found))  # type: ignore[arg-type]


def _table(table: FloatArray, **others: FloatArray) -> tuple[FloatArray, ...]:
    found = floating(table=table, **others)
    if found[0].ndim != 2:
        raise ShapeError(f"table: expected 2 axes (V, M), got shape {found[0].shape}")
    return found


def _fits(hidden: Array, table: Array) -> None:
    if hidden.ndim < 1 or hidden.shape[-1] != table.shape[1]:
        raise ShapeError(f"hidden: expected last axis {table.shape[1]}, got shape {hidden.shape}")
