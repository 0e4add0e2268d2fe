"""Seconds of single kernels: what `frugal calibrate` times, and a step of training made of them.

Kernels take ``max(computed/η + exposed/η_m, moved/η_m) + σ``: arithmetic at a share of its peak, what moves
before and after that, at the least all that they move, and a start each.

- Products run in whole waves of tiles, `memsim.waves`.
- Attention takes one exponential a score, on units of their own.  Kernels hide some of them behind products
  and lose time on what else a score needs, so both count in full, one after the other.
- Under a causal mask tiles on the diagonal are computed whole.
- A block of queries reads them before its loop over keys and writes its output after it, when it has no
  arithmetic to hide either; keys and values arrive behind the loop.
- The gradient has five products for two, and as much more to do for each score.  Its blocks are of keys:
  exposed are K, V, dK and dV, and kernels before and after that sum dO O and round the sums of dQ.

>>> from memsim.hardware import hardware
>>> sizes = {"B": 4, "H": 16, "N": 4096, "D": 128}
>>> parts = kernel_parts("attention", sizes, hardware("h200"))
>>> [round(1e6 * seconds, 1) for seconds in parts[:3]]  # microseconds
[429.7, 28.0, 55.9]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from memsim.derivation import Definition
from memsim.formula import evaluate
from memsim.hardware import Hardware
from memsim.waves import extra, in_waves
from refimpl.errors import OptionError

__all__ = [
    "KERNELS", "TILE", "Kernel", "Parts", "kernel_parts", "of_kernels", "rate_of_exponentials", "tiled",
]  # fmt: skip

# Queries and keys of a tile, FlashAttention 3's for heads of 128 under a causal mask:
# github.com/Dao-AILab/flash-attention @07602ad, hopper/tile_size.h.
TILE = 128
_EXPONENTIALS = "Shah et al. 2024, arXiv:2407.08608, section 3.1"
_GRADIENT = "Dao 2023, arXiv:2307.08691, Algorithm 2"
_MEASURED = "memsim.kernel_times, held to what `frugal calibrate` measured"


def tiled(tokens: str) -> str:
    """Return the formula of the scores that a causal mask leaves, in whole tiles.

    >>> evaluate(tiled("N"), {"N": 256})  # three tiles of four
    49152
    """
    return f"{TILE}*{TILE}*ceil({tokens}/{TILE})*(ceil({tokens}/{TILE}) + 1)/2"


class Kernel(NamedTuple):
    """Formulas of what is timed, in fp16: seconds at the peaks R, R_e and β, by letters of sizes.

    Attributes
    ----------
    sizes : tuple of str
        Letters that a problem gives.
    computed, exposed, moved : str
        Seconds of arithmetic, of what moves before and after it, and of all that must move.
    starts : int
        How many kernels it is.
    """

    sizes: tuple[str, ...]
    computed: str
    exposed: str
    moved: str
    starts: int = 1


_SCORES = f"B*H*{tiled('N')}*(4D/R + 1/R_e)"
KERNELS = {
    "copy": Kernel(("bytes",), "0", "0", "2bytes/β"),
    "product": Kernel(
        ("M", "N", "K"), f"2M*N*K/R*({extra('M', 'N')})", "0", "2(M*K + K*N + M*N)/β"
    ),
    "attention": Kernel(("B", "H", "N", "D"), _SCORES, "4B*H*N*D/β", "8B*H*N*D/β"),
    # Exposed: K, V, dK, dV; O and dO; dQ in fp32 and rounded.  What must move: Q, K, V, O and gradients.
    "gradient": Kernel(("B", "H", "N", "D"), f"2.5*{_SCORES}", "18B*H*N*D/β", "16B*H*N*D/β", 3),
}  # fmt: skip


class Parts(NamedTuple):
    """Seconds on a card that reaches its peaks, and how many kernels."""

    computed: float
    exposed: float
    moved: float
    starts: int

    def seconds(self, share: float, memory: float, start: float) -> float:
        """Return what it takes with shares of the peaks, and a start.

        >>> Parts(2.0, 1.0, 3.0, 1).seconds(0.5, 1.0, 0.25)
        5.25
        """
        return max(self.computed / share + self.exposed / memory, self.moved / memory) + self.starts * start


def kernel_parts(kind: str, sizes: Mapping[str, Any], card: Hardware) -> Parts:
    """Return the parts of what is timed, one of `KERNELS`.

    Raises
    ------
    OptionError
        If memsim does not know how many exponentials the card has a second.
    """
    kernel = KERNELS[kind]
    letters = {"R": card.peak("fp16").value, "β": card.hbm_bandwidth.value, "S": card.sms.value}
    letters |= {"R_e": rate_of_exponentials(card), **{name: sizes[name] for name in kernel.sizes}}
    texts = (kernel.computed, kernel.exposed, kernel.moved)
    computed, exposed, moved = (float(evaluate(text, letters)) for text in texts)
    return Parts(computed, exposed, moved, kernel.starts)


def rate_of_exponentials(card: Hardware) -> int:
    """Return how many exponentials a card has a second.

    Raises
    ------
    OptionError
        If memsim does not know.
    """
    if card.exponentials is None:
        raise OptionError(
            f"{card.name}: expected a rate of exponentials for times of kernels; memsim has none"
        )
    return card.exponentials.value


# Kernels of a forward pass in one stage, by operator of `memsim.roofline`: two norms, two additions and the
# activation of a layer; unfused attention's two products; the head and its loss.
_COUNTS = {
    "qkv": "L*ρ",
    "core": "(L*ρ if φ > 0 else 2L*ρ)",
    "softmax": "(0 if φ > 0 else L*ρ)",
    "out": "L*ρ",
    "up": "L_f*ρ",
    "down": "L_f*ρ",
    "experts": "2L_x*ρ",
    "pointwise": "5L*ρ",
    "head": "2",
}
# In the backward pass: the gradient of a product is two products.
_BACK = {**dict.fromkeys(("qkv", "out", "up", "down", "experts", "head"), "2"), "core": "(3 if φ > 0 else 2)"}
_CORE = (
    Definition(
        "whole_core", f"2*{tiled('s')}/(s*s) if φ > 0 else 1", "1", "computed over wanted scores", _MEASURED
    ),
    Definition("exp_core", "b*s*s*H*κ*L*ρ/(c*t)", "1", "exponentials of scores", _EXPONENTIALS),
    Definition(
        "arithmetic_core",
        "(FLOP_core/R + exp_core/R_e)*whole_core/η_a",
        "s",
        "products and exponentials",
        _EXPONENTIALS,
    ),
    Definition("exposed_core", "y*x*(A_q + A_o)*L*ρ/(t*M*η_m)", "s", "queries and output", _MEASURED),
)
_CORE_BACK = (
    Definition(
        "exposed_back",
        "y*x*(2A_k + 2A_v + 2A_o + 3A_q)*L*ρ/(t*M*η_m)",
        "s",
        "keys, values, their gradients, and kernels around attention's",
        _GRADIENT,
    ),
)
_FUSED = {
    "f": "max(arithmetic_core + exposed_core, m_core) if φ > 0 else max(FLOP_core/(R*η_c), m_core)",
    "g": "max(2.5arithmetic_core + exposed_back, 2m_core) if φ > 0 else max(2FLOP_core/(R*η_c), 2m_core)",
}


def of_kernels(chain: Iterable[Definition]) -> Iterator[Definition]:
    """Yield a chain of formulas whose operators take the times of kernels; it needs S, R_e and σ besides.

    Experts are not in waves: a layer's are two grouped products.  Products of unfused attention reach the
    share of other products.
    """
    for definition in in_waves(chain):
        way, _, name = definition.name.partition("_")
        if way not in ("f", "g") or name not in _COUNTS:
            yield definition
            continue
        starts = f"start_{name}"
        if way == "f":
            yield Definition(starts, f"σ*{_COUNTS[name]}", "s", f"starts of kernels, {name}", _MEASURED)
        elif name in _BACK:
            starts = f"{_BACK[name]}*{starts}"
        formula = definition.formula
        if name == "core":
            yield from _CORE if way == "f" else _CORE_BACK
            formula = f"({_FUSED[way]})"
        yield definition._replace(formula=f"{formula} + {starts}")
