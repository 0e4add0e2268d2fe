"""The weights of a Mamba block by name, checked, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray, wide_dtype, widen
from refimpl.validation import bind_axes, floating

__all__ = ["BlockInput", "MambaGradients", "MambaWeights", "block_input"]


class MambaWeights(TypedDict, total=False):
    """Weights of a Mamba block, applied as ``x @ w``, and the states before the first token.

    ``w_in`` (M, 2 Din): the first half is convolved and scanned, the second is the gate.  ``w_conv``
    (Din, k) and ``b_conv`` (Din,): the convolution.  ``w_x`` (Din, R + 2N): from a channel to the step in
    R numbers, to B and to C.  ``w_dt`` (R, Din) and ``b_dt`` (Din,): the step.  ``A_log`` (Din, N), with
    ``A = -exp(A_log)``; ``D`` (Din,).  ``w_out`` (Din, M).  Biases may be left out: ``b_conv``, ``b_in``
    (2 Din,) and ``b_out`` (M,), the last two of which published models do not have.
    ``conv_state`` (B, k - 1, Din) and ``scan_state`` (B, Din, N): 0 by default.
    """

    w_in: FloatArray
    w_conv: FloatArray
    w_x: FloatArray
    w_dt: FloatArray
    b_dt: FloatArray
    A_log: FloatArray
    D: FloatArray
    w_out: FloatArray
    b_in: FloatArray | None
    b_conv: FloatArray | None
    b_out: FloatArray | None
    conv_state: FloatArray | None
    scan_state: FloatArray | None


class MambaGradients(NamedTuple):
    """Gradients of the input and of every weight and state that was given, in their shapes."""

    dx: FloatArray
    dw_in: FloatArray
    dw_conv: FloatArray
    dw_x: FloatArray
    dw_dt: FloatArray
    db_dt: FloatArray
    dA_log: FloatArray  # noqa: N815 (the field's letters)
    dD: FloatArray  # noqa: N815
    dw_out: FloatArray
    db_in: FloatArray | None = None
    db_conv: FloatArray | None = None
    db_out: FloatArray | None = None
    dconv_state: FloatArray | None = None
    dscan_state: FloatArray | None = None


class BlockInput(NamedTuple):
    """A checked call: the arrays as they are in HBM, and their sizes and formats."""

    x: FloatArray
    weights: dict[str, FloatArray]
    size: dict[str, int]
    dtype: np.dtype[Any]
    wide: np.dtype[Any]

    def widened(self, name: str) -> FloatArray:
        """Return a weight in the wide dtype."""
        return self.in_wide(self.weights[name])

    def in_wide(self, array: FloatArray) -> FloatArray:
        """Return an array in the wide dtype; itself, if it is."""
        return widen(array).astype(self.wide, copy=False)


_AXES = {
    "w_conv": "Din k", "w_x": "Din columns", "w_dt": "R Din", "b_dt": "Din", "A_log": "Din N", "D": "Din",
    "w_out": "Din M", "b_conv": "Din", "b_out": "M", "conv_state": "B past Din", "scan_state": "B Din N",
}  # fmt: skip
_STATES = ("conv_state", "scan_state")
_OPTIONAL = {"b_in", "b_conv", "b_out", *_STATES}


def block_input(x: FloatArray, given: Mapping[str, Any]) -> BlockInput:
    """Check the arrays of a call of `mamba_block`.

    Raises
    ------
    OptionError
        If a weight is missing, or has no place in the block.
    ShapeError
        If arrays do not fit together.
    DTypeError
        If one is not real.
    """
    names = {"w_in", "b_in", *_AXES}
    weights = {name: array for name, array in given.items() if array is not None}
    missing, strange = names - _OPTIONAL - set(weights), set(weights) - names
    if missing or strange:
        raise OptionError(
            f"weights: missing {', '.join(sorted(missing)) or 'none'}, without a place "
            f"{', '.join(sorted(strange)) or 'none'}; a Mamba block takes {', '.join(sorted(names))}"
        )
    states = {name: weights.pop(name) for name in _STATES if name in weights}
    arrays = dict(zip(("x", *weights), floating(x=x, **weights), strict=True))
    for name, state in states.items():  # states are wide, and do not widen the rest
        (arrays[name],) = floating(**{name: state})
    size = bind_axes(
        {"x": (arrays["x"], "B T M"), **{n: (arrays[n], _AXES[n]) for n in arrays if n in _AXES}}
    )
    if not size["k"]:
        raise ShapeError(f"w_conv: expected at least one tap, got shape {arrays['w_conv'].shape}")
    Din, wanted = size["Din"], size["R"] + 2 * size["N"]
    expected = {"w_in": (size["M"], 2 * Din), "b_in": (2 * Din,), "w_x": (Din, wanted)}
    if "conv_state" in arrays:
        expected["conv_state"] = (size["B"], size["k"] - 1, Din)
    for name, shape in expected.items():
        if name in arrays and arrays[name].shape != shape:
            raise ShapeError(f"{name}: expected shape {shape}, got {arrays[name].shape}")
    dtype = arrays["x"].dtype
    return BlockInput(arrays.pop("x"), arrays, size, dtype, wide_dtype(dtype))
