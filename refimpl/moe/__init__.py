"""Mixture of experts: what routers are trained with."""

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

__all__ = [
    "LossCoefficients",
    "adapt_coefficient",
    "balance_loss",
    "balance_loss_vjp",
    "communication_balance_loss",
    "communication_balance_loss_vjp",
    "device_balance_loss",
    "device_balance_loss_vjp",
    "expert_balance_loss",
    "expert_balance_loss_vjp",
    "importance_loss",
    "importance_loss_vjp",
    "load_loss",
    "load_loss_vjp",
    "load_probabilities",
    "loss_coefficients",
    "mutual_information_loss",
    "mutual_information_loss_vjp",
    "normalize_logits",
    "normalize_logits_vjp",
    "task_information_loss",
    "task_information_loss_vjp",
    "uniformity_loss",
    "uniformity_loss_vjp",
    "z_loss",
    "z_loss_vjp",
]
