"""Operators of a layer as a chain of formulas: operations, bytes, and the longer of the times they take.

An operator's time is ``max(FLOP / (R η_c), bytes / (M η_m))``: the peak rate and the memory bandwidth, each
times an efficiency, 1 unless somebody measured it; attention's products have their own, η_a.  Quantities are
those of the fullest stage of a pipeline and one micro-batch of x tokens; the gradient of a product is two
products of the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from memsim.derivation import Definition
from memsim.estimate import Term

__all__ = ["OPERATORS", "ROOFLINE", "Bounded", "Operator", "roofline"]

_WILLIAMS = "Williams et al. 2009, doi:10.1145/1498765.1498785"
_MEGATRON = "Narayanan et al. 2021, arXiv:2104.04473, appendix"
_FLASH = "Dao et al. 2022, arXiv:2205.14135, Algorithms 0, 1, 3, 4"


class Operator(NamedTuple):
    """FLOPs and bytes of the forward pass, and what the backward pass costs in terms of them.

    Attributes
    ----------
    name, meaning : str
        Suffix of the names in formulas, and what it is.
    flop, moved : str
        Formulas of operations and bytes.
    rate : str
        Letter of the peak rate.
    flop_back, moved_back : str
        Factors of the backward pass.
    source : str
        Where they stand.
    """

    name: str
    meaning: str
    flop: str
    moved: str
    rate: str
    flop_back: str = "2"
    moved_back: str = "2"
    source: str = _MEGATRON


OPERATORS = (
    Operator(
        "qkv",
        "queries, keys, values",
        "2x*W_q*ρ/t",
        "y_x*(W_q/t + x*(h + (A_q + A_k + A_v)/t)*L)*ρ",
        "R_x",
    ),
    # Algorithm 0 in kernels one after the other: products that write S and read P, and between them softmax
    # with its mask, and dropout with a mask of bytes.  FlashAttention is one kernel that moves its operands
    # only, and its backward pass has 5 products against 2.
    Operator(
        "core",
        "scores and their product with values, all of FlashAttention",
        "2b*s*s*(A_q + A_o)*κ*L*ρ/(c*t)",
        "y*x*(A_q + c*A_k + c*A_v + A_o)*L*ρ/t + (0 if φ > 0 else 2y*b*s*s*H*L*ρ/(c*t))",
        "R",
        flop_back="(2.5 if φ > 0 else 2)",
        source=_FLASH,
    ),
    Operator(
        "softmax",
        "softmax and dropout between the products",
        "0",
        "0 if φ > 0 else b*s*s*H*(2y + (2y + 1)*δ)*L*ρ/(c*t)",
        "R",
        flop_back="1",
        moved_back="(3y + (2y + 1)*δ)/(2y + (2y + 1)*δ)",
        source=_FLASH,
    ),
    Operator(
        "out", "output projection", "2x*W_o*ρ/t", "y_x*(W_o/t + x*(A_o/t + h)*L)*ρ", "R_x"
    ),
    Operator(
        "up",
        "first matrices of the dense networks",
        "2x*W_f*(j - 1)*ρ/(j*t)",
        "y_x*(W_f*(j - 1)/(j*t) + x*(h*L_f + (j - 1)*F/t))*ρ",
        "R_x",
    ),
    Operator(
        "down", "last matrix of the dense networks", "2x*W_f*ρ/(j*t)",
        "y_x*(W_f/(j*t) + x*(F/t + h*L_f))*ρ", "R_x",
    ),
    Operator(
        "experts",
        "experts, whose tokens are spread evenly",
        "2x*W_a*ρ/t",
        "y_x*(W_x/(e*t) + x*(2h*K_x + j*F_x/t))*ρ",
        "R_x",
    ),
    # Two norms, two additions to the residual stream and the activation; the backward pass of each reads one
    # tensor more than the forward pass.
    Operator(
        "pointwise",
        "norms, residuals, activation, dropout",
        "0",
        "(y*x*(10h*L/u + j*(F + F_x)/t) + 2δ*x*h*L/u)*ρ",
        "R",
        flop_back="1",
        moved_back="1.5",
    ),
    Operator(
        "head", "head and cross-entropy, last stage only", "2x*W_h/t",
        "y*(W_h/t + x*h) + 12x*V/t", "R",
    ),
)  # fmt: skip


def _definitions(operator: Operator) -> tuple[Definition, ...]:
    name, meaning, source = operator.name, operator.meaning, operator.source
    share = "η_a" if name == "core" else "η_c"
    time = f"max({{0}}FLOP_{name}/({operator.rate}*{share}), {{1}}m_{name})"
    return (
        Definition(f"FLOP_{name}", operator.flop, "FLOP", f"operations of {meaning}", source),
        Definition(f"bytes_{name}", operator.moved, "B", f"bytes of {meaning}", source),
        Definition(f"m_{name}", f"bytes_{name}/(M*η_m)", "s", f"memory's time of {meaning}", _WILLIAMS),
        Definition(f"f_{name}", time.format("", ""), "s", f"forward, {meaning}", _WILLIAMS),
        Definition(
            f"g_{name}",
            time.format(f"{operator.flop_back}*", f"{operator.moved_back}*"),
            "s",
            f"backward, {meaning}",
            source,
        ),
    )


_LAYER = [operator.name for operator in OPERATORS if operator.name != "head"]
ROOFLINE = (
    *(definition for operator in OPERATORS for definition in _definitions(operator)),
    Definition("forward", " + ".join(f"f_{name}" for name in _LAYER), "s", "forward, a stage", _WILLIAMS),
    Definition("gradient", " + ".join(f"g_{name}" for name in _LAYER), "s", "backward, a stage", _WILLIAMS),
    Definition(
        "again",
        "forward if r > 1 else (f_core + f_softmax if r > 0 else 0)",
        "s",
        "recomputation, a stage",
        "Korthikanti et al. 2022, arXiv:2205.05198, section 5",
    ),
    Definition("head", "f_head + g_head", "s", "head and loss, forward and backward", _MEGATRON),
)


class Bounded(NamedTuple):
    """One operator: operations and bytes of its forward pass, seconds of both, and what limits the first.

    That is "compute", "memory", or of kernels that take longer to start than to work "start".
    """

    name: str
    operator: str
    flop: float
    moved_bytes: float
    intensity: float
    forward_s: float
    backward_s: float
    bound: str


def roofline(quantities: Mapping[str, Term]) -> list[Bounded]:
    """Return the operators of a step, those that the model lacks left out.

    Parameters
    ----------
    quantities : mapping of str to Term
        Of a `memsim.planning.training_step.TrainingStep`.
    """
    found = []
    for operator in OPERATORS:
        flop, moved, forward, back = (
            quantities[f"{kind}_{operator.name}"] for kind in ("FLOP", "bytes", "f", "g")
        )
        if not moved.value:
            continue
        start = quantities[f"start_{operator.name}"].value if f"start_{operator.name}" in quantities else 0
        working = forward.value - start
        limit = "compute" if working > quantities[f"m_{operator.name}"].value else "memory"
        if start > working:
            limit = "start"
        intensity = float(flop.value / moved.value)
        times = float(forward.value), float(back.value)
        sizes = float(flop.value), float(moved.value)
        found.append(Bounded(operator.name, operator.meaning, *sizes, intensity, *times, limit))
    return found
