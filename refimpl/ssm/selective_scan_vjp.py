"""The gradient of the selective scan: a scan backwards in time, over states that are computed anew."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.ssm.discretization import Discretized, discretize, discretize_vjp, step_size, step_size_slope
from refimpl.ssm.recurrence import Step, associative_scan
from refimpl.ssm.scan_input import ScanOptions, Tokens, scan_input
from refimpl.transformer.activations import activate, activation_slope
from refimpl.validation import bind_axes, floating

__all__ = ["ScanGradients", "selective_scan_vjp"]


class ScanGradients(NamedTuple):
    """Gradients of the arrays, in their shapes, and of those options that were given."""

    du: FloatArray
    ddelta: FloatArray
    dA: FloatArray  # noqa: N815 (the field's letters)
    dB: FloatArray  # noqa: N815
    dC: FloatArray  # noqa: N815
    dD: FloatArray | None = None  # noqa: N815
    dz: FloatArray | None = None
    ddelta_bias: FloatArray | None = None
    dinitial_state: FloatArray | None = None


def selective_scan_vjp(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    dout: FloatArray,
    /,
    *,
    dstate: FloatArray | None = None,
    **options: Unpack[ScanOptions],
) -> ScanGradients:
    """Return the gradients of ``sum(dout * out) + sum(dstate * state)`` of `selective_scan`.

    Parameters
    ----------
    u, delta, A, B, C : ndarray of float
        As for `selective_scan`.
    dout : ndarray of float, shape (B, T, Din)
        Gradient of the outputs.
    dstate : ndarray of float, shape (B, Din, N), optional
        Gradient of the last state: with it, and with ``dinitial_state``, the gradient of a long sequence is
        that of its parts, the last one first.
    **options
        Those of the forward call.

    Returns
    -------
    ScanGradients
        In the dtype of the arrays, ``dinitial_state`` in the wide dtype.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `selective_scan`.

    Notes
    -----
    The gradient of a state obeys ``λ_t = C_t dy_t + Ā_{t+1} λ_{t+1}``; everything else is a product of it
    with what the forward pass has at the same token.  It keeps B T Din N numbers of a few kinds.

    References
    ----------
    .. [1] Gu and Dao, 2023, arXiv:2312.00752, section 3.3.2 (states are recomputed, not stored).

    Examples
    --------
    The first of two inputs reaches both outputs, its decay 1 the second one:

    >>> ones = np.ones((1, 2, 1))
    >>> selective_scan_vjp(ones, ones, 0 * np.ones((1, 1)), ones, ones, ones).du.ravel()
    array([2., 1.])
    """
    given = scan_input(u, delta, A, B, C, **options)
    (dout,) = floating(dout=dout)
    bind_axes({"u": (given.tokens.u, "B T Din"), "dout": (dout, "B T Din")})
    dy = widen(dout).astype(given.wide, copy=False)
    hbm = Memory()  # nothing is counted here
    system, state = given.load_system(hbm), given.load_state(hbm)
    everything = slice(None)
    u, delta, B, C = given.load(hbm, everything, "u", "delta", "B", "C")
    tokens = Tokens(u, delta, B, C, given.load_gate(hbm, everything))
    size = step_size(tokens.delta, system.delta_bias, system.delta_softplus)[..., None]
    exponent = size * system.A
    decay, gain = discretize(exponent, size, system.discretization)
    inputs = tokens.u[..., None] * tokens.B[:, :, None]
    drive = gain * inputs
    drive[:, :1] += decay[:, :1] * state[:, None]
    states = associative_scan(Step(decay, drive))

    dz = None
    skip = 0.0 if system.D is None else system.D * tokens.u
    if tokens.z is not None:
        y = np.einsum("btdn,btn->btd", states, tokens.C) + skip
        dz = dy * y * activation_slope("silu", tokens.z)
        dy = dy * activate("silu", tokens.z)

    dstates = dy[..., None] * tokens.C[:, :, None]
    if dstate is not None:
        bind_axes({"state": (state, "B Din N"), "dstate": (np.asarray(dstate), "B Din N")})
        dstates[:, -1:] += np.asarray(dstate)[:, None]
    # Backwards the first step comes from nowhere, and each other one has the decay of the token after.
    later = np.concatenate([decay[:, 1:], decay[:, :1]], axis=1)
    dstates = associative_scan(Step(later[:, ::-1], dstates[:, ::-1]))[:, ::-1]

    before = np.concatenate([state[:, None], states[:, :-1]], axis=1)[:, : states.shape[1]]
    dgain = dstates * inputs
    dexponent, dsize = discretize_vjp(
        exponent, size, system.discretization, Discretized(dstates * before, dgain)
    )
    dinputs = dstates * gain
    du = np.einsum("btdn,btn->btd", dinputs, tokens.B)
    if system.D is not None:
        du = du + dy * system.D
    dmoved = (dsize + dexponent * system.A).sum(axis=-1) * step_size_slope(
        tokens.delta, system.delta_bias, system.delta_softplus
    )
    dtype, dinitial = given.dtype, None
    if given.state is not None:
        through = dstate if dstate is not None and not states.shape[1] else 0.0  # without a token in between
        dinitial = (decay * dstates)[:, :1].sum(axis=1) + through
    return ScanGradients(
        du=round_to(du, dtype),
        ddelta=round_to(dmoved, dtype),
        dA=round_to((dexponent * size).sum(axis=(0, 1)), dtype),
        dB=round_to(np.einsum("btdn,btd->btn", dinputs, tokens.u), dtype),
        dC=round_to(np.einsum("btdn,btd->btn", states, dy), dtype),
        dD=None if system.D is None else round_to((dy * tokens.u).sum(axis=(0, 1)), dtype),
        dz=None if dz is None else round_to(dz, dtype),
        ddelta_bias=None if system.delta_bias is None else round_to(dmoved.sum(axis=(0, 1)), dtype),
        dinitial_state=dinitial,
    )
