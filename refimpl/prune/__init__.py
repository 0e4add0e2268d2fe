"""Pruning: weights and units taken out, masks that are learned, and data that recovers what was lost."""

from refimpl.prune.constrained import constrained
from refimpl.prune.dynamic_batch_loading import dynamic_batch_loading, dynamic_batch_loading_released
from refimpl.prune.hard_concrete import (
    MaskGradients,
    evaluation_mask,
    hard_concrete,
    hard_concrete_vjp,
    open_probability,
    open_probability_vjp,
)
from refimpl.prune.magnitude import magnitude, magnitude_global, n_m
from refimpl.prune.structured import compacted_ffn, masked_ffn, masked_ffn_vjp
from refimpl.prune.structured_heads import compacted_heads, masked_heads, masked_heads_vjp
from refimpl.prune.structured_width import WidthGradients, compacted_width, masked_width, masked_width_vjp
from refimpl.prune.target_structure import (
    PenaltyGradients,
    target_at,
    target_structure,
    target_structure_vjp,
)

__all__ = [
    "MaskGradients",
    "PenaltyGradients",
    "WidthGradients",
    "compacted_ffn",
    "compacted_heads",
    "compacted_width",
    "constrained",
    "dynamic_batch_loading",
    "dynamic_batch_loading_released",
    "evaluation_mask",
    "hard_concrete",
    "hard_concrete_vjp",
    "magnitude",
    "magnitude_global",
    "masked_ffn",
    "masked_ffn_vjp",
    "masked_heads",
    "masked_heads_vjp",
    "masked_width",
    "masked_width_vjp",
    "n_m",
    "open_probability",
    "open_probability_vjp",
    "target_at",
    "target_structure",
    "target_structure_vjp",
]
