"""The selective scan without a loop over tokens: at once, in log depth, and chunk by chunk, as on a GPU."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray
from refimpl.registry import implements
from refimpl.ssm.recurrence import Step, associative_scan
from refimpl.ssm.scan_input import ScanInput, ScanOptions, outputs, scan_input, steps
from refimpl.ssm.selective_scan import ScanOutput
from refimpl.validation import whole

__all__ = ["selective_scan_associative", "selective_scan_chunked"]

# Two arrays of 256 x 16 states for each of a few channels stay in a processor's cache.
CHUNK = 256


@implements("ssm.selective_scan", backend="numpy")
def selective_scan_associative(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    /,
    *,
    return_state: bool = False,
    memory: Memory | None = None,
    **options: Unpack[ScanOptions],
) -> FloatArray | ScanOutput:
    """Return `selective_scan` by an associative scan over all tokens, every step in HBM.

    Parameters
    ----------
    u, delta, A, B, C, return_state, memory, **options
        As for `selective_scan`.

    Returns
    -------
    ndarray of float, or ScanOutput
        As for `selective_scan`.

    Notes
    -----
    Three passes: Ā and B̄u are written, scanned into states, and the states read: ``6 B T Din N`` elements
    move, where the loop and the chunks move none of that size.  The scan counts as if it read and wrote once.

    References
    ----------
    .. [1] Gu and Dao, 2023, arXiv:2312.00752, section 3.3.2 (what the fused kernel avoids).

    Examples
    --------
    >>> ones = np.ones((1, 3, 1))
    >>> selective_scan_associative(ones, 0 * ones, -np.ones((1, 1)), ones, ones, D=np.ones(1)).ravel()
    array([1., 1., 1.])
    """
    given = scan_input(u, delta, A, B, C, **options)
    hbm = memory or Memory()
    everything = slice(None)
    batch, T, Din, N = given.shape
    decay, drive, states = (np.empty((batch, T, Din, N), given.wide) for _ in range(3))
    out = np.empty(given.tokens.u.shape, given.dtype)
    with hbm.on_chip():
        system = given.load_system(hbm)
        state = hbm.keep("h", given.load_state(hbm))
        with hbm.on_chip():
            step = steps(hbm, system, *given.load(hbm, everything, "u", "delta", "B"))
            hbm.store("Ā", decay, None, step.decay)
            hbm.store("B̄u", drive, None, step.drive)
        with hbm.on_chip():
            step = _after(state, Step(hbm.load("Ā", decay), hbm.load("B̄u", drive)))
            hbm.store("states", states, None, associative_scan(step))
        with hbm.on_chip():
            u, C = given.load(hbm, everything, "u", "C")
            z, found = given.load_gate(hbm, everything), hbm.load("states", states)
            hbm.store("out", out, None, outputs(hbm, system, found, u, C, z))
        return _result(hbm, given, out, states[:, -1] if T else state, return_state)


@implements("ssm.selective_scan", backend="numpy")
def selective_scan_chunked(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    /,
    *,
    chunk_size: int = CHUNK,
    return_state: bool = False,
    memory: Memory | None = None,
    **options: Unpack[ScanOptions],
) -> FloatArray | ScanOutput:
    """Return `selective_scan` chunk by chunk: scans inside, the state carried between, nothing else kept.

    Parameters
    ----------
    u, delta, A, B, C, return_state, memory, **options
        As for `selective_scan`.
    chunk_size : int
        Tokens of a chunk; the last one may have fewer.

    Returns
    -------
    ndarray of float, or ScanOutput
        As for `selective_scan`.

    Notes
    -----
    Time O(T), and besides inputs and outputs ``chunk_size`` states.  HBM traffic is that of `selective_scan`:
    the authors' hardware-aware scan.

    References
    ----------
    .. [1] Gu and Dao, 2023, arXiv:2312.00752, section 3.3.2 and appendix D.

    Examples
    --------
    >>> ones = np.ones((1, 3, 1))
    >>> selective_scan_chunked(ones, ones, 0 * np.ones((1, 1)), ones, ones, chunk_size=2).ravel()
    array([1., 2., 3.])
    """
    chunk_size = whole("chunk_size", chunk_size)
    given = scan_input(u, delta, A, B, C, **options)
    hbm = memory or Memory()
    out = np.empty(given.tokens.u.shape, given.dtype)
    with hbm.on_chip():
        system = given.load_system(hbm)
        state = hbm.keep("h", given.load_state(hbm))
        for start in range(0, out.shape[1], chunk_size):
            chunk = slice(start, start + chunk_size)
            with hbm.on_chip():
                u_c, delta_c, B_c, C_c = given.load(hbm, chunk, "u", "delta", "B", "C")
                z_c = given.load_gate(hbm, chunk)
                states = associative_scan(_after(state, steps(hbm, system, u_c, delta_c, B_c)))
                hbm.compute("states", states)
                hbm.store("out", out[:, chunk], None, outputs(hbm, system, states, u_c, C_c, z_c))
                state = states[:, -1].copy()  # a view would keep the whole chunk
        return _result(hbm, given, out, state, return_state)


def _after(state: FloatArray, step: Step) -> Step:
    """Return the steps from 0 that give what `step` gives from `state`: it enters with the first input."""
    drive = step.drive.copy()
    drive[:, :1] += step.decay[:, :1] * state[:, None]
    return Step(step.decay, drive)


def _result(
    hbm: Memory, given: ScanInput, out: FloatArray, state: FloatArray, return_state: bool
) -> FloatArray | ScanOutput:
    if not return_state:
        return out
    last = given.new_state()
    hbm.store("h", last, None, state)
    return ScanOutput(out, last)
