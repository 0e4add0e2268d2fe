"""What the lecture prints wrongly about pruning, as programs that fail."""

from __future__ import annotations

from refimpl.numerics import FloatArray
from refimpl.registry import erratum

__all__ = ["parameters_returned"]


@erratum(
    "prune.dynamic_batch_loading",
    slide="Sheared LLaMA, Algorithm 1: Dynamic Batch Loading",
    says="UpdateWeight returns θ",
    should_say="UpdateWeight returns w: the caller would sample by the old shares for ever",
    breaks="prune.lagging_domains_gain",
)
def parameters_returned(weights: FloatArray, loss: FloatArray, reference: FloatArray, /) -> FloatArray:  # noqa: ARG001
    """Return the shares that the caller is left with: those it had.

    Examples
    --------
    >>> parameters_returned([0.5], [1.0], [0.0])
    [0.5]
    """
    return weights
