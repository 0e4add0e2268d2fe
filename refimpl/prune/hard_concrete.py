"""Hard-concrete masks: random numbers in [0, 1], with mass at both ends, that gradients pass through."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import BoolArray, FloatArray, round_to, wide_dtype, widen
from refimpl.registry import Case, Source, technique
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "BETA",
    "GAMMA",
    "ZETA",
    "Convention",
    "MaskGradients",
    "evaluation_mask",
    "hard_concrete",
    "hard_concrete_vjp",
    "open_probability",
    "open_probability_vjp",
]

Convention = Literal["paper", "released"]

# Temperature, and the ends of the interval that the concrete number is stretched to.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # Xia et al., appendix A, print β = 0.83; LLM-Shearing has 2/3
# The released code keeps log alpha and the draws away from where a sigmoid is flat.
LOG_ALPHA_LIMIT, DRAW_MARGIN = math.log(100), 1e-6
# In evaluation it multiplies log alpha / beta by this.
EVALUATION_FACTOR = 0.8


class MaskGradients(NamedTuple):
    """Gradient of log alpha; the draws have none."""

    log_alpha: FloatArray


def sample_masks(rng: np.random.Generator, *, n: int, values: str, convention: str) -> Case:
    """Return a call of `hard_concrete`; `values` "far" gives log alpha of hundreds.

    Examples
    --------
    >>> shape = dict(n=2, values="near", convention="paper")
    >>> [a.shape for a in sample_masks(np.random.default_rng(0), **shape).args]
    [(2,), (2,)]
    """
    log_alpha = rng.standard_normal(n) * (100.0 if values == "far" else 1.0)
    return Case((log_alpha, rng.random(n)), {"convention": convention})


_OPTIONS = {"values": ("near", "far"), "convention": ("paper", "released")}


@technique(
    "prune.hard_concrete",
    entries=(80,),
    kind="function",
    source=Source("Louizos et al. 2018", "arXiv:1712.01312", "eq. 10 and 11"),
    axes={"n": (1, 9)},
    options=_OPTIONS,
    edges=(
        {"n": 0, "convention": "paper"},
        {"n": 1, "values": "near", "convention": "paper"},
        {"n": 9, "values": "far", "convention": "paper"},
        {"n": 9, "values": "far", "convention": "released"},
    ),
    sample=sample_masks,
    terms=lambda case: (8, np.ones(case.args[0].shape)),
    vjp="refimpl.prune.hard_concrete:hard_concrete_vjp",
)
def hard_concrete(log_alpha: FloatArray, u: FloatArray, /, *, convention: Convention = "paper") -> FloatArray:
    """Return masks z drawn by the uniform numbers `u`.

    Parameters
    ----------
    log_alpha : ndarray of float, shape (n,)
        Location: above 0 a mask is open more often than not.
    u : ndarray of float, shape (n,)
        Draws in [0, 1).
    convention : {"paper", "released"}
        ``"released"`` clamps log alpha to ±log 100 and the draws to [1e-6, 1 - 1e-6]: a start of 5 is
        clamped at once.  It clamps the parameter itself, in place and before every call, so that one at a
        limit has a gradient and can come back.

    Returns
    -------
    ndarray of float, shape (n,)
        ``z = clip(s (ζ - γ) + γ, 0, 1)`` with ``s = σ((log u - log(1 - u) + log α) / β)``.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit or are not real.
    OptionError
        If log alpha is NaN or infinite, a draw not in [0, 1), or `convention` unknown.

    Notes
    -----
    **Special cases**

    - 0 and 1 have positive probability: see `open_probability`.
    - Far to the right the mask is 1, far to the left 0, without overflow; u = 0 gives 0.

    References
    ----------
    .. [1] Louizos et al., 2018, arXiv:1712.01312, eq. 10 and 11.
    .. [2] Xia et al., 2023, arXiv:2310.06694, section 2.1; the released l0_module.py.

    Examples
    --------
    >>> hard_concrete(np.array([0.0, 3.0, -3.0]), np.array([0.5, 0.5, 0.5])).round(6)
    array([0.5, 1. , 0. ])
    """
    (log_alpha, u), s = _concrete(log_alpha, u, convention)
    return round_to(np.clip(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0), log_alpha.dtype)


def hard_concrete_vjp(
    log_alpha: FloatArray, u: FloatArray, dz: FloatArray, /, *, convention: Convention = "paper"
) -> MaskGradients:
    """Return the gradient of log alpha: ``(ζ - γ) s (1 - s) / β`` where the mask is between its ends.

    Parameters
    ----------
    log_alpha, u, convention
        As for `hard_concrete`.
    dz : ndarray of float, shape (n,)
        Gradient of the masks.

    Returns
    -------
    MaskGradients
        0 where the mask is 0 or 1, and for a log alpha beyond the released code's limits; at a limit,
        where that code leaves its parameters, it is the slope inside.

    Examples
    --------
    >>> hard_concrete_vjp(np.array([0.0, 9.0]), np.array([0.5, 0.5]), np.ones(2)).log_alpha.round(4)
    array([0.45, 0.  ])
    """
    (log_alpha, _), s = _concrete(log_alpha, u, convention)
    (dz,) = floating(dz=dz)
    bind_axes({"log_alpha": (log_alpha, "n"), "dz": (dz, "n")})
    stretched = s * (ZETA - GAMMA) + GAMMA
    live = (stretched > 0) & (stretched < 1)
    if convention == "released":
        live &= _within(log_alpha)
    slope = np.where(live, (ZETA - GAMMA) * s * (1 - s) / BETA, 0.0)
    return MaskGradients(round_to(widen(dz) * slope, log_alpha.dtype))


def _sample_open(rng: np.random.Generator, *, n: int, values: str, convention: str) -> Case:
    return Case(
        sample_masks(rng, n=n, values=values, convention=convention).args[:1], {"convention": convention}
    )


@technique(
    "prune.hard_concrete.open",
    entries=(80,),
    kind="function",
    source=Source("Louizos et al. 2018", "arXiv:1712.01312", "eq. 12"),
    axes={"n": (1, 9)},
    options=_OPTIONS,
    edges=({"n": 0}, {"n": 1, "values": "near"}, {"n": 9, "values": "far", "convention": "paper"}),
    sample=_sample_open,
    terms=lambda case: (8, np.ones(case.args[0].shape)),
    vjp="refimpl.prune.hard_concrete:open_probability_vjp",
)
def open_probability(log_alpha: FloatArray, /, *, convention: Convention = "paper") -> FloatArray:
    """Return the probability that a mask is not 0: ``σ(log α - β log(-γ / ζ))``.

    Parameters
    ----------
    log_alpha : ndarray of float, shape (n,)
        As for `hard_concrete`.
    convention : {"paper", "released"}
        ``"released"`` clamps log alpha first, and the probability to [1e-6, 1 - 1e-6].

    Returns
    -------
    ndarray of float, shape (n,)
        Its sum is the expected number of weights that stay, which training can lower by gradients.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `hard_concrete`.

    References
    ----------
    .. [1] Louizos et al., 2018, arXiv:1712.01312, eq. 12.

    Examples
    --------
    >>> open_probability(np.array([0.0, -1.5986])).round(4)
    array([0.8318, 0.5   ])
    """
    (log_alpha,) = floating(log_alpha=log_alpha)
    p = _open(log_alpha, convention)
    if convention == "released":
        p = np.clip(p, DRAW_MARGIN, 1 - DRAW_MARGIN)
    return round_to(p, log_alpha.dtype)


def open_probability_vjp(
    log_alpha: FloatArray, dp: FloatArray, /, *, convention: Convention = "paper"
) -> MaskGradients:
    """Return the gradient of log alpha: ``p (1 - p)``, 0 beyond the released code's limits.

    Examples
    --------
    >>> open_probability_vjp(np.array([-1.5986]), np.ones(1)).log_alpha.round(4)
    array([0.25])
    """
    log_alpha, dp = floating(log_alpha=log_alpha, dp=dp)
    bind_axes({"log_alpha": (log_alpha, "n"), "dp": (dp, "n")})
    p = _open(log_alpha, convention)
    slope = p * (1 - p)
    if convention == "released":
        slope = np.where(_within(log_alpha), slope, 0.0)
    return MaskGradients(round_to(widen(dp) * slope, log_alpha.dtype))


def evaluation_mask(log_alpha: FloatArray, /, *, closed: int) -> FloatArray:
    """Return the masks that the released code evaluates with: `closed` of them 0, the others not binary.

    Parameters
    ----------
    log_alpha : ndarray of float, shape (n,)
        As for `hard_concrete`.
    closed : int
        How many are 0: those of smallest log alpha, of equals the first.

    Returns
    -------
    ndarray of float, shape (n,)
        ``σ(0.8 log α / β)`` where open.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If `log_alpha` is no real vector, or `closed` is not 0 to n.

    References
    ----------
    .. [1] Xia et al., 2023: LLM-Shearing, l0_module.py, ``_deterministic_z``.

    Examples
    --------
    >>> evaluation_mask(np.array([2.0, -1.0, 0.0]), closed=1).round(4)
    array([0.9168, 0.    , 0.5   ])
    """
    (log_alpha,) = floating(log_alpha=log_alpha)
    size = bind_axes({"log_alpha": (log_alpha, "n")})
    whole("closed", closed, least=0)
    if closed > size["n"]:
        raise OptionError(f"closed: expected at most {size['n']} masks, got {closed}")
    mask = _sigmoid(_clamped(log_alpha, "released") * (EVALUATION_FACTOR / BETA))
    mask[np.argsort(widen(log_alpha), kind="stable")[:closed]] = 0.0
    return round_to(mask, log_alpha.dtype)


def _concrete(
    log_alpha: FloatArray, u: FloatArray, convention: Convention
) -> tuple[tuple[FloatArray, FloatArray], FloatArray]:
    """Return the arrays, checked, and the concrete numbers s in the wide dtype."""
    log_alpha, u = floating(log_alpha=log_alpha, u=u)
    bind_axes({"log_alpha": (log_alpha, "n"), "u": (u, "n")})
    wide = widen(u).astype(np.float64)
    if not np.all((wide >= 0) & (wide <= 1)):  # a draw just below 1 is 1 in a narrow format
        raise OptionError("u: expected draws in [0, 1)")
    location = _clamped(log_alpha, convention).astype(np.float64)
    if convention == "released":
        wide = np.clip(wide, DRAW_MARGIN, 1 - DRAW_MARGIN)
    with np.errstate(divide="ignore"):
        logit = np.log(wide) - np.log1p(-wide)
    s = _sigmoid((logit + location) / BETA)
    return (log_alpha, u), s.astype(wide_dtype(log_alpha.dtype))


def _open(log_alpha: FloatArray, convention: Convention) -> FloatArray:
    bind_axes({"log_alpha": (log_alpha, "n")})
    return _sigmoid(_clamped(log_alpha, convention) - BETA * math.log(-GAMMA / ZETA))


def _clamped(log_alpha: FloatArray, convention: Convention) -> FloatArray:
    if convention not in ("paper", "released"):
        raise OptionError(f"convention: expected 'paper' or 'released', got {convention!r}")
    wide = widen(log_alpha).astype(wide_dtype(log_alpha.dtype), copy=False)
    if not np.isfinite(wide).all():
        raise OptionError("log_alpha: expected finite numbers, got NaN or infinity")
    return np.clip(wide, -LOG_ALPHA_LIMIT, LOG_ALPHA_LIMIT) if convention == "released" else wide


def _within(log_alpha: FloatArray) -> BoolArray:
    """Return where log alpha is not beyond the released code's limits, as its own dtype rounds them."""
    limit = widen(round_to(np.asarray(LOG_ALPHA_LIMIT), log_alpha.dtype))
    within: BoolArray = np.abs(widen(log_alpha)) <= limit
    return within


def _sigmoid(x: FloatArray) -> FloatArray:
    """Return 1 / (1 + exp(-x)), from the side on which exp does not overflow."""
    small = np.exp(-np.abs(x))
    sigmoid: FloatArray = np.where(x >= 0, 1 / (1 + small), small / (1 + small))
    return sigmoid
