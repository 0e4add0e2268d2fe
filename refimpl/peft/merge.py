"""LoRA's update written into the weight and taken out again, and how its factors start."""

from __future__ import annotations

from typing import Literal

import numpy as np

from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.peft.lora import counted_product, scaling
from refimpl.registry import Case, Source, technique
from refimpl.transformer.linear import product
from refimpl.validation import bind_axes, floating, whole

__all__ = ["Start", "lora_init", "lora_merge", "lora_merge_vjp", "lora_unmerge"]

Start = Literal["paper", "released", "embedding"]


def lora_init(
    K: int, N: int, r: int, *, start: Start = "released", rng: np.random.Generator | int | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return factors whose product is 0, so that training begins at the base model.

    Parameters
    ----------
    K, N, r : int
        Input features (for an embedding: the vocabulary), output features, rank.
    start : {"paper", "released", "embedding"}
        ``"paper"``: A normal, with variance 1 / r, and B = 0.  ``"released"``: A uniform within
        ``±1 / sqrt(K)`` (Kaiming with a = √5), and B = 0.  ``"embedding"``: A = 0 and B standard normal, as
        the released code starts embeddings.
    rng : numpy.random.Generator, int or None
        Where the draws come from.

    Returns
    -------
    lora_a, lora_b : ndarray of float64, shapes (K, r) and (r, N)

    Raises
    ------
    OptionError, DTypeError
        If a size is negative or no integer, or `start` unknown.

    Notes
    -----
    The paper says "random Gaussian" and gives no variance; 1 / r is that of the ``peft`` library.

    References
    ----------
    .. [1] Hu et al., 2021, arXiv:2106.09685, section 4.1.
    .. [2] loralib, layers.py, ``reset_parameters`` of ``Linear`` and ``Embedding``.

    Examples
    --------
    >>> a, b = lora_init(4, 3, 2, rng=0)
    >>> bool(np.abs(a).max() <= 0.5), b.any()
    (True, np.False_)
    """
    for name, size in (("K", K), ("N", N), ("r", r)):
        whole(name, size, least=0)
    generator = np.random.default_rng(rng)
    if start == "paper":
        return generator.normal(0.0, max(r, 1) ** -0.5, (K, r)), np.zeros((r, N))
    if start == "released":
        bound = max(K, 1) ** -0.5
        return generator.uniform(-bound, bound, (K, r)), np.zeros((r, N))
    if start == "embedding":
        return np.zeros((K, r)), generator.standard_normal((r, N))
    raise OptionError(f"start: expected 'paper', 'released' or 'embedding', got {start!r}")


def sample_merge(rng: np.random.Generator, *, K: int, N: int, R: int) -> Case:
    """Return a call of `lora_merge`.

    Examples
    --------
    >>> [a.shape for a in sample_merge(np.random.default_rng(0), K=3, N=4, R=1).args]
    [(3, 1), (1, 4), (3, 4)]
    """
    arrays = tuple(rng.standard_normal(shape) for shape in ((K, R), (R, N), (K, N)))
    return Case(arrays, {"lora_alpha": 2.0})


def _terms(case: Case) -> tuple[int, FloatArray]:
    a, b, weight = (np.abs(array) for array in case.args)
    return a.shape[1] + 2, weight + scaling(2.0, a.shape[1]) * (a @ b)


@technique(
    "peft.lora.merge",
    entries=(61,),
    kind="function",
    source=Source("Hu et al. 2021", "arXiv:2106.09685", "section 4.1, No Additional Inference Latency"),
    axes={"K": (1, 6), "N": (1, 6), "R": (0, 4)},
    edges=({"K": 0, "R": 1}, {"N": 0, "R": 1}, {"K": 1, "N": 1, "R": 1}, {"K": 3, "N": 2, "R": 0}),
    sample=sample_merge,
    terms=_terms,
    vjp="refimpl.peft.merge:lora_merge_vjp",
)
def lora_merge(
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    /,
    *,
    lora_alpha: float | None = None,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``W + (lora_alpha / R) A B``, a weight that costs what the base costs.

    Parameters
    ----------
    lora_a, lora_b, weight : ndarray of float, shapes (K, R), (R, N), (K, N)
        As for `refimpl.peft.lora_linear`.
    lora_alpha : float, optional
        As there.
    memory : Memory, optional
        Counts the operations, ``2 K R N``, once for all tokens to come.

    Returns
    -------
    ndarray of float, shape (K, N)
        Rounded once to the common dtype.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, are not real, or `lora_alpha` is not finite.

    Notes
    -----
    **Special cases**

    - Merged twice, the update counts twice: nothing here remembers.
    - In float16 a weight merged and unmerged is not the weight it was; keep a copy.
    - A base in 4 bits must be dequantised first, and quantising the sum rounds the update away in part.
    - Two updates merged one after the other are one of rank R1 + R2, their factors side by side.

    References
    ----------
    .. [1] Hu et al., 2021, arXiv:2106.09685, section 4.1.

    Examples
    --------
    >>> lora_merge(np.array([[1.0], [0.0]]), np.array([[0.5, 0.0]]), np.eye(2), lora_alpha=2)
    array([[2., 0.],
           [0., 1.]])
    """
    return _moved(lora_a, lora_b, weight, lora_alpha, 1, memory)


def lora_unmerge(
    lora_a: FloatArray, lora_b: FloatArray, weight: FloatArray, /, *, lora_alpha: float | None = None
) -> FloatArray:
    """Return ``W - (lora_alpha / R) A B``: what `lora_merge` was given, up to rounding.

    Parameters
    ----------
    lora_a, lora_b, weight, lora_alpha
        As for `lora_merge`; the factors must be those that were merged.

    Returns
    -------
    ndarray of float, shape (K, N)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `lora_merge`.

    Examples
    --------
    >>> a, b = np.array([[1.0], [0.0]]), np.array([[0.5, 0.0]])
    >>> lora_unmerge(a, b, lora_merge(a, b, np.eye(2)))
    array([[1., 0.],
           [0., 1.]])
    """
    return _moved(lora_a, lora_b, weight, lora_alpha, -1)


def lora_merge_vjp(
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    dweight: FloatArray,
    /,
    *,
    lora_alpha: float | None = None,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the gradients of A, B and W from that of the merged weight.

    Examples
    --------
    >>> [g.item() for g in lora_merge_vjp(*(np.full((1, 1), i) for i in (2.0, 3.0, 5.0, 1.0)))]
    [3.0, 2.0, 1.0]
    """
    lora_a, lora_b, weight, dweight = floating(lora_a=lora_a, lora_b=lora_b, weight=weight, dweight=dweight)
    bind_axes(
        {"weight": (weight, "K N"), "lora_a": (lora_a, "K R"), "lora_b": (lora_b, "R N"),
         "dweight": (dweight, "K N")}
    )  # fmt: skip
    dtype = weight.dtype
    a, b, wide = (widen(array) for array in (lora_a, lora_b, dweight))
    factor = scaling(lora_alpha, a.shape[1])
    da, db = product(wide, b.T), product(a.T, wide)
    return round_to(da * da.dtype.type(factor), dtype), round_to(db * db.dtype.type(factor), dtype), dweight


def _moved(
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    lora_alpha: float | None,
    sign: int,
    memory: Memory | None = None,
) -> FloatArray:
    lora_a, lora_b, weight = floating(lora_a=lora_a, lora_b=lora_b, weight=weight)
    bind_axes({"weight": (weight, "K N"), "lora_a": (lora_a, "K R"), "lora_b": (lora_b, "R N")})
    update = counted_product(memory)(widen(lora_a), widen(lora_b))
    factor = update.dtype.type(sign * scaling(lora_alpha, lora_a.shape[1]))
    return round_to(widen(weight) + factor * update, weight.dtype)
