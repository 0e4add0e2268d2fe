"""What models multiply their routers' losses by: no one number for all of them.

>>> [loss_coefficients(model=f"deepseekmoe-{size}").expert for size in ("2b", "16b", "145b")]
[0.01, 0.001, 0.003]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from refimpl.errors import UnknownNameError
from refimpl.registry import Case, Source, technique

__all__ = ["COEFFICIENTS", "LossCoefficients", "loss_coefficients"]


class LossCoefficients(NamedTuple):
    """The factor of each loss in what is minimised, 0 where a model does without it."""

    importance: float = 0.0
    load: float = 0.0
    balance: float = 0.0
    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0
    z: float = 0.0


# Model: where its numbers stand, and the numbers.  Skywork-MoE's adapts: see `adapt_coefficient`.
COEFFICIENTS: Mapping[str, tuple[Source, LossCoefficients]] = {
    "shazeer": (
        Source("Shazeer et al. 2017", "arXiv:1701.06538", "appendix C.1"),
        LossCoefficients(importance=0.1, load=0.1),
    ),
    "switch-transformer": (
        Source("Fedus et al. 2021", "arXiv:2101.03961", "section 2.2"),
        LossCoefficients(balance=0.01),
    ),
    "st-moe": (
        Source("Zoph et al. 2022", "arXiv:2202.08906", "section 3.2"),
        LossCoefficients(balance=0.01, z=0.001),
    ),
    "deepseekmoe-2b": (
        Source("Dai et al. 2024", "arXiv:2401.06066", "section 4.1.3"),
        LossCoefficients(expert=0.01),
    ),
    "deepseekmoe-16b": (
        Source("Dai et al. 2024", "arXiv:2401.06066", "section 5.1.2"),
        LossCoefficients(expert=0.001),
    ),
    "deepseekmoe-145b": (
        Source("Dai et al. 2024", "arXiv:2401.06066", "section 7.1"),
        LossCoefficients(expert=0.003, device=0.05),
    ),
    "deepseek-v2": (
        Source("DeepSeek-AI 2024", "arXiv:2405.04434", "section 3.1.2"),
        LossCoefficients(expert=0.003, device=0.05, communication=0.02),
    ),
}


def _sample(rng: np.random.Generator, *, model: str) -> Case:  # noqa: ARG001 (names are finite)
    return Case((), {"model": model})


@technique(
    "moe.loss_coefficients",
    entries=(49, 50, 51, 52, 53),
    kind="data",
    source=Source(
        "Dai et al. 2024", "arXiv:2401.06066", "sections 4.1.3, 5.1.2 and 7.1; and each model's own"
    ),
    options={"model": tuple(COEFFICIENTS)},
    sample=_sample,
    edges=tuple({"model": name} for name in COEFFICIENTS),
    exact=True,
)
def loss_coefficients(*, model: str) -> LossCoefficients:
    """Return the coefficients of a model's auxiliary losses, as its report states them.

    Parameters
    ----------
    model : str
        A name in `COEFFICIENTS`.

    Returns
    -------
    LossCoefficients

    Raises
    ------
    UnknownNameError
        If the model is not known; the message offers the nearest names.

    Examples
    --------
    >>> loss_coefficients(model="st-moe").z
    0.001
    """
    if model not in COEFFICIENTS:
        raise UnknownNameError("model", model, COEFFICIENTS)
    return COEFFICIENTS[model][1]
