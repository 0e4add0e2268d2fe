"""The lecture's table of auxiliary losses, as it is printed."""

from __future__ import annotations

from refimpl.moe.losses_coefficients import LossCoefficients, loss_coefficients
from refimpl.registry import erratum

__all__ = ["one_coefficient_for_all"]


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
