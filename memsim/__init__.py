"""What a technique costs: memory, HBM traffic, communication, FLOPs and time.

Every model returns an `Estimate`: named terms, each with its exact value, unit, formula and source.  Hardware
and published numbers are data files; ``reproduce`` sets every published number beside the one computed here.
Nothing loads before it is used; a function that bears its module's name is imported from there:
``from memsim.attention_io import attention_io``.

>>> from memsim import zero_memory
>>> print(zero_memory(parameters="7.5B", ranks=64, stage=2).explain()[-1])
total: 2Ψ + 14Ψ/N = 2*7.5e9 + 14*7.5e9/64 = 16.64 GB
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "CachingAllocator": "memory.allocator",
    "Division": "planning.division",
    "Estimate": "estimate",
    "Run": "memory.run",
    "Serving": "inference",
    "Setting": "planning.training_setting",
    "Term": "estimate",
    "activated_parameters": "moe",
    "adapter_parameters": "memory.adapter_states",
    "amdahl_scaling": "parallelism",
    "attended_pairs": "flops",
    "attention_flops": "flops",
    "attention_traffic": "attention_io",
    "batch_limit": "inference",
    "bits_per_weight": "inference",
    "block_activations": "training_memory",
    "block_sizes": "attention_io",
    "checkpoint_activations": "training_memory",
    "checkpoint_communication": "zero_r",
    "checkpoint_weights": "formats.checkpoint_header",
    "chinchilla": "scaling_laws",
    "compute_share": "compute_optimal",
    "crossover_batch": "parallelism",
    "data_vs_model_parallel": "parallelism",
    "defragmentation_traffic": "zero_r",
    "dense": "model",
    "derive": "derivation",
    "forward_flops": "compute_optimal",
    "fused_buffer": "training_memory",
    "hardware_names": "hardware",
    "hierarchical": "hierarchy",
    "host_memory": "memory.step_memory",
    "ideal_scaling": "parallelism",
    "inference_weights": "training_memory",
    "kaplan": "scaling_laws",
    "korthikanti_activations": "memory.korthikanti",
    "kv_cache": "inference",
    "largest_model": "zero",
    "linear_flops": "linear_io",
    "linear_traffic": "linear_io",
    "mamba_flops": "ssm",
    "mamba_parameters": "ssm",
    "mamba_state": "ssm",
    "mamba_traffic": "ssm",
    "model_names": "model",
    "padded_vocabulary": "model",
    "moe_all_to_all": "moe_communication",
    "model_of_config": "formats.huggingface",
    "moe_flops": "moe",
    "moe_parameters": "moe",
    "mpi_messages": "mpi_collectives",
    "non_embedding_parameters": "parameters",
    "partitioned_activation_overhead": "communication",
    "partitioned_communication": "communication",
    "partitioned_memory": "zero",
    "pass_total": "standard_attention",
    "pipeline_bubble": "parallelism",
    "plan": "planning.planner",
    "pruning_tokens": "scaling_laws",
    "quantized_weights": "inference",
    "read_model": "formats.huggingface",
    "read_run": "formats.deepspeed_config",
    "reason_against": "planning.division",
    "reproduce": "published",
    "scan_flops": "ssm",
    "scan_traffic": "ssm",
    "served_speculation": "inference",
    "softmax_flops": "flops",
    "stage_model": "memory.rank_model",
    "standard_passes": "standard_attention",
    "training_flops": "compute_optimal",
    "validate": "measured.validation",
    "zero_activations": "training_memory",
    "zero_communication": "communication",
    "zero_memory": "zero",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memsim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"memsim.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
