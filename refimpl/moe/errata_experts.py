"""The lecture's design table of mixtures of experts, run as it is printed: the counts mix conventions."""

from __future__ import annotations

from typing import Any

from refimpl.moe.shared_experts import shared_experts
from refimpl.numerics import FloatArray
from refimpl.registry import erratum
from refimpl.transformer.activations import Activation

__all__ = ["shared_counted_as_routed", "two_experts_a_token"]

TABLE = "Mixture of experts: design table"


@erratum(
    "moe.residual",
    slide=TABLE,
    says="DeepSpeed-MoE: 2 of 128 experts a token",
    should_say="1 of 128: the source takes the top-1 expert, and only that gives the sizes 350M and 1.3B",
    breaks="moe.one_expert_a_token",
)
def two_experts_a_token(
    x: FloatArray,
    w_1: FloatArray,
    w_2: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    /,
    *,
    activation: Activation = "relu",
) -> FloatArray:
    """Compute the residual layer with the two best experts of each token."""
    dense, k = (w_1[None], w_2[None]), min(2, len(w_in))
    return shared_experts(x, w_router, w_in, w_out, *dense, k=k, convention="switch", activation=activation)


@erratum(
    "moe.shared_experts",
    slide=TABLE,
    says="DeepSeekMoE: 8 of 66 experts a token, 2 shared, in the column where OpenMoE has 2 of 16, 1 shared",
    should_say="8 counts the shared ones: 6 routed of 64, and 2 shared; OpenMoE's 2 of 16 are all routed",
    breaks="moe.the_router_does_not_see_the_shared",
)
def shared_counted_as_routed(
    x: FloatArray,
    w_router: FloatArray,
    w_in: FloatArray,
    w_out: FloatArray,
    shared_in: FloatArray,
    shared_out: FloatArray,
    /,
    *,
    k: int,
    **options: Any,
) -> FloatArray:
    """Compute the layer with as many routed experts as the column says, the shared ones besides."""
    k = min(k + len(shared_in), len(w_in))
    return shared_experts(x, w_router, w_in, w_out, shared_in, shared_out, k=k, **options)
