"""The lecture's slide titled LoRA, which is about something else, run as it is printed."""

from __future__ import annotations

import numpy as np

from refimpl.attention.online_softmax import softmax
from refimpl.numerics import BoolArray, FloatArray
from refimpl.registry import erratum

__all__ = ["square_of_scores_factorized"]


@erratum(
    "attention.low_rank",
    slide="Low-Rank Approximations (LoRA)",
    says="LoRA is a low-rank approximation of the N x N self-attention matrix, M = L_k R_kᵀ",
    should_say="that is low-rank attention (Linformer), which projects keys and values: factors of the N x N "
    "matrix need it whole first, and their rows do not sum to 1.  LoRA is an update W_0 + B A of a weight",
    breaks="attention.rows_sum_to_one_over_the_projected_keys",
)
def square_of_scores_factorized(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    e: FloatArray,
    f: FloatArray,  # noqa: ARG001 (the slide projects nothing)
    /,
    *,
    key_mask: BoolArray | None = None,
    scale: float | None = None,
) -> FloatArray:
    """Compute softmax(q kᵀ) whole, cut its singular values off after R of them, and multiply the values."""
    k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if key_mask is not None:
        scores = np.where(key_mask[:, None, None, :], scores, -np.inf)
    left, values, right = np.linalg.svd(softmax(scores), full_matrices=False)
    rank = e.shape[1]
    square = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    out: FloatArray = np.einsum("bhij,bjhd->bihd", square, v)
    return out
