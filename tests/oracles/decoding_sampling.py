"""Oracles of sampling: the filters of transformers, and scalar loops in exact fractions of the draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def _row(logits: Any, temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """The law of one row, token by token in order of falling probability."""
    order = sorted(range(len(logits)), key=lambda v: (-float(logits[v]), v))
    if temperature == 0:
        return [1.0 if v == order[0] else 0.0 for v in range(len(logits))]
    top = float(logits[order[0]])
    weights = {v: math.exp((float(logits[v]) - top) / temperature) for v in order[: top_k or len(order)]}
    total, mass, kept = math.fsum(weights.values()), 0.0, {}
    for v, weight in weights.items():
        if kept and mass >= top_p * total:
            break
        kept[v] = weight
        mass = math.fsum(kept.values())
    return [kept.get(v, 0.0) / mass for v in range(len(logits))]


@oracle("decoding.sampling.law")
def law_in_loops(logits: Any, /, *, temperature: float, top_p: float, top_k: int | None = None) -> Any:
    rows = [_row(row, temperature, top_k, top_p) for row in logits]
    return np.array(rows, dtype=np.float64).reshape(logits.shape)


@oracle("decoding.sampling.law")
def law_of_transformers(logits: Any, /, *, temperature: float, top_p: float, top_k: int | None = None) -> Any:
    """``TemperatureLogitsWarper``, ``TopKLogitsWarper``, ``TopPLogitsWarper``, in their order."""
    distinct = all(len(set(row[np.isfinite(row)].tolist())) == np.isfinite(row).sum() for row in logits)
    if temperature == 0 or not distinct or not logits.size:
        raise NotImplementedError("transformers keeps all tokens tied at the edge, and has no temperature 0")
    torch = library("torch")
    warpers = library("transformers.generation.logits_process")
    scores = torch.from_numpy(np.array(logits))
    chain = [warpers.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    if top_k is not None:
        chain.append(warpers.TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(warpers.TopPLogitsWarper(top_p))
    for warper in chain:
        scores = warper(None, scores)
    return torch.softmax(scores, dim=-1).numpy()


@oracle("decoding.sampling")
def draws_in_loops(
    logits: Any, /, *, uniforms: Any, temperature: float, top_p: float, top_k: int | None = None
) -> Any:
    """Walk through the tokens until the cumulated probability exceeds the draw."""
    tokens = np.zeros(len(logits), np.int64)
    for n, (row, u) in enumerate(zip(logits, uniforms, strict=True)):
        law, passed = _row(row, temperature, top_k, top_p), []
        for v, p in enumerate(law):
            passed.append(p)
            if p > 0:
                tokens[n] = v
            if math.fsum(passed) > u:
                break
    return tokens
