"""Memory and time of one step of distributed training, for one way to divide it among accelerators.

>>> megatron = Setting("gpt3-175b", "a100-80gb", accelerators=64, batch=64, sequence=2048, **AS_IN_2022)
>>> paper = Division(tensor=8, pipeline=8, interleave=3, recompute="selective", sequence_parallel=True)
>>> step = training_step(megatron, paper)
>>> step.time.total < 13.75  # seconds that were measured; every efficiency is 1 here
True
>>> [round(float(term.value) / 2**30, 2) for term in step.memory.terms]  # states, 45.56 without embedding
[46.92, 12.38]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from memsim.derivation import derive
from memsim.estimate import Estimate, Term, estimate
from memsim.planning.division import Division, reason_against
from memsim.planning.division_memory import MEMORY
from memsim.planning.division_time import KERNEL_TIME, TIME
from memsim.planning.division_volumes import KINDS
from memsim.planning.training_setting import (
    AS_IN_2022,  # noqa: F401 (the doctest)
    Setting,
)
from memsim.units import Number
from refimpl.errors import OptionError

__all__ = ["TrainingStep", "training_step"]


class TrainingStep(NamedTuple):
    """Time, memory of the fullest rank, and what a rank sends; every quantity by its name in the formulas."""

    time: Estimate
    memory: Estimate
    sent: Estimate
    quantities: Mapping[str, Term]

    def value(self, name: str) -> Number:
        """Return the value of a quantity, such as ``"mfu"``."""
        return self.quantities[name].value


def training_step(setting: Setting, division: Division) -> TrainingStep:
    """Return the time of a step and the memory of its fullest rank.

    Parameters
    ----------
    setting : Setting
        What is trained, on what.
    division : Division
        How.

    Returns
    -------
    TrainingStep
        Exact.  `memory` is that of the first or the last stage, whichever is fuller.

    Raises
    ------
    OptionError
        If the division cannot be run.

    Notes
    -----
    Stages take as long as the fullest one but for the head, on the last one, which then sets the pace:
    ``m (slot + head) + (p - 1) slot / v``.  That is what `memsim.timeline` plays for computation; sends to
    the next stage count as if nothing hid them.

    References
    ----------
    .. [1] Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
    .. [2] Korthikanti et al. 2022, arXiv:2205.05198, section 4.

    Examples
    --------
    >>> setting = Setting("gpt2", "a100-80gb", accelerators=8, batch=8, sequence=1024)
    >>> step = training_step(setting, Division(data=8, zero=2))
    >>> 0 < step.value("mfu") <= step.value("hfu") < 1
    True
    """
    reason = reason_against(setting, division)
    if reason:
        raise OptionError(f"{reason}; got {division} on {setting.accelerators} accelerators")
    values = setting.letters() | division.letters(setting)
    found = derive((*MEMORY, *(TIME if setting.start is None else KERNEL_TIME)), values)
    parts = ("compute", "recompute", "tensor_step", "context_step", "expert_step", "hops_step")
    time = [found[name] for name in (*parts, "bubble", "data_step", "optimizer")]
    fuller = "first" if found["first"].value >= found["last"].value else "last"
    held = [found[name] for name in (f"states_{fuller}", f"activations_{fuller}", "gathered")]
    return TrainingStep(
        estimate("step of training", [item for item in time if item.value], leaves_out="stragglers, data"),
        estimate(
            "memory of the fullest rank",
            [item for item in held if item.value],
            leaves_out="workspaces, fragmentation, the context of the driver",
        ),
        estimate(
            "sent by a rank in a step",
            [found[f"{kind}_volume"] for kind in KINDS],
            leaves_out="the few numbers that ranks sum for loss and norm",
        ),
        found,
    )
