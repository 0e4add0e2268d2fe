"""What is trained and on what: the letters of a step of training that no way to divide it changes.

>>> setting = Setting("gpt2", "a100-80gb", accelerators=8, batch=64, sequence=1024)
>>> letters = setting.letters()
>>> letters["G"], letters["L"], letters["φ"], letters["κ"]
(8, 12, 1, Fraction(1, 2))
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from memsim.decoder import decoder_letters
from memsim.hardware import Hardware, hardware
from memsim.kernel_times import rate_of_exponentials
from memsim.model import Model
from memsim.training_memory import positive_values
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError

__all__ = [
    "AS_IN_2022", "KERNEL_LETTERS", "LETTERS", "PRECISIONS", "Precision", "Setting", "precision_letters",
]  # fmt: skip

Precision = Literal["bf16", "fp16", "fp8", "fp32"]
LETTERS: dict[str, str] = {
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
    "η_c": "efficiency of products with weights",
    "η_a": "efficiency of attention's products of scores and values",
    "η_m": "efficiency of memory",
    "η_n": "efficiency of links",
    "ω": "share of computation behind which data and context parallelism hide",
    "τ": "1 if all-reduces of tensor parallelism run beside the gradients of weights",
}
# What single kernels need besides, `memsim.kernel_times`.
KERNEL_LETTERS: dict[str, str] = {
    "σ": "seconds that a kernel takes to start",
    "R_e": "exponentials a second",
    "S": "multiprocessors",
}
# Peak rates in order of preference, of attention and of products with weights; then y, y_x, y_w and y_o.
PRECISIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[int, int, int, int]]] = {
    "bf16": (("bf16",), ("bf16",), (2, 2, 2, 12)),
    "fp16": (("fp16",), ("fp16",), (2, 2, 2, 12)),
    "fp8": (("bf16",), ("fp8", "fp8_e4m3"), (2, 1, 2, 12)),
    "fp32": (("tf32", "fp32"), ("tf32", "fp32"), (4, 4, 4, 8)),
}
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
        FlashAttention, which computes the half of the scores that a causal mask leaves, or all in memory.
    dropout : bool
        Whether masks are kept and read.
    states : {"megatron", "zero"}
        18 bytes a parameter, with fp32 gradients, or 16.
    latency : float
        Seconds a message.
    compute, memory, network : float
        Efficiencies: the share of its peak that each reaches.
    scores : float, optional
        That of attention's products; that of all others, `compute`.
    overlap : float
        The share of computation behind which data and context parallelism hide.
    tensor_overlap : bool
        Whether all-reduces of the backward pass run beside the gradients of weights.
    start : float, optional
        Seconds that a kernel takes to start, as a calibration gives them.  With it operators take the times
        of kernels, `memsim.kernel_times`, which calibrated shares are of; without it those of a roofline.
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
    scores: Quantity | None = None
    tensor_overlap: bool = False
    start: Quantity | None = None

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
        scores = self.compute if self.scores is None else self.scores
        shares = {"η_c": self.compute, "η_a": scores, "η_m": self.memory, "η_n": self.network}
        found = positive_values(G=self.accelerators, B=self.batch, s=self.sequence, **shares)
        found |= {"ω": exact(self.overlap, "overlap"), "α": exact(self.latency, "latency")}
        for name in (*shares, "ω"):
            if not 0 <= found[name] <= 1:
                raise OptionError(f"efficiencies and overlap: expected shares up to 1; got {found[name]}")
        if found["α"] < 0 or not all(isinstance(found[name], int) for name in "GBs"):
            raise OptionError("expected whole accelerators, batch and sequence, and a latency from 0")
        flash = self.attention == "flash"
        found |= {"τ": int(self.tensor_overlap)}
        found |= {"φ": int(flash), "δ": int(self.dropout), "κ": Fraction(1, 2) if flash else 1}
        card = hardware(self.hardware)
        found |= {"M": card.hbm_bandwidth.value, "N": card.node_size.value, "W": card.link.value}
        found |= {"w": card.network.value, "C": card.host_link.value}
        if self.start is not None:
            found |= {"σ": exact(self.start, "start"), "S": card.sms.value, "R_e": rate_of_exponentials(card)}
            if found["σ"] < 0:
                raise OptionError(f"start: expected seconds from 0; got {self.start}")
        return found | decoder_letters(self.model)


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
