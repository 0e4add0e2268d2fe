"""Adam and AdamW, one step at a time: bias-corrected, elementwise, so that states can be cut anywhere.

>>> AdamW(lr=3e-4).betas
(0.9, 0.999)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, fraction, positive, whole

__all__ = ["AdamStep", "AdamW", "adam_step", "adamw_step"]


@dataclass(frozen=True, slots=True)
class AdamW:
    """The settings of `adamw_step`, named as in PyTorch.

    Raises
    ------
    OptionError
        If a value is outside its range.  `eps` must be above 0: padding has a gradient of exactly 0.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        positive("lr", self.lr)
        positive("eps", self.eps)
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            fraction(name, beta)
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise OptionError(f"weight_decay: expected a finite number from 0; got {self.weight_decay}")


class AdamStep(NamedTuple):
    """Parameters and both moments after a step."""

    parameters: FloatArray
    momentum: FloatArray
    variance: FloatArray


def sample_step(rng: np.random.Generator, *, n: int, step: int, decay: str) -> Case:
    """Return one call of `adamw_step`, its arrays drawn from `rng`; a first step starts from zero moments."""
    parameters, gradient, momentum = rng.standard_normal((3, n))
    variance = rng.random(n)
    if step == 1:
        momentum, variance = np.zeros(n), np.zeros(n)
    settings = AdamW(lr=0.01, eps=1e-4, weight_decay={"none": 0.0, "some": 0.1}[decay])
    return Case((parameters, gradient, momentum, variance), {"step": step, "optimizer": settings})


_STEP: dict[str, Any] = {
    "axes": {"n": (0, 20), "step": (1, 5)},
    "options": {"decay": ("none", "some")},
    "edges": ({"n": 0}, {"n": 7, "step": 1, "decay": "none"}, {"n": 7, "step": 1, "decay": "some"}),
    "sample": sample_step,
}


@technique(
    "parallel.mixed_precision.adamw",
    entries=(96,),
    kind="function",
    source=Source("Loshchilov and Hutter 2019", "arXiv:1711.05101", "Algorithm 2, lines 6 to 12"),
    **_STEP,
)
def adamw_step(
    parameters: FloatArray,
    gradient: FloatArray,
    momentum: FloatArray,
    variance: FloatArray,
    /,
    *,
    step: int,
    optimizer: AdamW,
) -> AdamStep:
    """Return parameters and moments after one step of AdamW: bias-corrected, the decay not in the moments.

    Parameters
    ----------
    parameters, gradient, momentum, variance : ndarray of float, shape (n,)
        Values before the step; moments start at 0.
    step : int
        Number of this step, from 1.
    optimizer : AdamW
        Settings.

    Returns
    -------
    AdamStep
        In the common dtype.

    Raises
    ------
    ShapeError
        If the shapes differ.
    OptionError
        If `step` is below 1.

    Notes
    -----
    ``eps`` is added outside the root, and the decay is multiplied by the learning rate, as in PyTorch.

    References
    ----------
    .. [1] Loshchilov and Hutter, 2019, arXiv:1711.05101, Algorithm 2.
    .. [2] Kingma and Ba, 2015, arXiv:1412.6980, Algorithm 1.

    Examples
    --------
    >>> zero = np.zeros(2)
    >>> after = adamw_step(zero, np.array([5.0, -0.1]), zero, zero, step=1, optimizer=AdamW(lr=0.5))
    >>> after.parameters.round(6)
    array([-0.5,  0.5])
    """
    p, g, m, v = floating(parameters=parameters, gradient=gradient, momentum=momentum, variance=variance)
    bind_axes({"parameters": (p, "n"), "gradient": (g, "n"), "momentum": (m, "n"), "variance": (v, "n")})
    whole("step", step)
    beta1, beta2 = optimizer.betas
    dtype, (p, g, m, v) = p.dtype, (widen(x) for x in (p, g, m, v))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    direction = (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + optimizer.eps)
    p = p - optimizer.lr * optimizer.weight_decay * p - optimizer.lr * direction
    return AdamStep(round_to(p, dtype), round_to(m, dtype), round_to(v, dtype))


@technique(
    "parallel.mixed_precision.adam",
    entries=(96,),
    kind="function",
    source=Source("Kingma and Ba 2015", "arXiv:1412.6980", "Algorithm 1"),
    **_STEP,
)
def adam_step(
    parameters: FloatArray,
    gradient: FloatArray,
    momentum: FloatArray,
    variance: FloatArray,
    /,
    *,
    step: int,
    optimizer: AdamW,
) -> AdamStep:
    """Return parameters and moments after one step of Adam, a weight decay being part of the gradient (L2).

    Parameters
    ----------
    parameters, gradient, momentum, variance : ndarray of float, shape (n,)
        Values before the step; moments start at 0.
    step : int
        Number of this step, from 1.
    optimizer : AdamW
        Settings; ``weight_decay * parameters`` is added to the gradient.

    Returns
    -------
    AdamStep
        In the common dtype.

    Raises
    ------
    ShapeError
        If the shapes differ.
    OptionError
        If `step` is below 1.

    References
    ----------
    .. [1] Kingma and Ba, 2015, arXiv:1412.6980, Algorithm 1.
    .. [2] Loshchilov and Hutter, 2019, arXiv:1711.05101, Algorithm 2, line 6 (the coupled decay).

    Examples
    --------
    >>> one, zero = np.ones(1), np.zeros(1)
    >>> settings = AdamW(lr=0.5, weight_decay=0.1)
    >>> adam_step(one, zero, zero, zero, step=1, optimizer=settings).parameters.round(6)
    array([0.5])
    """
    p, g, m, v = floating(parameters=parameters, gradient=gradient, momentum=momentum, variance=variance)
    bind_axes({"parameters": (p, "n"), "gradient": (g, "n")})
    coupled = round_to(widen(g) + optimizer.weight_decay * widen(p), p.dtype)
    plain = AdamW(optimizer.lr, optimizer.betas, optimizer.eps)
    return adamw_step(p, coupled, m, v, step=step, optimizer=plain)
