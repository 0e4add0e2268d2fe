"""Mixture of experts: routers, capacity, dispatch, experts over ranks."""

from refimpl.moe.expert_ffn import ExpertGradients, ExpertOptions, expert_ffn, expert_ffn_vjp
from refimpl.moe.mixture import MixtureGradients, mixture, mixture_vjp
from refimpl.moe.routing import (
    Convention,
    Routing,
    assign_slots,
    gate_weights,
    gate_weights_vjp,
    router_logits,
    router_logits_vjp,
    top_k_indices,
)

__all__ = [
    "Convention",
    "ExpertGradients",
    "ExpertOptions",
    "MixtureGradients",
    "Routing",
    "assign_slots",
    "expert_ffn",
    "expert_ffn_vjp",
    "gate_weights",
    "gate_weights_vjp",
    "mixture",
    "mixture_vjp",
    "router_logits",
    "router_logits_vjp",
    "top_k_indices",
]
