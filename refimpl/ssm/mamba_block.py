"""The Mamba block: project, convolve, scan, gate, project back; no attention, and one state of fixed size.

Every stage here reads what it needs from HBM and writes its result, as unfused kernels do.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack, overload

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray, round_to
from refimpl.registry import Source, implements, technique
from refimpl.ssm.block_forward import Scan, forward
from refimpl.ssm.block_samples import BLOCK_AXES, BLOCK_EDGES, BLOCK_OPTIONS, sample_block
from refimpl.ssm.block_weights import MambaGradients, MambaWeights, block_input
from refimpl.ssm.chunked_vjp import selective_scan_chunked_vjp
from refimpl.ssm.convolution import causal_convolution_vjp
from refimpl.ssm.discretization import Discretization
from refimpl.ssm.scan_forms import selective_scan_chunked
from refimpl.ssm.selective_scan import selective_scan
from refimpl.transformer.activations import activation_slope
from refimpl.transformer.linear import linear_vjp
from refimpl.validation import as_array, bind_axes, floating

__all__ = ["MambaOutput", "mamba_block", "mamba_block_chunked", "mamba_block_step", "mamba_block_vjp"]


class MambaOutput(NamedTuple):
    """The outputs, the last k - 1 inputs of the convolution (B, k - 1, Din), the scan's state (B, Din, N)."""

    out: FloatArray
    conv_state: FloatArray
    scan_state: FloatArray


@overload
def mamba_block(
    x: FloatArray,
    /,
    *,
    discretization: Discretization = "euler",
    return_state: Literal[False] = False,
    memory: Memory | None = None,
    **weights: Unpack[MambaWeights],
) -> FloatArray: ...
@overload
def mamba_block(
    x: FloatArray,
    /,
    *,
    discretization: Discretization = "euler",
    return_state: Literal[True],
    memory: Memory | None = None,
    **weights: Unpack[MambaWeights],
) -> MambaOutput: ...
@technique(
    "ssm.mamba_block",
    entries=(26,),
    kind="function",
    source=Source("Gu and Dao 2023", "arXiv:2312.00752", "section 3.4 and figure 3"),
    axes=BLOCK_AXES,
    options=BLOCK_OPTIONS,
    edges=BLOCK_EDGES,
    sample=sample_block,
    vjp="refimpl.ssm.mamba_block:mamba_block_vjp",
)
def mamba_block(
    x: FloatArray,
    /,
    *,
    discretization: Discretization = "euler",
    return_state: bool = False,
    memory: Memory | None = None,
    **weights: Unpack[MambaWeights],
) -> FloatArray | MambaOutput:
    """Return a Mamba block's output: ``(scan(u) silu(z)) w_out`` with ``u = silu(conv(x w_in))``.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens, normalised by the layer around the block, which also adds the residual.
    discretization : {"euler", "zoh"}
        As for `selective_scan`: published models use ``"euler"``.
    return_state : bool
        Also return the states after the last token, from which the next ones go on.
    memory : Memory, optional
        Counts traffic, operations and the carried state.
    **weights
        Weights and states by name (`MambaWeights`).

    Returns
    -------
    ndarray of float, shape (B, T, M)
        In the common dtype of the tokens and weights; or `MambaOutput` if `return_state`.

    Raises
    ------
    OptionError
        If a weight is missing or has no place, or the discretization is unknown.
    ShapeError
        If arrays do not fit together.
    DTypeError
        If an array is not real.

    Notes
    -----
    With ``Din = 2M``, N = 16, k = 4 and ``R = ceil(M / 16)``, as published, the weights are some ``6 M²``.
    A sequence carries ``Din (N + k - 1)`` numbers, however long it is; the released code keeps k inputs of
    the convolution, of which the oldest is never read.  **Special cases**

    - The convolution sees zeros before the first token.
    - float16 and bfloat16 are computed in float32 and rounded on return.

    References
    ----------
    .. [1] Gu and Dao, 2023, arXiv:2312.00752, section 3.4, figure 3; Algorithm 2 for the scan.

    Examples
    --------
    Where nothing enters the state, a channel is its convolution, here of the token before, and its gate:

    >>> one = np.ones((1, 1))
    >>> weights = dict(w_in=np.ones((1, 2)), w_conv=np.array([[1.0, 0.0]]), w_x=np.zeros((1, 3)), w_dt=one)
    >>> weights |= dict(b_dt=one[0], A_log=0 * one, D=one[0], w_out=one)
    >>> mamba_block(np.array([[[1.0], [2.0], [0.0]]]), **weights).round(4).ravel()
    array([0.    , 1.2878, 0.    ])
    """
    return _run(x, selective_scan, discretization, return_state, memory or Memory(), weights)


@implements("ssm.mamba_block", backend="numpy")
def mamba_block_chunked(
    x: FloatArray,
    /,
    *,
    discretization: Discretization = "euler",
    return_state: bool = False,
    memory: Memory | None = None,
    **weights: Unpack[MambaWeights],
) -> FloatArray | MambaOutput:
    """Return `mamba_block` with the scan in chunks, which is fast.

    Parameters
    ----------
    x, discretization, return_state, memory, **weights
        As for `mamba_block`.

    Returns
    -------
    ndarray of float, or MambaOutput
        As for `mamba_block`.

    Examples
    --------
    >>> from refimpl.ssm.block_samples import sample_block
    >>> shape = dict(B=1, T=3, M=2, Din=4, N=3, R=1, k=4, discretization="euler", extra="bare")
    >>> case = sample_block(np.random.default_rng(0), **shape)
    >>> bool(np.allclose(case.call(mamba_block_chunked), case.call(mamba_block)))
    True
    """
    return _run(x, selective_scan_chunked, discretization, return_state, memory or Memory(), weights)


def mamba_block_step(
    x: FloatArray,
    conv_state: FloatArray,
    scan_state: FloatArray,
    /,
    *,
    discretization: Discretization = "euler",
    **weights: Unpack[MambaWeights],
) -> MambaOutput:
    """Return the output for one more token of every sequence, and the states after it.

    Parameters
    ----------
    x : ndarray of float, shape (B, M)
        The token.
    conv_state : ndarray of float, shape (B, k - 1, Din)
        Inputs of the convolution before it.
    scan_state : ndarray of float, shape (B, Din, N)
        State of the scan before it.
    discretization, **weights
        As for `mamba_block`.

    Returns
    -------
    MambaOutput
        The output of shape (B, M), and new states; those given are left as they are.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `mamba_block`.

    Examples
    --------
    >>> from refimpl.ssm.block_samples import sample_block
    >>> shape = dict(B=1, T=3, M=2, Din=4, N=3, R=1, k=4, discretization="euler", extra="bare")
    >>> case = sample_block(np.random.default_rng(0), **shape)
    >>> step = mamba_block_step(case.args[0][:, 0], np.zeros((1, 3, 4)), np.zeros((1, 4, 3)), **case.kwargs)
    >>> step.out.shape, step.conv_state.shape, step.scan_state.shape
    ((1, 2), (1, 3, 4), (1, 4, 3))
    """
    weights["conv_state"], weights["scan_state"] = conv_state, scan_state
    x = as_array("x", x)[..., None, :]
    found = mamba_block(x, discretization=discretization, return_state=True, **weights)
    return found._replace(out=found.out[:, 0])


def mamba_block_vjp(
    x: FloatArray,
    dout: FloatArray,
    /,
    *,
    discretization: Discretization = "euler",
    **weights: Unpack[MambaWeights],
) -> MambaGradients:
    """Return the gradients of ``sum(dout * mamba_block(x, **weights))``.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    dout : ndarray of float, shape (B, T, M)
        Gradient of the output.
    discretization, **weights
        Those of the forward call.

    Returns
    -------
    MambaGradients
        Each under its name with a d before it, in the common dtype; of states in the wide dtype.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As for `mamba_block`.

    Examples
    --------
    >>> from refimpl.ssm.block_samples import sample_block
    >>> shape = dict(B=1, T=3, M=2, Din=4, N=3, R=1, k=4, discretization="euler", extra="bare")
    >>> case = sample_block(np.random.default_rng(0), **shape)
    >>> mamba_block_vjp(*case.args, np.ones((1, 3, 2)), **case.kwargs).dw_in.shape
    (2, 8)
    """
    block = block_input(x, weights)
    (dout,) = floating(dout=dout)
    bind_axes({"x": (block.x, "B T M"), "dout": (dout, "B T M")})
    passed = forward(block, selective_scan_chunked, discretization, False, Memory())
    past, R = block.size["k"] - 1, block.size["R"]

    dy, dw_out, db_out = linear_vjp(passed.y, block.widened("w_out"), block.in_wide(dout))
    u, delta, A, B, C = passed.scan_arrays
    dscan: Any = selective_scan_chunked_vjp(u, delta, A, B, C, dy, **passed.scan_options)
    dlow, dw_dt, _ = linear_vjp(passed.parameters[..., :R], block.widened("w_dt"), dscan.ddelta)
    dparameters = np.concatenate([dlow, dscan.dB, dscan.dC], axis=2)
    du, dw_x, _ = linear_vjp(passed.u, block.widened("w_x"), dparameters)
    dconvolved = (du + dscan.du) * activation_slope("silu", passed.convolved)
    dconv = causal_convolution_vjp(passed.tokens, block.widened("w_conv"), dconvolved)
    dprojected = np.concatenate([dconv.dtokens[:, past:], dscan.dz], axis=2)
    dx, dw_in, db_in = linear_vjp(block.in_wide(block.x), block.widened("w_in"), dprojected)
    found = {
        "w_in": dw_in, "w_conv": dconv.dtaps, "w_x": dw_x, "w_dt": dw_dt, "b_dt": dscan.ddelta_bias,
        "A_log": dscan.dA * A, "D": dscan.dD, "w_out": dw_out, "b_in": db_in,
        "b_conv": dconv.dbias, "b_out": db_out,
    }  # fmt: skip
    given = {f"d{name}": round_to(found[name], block.dtype) for name in found if name in block.weights}
    if "conv_state" in block.weights:
        given["dconv_state"] = dconv.dtokens[:, :past]
    if "scan_state" in block.weights:
        given["dscan_state"] = dscan.dinitial_state
    return MambaGradients(round_to(dx, block.dtype), **given)


def _run(
    x: FloatArray,
    scan: Scan,
    discretization: Discretization,
    return_state: bool,
    hbm: Memory,
    weights: MambaWeights,
) -> FloatArray | MambaOutput:
    passed = forward(block_input(x, weights), scan, discretization, return_state, hbm)
    if passed.scan_state is None:
        return passed.out
    return MambaOutput(passed.out, passed.conv_state, passed.scan_state)
