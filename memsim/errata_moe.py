"""What the lecture's table of MoE designs prints wrongly, or in several senses at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from memsim.estimate import Estimate, estimate
from memsim.model import Model, Part
from memsim.moe import MoeParameters, moe_parameters
from memsim.parameters import model_of
from refimpl.registry import erratum

__all__ = [
    "experts_are_the_model",
    "shared_experts_counted_twice",
    "switch_xxl_has_64_experts",
    "two_experts_of_deepspeed",
]

_SLIDE = "MoE Experts Design"
_BREAKS = "memsim.a_name_says_the_size"


def _edited(model: str | Model, name: str, change: Callable[[Part], Part]) -> Model:
    """Return the model with every part changed, if it is the one called `name`."""
    described = model_of(model)
    if described.name != name:
        return described
    stacks = (replace(s, parts=tuple(map(change, s.parts))) for s in described.stacks)
    return replace(described, stacks=tuple(stacks))


def _resized(**sizes: int) -> Callable[[Part], Part]:
    def change(part: Part) -> Part:
        return replace(part, sizes={**part.sizes, **sizes}) if part.kind == "experts" else part

    return change


@erratum(
    "cost.moe_parameters",
    slide=_SLIDE,
    says="DeepSpeed-MoE activates 2 of 128 experts",
    should_say="1 of 128: the source's gate takes the first expert, and only then 350M and 1.3B fit",
    breaks=_BREAKS,
)
def two_experts_of_deepspeed(*, model: str | Model) -> MoeParameters:
    """Send each token to two experts."""
    return moe_parameters(model=_edited(model, "deepspeed-moe-52b", _resized(active=2)))


@erratum(
    "cost.moe_parameters",
    slide=_SLIDE,
    says="Switch-XXL, 395B, has 64 experts",
    should_say="128, as in the released config: 64 make 201B (the paper's own Table 9 has the misprint)",
    breaks=_BREAKS,
)
def switch_xxl_has_64_experts(*, model: str | Model) -> MoeParameters:
    """Halve the number of experts."""
    return moe_parameters(model=_edited(model, "switch-395b", _resized(experts=64)))


@erratum(
    "cost.moe_parameters",
    slide=_SLIDE,
    says="DeepSeekMoE 0.24B/1.89B, in a column of models",
    should_say="those are the parameters of its experts; the model has 2.0B and activates 0.3B",
    breaks=_BREAKS,
)
def experts_are_the_model(*, model: str | Model) -> MoeParameters:
    """Leave out everything but routed and shared experts."""
    total, activated = moe_parameters(model=model)
    if model_of(model).name != "deepseekmoe-2b":
        return MoeParameters(total, activated)
    return MoeParameters(_experts_of(total), _experts_of(activated))


def _experts_of(found: Estimate) -> Estimate:
    return estimate(found.name, [term for term in found.terms if term.name.endswith("experts")])


@erratum(
    "cost.moe_parameters",
    slide=_SLIDE,
    says="Qwen1.5-MoE: 8/64 experts, and 4 shared experts beside them",
    should_say="4 of 60 routed experts and one shared network as wide as 4, which 8/64 counts already",
    breaks=_BREAKS,
)
def shared_experts_counted_twice(*, model: str | Model) -> MoeParameters:
    """Take 8 of 64 as routed, and the shared network beside them."""
    return moe_parameters(model=_edited(model, "qwen1.5-moe", _resized(experts=64, active=8)))
