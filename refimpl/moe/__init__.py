"""Mixture of experts: gates, routers with a capacity, dispatch, experts over ranks.

A function that bears its module's name is imported from there: ``from refimpl.moe.switch import switch``.
"""

from refimpl.moe.batch_priority import batch_priority_routing, batch_priority_vjp
from refimpl.moe.buffers import LayerGradients, routed, routed_vjp
from refimpl.moe.capacity import expert_capacity
from refimpl.moe.dispatch import combine_tensor, dispatch_by_indices, dispatch_vjp
from refimpl.moe.expert_ffn import ExpertGradients, ExpertOptions, expert_ffn_vjp
from refimpl.moe.gating import dense_mixture, dense_mixture_vjp, top_k_gates, top_k_gates_vjp
from refimpl.moe.gshard import gshard_as_printed, gshard_as_printed_routing, gshard_as_printed_vjp
from refimpl.moe.gshard_as_coded import gshard_as_coded_routing, gshard_as_coded_vjp
from refimpl.moe.mixture import MixtureGradients, mixture_vjp
from refimpl.moe.noisy_gating import (
    noisy_top_k_gates,
    noisy_top_k_gates_vjp,
    vmoe_noisy_gates,
    vmoe_noisy_gates_vjp,
)
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
from refimpl.moe.switch import switch_routing, switch_vjp

__all__ = [
    "Convention",
    "ExpertGradients",
    "ExpertOptions",
    "LayerGradients",
    "MixtureGradients",
    "Routing",
    "assign_slots",
    "batch_priority_routing",
    "batch_priority_vjp",
    "combine_tensor",
    "dense_mixture",
    "dense_mixture_vjp",
    "dispatch_by_indices",
    "dispatch_vjp",
    "expert_capacity",
    "expert_ffn_vjp",
    "gate_weights",
    "gate_weights_vjp",
    "gshard_as_coded_routing",
    "gshard_as_coded_vjp",
    "gshard_as_printed",
    "gshard_as_printed_routing",
    "gshard_as_printed_vjp",
    "mixture_vjp",
    "noisy_top_k_gates",
    "noisy_top_k_gates_vjp",
    "routed",
    "routed_vjp",
    "router_logits",
    "router_logits_vjp",
    "switch_routing",
    "switch_vjp",
    "top_k_gates",
    "top_k_gates_vjp",
    "top_k_indices",
    "vmoe_noisy_gates",
    "vmoe_noisy_gates_vjp",
]
