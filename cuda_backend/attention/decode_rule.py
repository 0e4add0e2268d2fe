"""What the reference says of a decode step, before any kernel does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend.arrays import is_host
from refimpl.attention.decode import checked_pages
from refimpl.attention.scores import AttentionOptions, ScoreRule, score_rule
from refimpl.errors import ShapeError

__all__ = ["options_of", "rule_of"]


def options_of(k_lengths: Any, scale: float | None) -> AttentionOptions:
    """Return the options of dense attention that a decode step stands for."""
    return {"causal": "bottom_right", "k_lengths": k_lengths, "scale": scale}


def rule_of(table: Any, k_lengths: Any) -> Callable[..., ScoreRule]:
    """Return the check of q, k and v, or of pages if there is a table; on the GPU its entries are unknown."""
    if table is None:
        return score_rule

    def rule(q: Any, k: Any, v: Any, **options: Any) -> ScoreRule:
        if is_host(table) and is_host(k_lengths):
            checked_pages(q, k, v, table, k_lengths)
        if k.ndim != 4 or v.ndim != 4 or len(np.shape(table)) != 2:
            raise ShapeError("k_pages, v_pages, page_table: expected 4, 4 and 2 axes")
        B, count = np.shape(table)
        cache = (np.broadcast_to(x[:1, :1], (B, count * x.shape[1], *x.shape[2:])) for x in (k, v))
        return score_rule(q, *cache, **options)

    return rule
