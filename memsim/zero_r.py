"""ZeRO-R: what is left of activations, buffers and fragmentation when nothing is kept twice.

P_a divides the activation checkpoints among the ranks that split a model; C_B gives the fused buffer a size
that does not grow with the model; M_D copies checkpoints and gradients into regions that are set aside for
them, so that long-lived and short-lived memory do not mix.

>>> shape = {"hidden": 8192, "batch": 32, "sequence": 1024, "layers": 125}
>>> print(zero_r(**shape, parameters="100B", buffer="500M", model_parallel=16).explain()[0])
checkpoints: 2*L*ceil(b*s*h/M) = 2*125*ceil(32*1024*8192/16) = 4.194 GB
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = ["checkpoint_communication", "defragmentation_traffic", "zero_r"]

_ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054"
_CHECKPOINTS = {
    "replicated": "2*L*b*s*h",
    "partitioned": "2*L*ceil(b*s*h/M)",
    "offloaded": "0*L*b*s*h",
}


def _shape(**quantities: Quantity) -> dict[str, Number]:
    values = positive_values(**quantities)
    for name, value in values.items():
        if not isinstance(value, int):
            raise OptionError(f"{name}: expected a whole number; got {quantities[name]!r}")
    return values


def _sample(rng: np.random.Generator, *, checkpoints: str, **axes: int) -> Case:  # noqa: ARG001 (the contract)
    options: dict[str, Any] = {"checkpoints": checkpoints, **axes}
    return Case((), options)


@technique(
    "cost.zero_r",
    entries=(101,),
    kind="cost",
    source=Source("Rajbhandari et al. 2020", "arXiv:1910.02054", "sections 6 and 8"),
    axes={
        "hidden": (1, 40),
        "batch": (1, 4),
        "sequence": (1, 20),
        "layers": (1, 6),
        "model_parallel": (1, 9),
        "parameters": (1, 10**6),
        "buffer": (1, 10**6),
    },
    options={"checkpoints": ("replicated", "partitioned", "offloaded")},
    sample=_sample,
    edges=(
        {"model_parallel": 1, "checkpoints": "partitioned"},
        {"model_parallel": 7, "hidden": 1, "batch": 1, "sequence": 1, "checkpoints": "partitioned"},
        {"model_parallel": 4, "hidden": 5, "batch": 3, "sequence": 7, "checkpoints": "partitioned"},
    ),
    exact=True,
)
def zero_r(
    *,
    hidden: Quantity,
    batch: Quantity,
    sequence: Quantity,
    layers: Quantity,
    model_parallel: Quantity,
    parameters: Quantity,
    buffer: Quantity,
    checkpoints: Literal["replicated", "partitioned", "offloaded"] = "partitioned",
) -> Estimate:
    """Return the residual memory of one rank under ZeRO-R: activation checkpoints and the fused buffer.

    Parameters
    ----------
    hidden, batch, sequence, layers : int
        h, b, s, L; one fp16 hidden state a token is kept for each layer.
    model_parallel : int
        M, the ranks that split the model and therefore all need the same checkpoints.
    parameters : int or str
        Ψ, the parameters whose fp32 gradients share the buffer.
    buffer : int or str
        C, the most elements of the buffer (C_B); as large as Ψ for a buffer that grows with the model.
    checkpoints : {"replicated", "partitioned", "offloaded"}
        Whole on every rank, as model parallelism alone keeps them; a chunk of ceil(b*s*h/M) elements on each
        (P_a); or in the memory of the host (P_a+cpu).

    Returns
    -------
    Estimate
        In bytes, exact, on the device; the checkpoints are those that
        `refimpl.parallel.zero_r.PartitionedKeep` keeps.

    Raises
    ------
    OptionError
        If a number is not positive and whole, or nobody keeps checkpoints so.

    Notes
    -----
    - Partitioned checkpoints are gathered once a layer in the backward pass: `checkpoint_communication`.
      Offloaded ones travel to the host and back besides.
    - M_D takes no memory of its own, as its regions hold what is counted here and in `zero_memory`; what it
      costs is a copy: `defragmentation_traffic`.  What it saves depends on the allocator; the paper reports
      runs out of memory with more than 30% of it free.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, sections 6.1 (P_a), 6.2 (C_B), 6.3 (M_D) and 8.

    Examples
    --------
    >>> shape = {"hidden": 8, "batch": 1, "sequence": 4, "layers": 2, "parameters": 100, "buffer": 64}
    >>> [zero_r(**shape, model_parallel=ways)["checkpoints"] for ways in (1, 4, 5)]
    [128, 32, 28]
    """
    if checkpoints not in _CHECKPOINTS:
        raise OptionError(f"checkpoints: expected one of {', '.join(_CHECKPOINTS)}; got {checkpoints!r}")
    values = _shape(h=hidden, b=batch, s=sequence, L=layers, M=model_parallel, Ψ=parameters, C=buffer)
    return estimate(
        f"residual states, ZeRO-R with {checkpoints} checkpoints",
        [
            term("checkpoints", _CHECKPOINTS[checkpoints], values, "B", f"{_ZERO}, section 6.1"),
            term("fused buffer", "4*min(Ψ, C)", values, "B", f"{_ZERO}, section 6.2"),
        ],
        leaves_out="the working set of the layer that is recomputed, model states, fragmentation",
    )


def checkpoint_communication(
    *,
    hidden: Quantity,
    batch: Quantity,
    sequence: Quantity,
    layers: Quantity,
    model_parallel: Quantity,
    itemsize: Quantity = 2,
) -> Estimate:
    """Return the bytes that one rank sends in a step to gather partitioned checkpoints, one ring a layer.

    Parameters
    ----------
    hidden, batch, sequence, layers, model_parallel
        As in `zero_r`.
    itemsize : int
        Bytes of an activation.

    Returns
    -------
    Estimate
        In bytes, exact.

    References
    ----------
    .. [1] Rajbhandari et al. 2020, arXiv:1910.02054, section 8: one all-gather of s*h a block.

    Examples
    --------
    >>> checkpoint_communication(hidden=8, batch=1, sequence=4, layers=2, model_parallel=4).total
    96
    """
    values = _shape(h=hidden, b=batch, s=sequence, L=layers, M=model_parallel, e=itemsize)
    gathers = term("all-gathers", "e*L*(M - 1)*ceil(b*s*h/M)", values, "B", f"{_ZERO}, section 8")
    return estimate("gathering of partitioned checkpoints", [gathers], leaves_out="latency, offloading")


def defragmentation_traffic(
    *,
    hidden: Quantity,
    batch: Quantity,
    sequence: Quantity,
    layers: Quantity,
    model_parallel: Quantity,
    parameters: Quantity,
) -> Estimate:
    """Return the bytes that M_D reads and writes in a step: checkpoints and gradients are copied once.

    >>> shape = {"hidden": 8, "batch": 1, "sequence": 4, "layers": 2, "model_parallel": 4}
    >>> defragmentation_traffic(**shape, parameters=100).total
    464
    """
    values = _shape(h=hidden, b=batch, s=sequence, L=layers, M=model_parallel, Ψ=parameters)
    return estimate(
        "copies into contiguous regions",
        [
            term("checkpoints", "2*2*L*ceil(b*s*h/M)", values, "B", f"{_ZERO}, section 6.3"),
            term("gradients", "2*2Ψ", values, "B", f"{_ZERO}, section 6.3"),
        ],
    )
