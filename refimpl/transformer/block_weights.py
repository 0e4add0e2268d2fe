"""The weights of a transformer block by name, as a caller passes them and as gradients come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.scores import AttentionOptions
from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.validation import floating

__all__ = ["BlockGradients", "BlockInput", "BlockOptions", "block_gradients", "block_input", "weight_names"]


class BlockOptions(AttentionOptions, total=False):
    """Weights of a block, and options of its self-attention.

    Weights are applied as ``x @ w``; head h owns the columns ``h * D : (h + 1) * D``.  Self-attention has
    ``w_q, w_k, w_v, w_o`` and biases ``b_*``; attention over a context the same with ``cross_`` before;
    feed-forward ``w_1, b_1, w_2, b_2``, or, gated, ``w_gate, w_up, w_down``; the normalisations of
    self-attention, cross-attention and feed-forward ``gamma_1, beta_1``, ``cross_gamma, cross_beta`` and
    ``gamma_2, beta_2``.  Biases may be left out, and so must be the shifts ``beta`` of an RMSNorm.
    """

    w_q: FloatArray
    w_k: FloatArray
    w_v: FloatArray
    w_o: FloatArray
    b_q: FloatArray
    b_k: FloatArray
    b_v: FloatArray
    b_o: FloatArray
    w_1: FloatArray
    w_2: FloatArray
    b_1: FloatArray
    b_2: FloatArray
    w_gate: FloatArray
    w_up: FloatArray
    w_down: FloatArray
    gamma_1: FloatArray
    beta_1: FloatArray
    gamma_2: FloatArray
    beta_2: FloatArray
    cross_w_q: FloatArray
    cross_w_k: FloatArray
    cross_w_v: FloatArray
    cross_w_o: FloatArray
    cross_b_q: FloatArray
    cross_b_k: FloatArray
    cross_b_v: FloatArray
    cross_b_o: FloatArray
    cross_gamma: FloatArray
    cross_beta: FloatArray


class BlockGradients(NamedTuple):
    """Gradients of the input, of the context, and of every weight that was given."""

    dx: FloatArray
    dcontext: FloatArray | None = None
    dw_q: FloatArray | None = None
    dw_k: FloatArray | None = None
    dw_v: FloatArray | None = None
    dw_o: FloatArray | None = None
    db_q: FloatArray | None = None
    db_k: FloatArray | None = None
    db_v: FloatArray | None = None
    db_o: FloatArray | None = None
    dw_1: FloatArray | None = None
    dw_2: FloatArray | None = None
    db_1: FloatArray | None = None
    db_2: FloatArray | None = None
    dw_gate: FloatArray | None = None
    dw_up: FloatArray | None = None
    dw_down: FloatArray | None = None
    dgamma_1: FloatArray | None = None
    dbeta_1: FloatArray | None = None
    dgamma_2: FloatArray | None = None
    dbeta_2: FloatArray | None = None
    dcross_w_q: FloatArray | None = None
    dcross_w_k: FloatArray | None = None
    dcross_w_v: FloatArray | None = None
    dcross_w_o: FloatArray | None = None
    dcross_b_q: FloatArray | None = None
    dcross_b_k: FloatArray | None = None
    dcross_b_v: FloatArray | None = None
    dcross_b_o: FloatArray | None = None
    dcross_gamma: FloatArray | None = None
    dcross_beta: FloatArray | None = None


class BlockInput(NamedTuple):
    """What a block computes with: widened arrays, and the dtype that its result has."""

    x: FloatArray
    weights: dict[str, FloatArray]
    options: dict[str, Any]
    dtype: np.dtype[Any]


_NAMES = {name.removeprefix("d") for name in BlockGradients._fields} - {"x"}


def weight_names(*, norm: str, gated: bool, biases: bool, cross: bool) -> tuple[str, ...]:
    """Return the names of the weights of a block of a certain make.

    Examples
    --------
    >>> weight_names(norm="rms_norm", gated=True, biases=False, cross=False)
    ('w_q', 'w_k', 'w_v', 'w_o', 'w_gate', 'w_up', 'w_down', 'gamma_1', 'gamma_2')
    """
    attention = [f"{kind}_{name}" for kind in ("wb" if biases else "w") for name in "qkvo"]
    hidden = ["w_gate", "w_up", "w_down"] if gated else ["w_1", "w_2", *(("b_1", "b_2") if biases else ())]
    ends = ["_1", "_2"]
    norms = [part + end for end in ends for part in ("gamma", "beta")]
    crossed = [f"cross_{name}" for name in (*attention, "gamma", "beta")] if cross else []
    names = [*attention, *hidden, *norms, *crossed]
    return tuple(name for name in names if norm == "layer_norm" or "beta" not in name)


def block_input(x: FloatArray, given: Mapping[str, Any], needed: tuple[str, ...]) -> BlockInput:
    """Check that every needed weight is there, part weights (and a context) from options, widen the arrays.

    Raises
    ------
    OptionError
        If a weight is missing, or has no place in the block: its gradient would be lost.
    ShapeError
        If `x` has not three axes.
    """
    weights = {name: given[name] for name in given if name in _NAMES and given[name] is not None}
    optional = {name for name in needed if name.startswith(("b_", "cross_b_"))}
    missing, strange = set(needed) - optional - set(weights), set(weights) - set(needed)
    if missing:
        raise OptionError(f"weights: missing {', '.join(sorted(missing))}; needed are {', '.join(needed)}")
    if strange:
        raise OptionError(f"weights: {', '.join(sorted(strange))} have no place here; those that have are "
                          f"{', '.join(needed)}")  # fmt: skip
    names = "x", *weights
    arrays = dict(zip(names, floating(x=x, **weights), strict=True))
    dtype = arrays["x"].dtype
    if arrays["x"].ndim != 3:
        raise ShapeError(f"x: expected 3 axes (B, T, M), got shape {arrays['x'].shape}")
    arrays = {name: widen(array) for name, array in arrays.items()}
    options = {name: value for name, value in given.items() if name not in _NAMES}
    return BlockInput(arrays.pop("x"), arrays, options, dtype)


def block_gradients(
    dx: FloatArray, gradients: Mapping[str, FloatArray], dtype: np.dtype[Any]
) -> BlockGradients:
    """Return gradients by name as a `BlockGradients`, rounded to `dtype`.

    Examples
    --------
    >>> block_gradients(np.zeros(1), {"b_o": np.ones(2)}, np.dtype(np.float64)).db_o
    array([1., 1.])
    """
    rounded = {f"d{name}": round_to(gradient, dtype) for name, gradient in gradients.items()}
    return BlockGradients(round_to(dx, dtype), **rounded)
