"""The lecture's slide on dilated windows, run as it reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.attention.sliding_window import sliding_window_attention
from refimpl.numerics import FloatArray
from refimpl.registry import erratum

__all__ = ["receptive_field_without_gaps"]


@erratum(
    "attention.dilated_window",
    slide="Sparse Attention - LongFormer, dilated sliding window",
    says="the receptive field is enlarged from W to W x D, with the same complexity",
    should_say="its span is: W D + 1 tokens of which W + 1 are seen, the others left out by the gaps",
    breaks="attention.classes_never_meet",
)
def receptive_field_without_gaps(
    q: FloatArray, k: FloatArray, v: FloatArray, /, *, radius: int, dilation: Any, **options: Any
) -> Any:
    """Compute a window that sees all of W x D tokens, at D times the cost."""
    return sliding_window_attention(q, k, v, radius=radius * int(np.max(dilation)), **options)
