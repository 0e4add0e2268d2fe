"""How a model is trained: what ranks divide, what a micro-batch is, and what is kept or made again.

>>> run = Run(gpus=64, tensor=8, pipeline=4, stage=1, sequence=2048)
>>> run.data
2
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from memsim.memory.kept_tensors import Attention, Keeping
from memsim.memory.korthikanti import RECOMPUTE, Recompute
from memsim.memory.model_states import CONVENTIONS, OFFLOADS, Offload
from refimpl.errors import OptionError
from refimpl.validation import whole

__all__ = ["Run"]

_CHOICES = {
    "stage": (0, 1, 2, 3),
    "offload": OFFLOADS,
    "convention": CONVENTIONS,
    "recompute": RECOMPUTE,
    "attention": ("standard", "flash"),
    "adam": ("fused", "foreach"),
    "checkpoints": ("replicated", "partitioned", "offloaded"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; every size is checked when it is made.

    Attributes
    ----------
    gpus, tensor, pipeline, interleave, expert : int
        All ranks; those that divide the matrices; stages; chunks of layers a stage; those that divide the
        experts, which are data-parallel ranks.
    sequence_parallel : bool
        Whether the ranks that divide matrices divide norms along the sequence too.
    stage : {0, 1, 2, 3}
        ZeRO's, among the data-parallel ranks.
    offload : {"none", "optimizer", "all"}
        Which states the host keeps.
    convention : str
        Bytes of states a parameter (`memsim.memory.model_states.CONVENTIONS`).
    batch, sequence, micro_batches : int
        Sequences of a micro-batch, tokens of each, and micro-batches that a rank sees in a step.
    recompute : {"none", "selective", "full"}
        What the backward pass makes again.
    attention, dropout, fused_gate, fused_norm
        As in `memsim.memory.kept_tensors.Keeping`.
    softmax_product : bool
        Whether the gradient of a softmax in memory has the product of the result and its gradient beside it:
        PyTorch's CUDA kernels do, the host's do not.
    checkpoints : {"replicated", "partitioned", "offloaded"}
        Of full recomputation, under ZeRO-R: whole on every rank, divided among the ranks that divide the
        matrices (P_a), or kept by the host (P_a+cpu).
    adam : {"fused", "foreach"}
        How the optimizer steps: in one kernel, or operator by operator over all parameters, as PyTorch does
        by default, with a copy as large as one of its states.
    bucket : int
        Elements of the buffer in which gradients are sent; 0 for none.
    """

    gpus: int = 1
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    stage: Literal[0, 1, 2, 3] = 0
    offload: Offload = "none"
    convention: str = "zero"
    batch: int = 1
    sequence: int = 2048
    micro_batches: int = 1
    recompute: Recompute = "none"
    attention: Attention = "flash"
    dropout: bool = False
    fused_gate: bool = False
    fused_norm: bool = True
    softmax_product: bool = False
    checkpoints: Literal["replicated", "partitioned", "offloaded"] = "replicated"
    adam: Literal["fused", "foreach"] = "fused"
    bucket: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES:
                if value not in _CHOICES[field.name]:
                    known = ", ".join(map(str, _CHOICES[field.name]))
                    raise OptionError(f"{field.name}: expected one of {known}; got {value!r}")
            elif not isinstance(value, bool):
                whole(field.name, value, 0 if field.name == "bucket" else 1)
        if self.gpus % (self.tensor * self.pipeline):
            raise OptionError(
                f"gpus: expected a multiple of tensor x pipeline, {self.tensor} x {self.pipeline}; "
                f"got {self.gpus}"
            )
        if self.data % self.expert:
            raise OptionError(
                f"expert: expected a divisor of {self.data} data-parallel ranks; got {self.expert}"
            )
        if self.interleave > 1 and (self.pipeline == 1 or self.micro_batches % self.pipeline):
            raise OptionError(
                f"interleave: expected stages, and micro-batches in multiples of them; got {self.pipeline} "
                f"stages and {self.micro_batches} micro-batches"
            )
        if self.sequence_parallel and self.sequence % self.tensor:
            raise OptionError(f"tensor: expected a divisor of {self.sequence} tokens; got {self.tensor}")

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tensor * self.pipeline)

    @property
    def keeping(self) -> Keeping:
        """What decides which tensors are kept."""
        return Keeping(self.attention, self.dropout, self.fused_gate, self.fused_norm)
