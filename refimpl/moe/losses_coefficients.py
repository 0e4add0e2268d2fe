"""What models multiply their routers' losses by: no one number for all, and in Skywork-MoE one that adapts.

>>> [loss_coefficients(model=f"deepseekmoe-{size}").expert for size in ("2b", "16b", "145b")]
[0.01, 0.001, 0.003]
>>> adapt_coefficient(np.array([0.01]), np.array([0.0]))
array([0.0099])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError, UnknownNameError
from refimpl.moe.losses_importance import wide
from refimpl.numerics import FloatArray, round_to
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, finite, floating, fraction

__all__ = ["COEFFICIENTS", "LossCoefficients", "adapt_coefficient", "loss_coefficients"]


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
    "v-moe": (
        Source("google-research/vmoe", "GitHub", "vmoe/configs/vmoe_paper: half of 0.01 each"),
        LossCoefficients(importance=0.005, load=0.005),
    ),
    "switch-transformer": (
        Source("Fedus et al. 2021", "arXiv:2101.03961", "section 2.2"),
        LossCoefficients(balance=0.01),
    ),
    "st-moe": (
        Source("Zoph et al. 2022", "arXiv:2202.08906", "section 3.2 and hyper-parameters"),
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


def _sample_coefficients(rng: np.random.Generator, *, layers: int, dropped: str) -> Case:
    # Rates stay inside [0, 1], so that one unit in the last place either way is a rate too.
    rates = {"few": 0.01, "some": 0.1, "most": 1.0}[dropped] * (0.1 + 0.8 * rng.random(layers))
    return Case((0.02 * rng.random(layers), rates))


@technique(
    "moe.adaptive_coefficient",
    entries=(52,),
    kind="function",
    source=Source("Wei et al. 2024", "arXiv:2406.06563", "section on adaptive auxiliary loss coefficients"),
    axes={"layers": (0, 6)},
    options={"dropped": ("few", "some", "most")},
    sample=_sample_coefficients,
    edges=({"layers": 0}, {"layers": 1, "dropped": "most"}, {"layers": 3, "dropped": "few"}),
)
def adapt_coefficient(
    coefficient: FloatArray,
    drop_rate: FloatArray,
    /,
    *,
    sensitivity: float = 0.2,
    largest: float = 0.01,
    momentum: float = 0.99,
) -> FloatArray:
    """Return each layer's next coefficient, ``β α + (1 - β) min(ξ d, α_max)``, from the share d it dropped.

    Parameters
    ----------
    coefficient, drop_rate : ndarray of float, shape (layers,)
        α now, and the share of tokens dropped for want of capacity, from 0 to 1.
    sensitivity, largest, momentum : float
        ξ, α_max and β; defaults are Skywork-MoE's.

    Returns
    -------
    ndarray, shape (layers,)
        In the dtype of the arguments.

    Raises
    ------
    ShapeError, DTypeError
        If the arguments are not two rows of the same length of real numbers.
    OptionError
        If a rate is outside [0, 1], β outside [0, 1), or ξ or α_max not finite.

    Notes
    -----
    A layer that drops nothing loses its auxiliary loss in time, and with it the loss's pull on the router.

    **Special cases**: with no layer the result is empty.

    References
    ----------
    .. [1] Wei et al., 2024, arXiv:2406.06563, adaptive auxiliary loss coefficients.

    Examples
    --------
    >>> adapt_coefficient(np.array([0.01]), np.array([0.5]))
    array([0.01])
    """
    alpha, rate = floating(coefficient=coefficient, drop_rate=drop_rate)
    bind_axes({"coefficient": (alpha, "layers"), "drop_rate": (rate, "layers")})
    now, d = wide(alpha), wide(rate)
    if not np.all((d >= 0) & (d <= 1)):
        raise OptionError("drop_rate: expected shares in [0, 1]")
    beta = fraction("momentum", momentum)
    target = np.minimum(finite("sensitivity", sensitivity) * d, finite("largest", largest))
    return np.asarray(round_to(beta * now + (1 - beta) * target, alpha.dtype))
