"""What ranks send in a training step with ZeRO.

>>> print(zero_communication(parameters="7.5B", ranks=64, stage=3).explain()[-1])
total: 3Ψ = 3*7.5e9 = 22.5 B elements
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity
from memsim.zero import partitioned_values
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, erratum, technique

__all__ = ["PHASES", "partitioned_activation_overhead", "partitioned_communication", "zero_communication"]

_ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054"
_REDUCE, _GATHER = "reduce-scatter of gradients", "all-gather of parameters"
# Stage: each phase of a step, and whether every micro-batch needs it or the step only once; then how many
# times the parameters they move together, m being the number of micro-batches.
PHASES: dict[int, tuple[tuple[tuple[str, bool], ...], str]] = {
    0: (((_REDUCE, False), ("all-gather of gradients", False)), "2"),
    1: (((_REDUCE, False), (_GATHER, False)), "2"),
    2: (((_REDUCE, True), (_GATHER, False)), "(m + 1)"),
    3: (((f"{_GATHER}, forward", True), (f"{_GATHER}, backward", True), (_REDUCE, True)), "3m"),
}


def _step(name: str, stage: int, one: str, unit: str, values: dict[str, Number]) -> Estimate:
    """Return one term a phase, each moving `one` once or for every micro-batch."""
    phases, times = PHASES[stage]
    many = values["m"] != 1
    product = f"{times}*" if many else times.replace("(m + 1)", "2").replace("m", "")
    return estimate(
        f"{name}, ZeRO stage {stage}",
        [
            term(phase, f"m*{one}" if many and repeated else one, values, unit, f"{_ZERO}, section 7")
            for phase, repeated in phases
        ],
        formula=f"{product}{one}",
        values=values,
        leaves_out="latency, and the few numbers that ranks sum for loss and norm",
    )


def _checked(stage: int, values: dict[str, Number]) -> dict[str, Number]:
    if stage not in PHASES:
        raise OptionError(f"stage: expected 0, 1, 2 or 3; got {stage!r}")
    for name, what in (("N", "ranks"), ("m", "micro_batches")):
        if not isinstance(values[name], int):
            raise OptionError(f"{what}: expected a whole number; got {values[name]}")
    return values


def _sample(rng: np.random.Generator, *, stage: int, convention: str, **axes: int) -> Case:  # noqa: ARG001
    options: dict[str, Any] = {"stage": stage, "convention": convention, **axes}
    return Case((), options)


@technique(
    "cost.zero_communication",
    entries=(100,),
    kind="cost",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "section 7"),
    axes={"parameters": (1, 10**12), "ranks": (1, 4096), "micro_batches": (1, 16)},
    options={"stage": (0, 1, 2, 3), "convention": ("paper", "ring")},
    sample=_sample,
    edges=(
        {"ranks": 1, "convention": "ring"},
        {"ranks": 2, "stage": 3, "micro_batches": 1},
        {"ranks": 4, "stage": 2, "micro_batches": 3},
    ),
    exact=True,
)
def zero_communication(
    *,
    parameters: Quantity,
    ranks: Quantity,
    stage: Literal[0, 1, 2, 3],
    micro_batches: Quantity = 1,
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
    micro_batches : int
        m, how many a rank runs in a step.  Stages 0 and 1 add their gradients before anything is sent; stage
        2 has no room for whole gradients and reduces those of each, and stage 3 gathers for each, too.
    convention : {"paper", "ring"}
        "paper": each phase moves Ψ.  "ring": it sends exactly Ψ(N-1)/N, of partitions that need no padding.

    Returns
    -------
    Estimate
        One term a phase, in elements: of one micro-batch 2Ψ up to stage 2, 3Ψ in stage 3; of m of them
        (m + 1)Ψ in stage 2 and 3mΨ in stage 3.

    Raises
    ------
    OptionError
        If a number is not positive, or the stage or convention is unknown.

    Notes
    -----
    Stage 1 keeps 2Ψ only with a reduce-scatter; with an all-reduce of the gradients before the all-gather of
    the parameters it sends 3Ψ.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 7.

    Examples
    --------
    >>> zero_communication(parameters=100, ranks=4, stage=1, convention="ring").total
    150
    >>> zero_communication(parameters=100, ranks=4, stage=2, micro_batches=8).total
    900
    """
    values = _checked(stage, positive_values(Ψ=parameters, N=ranks, m=micro_batches))
    if convention not in ("paper", "ring"):
        raise OptionError(f"convention: expected 'paper' or 'ring'; got {convention!r}")
    one = "Ψ" if convention == "paper" else "Ψ*(N - 1)/N"
    return _step("communication of a step", stage, one, "elements", values)


def _sample_partition(
    rng: np.random.Generator, *, count: int, ranks: int, largest: int, micro_batches: int, stage: int
) -> Case:
    units = [int(size) for size in rng.integers(1, largest + 1, count)]
    options: dict[str, Any] = {"itemsize": int(rng.choice((2, 4, 8))), "micro_batches": micro_batches}
    return Case((), {"units": units, "ranks": ranks, "stage": stage, **options})


@technique(
    "cost.zero_communication.partitioned",
    entries=(100,),
    kind="cost",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "section 7, with padded partitions"),
    axes={"count": (1, 6), "ranks": (1, 9), "largest": (1, 40), "micro_batches": (1, 4)},
    options={"stage": (0, 1, 2, 3)},
    sample=_sample_partition,
    edges=(
        {"ranks": 1},
        {"count": 1, "largest": 1, "ranks": 7, "stage": 3, "micro_batches": 1},
        {"count": 3, "largest": 30, "ranks": 4, "stage": 2, "micro_batches": 3},
    ),
    exact=True,
)
def partitioned_communication(
    *,
    units: Sequence[int],
    ranks: Quantity,
    stage: Literal[0, 1, 2, 3],
    micro_batches: Quantity = 1,
    itemsize: int = 2,
) -> Estimate:
    """Return the bytes that one rank sends in a step when units are padded and cut one by one, exactly.

    Parameters
    ----------
    units : sequence of int
        Parameters of each unit that is reduced and gathered by itself.
    ranks : int
        N, the data-parallel degree.
    stage, micro_batches
        As in `zero_communication`.
    itemsize : int
        Bytes of a parameter or gradient.

    Returns
    -------
    Estimate
        One term a phase, in bytes; equal to what `refimpl.parallel.zero` counts under "gradients" and
        "parameters", each rank alike.

    Raises
    ------
    OptionError
        If a number is not positive and whole, or the stage is unknown.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 7.

    Examples
    --------
    Ten parameters on four ranks are padded to twelve: three ring steps of three elements a phase.

    >>> partitioned_communication(units=[10], ranks=4, stage=1, itemsize=2).total
    36
    """
    values = partitioned_values(units, ranks, m=micro_batches, e=itemsize)
    return _step("bytes sent in a step", stage, "(N - 1)*S*e", "B", _checked(stage, values))


@erratum(
    "cost.zero_communication",
    slide="Parallel Strategy: ZeRO",
    says="ZeRO-1&2: same communication volume as DP",
    should_say="stage 2 only with one micro-batch a step: it has no whole gradients to add up, so it reduces "
    "those of each of m micro-batches, and a step sends (m + 1)Ψ where data parallelism sends 2Ψ",
    breaks="memsim.accumulation_costs_stages_two_and_three",
)
def accumulation_for_free(*, micro_batches: Quantity = 1, **options: Any) -> Estimate:  # noqa: ARG001
    """Price a step of any number of micro-batches as one of a single one."""
    return zero_communication(**options)


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
