"""Calling the decoding kernels: what callers pass, the plan of a layer, its launch."""

from __future__ import annotations

import functools
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from cuda_backend._numba import SIMULATOR, cuda
from cuda_backend.arrays import Layout, View, empty_tensor, is_host, library_of, torch_layout, view
from cuda_backend.context import current_device
from cuda_backend.cubins import Image, compiled, load
from cuda_backend.int8.memory import allocated
from cuda_backend.int8.operands import described, one_format, one_library
from cuda_backend.launch import (
    allow_shared_memory,
    shared_memory_bytes,
    simulation,
    stream_of,
    torch_stream,
    wait_for,
)
from cuda_backend.weight_only.prepared import PreparedInt8, PreparedNF4
from cuda_backend.weight_only.variant import MOST_TOKENS, ROWS, SHARED_LIMIT, Variant, choose, deep
from refimpl.errors import UnsupportedError
from refimpl.numerics import Array
from refimpl.quant.double_quantization import dynamic_map
from refimpl.quant.nf4 import LEVELS
from refimpl.validation import bind_axes, floating

__all__ = ["int8_linear_decode", "nf4_linear_decode", "pair_table"]

KINDS = {"float16": "f16", "bfloat16": "bf16"}
ADDRESSES = 9
SIMULATED_BLOCKS, SIMULATED_WARPS = 2, 2


def int8_linear_decode(x: Any, weight: PreparedInt8, /, *, bias: Any = None, stream: Any = None) -> Any:
    """Return ``x @ dequantised(weight) + bias`` for up to 16 tokens, the weight widened in registers.

    Parameters
    ----------
    x : array of float16 or bfloat16, shape (M, K)
        Tokens, 1 to 16: NumPy's, or of a GPU library on the current GPU; rows are whole and begin at
        multiples of 8 bytes.
    weight : PreparedInt8
        As `prepare_int8_groups` makes it, in the library of `x`.
    bias : array like `x`, shape (N,), optional
        Added in float32.
    stream : int or stream object, optional
        Where to run.  Default: the stream that the library of `x` works on.

    Returns
    -------
    array, shape (M, N)
        In the dtype and library of `x`, rounded once; any output repeats bit for bit.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, or are of several libraries.
    UnsupportedError
        For other formats, more tokens, or rows that lie elsewhere.
    BackendUnavailableError
        If there is neither a GPU nor the simulator.

    Notes
    -----
    Codes are exact in both formats, products are summed in float32, and scales multiply sums.

    References
    ----------
    .. [1] Yao et al., 2022, arXiv:2206.01861, section 4.1.

    Examples
    --------
    >>> import cuda_backend
    >>> from cuda_backend.weight_only.prepared import prepare_int8_groups
    >>> from refimpl.quant import quantize_groups
    >>> if cuda_backend.availability("cudasim") is None:
    ...     weight = prepare_int8_groups(quantize_groups(np.eye(128, dtype=np.float32)))
    ...     x = np.arange(128, dtype=np.float16)[None]
    ...     assert np.abs(int8_linear_decode(x, weight) - x).max() < 0.07
    """
    groups = -(-weight.shape[0] // weight.group_size)
    share = max(1, -(-weight.group_size // deep("int8")))
    return _decode("int8", x, weight.shape, [weight.codes, weight.scale], groups, share, bias, stream)


def nf4_linear_decode(x: Any, weight: PreparedNF4, /, *, bias: Any = None, stream: Any = None) -> Any:
    """Return ``x @ doubleDequant(weight) + bias`` for up to 16 tokens, the weight looked up in registers.

    Parameters
    ----------
    x, bias, stream
        As for `int8_linear_decode`.
    weight : PreparedNF4
        As `prepare_nf4` makes it, in the library of `x`.

    Returns
    -------
    array, shape (M, N)
        In the dtype and library of `x`; any output repeats bit for bit.

    Raises
    ------
    ShapeError, DTypeError, UnsupportedError, BackendUnavailableError
        As `int8_linear_decode`.

    Notes
    -----
    Levels are rounded to the dtype of `x`, where the reference rounds level times absmax; absmax multiply
    sums in float32.

    References
    ----------
    .. [1] Dettmers et al., 2023, arXiv:2305.14314, eq. 5 and 6.

    Examples
    --------
    >>> import cuda_backend
    >>> from cuda_backend.weight_only.prepared import prepare_nf4
    >>> from refimpl.quant import nf4_quantize
    >>> if cuda_backend.availability("cudasim") is None:
    ...     weight = prepare_nf4(nf4_quantize(np.eye(256, dtype=np.float32)))
    ...     x = np.arange(256, dtype=np.float16)[None]
    ...     assert np.array_equal(nf4_linear_decode(x, weight), x)
    """
    share = weight.scale_block_size.bit_length() - 1
    parts = [weight.codes, weight.absmax_codes, weight.scale, weight.offset]
    return _decode("nf4", x, weight.shape, parts, 0, share, bias, stream)


def _decode(
    kind: str,
    x: Any,
    shape: tuple[int, int],
    parts: list[Any],
    groups: int,
    share: int,
    bias: Any,
    stream: Any,
) -> Any:
    if stream is None and type(x) is type(parts[0]) is type(parts[1]) and library_of(x) == "torch":
        # By far the most calls: what their layouts say is looked up, and the rest is addresses.
        device = current_device()
        plan = _plan_of_tensors(
            kind, shape, groups, share, torch_layout(x), None if bias is None else torch_layout(bias),
            tuple([torch_layout(part) for part in parts]), device,
        )  # fmt: skip
        address = x.data_ptr()
        if plan is not None and address % 8 == 0:
            out = empty_tensor((x.shape[0], shape[1]), x.dtype, x, on := torch_stream(x))
            stored = [part.data_ptr() for part in parts] + [0] * (4 - len(parts))
            added = 0 if bias is None else bias.data_ptr()
            plan.enqueue(on, [*stored, *plan.tables, address, added, out.data_ptr()])
            return out
    caller = f"{kind}_linear_decode"
    floats = {"x": x} if bias is None else {"x": x, "bias": bias}
    one_library({**floats, **{f"weight part {i}": part for i, part in enumerate(parts)}})
    found = {name: described(name, value) for name, value in floats.items()}
    size = bind_axes({name: (value, {"x": "M K", "bias": "N"}[name]) for name, value in found.items()})
    weight = np.broadcast_to(np.int8(0), shape)
    bind_axes({"x": (found["x"], "M K"), "weight": (weight, "K N")})
    bind_axes({"weight": (weight, "K N"), **({} if bias is None else {"bias": (found["bias"], "N")})})
    if is_host(x):
        floats = dict(zip(found, floating(**found), strict=True))
        dtype = floats["x"].dtype.name
    else:
        dtype = one_format(floats)
    M, (K, N) = size["M"], shape
    if dtype not in KINDS:
        raise UnsupportedError(f"{caller}: inputs are {dtype}; the kernel takes {', '.join(KINDS)}")
    if M > MOST_TOKENS:
        raise UnsupportedError(f"{caller}: {M} tokens; the kernel takes up to {MOST_TOKENS}")
    on = stream_of(x, stream)
    out, result = allocated((M, N), dtype, x, on)
    if 0 in (M, N):
        return result()
    if K == 0:
        raise UnsupportedError(f"{caller}: K is 0")
    views = [view("weight", part, on) for part in parts]
    tokens = view("x", np.ascontiguousarray(floats["x"]) if is_host(x) else x, on)
    pitch = tokens.strides[0] if M > 1 else 2 * K
    if tokens.strides[1] != 2 or pitch % 8 or not 0 < pitch < 2**31 or tokens.address % 8:
        raise UnsupportedError(
            f"{caller}: x has strides of {tokens.strides} bytes: rows must be whole, at 8s"
        )
    added = 0
    if bias is not None:
        given = view("bias", np.ascontiguousarray(floats["bias"]) if is_host(x) else bias, on)
        if given.strides != (2,):
            raise UnsupportedError(f"{caller}: bias has strides of {given.strides} bytes; expected (2,)")
        wait_for([given], on)
        added = _address(given)
    wait_for([*views, tokens], on)
    stored = [*map(_address, views), 0, 0][:4]
    plan = _plan(kind, KINDS[dtype], M, K, N, pitch, groups, share, 0 if SIMULATOR else current_device())
    plan.enqueue(on, [*stored, *plan.tables, _address(tokens), added, _address(out)])
    return result()


class Plan(NamedTuple):
    """A launch but for its addresses; `lock` is held while they are written and not yet read.

    `tables` are the addresses of levels, of which int8 has none.
    """

    launch: Any
    lock: Any
    tables: list[int]

    def enqueue(self, stream: int, addresses: list[int]) -> None:
        """Queue the kernel on `stream`; nothing waits."""
        with self.lock:
            self.launch(stream, *addresses)


@functools.lru_cache(maxsize=1024)
def _plan_of_tensors(
    kind: str, shape: tuple[int, int], groups: int, share: int, x: Layout, bias: Layout | None,
    parts: tuple[Layout, ...], device: int,
) -> Plan | None:  # fmt: skip
    """Return the plan of a call with PyTorch's tensors; None if the general way has to say what is wrong."""
    sizes, strides, dtype, _ = x
    (K, N), format_ = shape, KINDS.get(str(dtype).removeprefix("torch."))
    given = (x, *parts) if bias is None else (x, bias, *parts)
    if any(layout[3] != device for layout in given) or format_ is None:
        return None
    if len(sizes) != 2 or not 0 < sizes[0] <= MOST_TOKENS or sizes[1] != K or 0 in shape or strides[1] != 1:
        return None
    if bias is not None and (tuple(bias[0]) != (N,) or bias[1] != (1,) or bias[2] != dtype):
        return None
    M = sizes[0]
    pitch = 2 * (strides[0] if M > 1 else K)
    if pitch % 8 or not 0 < pitch < 2**31:
        return None
    return _plan(kind, format_, M, K, N, pitch, groups, share, device)


@functools.lru_cache(maxsize=1024)
def _plan(
    weight: str, kind: str, M: int, K: int, N: int, pitch: int, groups: int, share: int, device: int
) -> Plan:
    variant = choose(weight, kind, M, K, shared_memory_bytes() or SHARED_LIMIT)
    tiles, chunks = -(-N // ROWS), K // deep(weight)
    numbers = [M, N, chunks, tiles, pitch, groups, share]
    tables = [_address(table) for table in _tables(kind, device)] if weight == "nf4" else [0, 0]
    if SIMULATOR:
        variant = variant._replace(warps=SIMULATED_WARPS)
        return Plan(_simulated(variant, numbers, variant.shared_bytes(M, K)), Lock(), tables)
    from cuda_backend.int8.launches_hopper import Launch

    processors = int(cuda.get_current_device().MULTIPROCESSOR_COUNT)
    shared_bytes = variant.shared_bytes(M, K)
    function = allow_shared_memory(_function(variant, device), shared_bytes)
    blocks = min(tiles, variant.blocks * processors)
    return Plan(
        Launch(
            function, ADDRESSES, numbers, blocks=blocks, threads=variant.threads, shared_bytes=shared_bytes
        ),
        Lock(),
        tables,
    )


def _simulated(variant: Variant, numbers: list[int], shared_bytes: int) -> Any:
    """Return what plays the kernel with Python threads."""
    from cuda_backend.weight_only.decode import build

    kernel = cuda.jit(build(variant))

    def launch(_stream: int, *addresses: int) -> None:
        arguments = [*map(np.uint64, addresses), *map(np.int32, numbers)]
        with simulation():
            kernel[SIMULATED_BLOCKS, variant.threads, 0, shared_bytes](*arguments)

    return launch


@functools.cache
def _function(variant: Variant, device: int) -> Any:
    return load("weight_only_decode", variant, device, functools.partial(_compiled, variant))


def _compiled(variant: Variant) -> Image:
    from cuda_backend.weight_only.decode import SIGNATURE, build  # not needed if the kernel is on disk

    return compiled(build(variant), SIGNATURE, threads=variant.threads, blocks=variant.blocks)


def pair_table(kind: str) -> Array:
    """Return the two levels of each byte of NF4 codes as a word, that of the high nibble in its low half.

    >>> hex(pair_table("f16")[0xF7])
    '0x3c00'
    """
    if kind == "f16":
        halves = LEVELS.astype(np.float16).view(np.uint16).astype(np.uint32)
    else:
        bits = LEVELS.view(np.uint32)  # to nearest even, as `refimpl.numerics.round_to`
        halves = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)) >> np.uint32(16)
    byte = np.arange(256)
    pairs: Array = halves[byte >> 4] | halves[byte & 15] << np.uint32(16)
    return pairs


@functools.cache
def _tables(kind: str, _device: int) -> list[View]:
    """Return pairs of levels, and levels of absmax codes, on the current GPU; they stay there."""
    found = [view("levels", table, 0) for table in (pair_table(kind), np.array(dynamic_map()))]
    if not SIMULATOR:
        cuda.synchronize()
    return found


def _address(item: View) -> int:
    return int(item.owner.ctypes.data) if SIMULATOR else item.address
