"""Ranks and shards: counted messages, collectives, data, tensor and pipeline parallelism, ZeRO, all at once.

A function that bears its module's name is imported from there: ``from refimpl.parallel.zero import zero``.
"""

from refimpl.errors import DeadlockError
from refimpl.parallel.adam import AdamStep, AdamW, adam_step, adamw_step
from refimpl.parallel.array_collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    broadcast,
    reduce,
    reduce_scatter,
)
from refimpl.parallel.comm import Comm, Sent, Traffic, run_ranks
from refimpl.parallel.data import Replicas, data_parallel, data_parallel_step
from refimpl.parallel.groups import group
from refimpl.parallel.mesh import Mesh
from refimpl.parallel.mesh_training import MeshTraining, mesh_training
from refimpl.parallel.mixed_precision import (
    LossScale,
    OptimizerState,
    TrainedStates,
    mixed_precision_steps,
    next_loss_scale,
    optimizer_step,
)
from refimpl.parallel.network import Batch, Unit, attention_network, initial_parameters
from refimpl.parallel.pipeline import PipelineGradients, pipeline_parallel
from refimpl.parallel.schedules import check_schedule, pipeline_schedule
from refimpl.parallel.tensor import tensor_parallel, tensor_parallel_vjp
from refimpl.parallel.vocabulary import (
    vocabulary_embedding,
    vocabulary_embedding_vjp,
    vocabulary_loss,
    vocabulary_loss_vjp,
)
from refimpl.parallel.zero import ZeroState, ZeroTraining, zero_initial, zero_step

__all__ = [
    "AdamStep",
    "AdamW",
    "Batch",
    "Comm",
    "DeadlockError",
    "LossScale",
    "Mesh",
    "MeshTraining",
    "OptimizerState",
    "PipelineGradients",
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
    "check_schedule",
    "data_parallel",
    "data_parallel_step",
    "group",
    "initial_parameters",
    "mesh_training",
    "mixed_precision_steps",
    "next_loss_scale",
    "optimizer_step",
    "pipeline_parallel",
    "pipeline_schedule",
    "reduce",
    "reduce_scatter",
    "run_ranks",
    "tensor_parallel",
    "tensor_parallel_vjp",
    "vocabulary_embedding",
    "vocabulary_embedding_vjp",
    "vocabulary_loss",
    "vocabulary_loss_vjp",
    "zero_initial",
    "zero_step",
]
