"""The lecture's slide on the feed-forward layer's decomposition, run as it is printed."""

from __future__ import annotations

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import erratum

__all__ = ["activation_switched_to_gelu"]


@erratum(
    "transformer.ffn_decomposition",
    slide="FFN is decomposable",
    says="FFN(X) = sum_h GeLU(X W^In + b^In) W^Out + b^Out",
    should_say="the activation of the layer: the slides define the FFN with ReLU; GeLU is BERT's",
    breaks="transformer.groups_add_up_to_the_layer",
)
def activation_switched_to_gelu(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    /,
    *,
    parts: int,  # noqa: ARG001 (one unit at a time, as printed)
    b_1: FloatArray | None = None,
    b_2: FloatArray | None = None,
    activation: str = "relu",  # noqa: ARG001 (not asked: that is the mistake)
) -> FloatArray:
    """Compute the sum over hidden units with GeLU, whatever the layer's activation is."""
    from refimpl.transformer.activations import gelu

    total = np.zeros((*x.shape[:-1], w_2.shape[1]), x.dtype)
    for h in range(w_1.shape[1]):
        unit = x @ w_1[:, h] + (0 if b_1 is None else b_1[h])
        total = total + gelu(unit)[..., None] * w_2[h]
    return total if b_2 is None else total + b_2
