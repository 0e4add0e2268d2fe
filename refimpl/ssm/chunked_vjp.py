"""The gradient of the selective scan in chunks: states are kept between them and computed anew inside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np

from refimpl.numerics import FloatArray, round_to
from refimpl.ssm.scan_forms import CHUNK, selective_scan_chunked
from refimpl.ssm.scan_input import ScanInput, ScanOptions, scan_input
from refimpl.ssm.selective_scan_vjp import ScanGradients, selective_scan_vjp
from refimpl.validation import bind_axes, floating, whole

__all__ = ["selective_scan_chunked_vjp"]

_SHARED = ("dA", "dD", "ddelta_bias")  # every chunk adds to them
_OF_TOKENS = ("du", "ddelta", "dB", "dC", "dz")


def selective_scan_chunked_vjp(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    dout: FloatArray,
    /,
    *,
    chunk_size: int = CHUNK,
    dstate: FloatArray | None = None,
    **options: Unpack[ScanOptions],
) -> ScanGradients:
    """Return `selective_scan_vjp` in the memory of its arrays, a state for each chunk and the work of one.

    Parameters
    ----------
    u, delta, A, B, C, dout, dstate, **options
        As for `selective_scan_vjp`.
    chunk_size : int
        Tokens of a chunk; the last one may have fewer.

    Returns
    -------
    ScanGradients
        As `selective_scan_vjp`.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `selective_scan_vjp`, and if `chunk_size` is not positive.

    References
    ----------
    .. [1] Gu and Dao, 2023, arXiv:2312.00752, section 3.3.2 (recomputation).

    Examples
    --------
    >>> ones = np.ones((1, 5, 1))
    >>> selective_scan_chunked_vjp(ones, ones, 0 * ones[0, :1], ones, ones, ones, chunk_size=2).du.ravel()
    array([5., 4., 3., 2., 1.])
    """
    chunk_size = whole("chunk_size", chunk_size)
    given = scan_input(u, delta, A, B, C, **options)
    (dout,) = floating(dout=dout)
    bind_axes({"u": (given.tokens.u, "B T Din"), "dout": (dout, "B T Din")})
    starts = range(0, max(1, given.shape[1]), chunk_size)  # without a token there is one empty chunk
    chunks = [slice(start, start + chunk_size) for start in starts]
    entering = [given.state]
    for rows in chunks[:-1]:
        entering.append(_call(selective_scan_chunked, given, rows, entering[-1], return_state=True).state)
    gradients: list[ScanGradients] = []
    for rows, state in zip(reversed(chunks), reversed(entering), strict=True):
        # Every chunk is given a state, for the gradient of it: the chunk before ends with that state.
        known = given.new_state() if state is None else state
        found = _call(selective_scan_vjp, given, rows, known, dout[:, rows], dstate=dstate)
        dstate = found.dinitial_state
        gradients.append(found)
    return _joined(gradients[::-1], given)


def _call(
    function: Any, given: ScanInput, rows: slice, state: FloatArray | None, *more: FloatArray, **options: Any
) -> Any:
    """Call a form of the scan, or its gradient, on some tokens of every sequence."""
    u, delta, B, C = (array[:, rows] for array in given.tokens[:4])
    A, D, delta_bias, delta_softplus, discretization = given.system
    z = None if given.tokens.z is None else given.tokens.z[:, rows]
    return function(
        u, delta, A, B, C, *more, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
        discretization=discretization, initial_state=state, **options,
    )  # fmt: skip


def _joined(chunks: list[ScanGradients], given: ScanInput) -> ScanGradients:
    def sums(arrays: Iterable[FloatArray]) -> FloatArray:
        return round_to(np.sum([array.astype(given.wide) for array in arrays], axis=0), given.dtype)

    first = chunks[0]
    found: dict[str, Any] = {"dinitial_state": None if given.state is None else first.dinitial_state}
    for name in (*_SHARED, *_OF_TOKENS):
        parts = [getattr(chunk, name) for chunk in chunks]
        if parts[0] is None:
            found[name] = None
        else:
            found[name] = sums(parts) if name in _SHARED else np.concatenate(parts, axis=1)
    return ScanGradients(**found)
