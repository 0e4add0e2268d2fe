"""The two branches of Long-Short Range Attention: how a call is cut, and the one that convolves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.depthwise_convolution import checked_kernels, convolved, convolved_vjp, kernels
from refimpl.attention.key_mask import checked_key_mask
from refimpl.errors import ShapeError
from refimpl.memory import Memory
from refimpl.numerics import Array, BoolArray, FloatArray, contract, wide_dtype, widen
from refimpl.validation import bind_axes, floating

__all__ = ["BIASES", "LocalGradients", "LongShortCall", "local_branch", "local_branch_vjp", "long_short_call"]

BIASES = ("b_q", "b_k", "b_v", "b_o", "b_in", "b_out")


class LocalGradients(NamedTuple):
    """Gradients of the right part of the channels, of its weights, and of its biases, all of them wide."""

    dright: FloatArray
    dw_in: FloatArray
    dw_kernel: FloatArray
    dw_out: FloatArray
    db_in: FloatArray
    db_out: FloatArray


class LongShortCall(NamedTuple):
    """The two parts of the channels with their weights; the right one widened, its padding set to 0."""

    left: FloatArray
    attention: tuple[FloatArray, ...]
    options: dict[str, Any]
    right: FloatArray
    w_in: FloatArray
    w_kernel: FloatArray
    w_out: FloatArray
    b_in: FloatArray | None
    b_out: FloatArray | None
    mask: BoolArray | None
    causal: bool


def long_short_call(
    x: Array,
    attention: tuple[Array, ...],
    local: tuple[Array, ...],
    biases: dict[str, Array | None],
    key_mask: BoolArray | None,
    causal: bool,
) -> LongShortCall:
    """Check the arguments of `long_short_range_attention` and cut the channels in two.

    Raises
    ------
    ShapeError, DTypeError
        See `long_short_range_attention`.
    """
    names = ("x", "w_q", "w_k", "w_v", "w_o", "w_in", "w_kernel", "w_out")
    given = {name: bias for name, bias in biases.items() if bias is not None}
    values = floating(**dict(zip(names, (x, *attention, *local), strict=True)), **given)
    found = dict(zip((*names, *given), values, strict=True))
    sizes = bind_axes(
        {"x": (found["x"], "B T M"), "w_q": (found["w_q"], "Ml HD"), "w_in": (found["w_in"], "Mr C2")}
    )
    if sizes["Ml"] + sizes["Mr"] != sizes["M"]:
        raise ShapeError(
            f"x: expected as many channels as w_q and w_in have rows, {sizes['Ml']} + {sizes['Mr']}, "
            f"got {sizes['M']}"
        )
    if sizes["C2"] % 2:
        raise ShapeError(f"w_in: expected an even number of columns, values and gates, got {sizes['C2']}")
    C = sizes["C2"] // 2
    bind_axes({"w_in": (found["w_in"][:, :C], "Mr C"), "w_out": (found["w_out"], "C Mo")})
    checked_kernels(np.zeros((1, 1, C), found["x"].dtype), found["w_kernel"])
    for name, weight in (("b_in", "w_in"), ("b_out", "w_out")):
        if name in found and found[name].shape != found[weight].shape[1:]:
            raise ShapeError(f"{name}: expected shape {found[weight].shape[1:]}, got {found[name].shape}")
    mask = checked_key_mask(key_mask, sizes["B"], sizes["T"])
    options: dict[str, Any] = {"causal": causal}
    options |= {name: found[name] for name in ("b_q", "b_k", "b_v", "b_o") if name in found}
    if mask is not None:
        options["attn_mask"] = mask[:, None, None, :]
    wide = {
        name: widen(found[name]).astype(wide_dtype(found[name].dtype), copy=False)
        for name in ("x", "w_in", "w_kernel", "w_out", "b_in", "b_out")
        if name in found
    }
    right = wide["x"][..., sizes["Ml"] :]
    real = None if mask is None else mask[..., None]
    return LongShortCall(
        found["x"][..., : sizes["Ml"]],
        tuple(found[name] for name in names[1:5]),
        options,
        right if real is None else np.where(real, right, 0),
        wide["w_in"],
        wide["w_kernel"],
        wide["w_out"],
        wide.get("b_in"),
        wide.get("b_out"),
        real,
        causal,
    )


def local_branch(call: LongShortCall) -> FloatArray:
    """Return the right part's output, in float32 at least: GLU, convolution, projection."""
    return _linear(_glu_and_mix(call)[2], call.w_out, call.b_out)


def local_branch_vjp(call: LongShortCall, dy: FloatArray) -> LocalGradients:
    """Return the gradients of ``sum(dy * local_branch(call))``."""
    value, gate, mixed = _glu_and_mix(call)
    dmixed = contract("btd,cd->btc", dy, call.w_out)
    dtokens, dkernel = convolved_vjp(value * gate, call.w_kernel, dmixed, call.causal)
    dprojected = np.concatenate([dtokens * gate, dtokens * value * gate * (1 - gate)], axis=-1)
    dright = contract("btc,rc->btr", dprojected, call.w_in)
    return LocalGradients(
        dright if call.mask is None else np.where(call.mask, dright, 0),
        contract("btr,btc->rc", call.right, dprojected),
        dkernel,
        contract("btc,btd->cd", mixed, dy),
        dprojected.sum(axis=(0, 1)),
        dy.sum(axis=(0, 1)),
    )


def _glu_and_mix(call: LongShortCall) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the projection's values and gates, and their products convolved."""
    projected = _linear(call.right, call.w_in, call.b_in)
    C = projected.shape[-1] // 2
    value, gate = projected[..., :C], 0.5 * (1 + np.tanh(0.5 * projected[..., C:]))  # a sigmoid
    tokens = value * gate
    return value, gate, convolved(tokens, kernels(tokens, call.w_kernel, Memory()), call.causal, Memory())


def _linear(x: FloatArray, w: FloatArray, b: FloatArray | None) -> FloatArray:
    y = contract("btm,mj->btj", x, w)
    return y if b is None else y + b
