"""What the lecture says of Mamba, run: it breaks a law."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import erratum

__all__ = ["state_of_an_rnn_style_transformer"]


@erratum(
    "ssm.selective_scan",
    slide="Outline: Mamba (RNN-style Transformer)",
    says="Mamba is a Transformer in the style of an RNN",
    should_say="a selective state space model without attention: the Transformer that is an RNN is linear "
    "attention, whose state is a sum that never decays; Mamba's decays by exp(ΔA), as the token decides",
    breaks="ssm.a_long_step_forgets",
)
def state_of_an_rnn_style_transformer(
    u: FloatArray, delta: FloatArray, A: FloatArray, B: FloatArray, C: FloatArray, /, **options: Any
) -> Any:
    """Compute the scan with the recurrence of linear attention, ``h_t = h_{t-1} + B̄_t u_t``."""
    from refimpl.ssm.selective_scan import selective_scan

    return selective_scan(u, delta, np.zeros_like(A), B, C, **options)
