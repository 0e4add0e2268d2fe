"""The lecture's attention slides, run as they are printed: each breaks a law.

The slides show Algorithm 1 three times and the online softmax four times, not always the same.  A mutant here
is one printed form, in scalar loops that follow the slide, so that a reader can hold it against the print.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.registry import erratum

__all__ = [
    "block_counts_rounded_down",
    "heads_scaled_by_model_width",
    "last_online_step",
    "online_sum_not_rescaled",
    "output_not_carried",
    "scores_not_shifted",
    "sum_not_carried",
]

ALGORITHM_1 = "FlashAttention, Algorithm 1, first copy"


def _algorithm_1(
    q: FloatArray, k: FloatArray, v: FloatArray, options: dict[str, Any], mistake: str
) -> FloatArray:
    """Run the slide's Algorithm 1 head by head, with one of its mistakes."""
    Br, Bc = options.get("block_sizes") or (4, 4)
    scale = options.get("scale", q.shape[3] ** -0.5)
    count = math.floor if mistake == "floor" else math.ceil
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        g = h // (q.shape[2] // k.shape[2])
        o, l, m = out[b, :, h], np.zeros(q.shape[1]), np.full(q.shape[1], -np.inf)  # noqa: E741
        for j in range(count(k.shape[1] / Bc)):
            k_j, v_j = (x[b, j * Bc : (j + 1) * Bc, g] for x in (k, v))
            for i in range(count(q.shape[1] / Br)):
                rows = slice(i * Br, (i + 1) * Br)
                s = scale * q[b, rows, h] @ k_j.T
                m_block = s.max(axis=1)
                p = np.exp(s) if mistake == "no shift" else np.exp(s - m_block[:, None])
                l_block = p.sum(axis=1)
                m_new = np.maximum(m[rows], m_block)
                old, new = np.exp(m[rows] - m_new), np.exp(m_block - m_new)
                l_new = (old if mistake == "no sum" else old * l[rows]) + new * l_block
                carried = l[rows] * old
                carried = carried[:, None] * (1.0 if mistake == "no output" else o[rows])
                o[rows] = (carried + new[:, None] * (p @ v_j)) / l_new[:, None]
                l[rows], m[rows] = l_new, m_new
    return out


@erratum(
    "attention.flash",
    slide=ALGORITHM_1,
    says="B_c, B_r, T_r and T_c are rounded down",
    should_say="rounded up: otherwise the last rows and keys are dropped where blocks do not divide N",
    breaks="attention.equal_scores_give_the_mean",
)
def block_counts_rounded_down(
    q: FloatArray, k: FloatArray, v: FloatArray, /, *, block_sizes: tuple[int, int] = (4, 4)
) -> FloatArray:
    """Compute Algorithm 1 with floors instead of ceilings."""
    return _algorithm_1(q, k, v, {"block_sizes": block_sizes}, "floor")


@erratum(
    "attention.flash",
    slide=ALGORITHM_1,
    says="P = exp(S), without the block's maximum",
    should_say="P = exp(S - m): the update of l and O multiplies by exp(m - m_new) and counts on it",
    breaks="attention.keys_commute",
)
def scores_not_shifted(
    q: FloatArray,
    k: FloatArray,
    v: FloatArray,
    /,
    *,
    block_sizes: tuple[int, int] = (4, 4),
) -> FloatArray:
    """Compute Algorithm 1 with P = exp(S)."""
    return _algorithm_1(q, k, v, {"block_sizes": block_sizes}, "no shift")


@erratum(
    "attention.flash",
    slide=ALGORITHM_1,
    says="l_new = exp(m - m_new) + exp(m_block - m_new) l_block",
    should_say="l_new = exp(m - m_new) l + ...: the sum over earlier keys is carried on",
    breaks="attention.keys_commute",
)
def sum_not_carried(
    q: FloatArray, k: FloatArray, v: FloatArray, /, *, block_sizes: tuple[int, int] = (4, 4)
) -> FloatArray:
    """Compute Algorithm 1 with the old sum missing from the new one."""
    return _algorithm_1(q, k, v, {"block_sizes": block_sizes}, "no sum")


@erratum(
    "attention.flash",
    slide=ALGORITHM_1,
    says="O = (diag(l) exp(m - m_new) + exp(m_block - m_new) P V) / l_new",
    should_say="O = (diag(l) exp(m - m_new) O + ...) / l_new: the output over earlier keys is carried on",
    breaks="attention.values_scale_linearly",
)
def output_not_carried(
    q: FloatArray, k: FloatArray, v: FloatArray, /, *, block_sizes: tuple[int, int] = (4, 4)
) -> FloatArray:
    """Compute Algorithm 1 with the old output missing from the new one."""
    return _algorithm_1(q, k, v, {"block_sizes": block_sizes}, "no output")


def _online(x: FloatArray, mistake: str) -> FloatArray:
    """Run the slide's online softmax score by score, with one of its mistakes."""
    p = np.zeros_like(x, dtype=np.float64)
    for row in np.ndindex(x.shape[:-1]):
        scores = [float(score) for score in x[row]]
        m, l = scores[0], 1.0  # noqa: E741
        p[(*row, 0)] = 1.0
        for j, score in enumerate(scores[1:], start=1):
            m_new = max(m, score)
            old, new = math.exp(m - m_new), math.exp(score - m_new)
            l_new = (l if mistake == "sum not rescaled" else old * l) + new
            factor = math.exp(m) if mistake == "maximum lost" else old
            p[row] *= l / l_new * factor
            p[(*row, j)] = new / l_new
            m, l = m_new, l_new  # noqa: E741
    return p


@erratum(
    "attention.online_softmax",
    slide="Softmax reduction (numerically stable)",
    says="l = l_old + exp(S - m)",
    should_say="l = exp(m_old - m) l_old + exp(S - m): the old sum was taken against the old maximum",
    breaks="attention.softmax_sums_to_one",
)
def online_sum_not_rescaled(x: FloatArray, /, *, block_size: int = 1) -> FloatArray:  # noqa: ARG001
    """Compute the online softmax with the sum not moved to the new maximum."""
    return _online(x, "sum not rescaled")


@erratum(
    "attention.online_softmax",
    slide="Softmax reduction, last slide",
    says="O = O_old (l_old / l) exp(m_old) + ...",
    should_say="O = O_old (l_old / l) exp(m_old) / exp(m) + ...",
    breaks="attention.softmax_sums_to_one",
)
def last_online_step(x: FloatArray, /, *, block_size: int = 1) -> FloatArray:  # noqa: ARG001
    """Compute the online softmax without the division by exp(m)."""
    return _online(x, "maximum lost")


@erratum(
    "attention.head_decomposition",
    slide="Self-attention is decomposable",
    says="Softmax(X W^Q W^Kᵀ Xᵀ / √d) with d the width of the model",
    should_say="√d_h, the width of a head",
    breaks="attention.decomposition_equals_multi_head",
)
def heads_scaled_by_model_width(
    x: FloatArray,
    w_q: FloatArray,
    w_k: FloatArray,
    w_v: FloatArray,
    w_o: FloatArray,
    /,
    *,
    num_heads: int,
    b_o: FloatArray | None = None,
) -> FloatArray:
    """Compute the sum of heads with scores divided by √(H d_h)."""
    from refimpl.attention.multi_head import multi_head_attention

    return multi_head_attention(
        x, w_q, w_k, w_v, w_o, num_heads=num_heads, b_o=b_o, scale=w_q.shape[1] ** -0.5
    )
