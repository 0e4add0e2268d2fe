"""QLoRA: a linear layer with a frozen weight in NF4, its scales quantised too, and a trained low rank."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.numerics import FloatArray, IntArray, round_to
from refimpl.peft.lora import LoRAGradients, lora_linear, lora_linear_vjp, scaling
from refimpl.quant.double_quantization import double, double_dequantize
from refimpl.quant.nf4 import nf4, nf4_dequantize
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating

__all__ = [
    "NF4Weight",
    "qlora_dequantize",
    "qlora_linear",
    "qlora_linear_vjp",
    "qlora_quantize",
]


class NF4Weight(NamedTuple):
    """A weight [K, N] as it is stored: NF4 codes, 8-bit codes of their absmax, scales and offset of those.

    ``shape`` is (K, N), and ``blocks`` the sizes of the blocks of weights and of absmax.  `nf4_quantize`
    stores the weight ``turned``, with shape (N, K) and blocks along K: what reads one refuses the other.
    """

    codes: IntArray
    absmax_codes: IntArray
    scale: FloatArray
    offset: FloatArray
    shape: tuple[int, int]
    blocks: tuple[int, int]
    turned: bool = False

    def check_turned(self, turned: bool) -> None:
        """Check that the weight lies as a function reads it: of a square one nothing else would tell.

        Raises
        ------
        OptionError
            If it lies otherwise.
        """
        if self.turned != turned:
            stored = ("qlora_quantize", "nf4_quantize")
            raise OptionError(
                f"weight: expected one that {stored[turned]} has stored, got one of {stored[not turned]}, "
                "whose transpose it is"
            )


def qlora_quantize(weight: FloatArray, /, *, block_size: int = 64, scale_block_size: int = 256) -> NF4Weight:
    """Return a weight as QLoRA stores it.

    Parameters
    ----------
    weight : ndarray of float, shape (K, N)
        Used as ``x @ weight``; blocks run along its rows.
    block_size, scale_block_size : int
        Weights that share an absmax, and absmax that share a scale.

    Returns
    -------
    NF4Weight

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `nf4`, and if `weight` is no matrix.

    Examples
    --------
    >>> stored = qlora_quantize(np.eye(64))
    >>> stored.codes.nbytes, stored.absmax_codes.nbytes, bool((qlora_dequantize(stored) == np.eye(64)).all())
    (2048, 64, True)
    """
    (weight,) = floating(weight=weight)
    bind_axes({"weight": (weight, "K N")})
    codes, absmax = nf4(weight, block_size=block_size)
    K, N = weight.shape
    return NF4Weight(
        codes, *double(absmax, block_size=scale_block_size), (K, N), (block_size, scale_block_size)
    )


def qlora_dequantize(weight: NF4Weight, /) -> FloatArray:
    """Return ``doubleDequant(c1, c2, W)``: the absmax from their codes, then the weight from its own.

    Returns
    -------
    ndarray of float, shape (K, N)
        In the dtype of the stored scales.

    Raises
    ------
    ShapeError, DTypeError
        If the parts do not fit.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, eq. 6.

    Examples
    --------
    >>> qlora_dequantize(qlora_quantize(np.array([[3.0, -3.0]])))
    array([[ 3., -3.]])
    """
    block_size, scale_block_size = weight.blocks
    absmax = double_dequantize(weight.absmax_codes, weight.scale, weight.offset, block_size=scale_block_size)
    return nf4_dequantize(weight.codes, absmax, shape=weight.shape, block_size=block_size)


def sample_qlora(rng: np.random.Generator, *, T: int, K: int, N: int, R: int, factors: str) -> Case:
    """Return a call of `qlora_linear`.

    Examples
    --------
    >>> case = sample_qlora(np.random.default_rng(0), T=2, K=3, N=4, R=1, factors="zero")
    >>> [a.shape for a in case.args], case.kwargs["lora_alpha"]
    ([(2, 3), (3, 1), (1, 4), (3, 4)], 2.0)
    """
    x, a, b = (rng.standard_normal(shape) for shape in ((T, K), (K, R), (R, N)))
    weight = rng.standard_normal((K, N)) / np.sqrt(max(K, 1))
    return Case(
        (x, a, b * (factors != "zero"), weight), {"lora_alpha": 2.0, "block_size": 8, "scale_block_size": 4}
    )


def _terms(case: Case) -> tuple[int, FloatArray]:
    x, a, b, weight = (np.abs(array) for array in case.args)
    return sum(weight.shape) + 4, 2 * (x @ np.abs(weight)) + scaling(2.0, a.shape[1]) * (x @ a @ b)


@technique(
    "quant.qlora",
    entries=(75,),
    kind="function",
    source=Source("Dettmers et al. 2023", "arXiv:2305.14314", "eq. 5 and 6"),
    axes={"T": (1, 5), "K": (1, 12), "N": (1, 12), "R": (0, 3)},
    options={"factors": ("random", "zero")},
    edges=(
        {"T": 0, "K": 3, "N": 4, "R": 1},
        {"T": 2, "K": 0, "N": 4, "R": 1},
        {"T": 2, "K": 3, "N": 0, "R": 1},
        {"T": 2, "K": 3, "N": 5, "R": 0},
        {"T": 1, "K": 1, "N": 1, "R": 1, "factors": "random"},
        {"T": 3, "K": 11, "N": 7, "R": 2, "factors": "random"},
        {"T": 3, "K": 8, "N": 8, "R": 2, "factors": "zero"},
    ),
    sample=sample_qlora,
    terms=_terms,
    vjp="refimpl.quant.qlora:qlora_linear_vjp",
)
def qlora_linear(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray | NF4Weight,
    /,
    *,
    lora_alpha: float | None = None,
    block_size: int = 64,
    scale_block_size: int = 256,
    memory: Memory | None = None,
) -> FloatArray:
    """Return ``x · doubleDequant(weight) + (lora_alpha / R) (x · lora_a) · lora_b``.

    Parameters
    ----------
    x : ndarray of float, shape (T, K)
        Tokens by features.
    lora_a, lora_b : ndarray of float, shapes (K, R) and (R, N)
        The trained factors.
    weight : ndarray of float, shape (K, N), or NF4Weight
        The frozen weight, or as `qlora_quantize` stores it, ahead and once.
    lora_alpha : float, optional
        As for `refimpl.peft.lora_linear`; the paper's equation has a factor of 1, the default.
    block_size, scale_block_size : int
        As for `qlora_quantize`, if `weight` is not stored yet.
    memory : Memory, optional
        Counts the operations of the products, those of `refimpl.peft.lora_linear`: fewer bits save none.

    Returns
    -------
    ndarray of float, shape (T, N)
        In the dtype of `x`: the stored weight is rounded to it before it multiplies.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the arrays do not fit, are not real, or cannot be quantised.

    Notes
    -----
    It is LoRA on the dequantised copy of the weight.

    **Special cases**

    - R = 0, or a factor of zeros, gives the quantised base layer.
    - Paged optimisers are an allocation policy and change no number.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, eq. 5 and 6.

    Examples
    --------
    >>> x, base, zero = np.ones((1, 2)), np.diag([1.0, -1.0]), np.zeros((2, 1))
    >>> qlora_linear(x, zero, zero.T, base)
    array([[ 1., -1.]])
    """
    values = _values(x, weight, block_size, scale_block_size)
    return lora_linear(x, lora_a, lora_b, values, lora_alpha=lora_alpha, memory=memory)


def qlora_linear_vjp(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray | NF4Weight,
    dy: FloatArray,
    /,
    *,
    lora_alpha: float | None = None,
    block_size: int = 64,
    scale_block_size: int = 256,
) -> LoRAGradients:
    """Return the gradients of `qlora_linear` that training needs; the frozen weight gets none.

    Parameters
    ----------
    x, lora_a, lora_b, weight, lora_alpha, block_size, scale_block_size
        As for `qlora_linear`.
    dy : ndarray of float, shape (T, N)
        Gradient of the output.

    Returns
    -------
    LoRAGradients
        In the dtype of `x`; that of x passes through the dequantised weight.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `qlora_linear`.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, section 3, QLoRA: ∂E/∂L only.

    Examples
    --------
    >>> ones = np.ones((1, 1))
    >>> qlora_linear_vjp(ones, ones, ones, 2 * ones, ones)
    LoRAGradients(x=array([[3.]]), lora_a=array([[1.]]), lora_b=array([[1.]]))
    """
    values = _values(x, weight, block_size, scale_block_size)
    return lora_linear_vjp(x, lora_a, lora_b, values, dy, lora_alpha=lora_alpha)


def _values(
    x: FloatArray, weight: FloatArray | NF4Weight, block_size: int, scale_block_size: int
) -> FloatArray:
    """Return the dequantised weight, rounded to the dtype of x."""
    if not isinstance(weight, NF4Weight):
        x, weight = floating(x=x, weight=weight)
        weight = qlora_quantize(weight, block_size=block_size, scale_block_size=scale_block_size)
    weight.check_turned(False)
    return round_to(qlora_dequantize(weight), floating(x=x)[0].dtype)
