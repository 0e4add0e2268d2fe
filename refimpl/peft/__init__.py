"""Parameter-efficient fine-tuning: few trained numbers beside a frozen model, and modules put together."""

from refimpl.peft.adapter import AdapterGradients, adapter, adapter_vjp
from refimpl.peft.composition import (
    GatedGradients,
    composed_factors,
    composed_factors_vjp,
    composed_update,
    composed_update_vjp,
    gated_lora,
    gated_lora_vjp,
)
from refimpl.peft.expert_tuning import ExpertTuningGradients, expert_tuning, expert_tuning_vjp
from refimpl.peft.fusion import FusionGradients, adapter_fusion, adapter_fusion_vjp
from refimpl.peft.lora import (
    FullGradients,
    LoRAGradients,
    full_linear,
    full_linear_vjp,
    lora_linear,
    lora_linear_vjp,
)
from refimpl.peft.lora_layers import (
    lora_embedding,
    lora_embedding_vjp,
    lora_fused_linear,
    lora_fused_linear_vjp,
)
from refimpl.peft.merge import lora_init, lora_merge, lora_merge_vjp, lora_unmerge
from refimpl.peft.prefix import (
    PrefixGradients,
    prefix_attention,
    prefix_attention_vjp,
    prefix_from_embedding,
    prefix_from_embedding_vjp,
)
from refimpl.peft.retrieval import Retrieved, retrieve, retrieved_weights
from refimpl.peft.soft_prompt import soft_prompt, soft_prompt_labels, soft_prompt_vjp

__all__ = [
    "AdapterGradients",
    "ExpertTuningGradients",
    "FullGradients",
    "FusionGradients",
    "GatedGradients",
    "LoRAGradients",
    "PrefixGradients",
    "Retrieved",
    "adapter",
    "adapter_fusion",
    "adapter_fusion_vjp",
    "adapter_vjp",
    "composed_factors",
    "composed_factors_vjp",
    "composed_update",
    "composed_update_vjp",
    "expert_tuning",
    "expert_tuning_vjp",
    "full_linear",
    "full_linear_vjp",
    "gated_lora",
    "gated_lora_vjp",
    "lora_embedding",
    "lora_embedding_vjp",
    "lora_fused_linear",
    "lora_fused_linear_vjp",
    "lora_init",
    "lora_linear",
    "lora_linear_vjp",
    "lora_merge",
    "lora_merge_vjp",
    "lora_unmerge",
    "prefix_attention",
    "prefix_attention_vjp",
    "prefix_from_embedding",
    "prefix_from_embedding_vjp",
    "retrieve",
    "retrieved_weights",
    "soft_prompt",
    "soft_prompt_labels",
    "soft_prompt_vjp",
]
