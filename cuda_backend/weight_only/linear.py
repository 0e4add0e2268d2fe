"""Linear layers whose weight alone is quantised, on a GPU, any number of tokens: what callers see."""

from __future__ import annotations

from typing import Any

from cuda_backend.weight_only.operands import (
    checked_call,
    gradients,
    int8_operand,
    nf4_operand,
    product,
    stored_weight,
    turned,
)
from refimpl.quant import Int8Groups, NF4Weight, nf4_quantize, quantize_groups
from refimpl.quant.weight_only import WeightOnlyGradients

__all__ = ["int8_weight_linear", "int8_weight_linear_vjp", "nf4_linear", "nf4_linear_vjp"]


def int8_weight_linear(
    x: Any, weight: Any, /, *, bias: Any = None, group_size: int = 128, stream: Any = None
) -> Any:
    """Return ``x @ dequantised(weight) + bias``, the weight dequantised on the chip.

    Parameters
    ----------
    x : array of float32, float16 or bfloat16, shape (M, K)
        Tokens by features, NumPy's or of a GPU library on the current GPU, with any strides.
    weight : Int8Groups, or a NumPy array, shape (K, N)
        As `refimpl.quant.quantize_groups` stores it, scales in float32, in the library of `x`.  A weight in
        floating point is quantised by the definition on the host, in every call.
    bias : array like `x`, shape (N,), optional
        Added before rounding.
    group_size : int
        With which the weight was stored, or is.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `x` works on.

    Returns
    -------
    array, shape (M, N)
        As the reference, in the dtype and library of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As the reference; DTypeError also if arrays are of several libraries.
    UnsupportedError
        If the arrays are float64, or a weight on the GPU is not quantised yet.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    Any number of tokens; `int8_linear_decode` is the kernel for up to 16.

    References
    ----------
    .. [1] Yao et al., 2022, arXiv:2206.01861, section 4.1.

    Examples
    --------
    >>> import numpy as np
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     x, weight = np.ones((1, 2), np.float32), np.array([[127.0], [-1.0]], np.float32)
    ...     assert int8_weight_linear(x, weight).item() == 126.0
    """
    stored = stored_weight(
        "int8_weight_linear", weight, Int8Groups, lambda w: quantize_groups(w, group_size=group_size)
    )
    call = checked_call("int8_weight_linear", x, stored, bias, weight, stored.codes.shape, stream)
    operand = int8_operand(stored, group_size, call.on)
    return product(call, operand, call.x, call.shape, bias=call.bias)()


def int8_weight_linear_vjp(
    x: Any, weight: Any, dy: Any, /, *, bias: Any = None, group_size: int = 128, stream: Any = None
) -> WeightOnlyGradients:
    """Return the gradients of `int8_weight_linear` in x and bias.

    Parameters
    ----------
    x, weight, bias, group_size, stream
        As for `int8_weight_linear`.
    dy : array like `x`, shape (M, N)
        Gradient of the output.

    Returns
    -------
    WeightOnlyGradients
        As the reference.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `int8_weight_linear`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     one = np.ones((1, 1), np.float32)
    ...     assert int8_weight_linear_vjp(one, 2 * one, one).x.item() == 2.0
    """
    stored = stored_weight(
        "int8_weight_linear_vjp", weight, Int8Groups, lambda w: quantize_groups(w, group_size=group_size)
    )
    call = checked_call("int8_weight_linear_vjp", x, stored, bias, weight, stored.codes.shape, stream, dy=dy)
    operand = turned(int8_operand(stored, group_size, call.on))
    return gradients(call, operand)


def nf4_linear(
    x: Any,
    weight: Any,
    /,
    *,
    bias: Any = None,
    block_size: int = 64,
    scale_block_size: int = 256,
    stream: Any = None,
) -> Any:
    """Return ``x @ doubleDequant(weight) + bias``, the weight dequantised on the chip.

    Parameters
    ----------
    x, bias, stream
        As for `int8_weight_linear`.
    weight : NF4Weight, or a NumPy array, shape (K, N)
        As `refimpl.quant.nf4_quantize` stores it; otherwise as for `int8_weight_linear`.
    block_size, scale_block_size : int
        Of a weight that is not stored yet.

    Returns
    -------
    array, shape (M, N)
        As the reference, in the dtype and library of `x`.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `int8_weight_linear`.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, eq. 5 and 6.

    Examples
    --------
    >>> import numpy as np
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     x, weight = np.ones((1, 2), np.float32), np.array([[3.0], [-3.0]], np.float32)
    ...     assert nf4_linear(x, weight).item() == 0.0
    """
    sizes = {"block_size": block_size, "scale_block_size": scale_block_size}
    stored = stored_weight("nf4_linear", weight, NF4Weight, lambda w: nf4_quantize(w, **sizes))
    stored.check_turned(True)
    call = checked_call("nf4_linear", x, stored, bias, weight, stored.shape[::-1], stream)
    return product(call, nf4_operand(stored, call.on, turned=True), call.x, call.shape, bias=call.bias)()


def nf4_linear_vjp(
    x: Any,
    weight: Any,
    dy: Any,
    /,
    *,
    bias: Any = None,
    block_size: int = 64,
    scale_block_size: int = 256,
    stream: Any = None,
) -> WeightOnlyGradients:
    """Return the gradients of `nf4_linear` in x and bias.

    Parameters
    ----------
    x, weight, bias, block_size, scale_block_size, stream
        As for `nf4_linear`.
    dy : array like `x`, shape (M, N)
        Gradient of the output.

    Returns
    -------
    WeightOnlyGradients
        As the reference.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `int8_weight_linear`.

    Examples
    --------
    >>> import numpy as np
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     one = np.ones((1, 1), np.float32)
    ...     assert nf4_linear_vjp(one, 2 * one, one).x.item() == 2.0
    """
    sizes = {"block_size": block_size, "scale_block_size": scale_block_size}
    stored = stored_weight("nf4_linear_vjp", weight, NF4Weight, lambda w: nf4_quantize(w, **sizes))
    stored.check_turned(True)
    call = checked_call("nf4_linear_vjp", x, stored, bias, weight, stored.shape[::-1], stream, dy=dy)
    return gradients(call, nf4_operand(stored, call.on, turned=False))
