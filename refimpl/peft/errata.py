"""What the lecture prints wrongly about fine-tuning, as programs that fail."""

from __future__ import annotations

from typing import Any

from refimpl.numerics import FloatArray
from refimpl.peft.lora import lora_linear
from refimpl.registry import erratum

__all__ = ["factor_left_out"]


@erratum(
    "peft.lora",
    slide="LoRA Tuning",
    says="h = W_0 x + B A x",
    should_say="h = W_0 x + (α / r) B A x: without the factor the rank changes the step",
    breaks="peft.the_factor_is_alpha_over_rank",
)
def factor_left_out(
    x: FloatArray,
    lora_a: FloatArray,
    lora_b: FloatArray,
    weight: FloatArray,
    /,
    *,
    lora_alpha: float | None = None,  # noqa: ARG001
    **options: Any,
) -> FloatArray:
    """Return the layer with a factor of 1, whatever `lora_alpha`.

    Examples
    --------
    >>> factor_left_out([[1.0]], [[1.0]], [[1.0]], [[1.0]], lora_alpha=9.0)
    array([[2.]])
    """
    return lora_linear(x, lora_a, lora_b, weight, **options)
