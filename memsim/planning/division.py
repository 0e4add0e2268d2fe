"""A way to divide a step of training among accelerators, and what rules one out.

>>> setting = Setting("gpt2", "a100-80gb", accelerators=8, batch=8, sequence=1024)
>>> reason_against(setting, Division(tensor=8))
'tensor ranks must divide the key heads'
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memsim.formula import evaluate
from memsim.planning.training_setting import Precision, Setting, precision_letters
from memsim.units import Number
from refimpl.errors import OptionError

__all__ = ["CONSTRAINTS", "LETTERS", "RECOMPUTE", "Division", "Recompute", "reason_against"]

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
LETTERS: dict[str, str] = {
    "t": "tensor-parallel ranks",
    "p": "pipeline stages",
    "d": "data-parallel ranks",
    "c": "context-parallel ranks",
    "e": "expert-parallel ranks, among the d of data parallelism",
    "v": "chunks of layers a stage (interleaving)",
    "b": "sequences of a micro-batch",
    "z": "stage of ZeRO",
    "r": "recomputation: 0 none, 1 of scores, 2 of whole layers",
    "q": "1 with sequence parallelism",
    "o": "1 with optimizer states on the host",
}
# Each formula is 0 for what can be run; the last ones drop what is the same as something simpler.
CONSTRAINTS: tuple[tuple[str, str], ...] = (
    ("t*p*c*d - G", "tensor x pipeline x context x data ranks must be the accelerators"),
    ("B % (d*b)", "data ranks x micro-batch must divide the batch"),
    ("1 if p*v > L else 0", "stages x chunks must be at most the layers"),
    ("ceil(L/(p*ceil(L/(p*v)))) - v", "fewer chunks of a stage must be too few for their layers"),
    ("H_k % t", "tensor ranks must divide the key heads"),
    ("s % c", "context ranks must divide the sequence"),
    ("s/c % t if q > 0 else 0", "with sequence parallelism, tensor ranks must divide a rank's sequence"),
    ("d % e", "expert ranks must divide the data ranks"),
    ("E % e if E > 0 else e - 1", "expert ranks must divide the experts"),
    ("B/(d*b) % p if v > 1 else 0", "interleaved stages must divide the micro-batches"),
    ("(1 if z > 1 else 0) if p > 1 else 0", "gradients of a pipeline add up over micro-batches: ZeRO 0 or 1"),
    ("v - 1 if p == 1 else 0", "one stage has nothing to interleave"),
    ("q if t == 1 else 0", "sequence parallelism needs tensor parallelism"),
    ("z if c*d == 1 else 0", "ZeRO needs data or context parallelism"),
    ("φ if r == 1 else 0", "FlashAttention recomputes the scores anyway"),
)


@dataclass(frozen=True, slots=True)
class Division:
    """One way to divide a step among accelerators; see `LETTERS`."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    interleave: int = 1
    micro_batch: int = 1
    zero: int = 0
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    offload: bool = False
    precision: Precision = "bf16"

    def __str__(self) -> str:
        """Return what is not plain, as ``frugal timeline --division`` reads it.

        >>> str(Division(tensor=8, zero=1, sequence_parallel=True)), str(Division())
        ('tensor=8,zero=1,sequence_parallel=true', 'one rank')
        """
        plain = Division()
        parts = {name: getattr(self, name) for name in self.__slots__}
        shown = {name: value for name, value in parts.items() if value != getattr(plain, name)}
        texts = (f"{name}={'true' if value is True else value}" for name, value in shown.items())
        return ",".join(texts) or "one rank"

    def letters(self, setting: Setting) -> dict[str, Number]:
        """Return the values of this division's letters.

        Raises
        ------
        OptionError
            If a number is below its least, a choice unknown, or the hardware lacks the precision.
        """
        sizes = {"t": self.tensor, "p": self.pipeline, "d": self.data, "c": self.context, "e": self.expert}
        sizes |= {"v": self.interleave, "b": self.micro_batch}
        if self.recompute not in RECOMPUTE or self.zero not in (0, 1, 2, 3):
            raise OptionError(f"expected zero 0 to 3 and recompute of {RECOMPUTE}; got {self}")
        if not all(isinstance(size, int) for size in sizes.values()) or min(sizes.values()) < 1:
            raise OptionError(f"expected whole numbers above 0; got {self}")
        choices = {"z": self.zero, "r": RECOMPUTE.index(self.recompute)}
        flags = {"q": int(self.sequence_parallel), "o": int(self.offload)}
        return {**sizes, **choices, **flags, **precision_letters(setting, self.precision)}


def reason_against(setting: Setting, division: Division) -> str | None:
    """Return why a division cannot be run, or None; that it fits into memory is another question.

    >>> setting = Setting("gpt2", "a100-80gb", accelerators=8, batch=8, sequence=1024)
    >>> reason_against(setting, Division(tensor=8))
    'tensor ranks must divide the key heads'
    """
    values = setting.letters() | division.letters(setting)
    return next((reason for formula, reason in CONSTRAINTS if evaluate(formula, values) != 0), None)
