"""Every module of memsim that registers techniques, laws or prices (entry point ``frugal.techniques``)."""

from __future__ import annotations

import importlib

__all__ = ["MODULES"]

MODULES = (
    "activations",
    "attention_io",
    "attention_prices",
    "collective_prices",
    "collectives",
    "communication",
    "compression_prices",
    "compute_optimal",
    "convolution_prices",
    "errata_moe",
    "expert_parallel_prices",
    "fine_tuning",
    "fine_tuning_prices",
    "int8_attention_prices",
    "korthikanti",
    "laws",
    "laws_collectives",
    "laws_fine_tuning",
    "laws_moe",
    "laws_parameters",
    "laws_pipeline",
    "laws_scaling",
    "laws_speculative",
    "laws_tensor",
    "laws_training_memory",
    "laws_zero",
    "linear_attention_prices",
    "linear_io",
    "low_rank_prices",
    "mesh_prices",
    "model_flops",
    "model_states",
    "moe",
    "moe_communication",
    "moe_prices",
    "moe_variant_prices",
    "parallelism",
    "pipeline",
    "pipeline_prices",
    "parameters",
    "scaling_laws",
    "sparse_attention_prices",
    "speculative",
    "ssm_prices",
    "tensor_parallel",
    "tensor_prices",
    "training_memory",
    "weight_only_prices",
    "zero",
    "zero_r",
)

for _module in MODULES:
    importlib.import_module(f"memsim.{_module}")
