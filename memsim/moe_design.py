"""The lecture's table of MoE designs: what its columns alone make of each row, and what the facts do.

>>> row = next(row for row in design_rows() if row.model == "mixtral-8x7b")
>>> row.name, round(float(column_total(row=row.model).total) / 1e9, 2)  # 32 key heads, no vocabulary
('13B/47B', 47.25)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from fractions import Fraction

from memsim import data_files, published
from memsim.estimate import Estimate
from memsim.formula import evaluate
from memsim.model import Model
from memsim.moe import MoeParameters, moe_parameters
from memsim.sparse_model import sparse
from memsim.units import SCALES, Number, exact, round_half_up
from refimpl.errors import UnknownNameError

__all__ = [
    "DesignRow",
    "column_model",
    "column_parameters",
    "column_total",
    "design_rows",
    "published_sizes",
]


@dataclass(frozen=True, slots=True)
class DesignRow:
    """One row as printed, and the name of our description of the model.

    Attributes
    ----------
    reference, name, experts, d_ffn, d_expert, placement, activation : str
        Columns as printed; `name` says activated and total size, or total size alone.
    d_model, layers, heads, d_head, shared : int
        Columns that are numbers.
    model : str
        A name of `memsim.model.model`: the same with the facts that no column has.
    facts : str
        Those facts.
    """

    reference: str
    name: str
    experts: str
    d_ffn: str
    d_expert: str
    placement: str
    activation: str
    d_model: int
    layers: int
    heads: int
    d_head: int
    shared: int
    model: str
    facts: str


def design_rows() -> list[DesignRow]:
    """Return the 34 rows of the table, in its order.

    >>> len(design_rows())
    34
    """
    names = {field.name for field in fields(DesignRow)}
    found = []
    for group in data_files.read("moe_design")["group"]:
        for row in group["rows"]:
            merged = {"reference": group["reference"], "facts": group["facts"], **row}
            found.append(DesignRow(**{name: merged[name] for name in names}))
    return found


def column_model(row: DesignRow) -> Model:
    """Return what a row's columns alone describe.

    A decoder with a key head for every head, no embeddings and no norms; "k of E" as printed, shared experts
    left where the count has them; ``L * frequency`` layers with experts, rounded down; three matrices where
    the activation is gated.  A width that is not printed is that of a network of 8 d², 8/3 d where it is
    gated, and a fraction of it is rounded to the nearest.

    Examples
    --------
    >>> [(stack.name, stack.layers) for stack in column_model(design_rows()[0]).stacks]
    [('dense block', 18), ('MoE block', 18)]
    """
    d, gated = row.d_model, row.activation in ("GEGLU", "SwiGLU")
    ffn = Fraction(8 * d, 3) if row.d_ffn == "-" else Fraction(evaluate(row.d_ffn, {"d": d}))
    expert = Fraction(evaluate(row.d_expert, {"d_ffn": ffn}))
    active, experts = map(int, row.experts.partition("-")[0].split("/"))
    frequency = Fraction(row.placement.partition(",")[0])
    moe_layers = row.layers * frequency.numerator // frequency.denominator - ("except 1st" in row.placement)
    kinds = {int(E): int(L) for L, E in re.findall(r"(\d+)L-(\d+)E", row.placement)}
    kinds.pop(experts, None)
    return sparse(
        layers=row.layers,
        moe_layers=moe_layers,
        more_experts=kinds,
        width=d,
        heads=row.heads,
        head_width=row.d_head,
        ffn=int(round_half_up(ffn, 0)),
        experts=experts,
        active=active,
        expert_width=int(round_half_up(expert, 0)),
        gated=gated,
    )


def column_parameters(*, row: str) -> MoeParameters:
    """Return total and activated parameters of a row's columns alone; rows are named by their models.

    Raises
    ------
    UnknownNameError
        If there is no such row.

    Examples
    --------
    >>> [round(float(part.total) / 1e9, 2) for part in column_parameters(row="qwen1.5-moe")]
    [13.69, 2.07]
    """
    rows = {item.model: item for item in design_rows()}
    if row not in rows:
        raise UnknownNameError("row of the table", row, rows)
    return moe_parameters(model=column_model(rows[row]))


def column_total(*, row: str) -> Estimate:
    """Return the total of `column_parameters`.

    Examples
    --------
    >>> column_total(row="dbrx").unit
    'parameters'
    """
    return column_parameters(row=row).total


def published_sizes() -> dict[str, tuple[Number, Number | None]]:
    """Return total and activated parameters of each row as printed, None where only a total is.

    Examples
    --------
    >>> [float(size) for size in published_sizes()["openmoe-8b"]]
    [8700000000.0, 2600000000.0]
    """
    sizes: dict[str, Number] = {}
    for entry in published.load("moe_design"):
        sizes[entry["id"]] = exact(Fraction(entry["printed"]) * Fraction(SCALES[entry["unit"]][1]))
    models = [row.model for row in design_rows()]
    return {name: (sizes[f"moe.{name}.total"], sizes.get(f"moe.{name}.activated")) for name in models}
