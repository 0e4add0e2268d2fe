"""QLoRA on a GPU, forward and backward, composed of products with the stored weight and with the factors."""

from __future__ import annotations

from typing import Any

from cuda_backend.int8.memory import transposed
from cuda_backend.weight_only.operands import (
    allocate,
    checked_call,
    dense,
    enqueue,
    nf4_operand,
    product,
    stored_weight,
)
from refimpl.peft.lora import LoRAGradients, scaling
from refimpl.quant import NF4Weight, qlora_quantize

__all__ = ["qlora_linear", "qlora_linear_vjp"]


def qlora_linear(
    x: Any,
    lora_a: Any,
    lora_b: Any,
    weight: Any,
    /,
    *,
    lora_alpha: float | None = None,
    block_size: int = 64,
    scale_block_size: int = 256,
    stream: Any = None,
) -> Any:
    """Return ``x · doubleDequant(weight) + (lora_alpha / R) (x · lora_a) · lora_b``, in two launches.

    Parameters
    ----------
    x, lora_a, lora_b : array of float32, float16 or bfloat16, shapes (M, K), (K, R) and (R, N)
        As for `refimpl.quant.qlora_linear`: NumPy's, or of one GPU library, with any strides.
    weight : NF4Weight, or a NumPy array, shape (K, N)
        As `refimpl.quant.qlora_quantize` stores it, or to be stored so on the host, in every call.
    lora_alpha, block_size, scale_block_size
        As for the reference.
    stream : int or stream object, optional
        As for `int8_weight_linear`.

    Returns
    -------
    array, shape (M, N)
        In the dtype and library of `x`, rounded once; ``x · lora_a`` stays in float32.

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
    ...     x, zero = np.ones((1, 2), np.float32), np.zeros((2, 1), np.float32)
    ...     assert qlora_linear(x, zero, zero.T, np.diag([1, -1]).astype(np.float32)).tolist() == [[1, -1]]
    """
    sizes = {"block_size": block_size, "scale_block_size": scale_block_size}
    stored = stored_weight("qlora_linear", weight, NF4Weight, lambda w: qlora_quantize(w, **sizes))
    stored.check_turned(False)
    call = checked_call(
        "qlora_linear", x, stored, None, weight, stored.shape, stream, lora_a=lora_a, lora_b=lora_b
    )
    a, b = call.given["lora_a"], call.given["lora_b"]
    factor = scaling(lora_alpha, a.shape[1])
    low, _ = allocate(call, (call.x.shape[0], a.shape[1]), "float32")
    enqueue(call, dense(a), call.x, low)
    return product(
        call, nf4_operand(stored, call.on, turned=False), call.x, call.shape, branch=(low, b, factor)
    )()


def qlora_linear_vjp(
    x: Any,
    lora_a: Any,
    lora_b: Any,
    weight: Any,
    dy: Any,
    /,
    *,
    lora_alpha: float | None = None,
    block_size: int = 64,
    scale_block_size: int = 256,
    stream: Any = None,
) -> LoRAGradients:
    """Return the gradients of `qlora_linear` in x and the factors; the weight is dequantised again.

    Parameters
    ----------
    x, lora_a, lora_b, weight, lora_alpha, block_size, scale_block_size, stream
        As for `qlora_linear`.
    dy : array like `x`, shape (M, N)
        Gradient of the output.

    Returns
    -------
    LoRAGradients
        In the dtype and library of `x`, each rounded once.

    Raises
    ------
    ShapeError, DTypeError, OptionError, UnsupportedError, BackendUnavailableError
        As `int8_weight_linear`.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3, QLoRA: ∂E/∂L only.

    Examples
    --------
    >>> import numpy as np
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     one = np.ones((1, 1), np.float32)
    ...     assert qlora_linear_vjp(one, one, one, 2 * one, one).x.item() == 3.0
    """
    sizes = {"block_size": block_size, "scale_block_size": scale_block_size}
    stored = stored_weight("qlora_linear_vjp", weight, NF4Weight, lambda w: qlora_quantize(w, **sizes))
    stored.check_turned(False)
    call = checked_call(
        "qlora_linear_vjp", x, stored, None, weight, stored.shape, stream, lora_a=lora_a, lora_b=lora_b, dy=dy
    )
    a, b, gradient = (call.given[name] for name in ("lora_a", "lora_b", "dy"))
    (M, K), rank = call.x.shape, a.shape[1]
    factor = scaling(lora_alpha, rank)
    low, _ = allocate(call, (M, rank), "float32")
    back, _ = allocate(call, (M, rank), "float32")
    enqueue(call, dense(a), call.x, low)
    enqueue(call, dense(transposed(b)), gradient, back)
    dx = product(
        call,
        nf4_operand(stored, call.on, turned=True),
        gradient,
        (M, K),
        branch=(back, transposed(a), factor),
    )
    da = product(call, dense(back, factor), transposed(call.x), (K, rank))
    db = product(call, dense(gradient, factor), transposed(low), (rank, call.shape[1]))
    return LoRAGradients(dx(), da(), db())
