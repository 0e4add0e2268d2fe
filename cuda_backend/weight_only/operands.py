"""Calls of linear layers with a quantised weight: checked, taken apart into products, and queued."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda
from cuda_backend.arrays import View, absent, is_host, view
from cuda_backend.context import current_device
from cuda_backend.int8.memory import allocated, transposed
from cuda_backend.int8.operands import check_format, described, one_format, one_library, supported
from cuda_backend.launch import launch, stream_of
from cuda_backend.weight_only.product_portable import Variant, build
from refimpl.errors import DTypeError, ShapeError, UnsupportedError
from refimpl.quant import Int8Groups, NF4Weight
from refimpl.quant.double_quantization import dynamic_map
from refimpl.quant.nf4 import LEVELS
from refimpl.quant.weight_only import WeightOnlyGradients
from refimpl.validation import bind_axes, floating, whole

__all__ = [
    "Call",
    "Operand",
    "allocate",
    "checked_call",
    "dense",
    "enqueue",
    "gradients",
    "int8_operand",
    "nf4_operand",
    "product",
    "stored_weight",
    "turned",
]

NUMBERS = ("shape", "blocks", "turned")  # of a stored weight: the others are arrays


class Call(NamedTuple):
    """A validated call: its activations, what else it was given, by name, and where it runs."""

    x: View
    given: dict[str, View]
    bias: View | None
    like: Any
    dtype: str
    shape: tuple[int, int]
    on: int


class Operand(NamedTuple):
    """The right operand of a product, [K, N]: what it is, and the arguments that describe it."""

    weight: str
    codes: View
    turned: bool = False
    scales: View | None = None
    double: tuple[View, ...] = ()
    steps: tuple[int, int] = (0, 0)
    blocks: tuple[int, int] = (1, 1)
    factor: float = 1.0


def stored_weight(caller: str, weight: Any, form: type, quantize: Callable[[Any], Any]) -> Any:
    """Return a weight as it is stored; one in floating point is stored by the definition, on the host."""
    if isinstance(weight, form):
        return weight
    if isinstance(weight, tuple):
        raise DTypeError(
            f"{caller}: weight: expected {form.__name__} or an array, got {type(weight).__name__}"
        )
    if not is_host(weight):
        raise UnsupportedError(f"{caller}: a weight on the GPU must be stored ahead, as {form.__name__}")
    (weight,) = floating(weight=weight)
    return quantize(weight)


def checked_call(
    caller: str,
    x: Any,
    stored: Any,
    bias: Any,
    weight: Any,
    shape: tuple[int, ...],
    stream: Any,
    **others: Any,
) -> Call:
    """Check a call as the reference does, GPU arrays by their shapes alone."""
    floats = {"x": x, **others} if bias is None else {"x": x, "bias": bias, **others}
    parts = {f"weight {name}": part for name, part in stored._asdict().items() if name not in NUMBERS}
    ready = stored is weight
    one_library({**floats, **parts} if ready else floats)
    found = {name: described(name, value) for name, value in floats.items()}
    if is_host(x):
        given = found if ready else {**found, "weight": weight}
        values = dict(zip(given, floating(**given), strict=True))
        floats = {name: values[name] for name in floats}
        dtype = floats["x"].dtype.name
    else:
        dtype = one_format(floats)
    axes = {"x": "M K", "bias": "N", "dy": "M N", "lora_a": "K R", "lora_b": "R N"}
    size = bind_axes({name: (value, axes[name]) for name, value in found.items()})
    expected = (size["K"], size.get("N", shape[1]))
    if tuple(shape) != expected:
        raise ShapeError(f"weight: expected (K, N) = {expected}, got {tuple(shape)}")
    supported(caller, dtype, size["M"], max(shape))
    for name, part in parts.items():
        if "codes" not in name:
            check_format(name, _single(part), "float32")
    on = stream_of(x, stream)
    views = {name: view(name, value, on) for name, value in floats.items()}
    return Call(views.pop("x"), views, views.get("bias"), floats["x"], dtype, (size["M"], shape[1]), on)


def int8_operand(stored: Int8Groups, group_size: int, on: int) -> Operand:
    """Return a stored weight in int8 as an operand."""
    codes, scale = described("weight codes", stored.codes), described("weight scale", stored.scale)
    if codes.dtype != np.int8:
        raise DTypeError(f"weight codes: expected int8, got {codes.dtype}")
    group_size = whole("group_size", group_size)
    groups = -(-codes.shape[0] // group_size), codes.shape[1]
    if scale.shape != groups:
        raise ShapeError(
            f"weight scale: expected shape {groups} for groups of {group_size}, got {scale.shape}"
        )
    return Operand(
        "int8",
        view("weight codes", stored.codes, on),
        scales=view("weight scale", _single(stored.scale), on),
        blocks=(group_size, 1),
    )


def turned(operand: Operand) -> Operand:
    """Return an operand in int8 with its axes exchanged."""
    return Operand("int8", transposed(operand.codes), True, operand.scales, blocks=operand.blocks)


def nf4_operand(stored: NF4Weight, on: int, *, turned: bool) -> Operand:
    """Return a stored weight [rows, columns] as an operand, or its transpose."""
    rows, columns = stored.shape
    blocks = -(-rows * columns // stored.blocks[0])
    sizes = {"codes": -(-rows * columns // 2), "absmax_codes": blocks,
             "scale": -(-blocks // stored.blocks[1]), "offset": 1}  # fmt: skip
    for name, size in sizes.items():
        found = described(f"weight {name}", getattr(stored, name))
        if found.shape != (size,):
            raise ShapeError(f"weight {name}: expected shape ({size},) for {stored.shape}, got {found.shape}")
        if "codes" in name and found.dtype != np.uint8:
            raise DTypeError(f"weight {name}: expected uint8, got {found.dtype}")
    double = tuple(
        view(f"weight {name}", _single(getattr(stored, name)), on)
        for name in ("absmax_codes", "scale", "offset")
    )
    steps = (1, columns) if turned else (columns, 1)
    return Operand(
        "nf4", view("weight codes", stored.codes, on), double=double, steps=steps, blocks=stored.blocks
    )


def _single(array: Any) -> Any:
    """Return scales that the definition made in float64 as float32."""
    return array.astype(np.float32) if is_host(array) and array.dtype == np.float64 else array


def dense(matrix: View, factor: float = 1.0) -> Operand:
    """Return a matrix as it is as an operand."""
    return Operand("float", matrix, factor=factor)


def allocate(call: Call, shape: tuple[int, int], dtype: str) -> tuple[View, Callable[[], Any]]:
    """Allocate an array beside what the caller gave."""
    return allocated(shape, dtype, call.like, call.on)


def product(
    call: Call,
    operand: Operand,
    x: View,
    shape: tuple[int, int],
    *,
    bias: View | None = None,
    branch: tuple[View, View, float] | None = None,
) -> Callable[[], Any]:
    """Queue a product into a new array of the caller's dtype; return what gives it."""
    out, result = allocate(call, shape, call.dtype)
    enqueue(call, operand, x, out, bias=bias, branch=branch)
    return result


def enqueue(
    call: Call,
    operand: Operand,
    x: View,
    out: View,
    *,
    bias: View | None = None,
    branch: tuple[View, View, float] | None = None,
) -> None:
    """Queue ``x operand + factor * low b + bias`` into `out`, ``branch`` being (low, b, factor)."""
    low, b, factor = branch or (None, None, operand.factor)
    formats = {view_.dtype for view_ in (b, operand.codes if operand.weight == "float" else None) if view_}
    kind = x.dtype
    variant = Variant(
        operand.weight,
        kind,
        formats.pop() if formats else kind,
        out.dtype,
        turned=operand.turned,
        low_rank=low is not None and low.shape[1] > 0,
        bias=bias is not None,
    )
    if 0 in out.shape:
        return
    tables = _levels(0 if SIMULATOR else current_device())
    double = operand.double or (absent("uint8", 1), absent("float32", 1), absent("float32", 1))
    launch(
        build(variant),
        [
            x,
            operand.codes,
            operand.scales or absent("float32", 2),
            *double,
            *tables,
            *map(np.int64, (*operand.steps, *operand.blocks)),
            low if variant.low_rank and low else absent("float32", 2),
            b if variant.low_rank and b else absent(variant.weight_kind, 2),
            np.float32(factor),
            bias or absent(kind, 1),
            out,
        ],
        blocks=-(-out.shape[0] // variant.tile) * -(-out.shape[1] // variant.tile),
        threads=variant.threads,
        shared_bytes=variant.shared_bytes,
        stream=call.on,
    )


def gradients(call: Call, operand: Operand) -> WeightOnlyGradients:
    """Queue the gradients of a layer without a branch: of x, and of the bias as a row of ones times dy."""
    dy = call.given["dy"]
    rows, columns = call.x.shape
    dx = product(call, operand, dy, (rows, columns))
    if call.bias is None:
        return WeightOnlyGradients(dx(), None, None)
    ones = view("ones", np.ones((1, dy.shape[0]), np.float32), call.on)
    dbias = product(call, dense(dy), ones, (1, dy.shape[1]))()
    return WeightOnlyGradients(dx(), None, dbias.reshape(-1))


@functools.cache
def _levels(_device: int) -> tuple[View, View]:
    """Return the levels of NF4 and those of absmax codes on the current GPU; they stay there."""
    found = view("levels", np.array(LEVELS), 0), view("levels", np.array(dynamic_map()), 0)
    if not SIMULATOR:
        cuda.synchronize()
    return found
