"""Oracles of quantisation: exact fractions, scalar loops, the ONNX reference evaluator, PyTorch, int64."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library


def _nearest(value: Fraction, rounding: str) -> int:
    if rounding == "half_even":
        return round(value)  # Python's own rule
    away = math.floor(abs(value) + Fraction(1, 2))
    return away if value > 0 else -away


def _cuts(size: int, extent: int | None) -> list[range]:
    step = max(size, 1) if extent is None else extent
    return [range(start, min(start + step, size)) for start in range(0, size, step)]


@oracle("quant.uniform")
def uniform_in_fractions(
    x: Any,
    /,
    *,
    bits: int = 8,
    scheme: str = "symmetric",
    block: Any = None,
    signed: bool = True,
    rounding: str = "half_even",
) -> Any:
    """Block by block and number by number; what rounding does is decided on exact fractions."""
    cuts = [_cuts(n, b) for n, b in zip(x.shape, block or (None,) * x.ndim, strict=True)]
    codes = np.zeros(x.shape, np.int64)
    scales = np.ones([len(c) for c in cuts])
    zeros = np.zeros(scales.shape, np.int64)
    top = 2 ** (bits - 1) - 1
    bottom = -top if scheme == "symmetric" else -top - 1
    for place in itertools.product(*(range(len(c)) for c in cuts)):
        cells = list(itertools.product(*(c[i] for c, i in zip(cuts, place, strict=True))))
        numbers = [float(x[cell]) for cell in cells]
        low, high = min(0.0, *numbers), max(0.0, *numbers)
        if scheme == "affine":
            extent, steps = high - low, 2**bits - 1
        else:
            extent, steps = max(-low, high), top if scheme == "symmetric" else (2**bits - 1) / 2
        scale = extent / steps if extent > 0 else 1.0
        zero = 0
        if scheme == "affine":
            # the quotient low / scale and the difference are rounded as floating-point numbers
            zero = max(bottom, min(top, _nearest(Fraction(bottom - low / scale), rounding)))
            if not signed:
                zero = max(0, min(2 * top + 1, _nearest(Fraction(0 - low / scale), rounding))) - top - 1
        scales[place], zeros[place] = scale, zero
        for cell, number in zip(cells, numbers, strict=True):
            code = _nearest(Fraction(number / scale), rounding) + zero
            codes[cell] = max(bottom, min(top, code))
    shift = 0 if signed else top + 1
    dtype = np.int8 if signed else np.uint8
    return (codes + shift).astype(dtype), scales, (zeros + shift).astype(dtype)


@oracle("quant.uniform")
def onnx_quantize_linear(
    x: Any,
    /,
    *,
    bits: int = 8,
    scheme: str = "symmetric",
    block: Any = None,
    signed: bool = True,
    rounding: str = "half_even",
) -> Any:
    """QuantizeLinear of ONNX's reference evaluator, with the ranges found here."""
    known = block in (None, (1, None), (None, 1), (1, 8))
    if bits != 8 or rounding != "half_even" or not x.size or not known:
        raise NotImplementedError("QuantizeLinear has 8 bits, rounds half to even, and blocks one axis")
    onnx, reference = library("onnx"), library("onnx.reference")
    if block is None:
        pieces, attributes = x.reshape(1, 1, -1), {}
    elif block == (1, 8):
        whole = -(-x.shape[1] // 8) * 8
        pieces = np.pad(x, ((0, 0), (0, whole - x.shape[1]))).reshape(len(x), -1, 8)  # zeros change no range
        attributes = {"axis": 1, "block_size": 8}
    else:
        pieces = (x if block == (1, None) else x.T)[None]
        attributes = {"axis": 0 if block == (1, None) else 1}
    low, high = np.minimum(pieces.min(-1), 0), np.maximum(pieces.max(-1), 0)
    extent = high - low if scheme == "affine" else np.maximum(-low, high)
    scale = extent / {"affine": 255, "symmetric": 127, "symmetric_full": 127.5}[scheme]
    scale[extent == 0] = 1.0
    bottom = -128 if signed else 0
    zero = np.full(scale.shape, 0 if signed else 128)
    if scheme == "affine":
        zero = np.clip(np.rint(bottom - low / scale), bottom, bottom + 255)
    zero = zero.astype(np.int8 if signed else np.uint8)
    given = [scale, zero] if block == (1, 8) else [part.ravel() for part in (scale, zero)]
    if block is None:
        given = [part.reshape(()) for part in (scale, zero)]
    names = ["x", "scale", "zero"]
    node = onnx.helper.make_node("QuantizeLinear", names, ["y"], **attributes)
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT8, None)
    graph = onnx.helper.make_graph([node], "quantise", values, [result])
    opset = [onnx.helper.make_opsetid("", 21)]
    session = reference.ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opset))
    codes = session.run(None, dict(zip(names, [x, *given], strict=True)))[0]
    shape = {None: (1, 1), (1, None): (len(x), 1), (None, 1): (1, x.shape[1]), (1, 8): scale.shape}[block]
    return codes, scale.reshape(shape), zero.reshape(shape)


@oracle("quant.error")
def error_in_scalars(x: Any, quantized: Any, /) -> Any:
    """Sums without rounding error."""
    errors = [float(a) - float(b) for a, b in zip(x, quantized, strict=True)]
    noise = math.fsum(e * e for e in errors)
    signal = math.fsum(float(a) ** 2 for a in x)
    ratio = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    return np.array(errors), np.array(noise / max(len(errors), 1)), np.array(ratio)


@oracle("quant.int8_matmul", "quant.integer_matmul")
def product_in_int64(a: Any, b: Any, /, *, a_zero_point: Any = 0, b_zero_point: Any = 0) -> Any:
    """Zero points taken off first, then int64 throughout."""
    return (a.astype(np.int64) - np.asarray(a_zero_point, np.int64)) @ (
        b.astype(np.int64) - np.asarray(b_zero_point, np.int64)
    )


@oracle("quant.int8_matmul")
def torch_int32_product(a: Any, b: Any, /) -> Any:
    """PyTorch's own product in int32."""
    torch = library("torch")
    left, right = (torch.from_numpy(codes.copy()).to(torch.int32) for codes in (a, b))
    return torch.matmul(left, right).numpy()


@oracle("quant.twos_complement")
def sign_extension_by_shifts(patterns: Any, /, *, bits: int = 2) -> Any:
    """Up to the sign bit of an int8, and arithmetically down again."""
    return (patterns << (8 - bits)).astype(np.uint8).view(np.int8) >> (8 - bits)


@oracle("quant.llm_int8", "quant.llm_int8_fused")
def llm_int8_in_scalars(
    x: Any, weight: Any, /, *, bias: Any = None, threshold: Any = 6.0, convention: str = "released"
) -> Any:
    """Token by token and feature by feature, the codes from exact quotients."""
    (T, K), N = x.shape, weight.shape[1]
    released = convention == "released"

    def is_outlier(value: float) -> bool:
        if threshold is None:
            return False
        return abs(value) >= threshold if released else abs(value) > threshold

    def code(value: float, absmax: float) -> int:
        return round(Fraction(value) * 127 / Fraction(absmax)) if absmax else 0

    aside = [any(is_outlier(x[t, k]) for t in range(T)) for k in range(K)]
    weight_absmax = [max((abs(weight[k, n]) for k in range(K)), default=0.0) for n in range(N)]
    out = np.zeros((T, N))
    for t in range(T):
        skip = [is_outlier(x[t, k]) if released else aside[k] for k in range(K)]
        absmax = max((abs(x[t, k]) for k in range(K) if not skip[k]), default=0.0)
        for n in range(N):
            total, product = 0.0 if bias is None else float(bias[n]), 0
            for k in range(K):
                w = code(weight[k, n], weight_absmax[n])
                if aside[k]:
                    total += x[t, k] * (w * weight_absmax[n] / 127 if released else weight[k, n])
                else:
                    product += code(x[t, k], absmax) * w
            out[t, n] = total + product * (absmax / 127) * (weight_absmax[n] / 127)
    return out


@oracle("quant.llm_int8", "quant.llm_int8_fused")
def llm_int8_in_torch(
    x: Any, weight: Any, /, *, bias: Any = None, threshold: Any = 6.0, convention: str = "released"
) -> Any:
    """The released steps on tensors: outlier cells set to 0, rows scaled, columns cleared, parts added."""
    if convention != "released" or not x.size or not weight.size:
        raise NotImplementedError("the released convention only, on arrays that are not empty")
    torch = library("torch")
    a, w = (torch.from_numpy(array.copy()) for array in (x, weight))
    cells = torch.zeros_like(a, dtype=torch.bool) if threshold is None else a.abs().ge(threshold)
    rows = a.masked_fill(cells, 0).abs().amax(1, keepdim=True)
    codes = torch.where(cells, 0, a.mul(127 / rows)).nan_to_num(0).round().to(torch.int64)
    columns = cells.any(0)
    codes[:, columns] = 0
    features = w.abs().amax(0, keepdim=True)
    weight_codes = w.mul(127 / features).round().to(torch.int64)
    out = (codes @ weight_codes).double() * rows * features / 127**2
    out += a[:, columns] @ (weight_codes[columns].double() * features / 127)
    return (out if bias is None else out + torch.from_numpy(bias)).numpy()


def count_linear(**shape: Any) -> Counter[str]:
    """Count the traffic of a linear layer array by array: what `memsim.linear_io` says in formulas."""
    T, K, N, e = (shape[name] for name in ("T", "K", "N", "itemsize"))
    s, n = shape.get("statistics_itemsize", 4), shape["outliers"]
    counts: Counter[str] = Counter(elements_read=0, elements_written=0, bytes_read=0, bytes_written=0)

    def move(way: str, elements: int, size: int) -> None:
        counts[f"elements_{way}"] += elements
        counts[f"bytes_{way}"] += elements * size

    def bias() -> None:
        if shape["bias"]:
            move("read", N, e)

    if shape["algorithm"] == "fp16":
        move("read", T * K, e)
        move("read", K * N, e)
        bias()
        move("written", T * N, e)
        return counts
    if n is not None:  # look for outliers
        move("read", T * K, e)
        move("written", n, 8)
        move("read", n, 8)
    move("read", T * K, e)
    move("written", T * K, 1)
    move("written", T, s)
    move("read", T * K, 1)  # the product
    move("read", K * N, 1)
    if shape["algorithm"] == "int8":
        move("written", T * N, 4)
        move("read", T * N, 4)
    move("read", T + N, s)
    bias()
    move("written", T * N, e)
    if n:
        move("read", n, 8)
        move("read", T * n, e)
        move("read", n * N, 1 if shape["convention"] == "released" else e)
        if shape["algorithm"] == "int8":
            move("read", T * N, e)
            move("written", T * N, e)
            if shape["convention"] == "released":
                move("read", N, s)
    return counts


@oracle("cost.linear_io")
def linear_io_in_moves(**shape: Any) -> int:
    """Return the bytes of `count_linear`."""
    counts = count_linear(**shape)
    return counts["bytes_read"] + counts["bytes_written"]
