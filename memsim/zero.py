"""ZeRO's model states a rank: what each stage divides by the number of ranks.

>>> print(zero_memory(parameters="7.5B", ranks=64, stage=2).explain()[-1])
total: 2Ψ + 14Ψ/N = 2*7.5e9 + 14*7.5e9/64 = 16.64 GB

A real partition pads every unit to a multiple of the ranks; `partitioned_memory` gives its bytes exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = ["largest_model", "partitioned_memory", "partitioned_values", "zero_memory"]

_PAPER = "Rajbhandari et al. 2020, arXiv:1910.02054, Figure 1 and section 5"
_DEEPSPEED = "DeepSpeed, estimate_zero2/3_model_states_mem_needs, without offload"
# Stage: (parameters, gradients, optimizer states, the paper's formula of the sum), in bytes.
_STAGES = {
    0: ("2Ψ", "2Ψ", "12Ψ", "16Ψ"),
    1: ("2Ψ", "2Ψ", "12Ψ/N", "4Ψ + 12Ψ/N"),
    2: ("2Ψ", "2Ψ/N", "12Ψ/N", "2Ψ + 14Ψ/N"),
    3: ("2Ψ/N", "2Ψ/N", "12Ψ/N", "16Ψ/N"),
}


def _values(ranks: Quantity, stage: int, **quantities: Quantity) -> dict[str, Number]:
    values = positive_values(N=ranks, **quantities)
    if not isinstance(values["N"], int):
        raise OptionError(f"ranks: expected a whole number; got {ranks!r}")
    if stage not in _STAGES:
        raise OptionError(f"stage: expected 0, 1, 2 or 3; got {stage!r}")
    return values


def _sample(rng: np.random.Generator, *, stage: int, **axes: int) -> Case:  # noqa: ARG001 (the contract)
    options: dict[str, Any] = {"parameters": axes["parameters"], "ranks": axes["ranks"], "stage": stage}
    return Case((), options)


@technique(
    "cost.zero_memory",
    entries=(99,),
    kind="cost",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "Figure 1, section 5, Table 1"),
    axes={"parameters": (1, 10**12), "ranks": (1, 4096)},
    options={"stage": (0, 1, 2, 3)},
    sample=_sample,
    edges=({"ranks": 1, "stage": 3}, {"parameters": 1, "ranks": 7, "stage": 2}),
    exact=True,
)
def zero_memory(
    *,
    parameters: Quantity,
    ranks: Quantity,
    stage: Literal[0, 1, 2, 3],
    convention: Literal["paper", "deepspeed"] = "paper",
) -> Estimate:
    """Return the model states of one rank under data parallelism with ZeRO.

    Parameters
    ----------
    parameters : int or str
        Ψ; strings such as ``"7.5B"`` are read.
    ranks : int
        N, the data-parallel degree.
    stage : {0, 1, 2, 3}
        0: plain data parallelism; 1: optimizer states divided (P_os); 2: gradients too (P_os+g); 3: the
        parameters too (P_os+g+p).
    convention : {"paper", "deepspeed"}
        "paper": fp16 gradients, 16 bytes a parameter in all.  "deepspeed": its estimators keep fp32 gradients
        as well and divide 18 bytes; they exist for stages 2 and 3.

    Returns
    -------
    Estimate
        In bytes, exact: Ψ/N is a fraction unless N divides Ψ; `partitioned_memory` counts the padding.

    Raises
    ------
    OptionError
        If a number is not positive, the stage is unknown, or the convention does not have that stage.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, Figure 1 and section 5.

    Examples
    --------
    >>> [zero_memory(parameters="7.5B", ranks=64, stage=stage).total for stage in (0, 1, 3)]
    [120000000000, 31406250000, 1875000000]
    """
    values = _values(ranks, stage, Ψ=parameters)
    leaves_out = "activations, buffers, fragmentation, padding of the partitions"
    if convention == "deepspeed":
        if stage < 2:
            raise OptionError(f"stage: the convention 'deepspeed' has stages 2 and 3; got {stage}")
        terms = [term("divided states", "18Ψ/N", values, "B", _DEEPSPEED)]
        if stage == 2:
            terms.insert(0, term("fp16 parameters", "2Ψ", values, "B", _DEEPSPEED))
        return estimate(
            f"model states, ZeRO stage {stage}", terms, leaves_out=f"{leaves_out}, the gathered layer"
        )
    if convention != "paper":
        raise OptionError(f"convention: expected 'paper' or 'deepspeed'; got {convention!r}")
    *formulas, total = _STAGES[stage]
    names = ("fp16 parameters", "fp16 gradients", "optimizer states")
    terms = [term(name, formula, values, "B", _PAPER) for name, formula in zip(names, formulas, strict=True)]
    return estimate(
        f"model states, ZeRO stage {stage}", terms, formula=total, values=values, leaves_out=leaves_out
    )


def partitioned_values(units: Sequence[int], ranks: Quantity, **quantities: Quantity) -> dict[str, Number]:
    """Return Ψ, N and S, the elements of a shard: the units, each padded to a multiple of N, over N.

    Raises
    ------
    OptionError
        If there is no unit, or a number is not positive and whole.

    Examples
    --------
    >>> partitioned_values([5, 3], 2)
    {'Ψ': 8, 'N': 2, 'S': 5}
    """
    if not units or any(unit < 1 or unit != int(unit) for unit in units):
        raise OptionError(f"units: expected numbers of parameters, at least 1 each; got {units!r}")
    values = positive_values(Ψ=sum(map(int, units)), N=ranks, **quantities)
    for name, value in values.items():
        if not isinstance(value, int):
            raise OptionError(f"{name}: expected a whole number; got {value}")
    return values | {"S": sum(-(-int(unit) // int(values["N"])) for unit in units)}


def _sample_partition(rng: np.random.Generator, *, count: int, ranks: int, largest: int, stage: int) -> Case:
    units = [int(size) for size in rng.integers(1, largest + 1, count)]
    sizes = {"model_itemsize": int(rng.choice((2, 4))), "state_itemsize": int(rng.choice((4, 8)))}
    return Case((), {"units": units, "ranks": ranks, "stage": stage, **sizes})


@technique(
    "cost.zero_memory.partitioned",
    entries=(99,),
    kind="cost",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "section 5, with padded partitions"),
    axes={"count": (1, 6), "ranks": (1, 9), "largest": (1, 40)},
    options={"stage": (0, 1, 2, 3)},
    sample=_sample_partition,
    edges=(
        {"ranks": 1, "stage": 3},
        {"count": 1, "largest": 1, "ranks": 7, "stage": 3},
        {"count": 4, "largest": 30, "ranks": 4, "stage": 2},
    ),
    exact=True,
)
def partitioned_memory(
    *,
    units: Sequence[int],
    ranks: Quantity,
    stage: Literal[0, 1, 2, 3],
    model_itemsize: int = 2,
    state_itemsize: int = 4,
) -> Estimate:
    """Return the model states that every rank holds when units are padded and cut one by one, in whole bytes.

    Parameters
    ----------
    units : sequence of int
        Parameters of each unit that is partitioned by itself; one unit for a flat partition of all.
    ranks : int
        N, the data-parallel degree.
    stage : {0, 1, 2, 3}
        As in `zero_memory`.
    model_itemsize, state_itemsize : int
        Bytes of a parameter or gradient, and of each of the three optimizer states.

    Returns
    -------
    Estimate
        In bytes; equal to what `refimpl.parallel.zero` holds on each rank when its gradients are complete.

    Raises
    ------
    OptionError
        If a number is not positive and whole, or the stage is unknown.

    Notes
    -----
    Every rank allocates the same, also one whose shard is padding only.  DeepSpeed pads to multiples of 2N:
    the same with units rounded up to even shards.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 5.

    Examples
    --------
    Ten parameters on four ranks: shards of three, so 48 bytes and not 40.

    >>> partitioned_memory(units=[10], ranks=4, stage=3).total
    48
    """
    if stage not in _STAGES:
        raise OptionError(f"stage: expected 0, 1, 2 or 3; got {stage!r}")
    values = partitioned_values(units, ranks)
    positive_values(model_itemsize=model_itemsize, state_itemsize=state_itemsize)
    # (what, bytes an element, first stage that divides it)
    kinds = (
        ("parameters", model_itemsize, 3),
        ("gradients", model_itemsize, 2),
        *((name, state_itemsize, 1) for name in ("master copy", "momentum", "variance")),
    )
    terms = [
        term(name, f"{size}{'S' if stage >= first else 'Ψ'}", values, "B", _PAPER)
        for name, size, first in kinds
    ]
    return estimate(
        f"model states held, ZeRO stage {stage}", terms, leaves_out="activations, gathered units, buffers"
    )


def largest_model(*, memory: Quantity, ranks: Quantity, stage: Literal[0, 1, 2, 3]) -> Estimate:
    """Return how many parameters' model states fill `memory` bytes a rank: Table 2's theoretical size.

    Parameters
    ----------
    memory : int
        Bytes of one device.
    ranks, stage
        As in `zero_memory`.

    Returns
    -------
    Estimate
        In parameters, not rounded down.

    Examples
    --------
    >>> largest_model(memory=32 * 10**9, ranks=64, stage=3).total
    128000000000
    """
    values = _values(ranks, stage, M=memory)
    per_parameter = _STAGES[stage][3].replace("Ψ", "")
    return estimate(
        f"largest model, ZeRO stage {stage}",
        [term("parameters", f"M/({per_parameter})", values, "parameters", f"{_PAPER}; Table 2")],
        leaves_out="everything but model states",
    )
