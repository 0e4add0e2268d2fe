"""Activations of a pipeline's first stage by Korthikanti et al.: all modes of their Table 2.

They count what a GPT with GELU, dropout and a feed-forward network of four widths keeps; `activations`
counts other models operator by operator.

>>> shape = dict(hidden=12288, batch=1, sequence=2048, layers=96, heads=96)
>>> ranks = dict(tensor=8, pipeline=8, interleave=3)
>>> layers = korthikanti_activations(**shape, **ranks, sequence_parallel=True, recompute="selective")
>>> layers["layers"] / 2**30
12.3515625
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.training_memory import positive_values
from memsim.units import Quantity
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique

__all__ = ["RECOMPUTE", "Recompute", "korthikanti_activations"]

_PAPER = "Korthikanti et al. 2022, arXiv:2205.05198"
Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
# Bytes of one layer over s b h: (what is recomputed, whether the sequence is divided too).
_LAYER = {
    ("none", False): "(10 + 24/t + 5a*s/(h*t))",
    ("none", True): "(34/t + 5a*s/(h*t))",
    ("selective", False): "(10 + 24/t)",
    ("selective", True): "(34/t)",
    ("full", False): "2",
    ("full", True): "2",
}


def _sample(rng: np.random.Generator, **chosen: Any) -> Case:
    heads = chosen["heads"]
    chosen["hidden"] = heads * int(rng.integers(1, 20))
    return Case((), chosen)


@technique(
    "cost.training_memory.korthikanti",
    entries=(98,),
    kind="cost",
    source=Source("Korthikanti et al. 2022", "arXiv:2205.05198", "Table 2, equations 4 and 5"),
    axes={
        "batch": (1, 8),
        "sequence": (1, 99),
        "layers": (1, 20),
        "heads": (1, 9),
        "tensor": (1, 8),
        "pipeline": (1, 6),
        "interleave": (1, 4),
    },
    options={"sequence_parallel": (False, True), "recompute": RECOMPUTE},
    sample=_sample,
    edges=(
        {"tensor": 1, "pipeline": 1, "interleave": 1, "recompute": "none"},
        {"tensor": 8, "pipeline": 6, "interleave": 4, "sequence_parallel": True, "recompute": "full"},
    ),
    exact=True,
)
def korthikanti_activations(
    *,
    hidden: Quantity,
    batch: Quantity,
    sequence: Quantity,
    layers: Quantity,
    heads: Quantity,
    tensor: Quantity = 1,
    pipeline: Quantity = 1,
    interleave: Quantity = 1,
    sequence_parallel: bool = False,
    recompute: Recompute = "none",
    vocabulary: Quantity | None = None,
) -> Estimate:
    """Return the activations of one device of the first pipeline stage, which keeps the most.

    Parameters
    ----------
    hidden, batch, sequence, layers, heads : int
        h, b of a micro-batch, s, L of the whole model, a.
    tensor, pipeline, interleave : int
        t, p, and v model chunks of each stage.
    sequence_parallel : bool
        Whether norms and dropouts are divided along the sequence among the t ranks.
    recompute : {"none", "selective", "full"}
        Nothing; attention's scores; all of a layer but its input.
    vocabulary : int, optional
        V.  With it, what embedding and head keep is counted; by default it is left out.

    Returns
    -------
    Estimate
        In bytes, exact.

    Raises
    ------
    OptionError
        If a number is not positive, or the mode of recomputing is unknown.

    Notes
    -----
    The first stage of 1F1B has p micro-batches in flight, each of L/p layers: L layers' worth.  Interleaving
    raises that by (p - 1)/(p v).  Head and final norm stand in the last stage, so they count for p = 1 only.
    As a formula t need not divide anything.

    References
    ----------
    .. [1] Korthikanti et al. 2022, arXiv:2205.05198, Table 2, section 4.3 and equations 4 and 5.

    Examples
    --------
    >>> shape = dict(hidden=6144, batch=4, sequence=2048, layers=48, heads=64, tensor=8)
    >>> [korthikanti_activations(**shape, recompute=mode).total / 2**30 for mode in ("none", "full")]
    [59.25, 4.5]
    """
    if recompute not in RECOMPUTE:
        raise OptionError(f"recompute: expected one of {', '.join(RECOMPUTE)}; got {recompute!r}")
    values = positive_values(
        h=hidden, b=batch, s=sequence, L=layers, a=heads, t=tensor, p=pipeline, v=interleave
    )
    in_flight = "" if values["p"] == 1 else "*(1 + (p - 1)/(p*v))" if values["v"] != 1 else ""
    formula = f"s*b*h*L{in_flight}*{_LAYER[recompute, bool(sequence_parallel)]}"
    terms = [term("layers", formula, values, "B", f"{_PAPER}, Table 2")]
    if vocabulary is not None:
        values |= positive_values(V=vocabulary)
        over = "/t" if sequence_parallel else ""
        terms.append(term("embedding's dropout", f"s*b*h*p{over}", values, "B", f"{_PAPER}, section 4.3"))
        if values["p"] == 1:
            terms += [
                term("final norm and head's input", f"4s*b*h{over}", values, "B", f"{_PAPER}, section 4.3"),
                term("logits in fp32", "4s*b*V/t", values, "B", f"{_PAPER}, section 4.3"),
            ]
    return estimate(
        "activations, Korthikanti's count",
        terms,
        leaves_out="gated networks, flash attention and training without dropout, which differ; buffers",
    )
