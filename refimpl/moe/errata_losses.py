"""The lecture's table of auxiliary losses, as it is printed."""

from __future__ import annotations

from refimpl.moe.losses_coefficients import LossCoefficients, loss_coefficients
from refimpl.registry import erratum

__all__ = ["one_coefficient_for_all", "shazeers_coefficients_for_vision"]


@erratum(
    "moe.loss_coefficients",
    slide="Auxiliary Loss",
    says="GShard, Switch, ..., DeepSeekMoE, DeepSeek-V2, Skywork-MoE: w_aux = 0.01",
    should_say="DeepSeekMoE: 0.01 (2B), 0.001 (16B), 0.003 and 0.05 for devices (145B); DeepSeek-V2: 0.003, "
    "0.05 for devices, 0.02 for communication; Skywork-MoE: adapted, at most 0.01",
    breaks="moe.deepseek_changes_its_coefficient_with_size",
)
def one_coefficient_for_all(*, model: str) -> LossCoefficients:
    """Return 0.01 for every expert loss and no device loss."""
    known = loss_coefficients(model=model)
    return LossCoefficients(expert=0.01) if known.expert else known


@erratum(
    "moe.loss_coefficients",
    slide="Auxiliary Loss",
    says="Shazeer et al., V-MoE: w_importance = 0.1, w_load = 0.1",
    should_say="V-MoE: 0.005 and 0.005, half of 0.01 each, in the configs of its paper",
    breaks="moe.vision_weighs_its_losses_a_twentieth",
)
def shazeers_coefficients_for_vision(*, model: str) -> LossCoefficients:
    """Return 0.1 and 0.1 wherever importance and load are balanced."""
    known = loss_coefficients(model=model)
    return LossCoefficients(importance=0.1, load=0.1) if known.importance else known
