"""Every module of memsim that registers techniques, laws or prices (entry point ``frugal.techniques``)."""

from __future__ import annotations

import importlib

__all__ = ["MODULES"]

MODULES = (
    "memory.activations",
    "attention_io",
    "prices.attention",
    "prices.collective",
    "collectives",
    "communication",
    "prices.compression",
    "compute_optimal",
    "prices.convolution",
    "errata_moe",
    "prices.expert_parallel",
    "fine_tuning",
    "prices.fine_tuning",
    "prices.int8_attention",
    "memory.korthikanti",
    "laws.attention_io",
    "laws.linear_in_parameters",
    "laws.parallelism",
    "laws.collectives",
    "laws.fine_tuning",
    "laws.moe",
    "laws.parameters",
    "laws.pipeline",
    "laws.scaling",
    "laws.speculative",
    "laws.tensor",
    "laws.training_memory",
    "laws.zero",
    "prices.linear_attention",
    "linear_io",
    "prices.low_rank",
    "prices.mesh",
    "model_flops",
    "memory.model_states",
    "moe",
    "moe_communication",
    "prices.moe",
    "prices.moe_variant",
    "parallelism",
    "pipeline",
    "prices.pipeline",
    "parameters",
    "scaling_laws",
    "prices.sparse_attention",
    "speculative",
    "prices.ssm",
    "tensor_parallel",
    "prices.tensor",
    "training_memory",
    "prices.varlen_attention",
    "prices.weight_only",
    "zero",
    "zero_r",
)

for _module in MODULES:
    importlib.import_module(f"memsim.{_module}")
