"""The mixed-precision training step: low-precision gradients, a wide master copy, Adam, dynamic loss scaling.

One step: unscale the gradient into the wide format; if anything in it is not finite, skip the step and halve
the scale; otherwise clip by the global norm, run AdamW on the master copy, and round that to the low format.
Unscaling comes before clipping: a scaled norm is the scale times too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from refimpl.numerics import Array, FloatArray, round_to, wide_dtype, widen
from refimpl.parallel.adam import AdamW, adamw_step
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "LossScale",
    "OptimizerState",
    "TrainedStates",
    "initial_state",
    "mixed_precision_steps",
    "next_loss_scale",
    "optimizer_step",
]

_MICIKEVICIUS = Source("Micikevicius et al. 2018", "arXiv:1710.03740", "sections 3.1, 3.2; Figure 1")


class LossScale(NamedTuple):
    """The scale, and how many good steps it has lasted."""

    scale: float = 2.0**16
    good_steps: int = 0


def next_loss_scale(state: LossScale, *, overflow: bool, growth_interval: int = 2000) -> LossScale:
    """Return the loss scale after a step: halved on overflow, doubled after `growth_interval` good steps.

    Parameters
    ----------
    state : LossScale
        Before the step.
    overflow : bool
        Whether the step was skipped.
    growth_interval : int
        Good steps in a row after which the scale doubles.

    Returns
    -------
    LossScale
        The count of good steps starts anew whenever the scale changes.

    References
    ----------
    .. [1] Micikevicius et al., 2018, arXiv:1710.03740, section 3.2; PyTorch's ``torch.amp.GradScaler``.

    Examples
    --------
    >>> next_loss_scale(LossScale(8.0, 5), overflow=True)
    LossScale(scale=4.0, good_steps=0)
    >>> next_loss_scale(LossScale(8.0, 1), overflow=False, growth_interval=2)
    LossScale(scale=16.0, good_steps=0)
    """
    if overflow:
        return LossScale(state.scale / 2, 0)
    if state.good_steps + 1 >= whole("growth_interval", growth_interval):
        return LossScale(state.scale * 2, 0)
    return LossScale(state.scale, state.good_steps + 1)


class OptimizerState(NamedTuple):
    """What AdamW keeps: the wide master copy and two moments, the steps taken, the loss scale."""

    master: FloatArray
    momentum: FloatArray
    variance: FloatArray
    step: int
    loss_scale: LossScale


def initial_state(parameters: FloatArray, loss_scale: LossScale) -> OptimizerState:
    """Return the state before the first step; arrays are copies in the wide dtype of `parameters`."""
    master = np.array(widen(parameters), wide_dtype(parameters.dtype))
    return OptimizerState(master, np.zeros_like(master), np.zeros_like(master), 0, loss_scale)


def optimizer_step(
    state: OptimizerState,
    scaled_gradient: Array,
    *,
    optimizer: AdamW,
    max_norm: float | None = None,
    growth_interval: int = 2000,
    sum_over_shards: Callable[[float], float] = float,
) -> OptimizerState:
    """Return the optimizer state after a step; a gradient that is not finite changes nothing but the scale.

    Parameters
    ----------
    state : OptimizerState
        Before the step: of all parameters, or of the shard that this rank owns.
    scaled_gradient : ndarray of float, shape (n,)
        The loss scale times the gradient, in any format.
    optimizer : AdamW
        Settings.
    max_norm : float, optional
        Clip the unscaled gradient to this global Euclidean norm.
    growth_interval : int
        As for `next_loss_scale`.
    sum_over_shards : callable
        Adds a number over the ranks that own the other shards.  Default: there are none.

    Returns
    -------
    OptimizerState
        New arrays, or those of `state` if the step was skipped.
    """
    gradient = widen(scaled_gradient).astype(state.master.dtype) / state.loss_scale.scale
    squares = sum_over_shards(float(np.sum(np.square(gradient, dtype=np.float64))))
    scale = next_loss_scale(
        state.loss_scale, overflow=not math.isfinite(squares), growth_interval=growth_interval
    )
    if not math.isfinite(squares):
        return state._replace(loss_scale=scale)
    norm = math.sqrt(squares)
    if max_norm is not None and norm > max_norm:
        gradient = gradient * (max_norm / norm)
    moved = adamw_step(
        state.master, gradient, state.momentum, state.variance, step=state.step + 1, optimizer=optimizer
    )
    return OptimizerState(*moved, step=state.step + 1, loss_scale=scale)


class TrainedStates(NamedTuple):
    """What is left after the steps: the low-precision parameters, and the optimizer's states."""

    parameters: Array
    master: FloatArray
    momentum: FloatArray
    variance: FloatArray
    step: int
    scale: float
    good_steps: int


def sample_steps(rng: np.random.Generator, *, n: int, steps: int, model_dtype: str, extra: str) -> Case:
    """Return one call of `mixed_precision_steps`; "overflow" puts what is not finite into some gradients."""
    gradients = rng.standard_normal((steps, n))
    options: dict[str, Any] = {
        "model_dtype": model_dtype,
        "optimizer": AdamW(lr=0.01, eps=1e-4, weight_decay=0.1),
        "loss_scale": LossScale(2.0 ** int(rng.integers(0, 12)), int(rng.integers(0, 3))),
        "growth_interval": 3,
    }
    if extra == "overflow" and n:
        for step in np.flatnonzero(rng.random(steps) < 0.5):
            gradients[step, rng.integers(n)] = rng.choice([np.inf, -np.inf, np.nan, 1e300])
    if extra == "clip":
        options["max_norm"] = 1.5
    return Case((rng.standard_normal(n), gradients), options)


def _terms(case: Case) -> tuple[int, Any]:
    """Return a bound on the terms of every sum: gradients in the moments, steps of the rate in the master."""
    p, g = (np.abs(widen(x).astype(np.float64)) for x in case.args)
    largest = float(np.max(g, initial=0.0, where=g < 1e100))
    settings, steps = case.kwargs["optimizer"], len(g)
    # An error in the moments moves the parameters by up to lr / eps times as much.
    moved = (
        p * (1 + settings.lr * settings.weight_decay) ** steps + steps * settings.lr / settings.eps * largest
    )
    ones = np.ones_like(p)
    return steps + 4, TrainedStates(moved, moved, largest * ones, largest**2 * ones, 0, 0.0, 0)


@technique(
    "parallel.mixed_precision",
    entries=(96,),
    kind="function",
    source=_MICIKEVICIUS,
    axes={"n": (0, 12), "steps": (0, 6)},
    options={"model_dtype": ("float16", "float32", "float64"), "extra": ("none", "clip", "overflow")},
    edges=(
        {"n": 0, "steps": 2},
        {"n": 3, "steps": 0},
        {"n": 5, "steps": 6, "extra": "overflow", "model_dtype": "float16"},
        {"n": 5, "steps": 6, "extra": "clip", "model_dtype": "float64"},
        {"n": 5, "steps": 6, "extra": "none", "model_dtype": "float64"},
    ),
    sample=sample_steps,
    terms=_terms,
)
def mixed_precision_steps(
    parameters: FloatArray,
    gradients: FloatArray,
    /,
    *,
    model_dtype: npt.DTypeLike = "float16",
    optimizer: AdamW | None = None,
    loss_scale: LossScale | None = None,
    growth_interval: int = 2000,
    max_norm: float | None = None,
) -> TrainedStates:
    """Return the states after training on given gradients in mixed precision.

    Parameters
    ----------
    parameters : ndarray of float, shape (n,)
        Where training starts; the master copy has their wide dtype.
    gradients : ndarray of float, shape (steps, n)
        The true gradient of each step.  What the optimizer gets is the loss scale times it, rounded to
        `model_dtype` (where it may overflow or vanish), as a backward pass in that format would leave it.
    model_dtype : dtype
        Format of parameters and gradients in the forward and backward pass.
    optimizer : AdamW, optional
        Settings.
    loss_scale : LossScale, optional
        At the start.
    growth_interval : int
        Good steps after which the loss scale doubles.
    max_norm : float, optional
        Clip the unscaled gradient to this Euclidean norm.

    Returns
    -------
    TrainedStates
        ``parameters`` in `model_dtype`, the master copy rounded; moments and master in the wide dtype.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    OptionError
        If a setting is outside its range.

    Notes
    -----
    - A gradient that is not finite skips the step: all states stay as they are and the scale is halved.
    - Updates too small for `model_dtype` add up in the master copy.

    References
    ----------
    .. [1] Micikevicius et al., 2018, arXiv:1710.03740, sections 3.1 and 3.2.

    Examples
    --------
    Steps of 1e-4 vanish on a float16 parameter of 1, whose neighbor is 0.00098 away, but not on the master:

    >>> after = mixed_precision_steps(np.ones(1), np.full((100, 1), -0.5), optimizer=AdamW(lr=1e-4))
    >>> after.parameters, after.master.round(4)
    (array([1.01], dtype=float16), array([1.01]))
    """
    start, given = floating(parameters=parameters, gradients=gradients)
    bind_axes({"parameters": (start, "n"), "gradients": (given, "steps n")})
    state = initial_state(start, loss_scale or LossScale())
    wide = widen(given).astype(state.master.dtype, copy=False)
    for gradient in wide:
        with np.errstate(over="ignore", invalid="ignore"):  # overflow is found, and answered, by the step
            scaled = round_to(gradient * state.loss_scale.scale, model_dtype)
            state = optimizer_step(
                state,
                scaled,
                optimizer=optimizer or AdamW(),
                max_norm=max_norm,
                growth_interval=growth_interval,
            )
    return TrainedStates(
        round_to(state.master, model_dtype),
        state.master,
        state.momentum,
        state.variance,
        state.step,
        state.loss_scale.scale,
        state.loss_scale.good_steps,
    )
