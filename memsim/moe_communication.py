"""What a rank sends when the experts of a layer are spread over ranks: two all-to-alls a pass.

>>> layer = moe_all_to_all(experts=64, capacity=384, width=2048, ranks=8)
>>> print(layer.explain()[0])
forward, dispatch: (E - h)*C*d*e = (64 - 8)*384*2048*2 = 88.08 MB
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from memsim.estimate import Estimate, estimate, term
from memsim.units import Number, Quantity, exact
from refimpl.errors import OptionError
from refimpl.registry import Case, Source, technique
from refimpl.validation import whole

__all__ = ["moe_all_to_all"]

_ALL_TO_ALL = "Lepikhin et al. 2020, arXiv:2006.16668, Algorithm 2"


def _sample(rng: np.random.Generator, *, experts: int, ranks: int, capacity: int, direction: str) -> Case:
    width, itemsize = int(rng.integers(1, 5000)), int(rng.choice([1, 2, 4, 8]))
    held = int(rng.integers(-(-experts // ranks) if ranks > 1 else experts, experts + 1))
    size = {"experts": experts, "ranks": ranks, "capacity": capacity, "width": width, "itemsize": itemsize}
    return Case((), {**size, "held": held, "direction": direction})


@technique(
    "cost.moe_communication",
    entries=(37,),
    kind="cost",
    source=Source("Lepikhin et al. 2020", "arXiv:2006.16668", "section 3.2, Algorithm 2"),
    axes={"experts": (1, 40), "ranks": (1, 12), "capacity": (1, 500)},
    options={"direction": ("forward", "backward", "both")},
    sample=_sample,
    edges=(
        {"experts": 1, "ranks": 1, "capacity": 1},
        {"experts": 2, "ranks": 7},
        {"experts": 40, "ranks": 8, "direction": "both"},
    ),
    exact=True,
)
def moe_all_to_all(
    *,
    experts: Quantity,
    capacity: Quantity,
    width: Quantity,
    ranks: Quantity,
    itemsize: Quantity = 2,
    held: Quantity | None = None,
    direction: Literal["forward", "backward", "both"] = "forward",
) -> Estimate:
    """Return the bytes that a rank sends in the all-to-alls of one layer under expert parallelism.

    Parameters
    ----------
    experts : int
        E of the layer.
    capacity : int
        C, places for the tokens of one rank in each expert's buffer; empty ones travel too.
    width, ranks, itemsize : int
        d, p, and bytes an element.
    held : int, optional
        Experts on the rank that is asked about.  Default: E / p, which must be whole.
    direction : {"forward", "backward", "both"}
        A pass has two all-to-alls, to the experts and back; the backward pass sends gradients.

    Returns
    -------
    Estimate
        In bytes; 0 with one rank.

    Raises
    ------
    OptionError
        If a number is not whole and above 0, `held` is not below E or there is no even share, or `direction`
        is unknown.
    DTypeError
        If a number is not whole.

    Notes
    -----
    A rank sends its tokens to the experts that others hold, and to others what its own experts made of
    theirs.  Together, with an even share, that is ``2 (p - 1)/p E C d`` elements.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, section 3.2 and Algorithm 2.

    Examples
    --------
    >>> moe_all_to_all(experts=8, capacity=1024, width=4096, ranks=8).total == 2 * 7 * 1024 * 4096 * 2
    True
    """
    sizes = {"E": experts, "C": capacity, "d": width, "p": ranks, "e": itemsize}
    values: dict[str, Number] = {name: whole(name, exact(size, name)) for name, size in sizes.items()}
    share, rest = divmod(int(values["E"]), int(values["p"]))
    if held is None and rest:
        raise OptionError(f"held: {experts} experts on {ranks} ranks have no even share; say how many")
    values["h"] = share if held is None else whole("held", exact(held, "held"), 0)
    if values["h"] > values["E"]:
        raise OptionError(f"held: expected at most E={experts} experts on a rank, got {held}")
    if direction not in ("forward", "backward", "both"):
        raise OptionError(f"direction: expected 'forward', 'backward' or 'both'; got {direction!r}")
    ways = ("forward", "backward") if direction == "both" else (direction,)
    formulas = {"dispatch": "(E - h)*C*d*e", "combine": "(p - 1)*h*C*d*e"}
    return estimate(
        f"all-to-alls of a layer with experts, {direction}",
        [
            term(f"{way}, {name}", formula, values, "B", _ALL_TO_ALL)
            for way in ways
            for name, formula in formulas.items()
        ],
        leaves_out="indices and gates of the tokens, the router's gradient",
    )
