"""Mixture of experts: gates, routers with a capacity, other routers, hash layers, dispatch, ranks, losses.

A function that bears its module's name is imported from there: ``from refimpl.moe.switch import switch``.
"""

from refimpl.moe.attention_router import attention_routed, attention_routed_vjp, attention_router_vjp
from refimpl.moe.base_assignment import base_layer, base_layer_vjp, best_exchange
from refimpl.moe.batch_priority import batch_priority_routing, batch_priority_vjp
from refimpl.moe.buffers import LayerGradients, routed, routed_vjp
from refimpl.moe.capacity import expert_capacity
from refimpl.moe.deepseek_v3 import BiasedGradients, deepseek_v3_vjp, gates_by_masks
from refimpl.moe.dispatch import combine_tensor, dispatch_by_indices, dispatch_vjp
from refimpl.moe.expert_choice import (
    chosen_by_experts,
    expert_choice_vjp,
    expert_selection,
    expert_selection_vjp,
)
from refimpl.moe.expert_ffn import ExpertGradients, ExpertOptions, expert_ffn_vjp
from refimpl.moe.fine_grained import fine_grained_vjp
from refimpl.moe.gating import dense_mixture, dense_mixture_vjp, top_k_gates, top_k_gates_vjp
from refimpl.moe.gshard import gshard_as_printed, gshard_as_printed_routing, gshard_as_printed_vjp
from refimpl.moe.gshard_as_coded import gshard_as_coded_routing, gshard_as_coded_vjp
from refimpl.moe.hash_context import (
    bigram_hash,
    future_hash,
    position_hash,
    predicted_future_hash,
    previous_hash,
)
from refimpl.moe.hash_layers import hash_layer, hash_layer_vjp
from refimpl.moe.hash_tables import balanced_table, clustered_table, dispersed_table, random_table
from refimpl.moe.losses_balance import balance_loss, balance_loss_vjp
from refimpl.moe.losses_coefficients import LossCoefficients, adapt_coefficient, loss_coefficients
from refimpl.moe.losses_communication import communication_balance_loss, communication_balance_loss_vjp
from refimpl.moe.losses_device_balance import (
    device_balance_loss,
    device_balance_loss_vjp,
    expert_balance_loss,
    expert_balance_loss_vjp,
)
from refimpl.moe.losses_importance import importance_loss, importance_loss_vjp
from refimpl.moe.losses_load import load_loss, load_loss_vjp, load_probabilities
from refimpl.moe.losses_mutual_information import (
    mutual_information_loss,
    mutual_information_loss_vjp,
    task_information_loss,
    task_information_loss_vjp,
)
from refimpl.moe.losses_skywork import (
    normalize_logits,
    normalize_logits_vjp,
    uniformity_loss,
    uniformity_loss_vjp,
)
from refimpl.moe.losses_z import z_loss, z_loss_vjp
from refimpl.moe.mixture import MixtureGradients, mixture_vjp
from refimpl.moe.multi_hash import multi_hash_layer, multi_hash_layer_vjp
from refimpl.moe.noisy_gating import (
    noisy_top_k_gates,
    noisy_top_k_gates_vjp,
    vmoe_noisy_gates,
    vmoe_noisy_gates_vjp,
)
from refimpl.moe.residual import ResidualLayer, pyramid, residual_vjp
from refimpl.moe.residual_coefficients import residual_coefficients_vjp
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
from refimpl.moe.shared_experts import shared_experts_vjp
from refimpl.moe.soft_merging import merge_experts, soft_merging_vjp
from refimpl.moe.sparse_mixture import sparse_mixture_vjp
from refimpl.moe.split_ffn import SplitExperts, split_ffn_vjp, split_weights
from refimpl.moe.switch import switch_routing, switch_vjp
from refimpl.moe.upcycling import virtual_groups

__all__ = [
    "BiasedGradients",
    "Convention",
    "ExpertGradients",
    "ExpertOptions",
    "LayerGradients",
    "LossCoefficients",
    "MixtureGradients",
    "ResidualLayer",
    "Routing",
    "SplitExperts",
    "adapt_coefficient",
    "assign_slots",
    "attention_routed",
    "attention_routed_vjp",
    "attention_router_vjp",
    "balance_loss",
    "balance_loss_vjp",
    "balanced_table",
    "base_layer",
    "base_layer_vjp",
    "batch_priority_routing",
    "batch_priority_vjp",
    "best_exchange",
    "bigram_hash",
    "chosen_by_experts",
    "clustered_table",
    "combine_tensor",
    "communication_balance_loss",
    "communication_balance_loss_vjp",
    "deepseek_v3_vjp",
    "dense_mixture",
    "dense_mixture_vjp",
    "device_balance_loss",
    "device_balance_loss_vjp",
    "dispatch_by_indices",
    "dispatch_vjp",
    "dispersed_table",
    "expert_balance_loss",
    "expert_balance_loss_vjp",
    "expert_capacity",
    "expert_choice_vjp",
    "expert_ffn_vjp",
    "expert_selection",
    "expert_selection_vjp",
    "fine_grained_vjp",
    "future_hash",
    "gate_weights",
    "gate_weights_vjp",
    "gates_by_masks",
    "gshard_as_coded_routing",
    "gshard_as_coded_vjp",
    "gshard_as_printed",
    "gshard_as_printed_routing",
    "gshard_as_printed_vjp",
    "hash_layer",
    "hash_layer_vjp",
    "importance_loss",
    "importance_loss_vjp",
    "load_loss",
    "load_loss_vjp",
    "load_probabilities",
    "loss_coefficients",
    "merge_experts",
    "mixture_vjp",
    "multi_hash_layer",
    "multi_hash_layer_vjp",
    "mutual_information_loss",
    "mutual_information_loss_vjp",
    "noisy_top_k_gates",
    "noisy_top_k_gates_vjp",
    "normalize_logits",
    "normalize_logits_vjp",
    "position_hash",
    "predicted_future_hash",
    "previous_hash",
    "pyramid",
    "random_table",
    "residual_coefficients_vjp",
    "residual_vjp",
    "routed",
    "routed_vjp",
    "router_logits",
    "router_logits_vjp",
    "shared_experts_vjp",
    "soft_merging_vjp",
    "sparse_mixture_vjp",
    "split_ffn_vjp",
    "split_weights",
    "switch_routing",
    "switch_vjp",
    "task_information_loss",
    "task_information_loss_vjp",
    "top_k_gates",
    "top_k_gates_vjp",
    "top_k_indices",
    "uniformity_loss",
    "uniformity_loss_vjp",
    "virtual_groups",
    "vmoe_noisy_gates",
    "vmoe_noisy_gates_vjp",
    "z_loss",
    "z_loss_vjp",
]
