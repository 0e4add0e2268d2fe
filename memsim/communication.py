"""What ranks send in a training step.

>>> print(zero_communication(parameters="7.5B", ranks=64, stage=3).explain()[-1])
total: 3Ψ = 3*7.5e9 = 22.5 B elements
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Quantity
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = ["partitioned_activation_overhead", "zero_communication"]

_ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054"
_PHASES = {
    0: ("reduce-scatter of gradients", "all-gather of gradients"),
    1: ("reduce-scatter of gradients", "all-gather of parameters"),
    2: ("reduce-scatter of gradients", "all-gather of parameters"),
    3: (
        "all-gather of parameters, forward",
        "all-gather of parameters, backward",
        "reduce-scatter of gradients",
    ),
}


def _sample(rng: np.random.Generator, *, stage: int, convention: str, **axes: int) -> Case:  # noqa: ARG001
    options: dict[str, Any] = {"stage": stage, "convention": convention, **axes}
    return Case((), options)


@technique(
    "cost.zero_communication",
    entries=(100,),
    kind="cost",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "section 7"),
    axes={"parameters": (1, 10**12), "ranks": (1, 4096)},
    options={"stage": (0, 1, 2, 3), "convention": ("paper", "ring")},
    sample=_sample,
    edges=({"ranks": 1, "convention": "ring"}, {"ranks": 2, "stage": 3}),
    exact=True,
)
def zero_communication(
    *,
    parameters: Quantity,
    ranks: Quantity,
    stage: Literal[0, 1, 2, 3],
    convention: Literal["paper", "ring"] = "paper",
) -> Estimate:
    """Return the elements that one rank sends in a step of data parallelism with ZeRO.

    Parameters
    ----------
    parameters : int or str
        Ψ.
    ranks : int
        N, the data-parallel degree.
    stage : {0, 1, 2, 3}
        As in `memsim.zero.zero_memory`.
    convention : {"paper", "ring"}
        "paper": each phase moves Ψ.  "ring": it sends exactly Ψ(N-1)/N, of partitions that need no padding.

    Returns
    -------
    Estimate
        One term a phase, in elements: 2Ψ up to stage 2, 3Ψ in stage 3.

    Raises
    ------
    OptionError
        If a number is not positive, or the stage or convention is unknown.

    Notes
    -----
    One step of one micro-batch.  Stage 1 keeps 2Ψ only with a reduce-scatter; with an all-reduce of the
    gradients before the all-gather of the parameters it sends 3Ψ.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 7.

    Examples
    --------
    >>> zero_communication(parameters=100, ranks=4, stage=1, convention="ring").total
    150
    """
    values = positive_values(Ψ=parameters, N=ranks)
    if not isinstance(values["N"], int):
        raise OptionError(f"ranks: expected a whole number; got {ranks!r}")
    if stage not in _PHASES:
        raise OptionError(f"stage: expected 0, 1, 2 or 3; got {stage!r}")
    if convention not in ("paper", "ring"):
        raise OptionError(f"convention: expected 'paper' or 'ring'; got {convention!r}")
    phases = _PHASES[stage]
    one = "Ψ" if convention == "paper" else "Ψ*(N - 1)/N"
    return estimate(
        f"communication of a step, ZeRO stage {stage}",
        [term(phase, one, values, "elements", f"{_ZERO}, section 7") for phase in phases],
        formula=f"{len(phases)}{one}",
        values=values,
        leaves_out="latency, padding, gradient accumulation",
    )


def partitioned_activation_overhead(*, sequence: Quantity, hidden: Quantity) -> Estimate:
    """Return what partitioned activations add to model parallelism's traffic, as a share: s·h over 12·s·h.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 8.

    Examples
    --------
    >>> partitioned_activation_overhead(sequence=1024, hidden=8192).total
    Fraction(1, 12)
    """
    values = positive_values(s=sequence, h=hidden)
    return estimate(
        "overhead of partitioned activations",
        [
            term(
                "one all-gather a block over Megatron's own",
                "s*h/(12*s*h)",
                values,
                "1",
                f"{_ZERO}, section 8",
            )
        ],
    )
