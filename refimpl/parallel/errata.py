"""The lecture's words on ZeRO, run: what they leave open breaks a law."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics import Array, BoolArray, IntArray
from refimpl.parallel.collectives import ring_all_reduce
from refimpl.parallel.comm import Traffic, run_ranks
from refimpl.parallel.zero import ZeroTraining, zero
from refimpl.registry import erratum

__all__ = ["gradients_all_reduced"]


@erratum(
    "parallel.zero",
    slide="Parallel Strategy: ZeRO",
    says="ZeRO-1 shards the optimizer state and has the same communication volume as data parallelism",
    should_say="only with a reduce-scatter of the gradients: with data parallelism's own all-reduce, and the "
    "all-gather of the parameters after it, a step sends 3Ψ instead of 2Ψ",
    breaks="parallel.one_and_two_send_twice_the_model_three_thrice",
)
def gradients_all_reduced(
    parameters: Array,
    tokens: IntArray,
    mask: BoolArray,
    /,
    *,
    traffic: Traffic | None = None,
    **options: Any,
) -> ZeroTraining:
    """Train as ZeRO does, and send what an all-reduce of the gradients would send beyond a reduce-scatter."""
    result = zero(parameters, tokens, mask, traffic=traffic, **options)
    if traffic is not None and options["stage"] < 3:
        extra = Traffic()
        for unit in options["network"]:
            run_ranks(
                tokens.shape[2], lambda comm, n=unit.size: ring_all_reduce(comm, np.zeros(n)), traffic=extra
            )
        for rank in extra.ranks:
            messages, size = extra.sent(rank)
            traffic.add(rank, "gradients", len(tokens) * size // 2, len(tokens) * messages // 2)
    return result
