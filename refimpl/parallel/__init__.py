"""Ranks and shards: message passing that is counted, collectives, data parallelism, mixed precision, ZeRO.

A function that bears its module's name is imported from there: ``from refimpl.parallel.zero import zero``.
"""

from refimpl.parallel.adam import AdamStep, AdamW, adam_step, adamw_step
from refimpl.parallel.array_collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    reduce,
    reduce_scatter,
)
from refimpl.parallel.comm import Comm, DeadlockError, Sent, Traffic, run_ranks
from refimpl.parallel.data import Replicas, data_parallel, data_parallel_step
from refimpl.parallel.mixed_precision import (
    LossScale,
    OptimizerState,
    TrainedStates,
    mixed_precision_steps,
    next_loss_scale,
    optimizer_step,
)
from refimpl.parallel.network import Batch, Unit, attention_network, initial_parameters
from refimpl.parallel.zero import ZeroState, ZeroTraining, zero_initial, zero_step

__all__ = [
    "AdamStep",
    "AdamW",
    "Batch",
    "Comm",
    "DeadlockError",
    "LossScale",
    "OptimizerState",
    "Replicas",
    "Sent",
    "Traffic",
    "TrainedStates",
    "Unit",
    "ZeroState",
    "ZeroTraining",
    "adam_step",
    "adamw_step",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "attention_network",
    "broadcast",
    "data_parallel",
    "data_parallel_step",
    "initial_parameters",
    "mixed_precision_steps",
    "next_loss_scale",
    "optimizer_step",
    "reduce",
    "reduce_scatter",
    "run_ranks",
    "zero_initial",
    "zero_step",
]
