"""Memory and time of one step of distributed training, for one way to divide it among accelerators.

>>> megatron = Setting("gpt3-175b", "a100-80gb", accelerators=64, batch=64, sequence=2048, **AS_IN_2022)
>>> paper = Division(tensor=8, pipeline=8, interleave=3, recompute="selective", sequence_parallel=True)
>>> step = training_step(megatron, paper)
>>> step.time.total < Fraction("13.75")  # seconds that were measured; every efficiency is 1 here
True
>>> [round(float(term.value) / 2**30, 2) for term in step.memory.terms]  # the paper counts no embedding: 45.56
[46.92, 12.38]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from memsim.decoder import decoder_letters
from memsim.derivation import derive
from memsim.estimate import Estimate, Term, estimate
from memsim.formula import evaluate
from memsim.hardware import Hardware, hardware
from memsim.model import Model
from memsim.step_memory import MEMORY
from memsim.step_time import TIME
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError

__all__ = [
    "AS_IN_2022",
    "CONSTRAINTS",
    "LETTERS",
    "PRECISIONS",
    "RECOMPUTE",
    "Division",
    "Setting",
    "TrainingStep",
    "reason_against",
    "training_step",
]

Precision = Literal["bf16", "fp16", "fp8", "fp32"]
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
    "G": "accelerators",
    "B": "sequences of a step",
    "s": "tokens of a sequence",
    "φ": "1 with FlashAttention",
    "δ": "1 with dropout",
    "κ": "share of the scores that a kernel computes",
    "y": "bytes of an activation",
    "y_x": "bytes of an operand of a matrix product",
    "y_w": "bytes of a weight",
    "y_g": "bytes of a gradient",
    "y_o": "bytes of optimizer states a parameter, fp32 weights among them",
    "R": "peak rate of attention, operations a second",
    "R_x": "peak rate of matrix products with weights",
    "M": "memory bandwidth, bytes a second",
    "N": "accelerators of a node",
    "W": "bandwidth within a node",
    "w": "bandwidth between nodes, of one accelerator",
    "C": "bandwidth to the host",
    "α": "latency of a message, seconds",
    "η_c": "efficiency of computation",
    "η_m": "efficiency of memory",
    "η_n": "efficiency of links",
    "ω": "share of computation behind which data and context parallelism hide",
}
# Peak rates in order of preference, of attention and of products with weights; then y, y_x, y_w and y_o.
PRECISIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[int, int, int, int]]] = {
    "bf16": (("bf16",), ("bf16",), (2, 2, 2, 12)),
    "fp16": (("fp16",), ("fp16",), (2, 2, 2, 12)),
    "fp8": (("bf16",), ("fp8", "fp8_e4m3"), (2, 1, 2, 12)),
    "fp32": (("tf32", "fp32"), ("tf32", "fp32"), (4, 4, 4, 8)),
}
# Each formula is 0 for what can be run; the last ones drop what is the same as something simpler.
CONSTRAINTS: tuple[tuple[str, str], ...] = (
    ("t*p*c*d - G", "tensor x pipeline x context x data ranks must be the accelerators"),
    ("B % (d*b)", "data ranks x micro-batch must divide the batch"),
    ("L % (p*v)", "stages x chunks must divide the layers"),
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
# How Korthikanti et al. trained in 2022: scores in memory, dropout, fp32 gradients (18 bytes a parameter).
AS_IN_2022: dict[str, Any] = {"attention": "standard", "dropout": True, "states": "megatron"}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, and on what.

    Attributes
    ----------
    model : str or Model
        A decoder, by name or description.
    hardware : str
        Its name, such as ``"a100-80gb"``.
    accelerators, batch, sequence : int
        How many accelerators, sequences of a step, and tokens of each.
    attention : {"flash", "standard"}
        FlashAttention, which computes half of the scores under a causal mask, or scores in memory, all of them.
    dropout : bool
        Whether masks are kept and read.
    states : {"megatron", "zero"}
        18 bytes a parameter, with fp32 gradients, or 16.
    latency : float
        Seconds a message.
    compute, memory, network : float
        Efficiencies: the share of its peak that each reaches.
    overlap : float
        The share of computation behind which data and context parallelism hide.
    """

    model: str | Model
    hardware: str
    accelerators: int
    batch: int
    sequence: int
    attention: Literal["flash", "standard"] = "flash"
    dropout: bool = False
    states: Literal["megatron", "zero"] = "megatron"
    latency: Quantity = 0
    compute: Quantity = 1
    memory: Quantity = 1
    network: Quantity = 1
    overlap: Quantity = 1

    def letters(self) -> dict[str, Number]:
        """Return the values that no division changes, exact.

        Raises
        ------
        OptionError
            If a number is out of range or a choice unknown.
        """
        for name, value, choices in (
            ("attention", self.attention, ("flash", "standard")),
            ("states", self.states, ("megatron", "zero")),
        ):
            if value not in choices:
                raise OptionError(f"{name}: expected one of {choices}; got {value!r}")
        shares = {"η_c": self.compute, "η_m": self.memory, "η_n": self.network}
        found = positive_values(G=self.accelerators, B=self.batch, s=self.sequence, **shares)
        found |= {"ω": exact(self.overlap, "overlap"), "α": exact(self.latency, "latency")}
        for name in (*shares, "ω"):
            if not 0 <= found[name] <= 1:
                raise OptionError(f"efficiencies and overlap: expected shares up to 1; got {found[name]}")
        if not all(isinstance(found[name], int) for name in "GBs") or found["α"] < 0:
            raise OptionError("expected whole accelerators, batch and sequence, and a latency from 0")
        flash = self.attention == "flash"
        found |= {"φ": int(flash), "δ": int(self.dropout), "κ": Fraction(1, 2) if flash else 1}
        card = hardware(self.hardware)
        found |= {"M": card.hbm_bandwidth.value, "N": card.node_size.value, "W": card.link.value}
        found |= {"w": card.network.value, "C": card.host_link.value}
        return found | decoder_letters(self.model)


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
        if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
            raise OptionError(f"expected whole numbers above 0; got {self}")
        choices = {"z": self.zero, "r": RECOMPUTE.index(self.recompute)}
        flags = {"q": int(self.sequence_parallel), "o": int(self.offload)}
        return {**sizes, **choices, **flags, **precision_letters(setting, self.precision)}


def precision_letters(setting: Setting, precision: str) -> dict[str, Number]:
    """Return rates and bytes of a precision on the hardware of `setting`.

    Raises
    ------
    OptionError
        If the precision is unknown, or the hardware has no rate for it.

    Examples
    --------
    >>> setting = Setting("gpt2", "a100-80gb", accelerators=8, batch=8, sequence=1024)
    >>> precision_letters(setting, "fp32")["R"]
    156000000000000
    """
    if precision not in PRECISIONS:
        raise OptionError(f"precision: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    *rates, (y, operand, weight, states) = PRECISIONS[precision]
    card = hardware(setting.hardware)
    attention, products = (_rate(card, names, precision) for names in rates)
    gradient = 4 if setting.states == "megatron" else weight
    return {
        "R": attention, "R_x": products,
        "y": y, "y_x": operand, "y_w": weight, "y_g": gradient, "y_o": states,
    }  # fmt: skip


def _rate(card: Hardware, names: tuple[str, ...], precision: str) -> int:
    for name in names:
        if name in card.peaks:
            return card.peaks[name].value
    raise OptionError(f"{card.name} has no peak rate for {precision}; it has {', '.join(card.peaks)}")


class TrainingStep(NamedTuple):
    """Time and memory of the fullest rank, an estimate each; every quantity by its name in the formulas."""

    time: Estimate
    memory: Estimate
    quantities: Mapping[str, Term]

    def value(self, name: str) -> Number:
        """Return the value of a quantity, such as ``"mfu"``."""
        return self.quantities[name].value


def reason_against(setting: Setting, division: Division) -> str | None:
    """Return why a division cannot be run, or None; that it fits into memory is another question.

    >>> setting = Setting("gpt2", "a100-80gb", accelerators=8, batch=8, sequence=1024)
    >>> reason_against(setting, Division(tensor=8))
    'tensor ranks must divide the key heads'
    """
    values = setting.letters() | division.letters(setting)
    return next((reason for formula, reason in CONSTRAINTS if evaluate(formula, values) != 0), None)


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
    Stages take equally long but for the head, on the last one, which then sets the pace:
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
    found = derive((*MEMORY, *TIME), values)
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
        found,
    )
