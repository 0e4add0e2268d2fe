"""Weights made ready for decoding: as the references store them, then in the kernel's order, once.

A prepared weight is constant.  On Hopper a decoding kernel asks for it while kernels ahead of it in the
stream still run, and does not see what those write: so the functions here return when a weight lies in
memory, and whoever writes into one later has to wait in the same way before the next call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR
from cuda_backend.arrays import ITEMSIZE, View, contiguous, is_host, view
from cuda_backend.capture import refuse_capture
from cuda_backend.context import checked, driver
from cuda_backend.int8.memory import transposed_view
from cuda_backend.int8.operands import check_format, codes_matrix, described, one_library
from cuda_backend.launch import stream_of
from cuda_backend.weight_only.pack import absmax_order, int8_order, moved, nf4_order, scale_order
from cuda_backend.weight_only.variant import BLOCK, deep
from refimpl.errors import DTypeError, ShapeError, UnsupportedError
from refimpl.quant import Int8Groups, NF4Weight
from refimpl.validation import bind_axes, whole

__all__ = ["PreparedInt8", "PreparedNF4", "check_kind", "flat", "prepare_int8_groups", "prepare_nf4"]


class PreparedInt8(NamedTuple):
    """Packed codes and scales of a weight [K, N] in int8, all constant; `shape` is (K, N)."""

    codes: Any
    scale: Any
    shape: tuple[int, int]
    group_size: int


class PreparedNF4(NamedTuple):
    """Packed codes and absmax codes of a weight [K, N] in NF4, its scales as they are; all constant.

    `shape` is (K, N).
    """

    codes: Any
    absmax_codes: Any
    scale: Any
    offset: Any
    shape: tuple[int, int]
    scale_block_size: int


def check_kind(weight: Any, kind: type) -> None:
    """Check that a weight is stored in the way that a function reads.

    Raises
    ------
    DTypeError
        If it is of another type.
    """
    if not isinstance(weight, kind):
        raise DTypeError(f"weight: expected {kind.__name__}, got {type(weight).__name__}")


def prepare_int8_groups(weight: Int8Groups, /, *, group_size: int = 128, stream: Any = None) -> PreparedInt8:
    """Return a weight in int8 in the order in which `int8_linear_decode` reads it.

    Parameters
    ----------
    weight : Int8Groups
        As `refimpl.quant.quantize_groups` stores it: NumPy arrays, or arrays on the current GPU, whose result
        is of the same library; scales in float32.
    group_size : int
        With which it was stored; the kernel takes multiples of 128, or all of K.
    stream : int or stream object, optional
        Where to run.

    Returns
    -------
    PreparedInt8
        As many bytes, rows of the last tile of 16 features repeated; constant, and in memory.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If the parts do not fit.
    UnsupportedError
        If K is no multiple of 128, or the group size none; under capture, as this waits.

    Examples
    --------
    >>> import cuda_backend
    >>> if cuda_backend.availability("cudasim") is None:
    ...     stored = Int8Groups(np.ones((128, 3), np.int8), np.ones((1, 3), np.float32))
    ...     assert prepare_int8_groups(stored).codes.nbytes == 128 * 16
    """
    check_kind(weight, Int8Groups)
    one_library({"weight codes": weight.codes, "weight scale": weight.scale})
    codes, scale = codes_matrix("weight codes", weight.codes), described("weight scale", weight.scale)
    whole("group_size", group_size)
    K, N = bind_axes({"weight codes": (codes, "K N")}).values()
    groups = -(-K // group_size)
    if scale.shape != (groups, N):
        raise ShapeError(f"weight scale: expected shape {(groups, N)}, got {scale.shape}")
    check_format("weight scale", weight.scale, "float32")
    chunk = deep("int8")
    if K % chunk:
        raise UnsupportedError(f"prepare_int8_groups: K is {K}; the kernel takes multiples of {chunk}")
    if group_size % chunk and group_size < K:
        raise UnsupportedError(
            f"prepare_int8_groups: group_size is {group_size}; the kernel takes multiples of {chunk}"
        )
    on = stream_of(weight.codes, stream)
    _refuse_capture("prepare_int8_groups", on)
    lines = _units(transposed_view("weight codes", weight.codes, on), "uint8")
    scales = _units(transposed_view("weight scale", weight.scale, on), "uint32")
    packed = moved(lines, int8_order(K, N), weight.codes, on, features=N, flip=0x80)
    packed_scales = moved(scales, scale_order(groups, N), weight.codes, on, features=N)
    _wait(on)
    return PreparedInt8(packed, packed_scales, (K, N), group_size)


def prepare_nf4(weight: NF4Weight, /, *, stream: Any = None) -> PreparedNF4:
    """Return a weight in NF4 in the order in which `nf4_linear_decode` reads it.

    Parameters
    ----------
    weight : NF4Weight
        As `refimpl.quant.nf4_quantize` stores it, blocks of 64 along K: NumPy arrays, or arrays on the
        current GPU, whose result is of the same library; scales in float32.
    stream : int or stream object, optional
        Where to run.

    Returns
    -------
    PreparedNF4
        As many bytes, rows of the last tile of 16 features repeated; constant, and in memory.

    Raises
    ------
    ShapeError, DTypeError
        If the parts do not fit.
    UnsupportedError
        If K is no multiple of 256, blocks are not of 64 weights, or no power of two from 4 on of absmax
        share a scale; under capture, as this waits.

    Examples
    --------
    >>> import cuda_backend
    >>> from refimpl.quant import nf4_quantize
    >>> if cuda_backend.availability("cudasim") is None:
    ...     stored = nf4_quantize(np.ones((256, 16), np.float32))
    ...     assert prepare_nf4(stored).codes.nbytes == 256 * 16 // 2
    """
    check_kind(weight, NF4Weight)
    weight.check_turned(True)
    parts = {name: getattr(weight, name) for name in ("codes", "absmax_codes", "scale", "offset")}
    one_library(parts)
    N, K = weight.shape
    block, inner = weight.blocks
    chunk = deep("nf4")
    if K % chunk:
        raise UnsupportedError(f"prepare_nf4: K is {K}; the kernel takes multiples of {chunk}")
    if block != BLOCK or inner < 4 or inner & (inner - 1):
        raise UnsupportedError(
            f"prepare_nf4: blocks are {weight.blocks}; the kernel takes {BLOCK}, and a power of two from 4 on"
        )
    blocks = N * K // BLOCK
    expected = {"codes": (N * K // 2, "uint8"), "absmax_codes": (blocks, "uint8"),
                "scale": (-(-blocks // inner), "float32"), "offset": (1, "float32")}  # fmt: skip
    for name, (size, dtype) in expected.items():
        found = described(name, parts[name])
        if found.shape != (size,):
            raise ShapeError(f"{name}: expected shape ({size},) for a weight of {K} x {N}, got {found.shape}")
        check_format(name, parts[name], dtype)
    on = stream_of(weight.codes, stream)
    _refuse_capture("prepare_nf4", on)
    lines = flat(view("codes", _whole(weight.codes), on), (N, K // 4), "uint16")
    absmax = flat(view("absmax_codes", _whole(weight.absmax_codes), on), (N, K // BLOCK), "uint8")
    codes = moved(lines, nf4_order(K, N), weight.codes, on, features=N)
    absmax_codes = moved(absmax, absmax_order(K, N), weight.codes, on, features=N)
    _wait(on)
    return PreparedNF4(codes, absmax_codes, weight.scale, weight.offset, (K, N), inner)


def _refuse_capture(caller: str, stream: int) -> None:
    if not SIMULATOR:
        refuse_capture(caller, stream, "weights are prepared ahead")


def _wait(stream: int) -> None:
    """Return when a weight is in memory: decoding kernels do not wait for it."""
    if not SIMULATOR:
        checked(driver.cuStreamSynchronize(stream))


def _whole(array: Any) -> Any:
    return np.ascontiguousarray(array) if is_host(array) else array


def _units(given: View, dtype: str) -> View:
    """Return a matrix with the bits of its numbers as integers of the same size."""
    owner = given.owner.view(dtype) if SIMULATOR else given.owner
    return given._replace(dtype=dtype, owner=owner)


def flat(given: View, shape: tuple[int, ...], dtype: str) -> View:
    """Return the bytes of a contiguous vector as a matrix of another shape and dtype."""
    owner = given.owner.view(dtype).reshape(shape) if SIMULATOR else given.owner
    return given._replace(shape=shape, strides=contiguous(shape, ITEMSIZE[dtype]), dtype=dtype, owner=owner)
