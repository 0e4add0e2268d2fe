"""Distillation: a small model learns from a large one's distributions, layers or texts, or on its own."""

from refimpl.distill.augmentation import augment, nearest_embeddings
from refimpl.distill.minillm import minillm_gradient
from refimpl.distill.prediction import PredictionGradients, prediction_loss, prediction_loss_vjp
from refimpl.distill.reverse_kl import TreeGradients, reverse_kl, reverse_kl_vjp, sequence_probabilities
from refimpl.distill.sequence_level import sequence_level_loss, sequence_level_loss_vjp
from refimpl.distill.soft_targets import StudentGradients, soft_target_loss, soft_target_loss_vjp
from refimpl.distill.tinybert import (
    LayerGradients,
    LayerMap,
    layer_map,
    tinybert_layer_loss,
    tinybert_layer_loss_vjp,
)

__all__ = [
    "LayerGradients",
    "LayerMap",
    "PredictionGradients",
    "StudentGradients",
    "TreeGradients",
    "augment",
    "layer_map",
    "minillm_gradient",
    "nearest_embeddings",
    "prediction_loss",
    "prediction_loss_vjp",
    "reverse_kl",
    "reverse_kl_vjp",
    "sequence_level_loss",
    "sequence_level_loss_vjp",
    "sequence_probabilities",
    "soft_target_loss",
    "soft_target_loss_vjp",
    "tinybert_layer_loss",
    "tinybert_layer_loss_vjp",
]
