"""Cases on which quantisers are judged, their arrays drawn from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.registry import Case

__all__ = ["sample_integers", "sample_linear", "sample_pair", "sample_uniform"]

GRANULARITIES: dict[str, tuple[int | None, int | None] | None] = {
    "tensor": None,
    "row": (1, None),
    "column": (None, 1),
    "group": (1, 8),
    "tile": (2, 4),
}


def sample_uniform(
    rng: np.random.Generator,
    *,
    rows: int,
    columns: int,
    bits: int,
    granularity: str,
    values: str,
    **options: Any,
) -> Case:
    """Return a call of `uniform` on a matrix.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    rows, columns, bits : int
        Shape, and bits of a code.
    granularity : {"tensor", "row", "column", "group", "tile"}
        The block.
    values : {"normal", "ties", "one_sided", "zero", "constant"}
        ``"ties"`` are halves of a step that is a power of two.
    **options
        Passed on.

    Returns
    -------
    Case

    Examples
    --------
    >>> shape = dict(rows=1, columns=3, bits=8, granularity="row", values="zero")
    >>> sample_uniform(np.random.default_rng(0), **shape)
    Case(args=(array([[0., 0., 0.]]),), kwargs={'bits': 8, 'block': (1, None)})
    """
    x = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-3, 4, (rows, 1)))
    if values == "one_sided":
        x = np.abs(x) + 1.0
    elif values == "zero":
        x = np.zeros_like(x)
    elif values == "constant":
        x = np.full_like(x, -1.5)
    elif values == "ties":
        limit = 2 ** (bits - 1) - 1
        x = rng.integers(-2 * limit, 2 * limit + 1, x.shape) / 2
        x[..., :1] = limit
    return Case((x,), {"bits": bits, "block": GRANULARITIES[granularity], **options})


def sample_integers(rng: np.random.Generator, *, M: int, K: int, N: int, codes: str) -> Case:
    """Return a call of an integer product: codes [M, K] and [K, N], and zero points with ``"affine"``.

    Examples
    --------
    >>> case = sample_integers(np.random.default_rng(0), M=2, K=3, N=1, codes="extreme")
    >>> case.args[0]
    array([[127, 127, 127],
           [127, 127, 127]], dtype=int8)
    """
    if codes == "extreme":
        return Case((np.full((M, K), 127, np.int8), np.full((K, N), -127, np.int8)))
    a, b = rng.integers(-127, 128, (M, K)), rng.integers(-127, 128, (K, N))
    if codes == "restricted":
        return Case((a.astype(np.int8), b.astype(np.int8)))
    zeros = {"a_zero_point": rng.integers(0, 256, (M, 1)).astype(np.uint8),
             "b_zero_point": rng.integers(-128, 128, (1, N)).astype(np.int8)}  # fmt: skip
    return Case(((a + 128).astype(np.uint8), b.astype(np.int8)), zeros)


def sample_pair(rng: np.random.Generator, *, n: int, bits: int, values: str) -> Case:
    """Return a call of `error`: numbers and their quantised values, both in float64.

    Examples
    --------
    >>> [a.shape for a in sample_pair(np.random.default_rng(0), n=5, bits=4, values="uniform").args]
    [(5,), (5,)]
    """
    x = rng.uniform(-1, 1, n) if values == "uniform" else rng.standard_normal(n)
    if values == "zero":
        x = np.zeros(n)
    step = 2.0 ** (1 - bits)
    return Case((x, x if values == "exact" else step * np.rint(x / step)))


def sample_linear(
    rng: np.random.Generator,
    *,
    T: int,
    K: int,
    N: int,
    outliers: str,
    threshold: float | None,
    bias: bool,
    **options: Any,
) -> Case:
    """Return a call of `llm_int8_linear`.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    T, K, N : int
        Tokens, input features, output features.
    outliers : {"none", "some", "all", "zero_row"}
        Which columns of x hold a number far beyond the threshold.
    threshold : float or None
        Passed on.
    bias : bool
        Draw one.
    **options
        Passed on.

    Returns
    -------
    Case

    Examples
    --------
    >>> shape = dict(T=2, K=3, N=4, outliers="none", threshold=6.0, bias=False)
    >>> case = sample_linear(np.random.default_rng(0), **shape)
    >>> [a.shape for a in case.args], case.kwargs
    ([(2, 3), (3, 4)], {'threshold': 6.0})
    """
    x = np.clip(rng.standard_normal((T, K)), -4, 4)
    weight = rng.standard_normal((K, N)) / np.sqrt(max(K, 1))
    chosen = {"some": rng.random(K) < 0.3, "all": np.ones(K, bool)}.get(outliers, np.zeros(K, bool))
    tokens = rng.random((T, K)) < 0.5
    if T:
        tokens[rng.integers(T)] = True
    x = np.where(chosen & tokens, 8.0 * np.sign(x) + 3.0 * x, x)
    if outliers == "zero_row":
        x[: T // 2 + 1] = 0.0
    extra: dict[str, Any] = {"bias": rng.standard_normal(N)} if bias else {}
    return Case((x, weight), {"threshold": threshold, **options, **extra})
