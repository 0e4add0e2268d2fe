"""Mamba's selective scan: a state space model whose steps, inputs and reads depend on the token.

Every channel carries N numbers, whatever the length of the sequence.  The definition here goes from token to
token, as a recurrent network does; the forms in `refimpl.ssm.scan_forms` need no loop over tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack, overload

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray
from refimpl.registry import Source, technique
from refimpl.ssm.discretization import Discretization
from refimpl.ssm.samples import AXES, EDGES, OPTIONS, sample_scan, scan_terms
from refimpl.ssm.scan_input import ScanOptions, outputs, scan_input, steps
from refimpl.validation import as_array

__all__ = ["ScanOutput", "selective_scan", "selective_scan_step"]


class ScanOutput(NamedTuple):
    """The outputs, shape (B, T, Din), and the state after the last token, (B, Din, N) in the wide dtype."""

    out: FloatArray
    state: FloatArray


@overload
def selective_scan(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    /,
    *,
    return_state: Literal[False] = False,
    memory: Memory | None = None,
    **options: Unpack[ScanOptions],
) -> FloatArray: ...
@overload
def selective_scan(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    /,
    *,
    return_state: Literal[True],
    memory: Memory | None = None,
    **options: Unpack[ScanOptions],
) -> ScanOutput: ...
@technique(
    "ssm.selective_scan",
    entries=(25,),
    kind="function",
    source=Source("Gu and Dao 2023", "arXiv:2312.00752", "eq. 2 and 4, Algorithm 2"),
    axes=AXES,
    options=OPTIONS,
    edges=EDGES,
    sample=sample_scan,
    terms=scan_terms,
    vjp="refimpl.ssm.selective_scan_vjp:selective_scan_vjp",
)
def selective_scan(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    /,
    *,
    D: FloatArray | None = None,
    z: FloatArray | None = None,
    delta_bias: FloatArray | None = None,
    delta_softplus: bool = False,
    discretization: Discretization = "euler",
    initial_state: FloatArray | None = None,
    return_state: bool = False,
    memory: Memory | None = None,
) -> FloatArray | ScanOutput:
    """Return ``(C_t h_t + D u_t) silu(z_t)`` for the states ``h_t = exp(Δ_t A) h_{t-1} + B̄_t u_t``.

    Parameters
    ----------
    u : ndarray of float, shape (B, T, Din)
        Inputs.  The authors' kernel has the axes (B, Din, T).
    delta : ndarray of float, shape (B, T, Din)
        Sizes Δ of the steps, or what they are made of: see `delta_bias` and `delta_softplus`.
    A : ndarray of float, shape (Din, N)
        Rates of the continuous system, diagonal and usually negative: ``A = -exp(A_log)``.
    B, C : ndarray of float, shape (B, T, N)
        How an input enters the state, and how the state is read.
    D : ndarray of float, shape (Din,), optional
        Skip connection, added before the gate.
    z : ndarray of float, shape (B, T, Din), optional
        Gate: the output is multiplied by ``silu(z)``.
    delta_bias : ndarray of float, shape (Din,), optional
        Added to `delta`, before softplus.
    delta_softplus : bool
        Whether the step is ``softplus(delta + delta_bias)``, as in Mamba, and not the sum itself.
    discretization : {"euler", "zoh"}
        ``"euler"``: ``B̄ = ΔB``, as in the released code, with which every published model was trained.
        ``"zoh"``: ``B̄ = (ΔA)⁻¹ (exp(ΔA) - 1) ΔB``, as in the paper.
    initial_state : ndarray of float, shape (B, Din, N), optional
        State before the first token.  Default: 0.
    return_state : bool
        Also return the state after the last token.
    memory : Memory, optional
        Counts traffic, operations and the carried state.

    Returns
    -------
    ndarray of float, shape (B, T, Din)
        In the common dtype of the arrays; or `ScanOutput` if `return_state`, with a state in float32, for
        float64 arrays in float64.

    Raises
    ------
    ShapeError
        If arrays do not fit together.
    DTypeError
        If an array is not real.
    OptionError
        If the discretization is unknown.

    Notes
    -----
    Every array is read once and no state is written: ``B T (3 Din + 2 N) + Din N`` elements and a few, as in
    the authors' fused kernel; ``8 B T Din N`` operations.  **Special cases**

    - A step of 0 keeps the state; with a negative rate a long one forgets it.
    - Where a rate is 0 both discretisations give ``B̄ = ΔB``.
    - With ``A = -1``, ``B = 1``, N = 1, softplus and ``"zoh"`` the state is that of a gated recurrent
      network, ``h_t = (1 - g) h_{t-1} + g u_t`` with ``g = sigmoid(delta)`` (Theorem 1); with ``"euler"`` the
      input has the factor ``softplus(delta)`` instead.
    - float16 and bfloat16 are summed, and states kept, in float32.

    References
    ----------
    .. [1] Gu and Dao, 2023, arXiv:2312.00752, eq. 2 (recurrence), eq. 4 (zero-order hold), Algorithm 2,
       Theorem 1.

    Examples
    --------
    A step of ``log 2`` at rate -1 halves the state:

    >>> ones = np.ones((1, 3, 1))
    >>> selective_scan(ones, np.log(2) * ones, -np.ones((1, 1)), ones, ones, discretization="zoh").ravel()
    array([0.5  , 0.75 , 0.875])
    """
    given = scan_input(
        u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
        discretization=discretization, initial_state=initial_state,
    )  # fmt: skip
    hbm = memory or Memory()
    out = np.empty(given.tokens.u.shape, given.dtype)
    with hbm.on_chip():
        system = given.load_system(hbm)
        state = hbm.keep("h", given.load_state(hbm))
        for t in range(out.shape[1]):
            token = slice(t, t + 1)
            with hbm.on_chip():
                u_t, delta_t, B_t, C_t = given.load(hbm, token, "u", "delta", "B", "C")
                z_t = given.load_gate(hbm, token)
                step = steps(hbm, system, u_t, delta_t, B_t)
                state = hbm.contract("bdn,bdn->bdn", step.decay[:, 0], state) + step.drive[:, 0]
                hbm.store("out", out[:, token], None, outputs(hbm, system, state[:, None], u_t, C_t, z_t))
        if not return_state:
            return out
        last = given.new_state()
        hbm.store("h", last, None, state)
        return ScanOutput(out, last)


def selective_scan_step(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    state: FloatArray,
    /,
    **options: Unpack[ScanOptions],
) -> ScanOutput:
    """Return the output for one more token of every sequence, and the state after it.

    Parameters
    ----------
    u, delta : ndarray of float, shape (B, Din)
        Of the token.
    A : ndarray of float, shape (Din, N)
        As for `selective_scan`.
    B, C : ndarray of float, shape (B, N)
        Of the token.
    state : ndarray of float, shape (B, Din, N)
        State before it; it is left as it is.
    **options
        As for `selective_scan`, the gate z being that of the token, (B, Din).

    Returns
    -------
    ScanOutput
        Of shapes (B, Din) and (B, Din, N).

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `selective_scan`.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> selective_scan_step(one, 0 * one, -one, one, one, np.full((1, 1, 1), 3.0)).out.item()
    3.0
    """
    u, delta, B, C = (
        as_array(name, x)[..., None, :] for name, x in zip("uδBC", (u, delta, B, C), strict=True)
    )
    options["initial_state"] = state
    if options.get("z") is not None:
        options["z"] = as_array("z", options["z"])[..., None, :]
    out, state = selective_scan(u, delta, A, B, C, return_state=True, **options)
    return ScanOutput(out[:, 0], state)
