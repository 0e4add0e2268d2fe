"""The stages of a Mamba block, each from HBM to HBM, and what they leave for a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray
from refimpl.ssm.block_weights import BlockInput
from refimpl.ssm.convolution import causal_convolution, with_past
from refimpl.ssm.discretization import Discretization
from refimpl.transformer.activations import activate

__all__ = ["Passed", "Scan", "forward"]

Scan = Callable[..., Any]


class Passed(NamedTuple):
    """Results of the stages, in the wide dtype but for `out`, and, if asked for, the states at the end."""

    tokens: FloatArray  # what the convolution sees, the past included
    convolved: FloatArray  # before its activation
    u: FloatArray
    parameters: FloatArray  # what a step is made of, B and C
    scan_arrays: tuple[FloatArray, ...]
    scan_options: dict[str, Any]
    y: FloatArray
    out: FloatArray
    conv_state: FloatArray
    scan_state: FloatArray | None


def forward(
    block: BlockInput, scan: Scan, discretization: Discretization, return_state: bool, hbm: Memory
) -> Passed:
    """Run the block with one form of the scan."""
    B, T, Din, R, N = (block.size[name] for name in ("B", "T", "Din", "R", "N"))
    projected = _projection(block, hbm, block.x, "w_in", "b_in")
    conv_input, z = projected[..., :Din], projected[..., Din:]
    tokens, convolved, u, conv_state = _convolution(block, hbm, conv_input, return_state)
    parameters = _projection(block, hbm, u, "w_x")
    delta = _projection(block, hbm, parameters[..., :R], "w_dt")
    A = -np.exp(block.widened("A_log"))  # once a model, not once a call
    scan_arrays = u, delta, A, parameters[..., R : R + N], parameters[..., R + N :]
    scan_options = {
        "D": block.widened("D"), "z": z, "delta_bias": block.widened("b_dt"), "delta_softplus": True,
        "discretization": discretization, "initial_state": block.weights.get("scan_state"),
    }  # fmt: skip
    found = scan(*scan_arrays, **scan_options, return_state=return_state, memory=hbm)
    y, scan_state = found if return_state else (found, None)
    out = np.empty((B, T, block.size["M"]), block.dtype)
    _projection(block, hbm, y, "w_out", "b_out", out)
    return Passed(tokens, convolved, u, parameters, scan_arrays, scan_options, y, out, conv_state, scan_state)


def _projection(
    block: BlockInput,
    hbm: Memory,
    source: FloatArray,
    weight: str,
    bias: str = "",
    target: FloatArray | None = None,
) -> FloatArray:
    """Read tokens and a weight, and write their product: to `target`, or to a new array in the wide dtype."""
    if target is None:
        shape = (*source.shape[:2], block.weights[weight].shape[1])
        target = np.empty(shape, block.wide)
    with hbm.on_chip():
        rows = hbm.load("tokens", source).astype(block.wide, copy=False)
        w = hbm.load(weight, block.weights[weight]).astype(block.wide, copy=False)
        y = hbm.contract("btm,mn->btn", rows, w)
        if bias in block.weights:
            y = y + hbm.load(bias, block.weights[bias]).astype(block.wide, copy=False)
        hbm.store(f"tokens {weight}", target, None, y)
    return target


def _convolution(
    block: BlockInput, hbm: Memory, source: FloatArray, return_state: bool
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return the tokens with their past, the convolution, its activation and the inputs to remember."""
    u = np.empty(source.shape, block.wide)
    conv_state = np.empty((source.shape[0], block.size["k"] - 1, source.shape[2]), block.wide)
    with hbm.on_chip():
        loaded = {
            name: hbm.load(name, block.weights[name]).astype(block.wide, copy=False)
            for name in ("conv_state", "w_conv", "b_conv")
            if name in block.weights
        }
        tokens = with_past(hbm.load("tokens", source), loaded.get("conv_state"), block.size["k"])
        convolved = causal_convolution(tokens, loaded["w_conv"], loaded.get("b_conv"), memory=hbm)
        hbm.store("u", u, None, activate("silu", convolved))
        last = hbm.keep("conv", tokens[:, source.shape[1] :])
        if return_state:
            hbm.store("conv_state", conv_state, None, last)
    return tokens, convolved, u, conv_state
