"""Ideal and limited scaling, and the lecture's table of data against model parallelism.

>>> print(ideal_scaling(device_seconds=10 * 86400, devices=1024).explain()[0])
time: T/p = 864000/1024 = 14.06 min
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Quantity, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = [
    "Comparison",
    "amdahl_scaling",
    "crossover_batch",
    "data_vs_model_parallel",
    "ideal_scaling",
    "pipeline_bubble",
]

_LECTURE = "Efficiency in LLMs, CSC6203 lecture 5, distributed training"
_ALL_REDUCE = "Rajbhandari et al. 2020, arXiv:1910.02054, section 7: all-reduce of the gradients"
_MEGATRON = "Shoeybi et al. 2019, arXiv:1909.08053, section 3: 4 all-reduces of b*s*h a block"


def _sample_scaling(rng: np.random.Generator, **axes: int) -> Case:  # noqa: ARG001 (the contract)
    return Case((), dict(axes))


@technique(
    "cost.ideal_scaling",
    entries=(90,),
    kind="cost",
    source=Source("Efficiency in LLMs", "CSC6203 lecture 5", "distributed training, ideal scaling"),
    axes={"device_seconds": (1, 10**9), "devices": (1, 10**5)},
    sample=_sample_scaling,
    edges=({"devices": 1},),
    exact=True,
)
def ideal_scaling(*, device_seconds: Quantity, devices: Quantity) -> Estimate:
    """Return the time of `device_seconds` of work spread over `devices` without any loss: T/p.

    Parameters
    ----------
    device_seconds : int or Fraction
        T, the time on one device, in seconds.
    devices : int
        p.

    Returns
    -------
    Estimate
        In seconds.

    Raises
    ------
    OptionError
        If a number is not positive.

    References
    ----------
    .. [1] Efficiency in LLMs, CSC6203 lecture 5: 10 GPU-days on 1024 GPUs.

    Examples
    --------
    >>> ideal_scaling(device_seconds=864000, devices=1024).total
    Fraction(3375, 4)
    """
    values = positive_values(T=device_seconds, p=devices)
    return estimate(
        "ideal scaling",
        [term("time", "T/p", values, "s", _LECTURE)],
        leaves_out="communication, serial work, imbalance",
    )


def amdahl_scaling(*, device_seconds: Quantity, devices: Quantity, serial: Quantity) -> Estimate:
    """Return the time when the share `serial` of the work cannot be spread: T·σ + T·(1-σ)/p.

    Raises
    ------
    OptionError
        If `serial` is outside [0, 1] or another number is not positive.

    References
    ----------
    .. [1] Amdahl 1967, "Validity of the single processor approach".

    Examples
    --------
    >>> amdahl_scaling(device_seconds=1000, devices=9, serial=0.1).total
    200
    """
    share = exact(serial, "serial")
    if not 0 <= share <= 1:
        raise OptionError(f"serial: expected a share from 0 to 1; got {serial!r}")
    values = positive_values(T=device_seconds, p=devices) | {"σ": share}
    return estimate(
        "scaling with serial work",
        [
            term("serial", "T*σ", values, "s", "Amdahl 1967"),
            term("parallel", "T*(1 - σ)/p", values, "s", "Amdahl 1967"),
        ],
    )


class Comparison(NamedTuple):
    """An estimate for each strategy: copies of the model, memory a rank, communication."""

    data: Estimate
    model: Estimate


def _sample_comparison(rng: np.random.Generator, **axes: int) -> Case:  # noqa: ARG001 (the contract)
    options: dict[str, Any] = dict(axes)
    return Case((), options)


@technique(
    "cost.data_vs_model_parallel",
    entries=(95,),
    kind="cost",
    source=Source(
        "Efficiency in LLMs", "CSC6203 lecture 5", "distributed training, data against model parallelism"
    ),
    axes={
        "parameters": (1, 10**11),
        "ranks": (1, 1024),
        "batch": (1, 4096),
        "sequence": (1, 8192),
        "hidden": (1, 16384),
        "layers": (1, 128),
    },
    exact=True,
    sample=_sample_comparison,
    edges=({"ranks": 1},),
)
def data_vs_model_parallel(
    *,
    parameters: Quantity,
    ranks: Quantity,
    batch: Quantity,
    sequence: Quantity,
    hidden: Quantity,
    layers: Quantity,
) -> Comparison:
    """Return copies of the model, memory and communication of data and of model (tensor) parallelism.

    Parameters
    ----------
    parameters : int or str
        Ψ.
    ranks : int
        p.
    batch, sequence, hidden, layers : int
        b, s, h, L of the micro-batch that a model-parallel group works on.

    Returns
    -------
    Comparison
        Two estimates, `data` and `model`, with the terms "copies" (1), "memory" (B a rank, 16 bytes a
        parameter) and "communication" (elements sent a step and rank, to within the factor (p-1)/p).

    Raises
    ------
    OptionError
        If a number is not positive.

    References
    ----------
    .. [1] Shoeybi et al. 2019, arXiv:1909.08053, section 3; ring all-reduce sends 2 elements for each one.

    Examples
    --------
    >>> block = dict(batch=1, sequence=2048, hidden=4096, layers=36)
    >>> table = data_vs_model_parallel(parameters="7.5B", ranks=8, **block)
    >>> table.data["memory"], table.model["memory"]
    (120000000000, 15000000000)
    """
    values = positive_values(Ψ=parameters, p=ranks, b=batch, s=sequence, h=hidden, L=layers)
    left_out = "activations; the factor (p - 1)/p of a ring"
    data = estimate(
        "data parallelism",
        [
            term("copies", "p", values, "1", _LECTURE),
            term("memory", "16Ψ", values, "B", _LECTURE),
            term("communication", "2Ψ", values, "elements", _ALL_REDUCE),
        ],
        leaves_out=left_out,
    )
    model = estimate(
        "model parallelism",
        [
            term("copies", "1", values, "1", _LECTURE),
            term("memory", "16Ψ/p", values, "B", _LECTURE),
            term("communication", "8*b*s*h*L", values, "elements", _MEGATRON),
        ],
        leaves_out=left_out,
    )
    return Comparison(data, model)


def crossover_batch(
    *, parameters: Quantity, sequence: Quantity, hidden: Quantity, layers: Quantity
) -> Estimate:
    """Return the micro-batch above which model parallelism sends more than data parallelism: Ψ/(4·s·h·L).

    >>> crossover_batch(parameters=12 * 36 * 4096**2, sequence=2048, hidden=4096, layers=36).total
    6
    """
    values = positive_values(Ψ=parameters, s=sequence, h=hidden, L=layers)
    return estimate("crossover batch", [term("batch", "2Ψ/(8*s*h*L)", values, "1", _MEGATRON)])


def pipeline_bubble(*, stages: Quantity, microbatches: Quantity, chunks: Quantity = 1) -> Estimate:
    """Return the share of time that a pipeline of equal stages idles: (p-1)/(m+p-1), and with v chunks less.

    References
    ----------
    .. [1] Huang et al. 2019, arXiv:1811.06965 (GPipe), section 2.3; the same for 1F1B.
    .. [2] Narayanan et al. 2021, arXiv:2104.04473, section 2.2.2, interleaved: (p-1)/(m v + p-1).

    Examples
    --------
    >>> pipeline_bubble(stages=8, microbatches=32).total
    Fraction(7, 39)
    """
    values = positive_values(p=stages, m=microbatches, v=chunks)
    plain = values["v"] == 1
    formula = "(p - 1)/(m + p - 1)" if plain else "(p - 1)/(m*v + p - 1)"
    source = "arXiv:1811.06965, 2.3" if plain else "arXiv:2104.04473, 2.2.2"
    return estimate("pipeline bubble", [term("idle share", formula, values, "1", source)])
