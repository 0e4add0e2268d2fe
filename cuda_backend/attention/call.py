"""What stands between a caller and an attention kernel of either direction: checks, reasons, arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cuda_backend.arrays import View, absent, broadcast, dtype_name, is_host, library_of, stub, view
from cuda_backend.attention.variant_portable import LARGEST_WIDTH, Features
from cuda_backend.formats import FORMATS
from refimpl.attention.scores import AttentionOptions, ScoreRule, score_rule
from refimpl.errors import DTypeError
from refimpl.numerics import widen
from refimpl.random import drop_threshold
from refimpl.validation import floating

__all__ = ["Call", "beside", "features", "numbers", "prepare", "reasons", "wrong_format"]

MOST_BLOCKS = 2**31 - 1
TAKEN = {
    "bias": FORMATS,
    "alibi_slopes": ("float32",),
    "q_lengths": ("int32", "int64"),
    "k_lengths": ("int32", "int64"),
}
ARRAYS = ("attn_mask", "bias", "alibi_slopes", "q_lengths", "k_lengths", "dropout_mask")


class Call(NamedTuple):
    """A validated call.

    Attributes
    ----------
    tensors
        q, k, v and what else has their dtype, by name: host arrays in that dtype, GPU arrays as given.
    stubs
        The same for the reference's checks: GPU arrays by their shapes alone.
    dtype
        Name of their number format.
    rule, options
        The options as the reference reads them, and as given.
    """

    tensors: dict[str, Any]
    stubs: dict[str, Any]
    dtype: str
    rule: ScoreRule
    options: AttentionOptions


def prepare(
    tensors: Mapping[str, Any], options: AttentionOptions, rule: Callable[..., ScoreRule] = score_rule
) -> Call:
    """Check a call as the reference does, GPU arrays by their shapes alone.

    Parameters
    ----------
    tensors : mapping of str to array
        q, k, v and further arrays that must share their dtype and library.
    options : AttentionOptions
        As the caller gave them.
    rule : callable
        `score_rule`, or `backward_rule` for a backward pass.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `refimpl.attention.flash_attention`; DTypeError also for a mixture of libraries.
    """
    libraries = {name: library_of(value) for name, value in tensors.items()}
    if len(set(libraries.values())) > 1:
        *most, last = tensors
        raise DTypeError(f"{', '.join(most)} and {last}: expected arrays of one library, got {libraries}")
    q = tensors["q"]
    checked: dict[str, Any] = {
        name: beside(name, value, q) if name in ARRAYS and value is not None else value
        for name, value in options.items()
    }
    if is_host(q):
        arrays = dict(zip(tensors, floating(**tensors), strict=True))
        dtype, stubs = arrays["q"].dtype.name, arrays
    else:
        arrays = dict(tensors)
        dtype = _common_dtype(tensors)
        stubs = {name: stub(name, value) for name, value in tensors.items()}
    return Call(arrays, stubs, dtype, rule(stubs["q"], stubs["k"], stubs["v"], **checked), options)


def beside(name: str, value: Any, q: Any) -> Any:
    """Return an array that may lie on the host or beside `q`, for the reference's checks.

    Raises
    ------
    DTypeError
        If it lies elsewhere.
    """
    if is_host(value):
        return value
    library = library_of(q)
    if library_of(value) != library:
        taken = " or ".join(sorted({"numpy", library}))
        raise DTypeError(f"{name}: expected an array of {taken}, got one of {library_of(value)}")
    return stub(name, value)


def reasons(call: Call) -> list[str]:
    """Return the reasons why the portable kernels refuse a valid call."""
    shape, found = call.rule.shape, []
    if call.dtype not in FORMATS:
        found.append(f"inputs are {call.dtype}; the kernel takes {', '.join(FORMATS)}")
    for axis, width in (("D", shape.D), ("Dv", shape.Dv)):
        if width > LARGEST_WIDTH:
            found.append(f"{axis} is {width}; the kernel takes up to {LARGEST_WIDTH}")
    for name, taken in TAKEN.items():
        found += wrong_format(name, call.options.get(name), taken)
    if shape.B * shape.Hq * max(shape.Tq, shape.Tk) > MOST_BLOCKS:
        found.append(f"B * Hq * T exceeds {MOST_BLOCKS}")
    return found


def wrong_format(name: str, value: Any, taken: tuple[str, ...]) -> list[str]:
    """Return the reason, if there is one, why an array on the GPU is refused for its dtype."""
    if value is None or is_host(value) or dtype_name(name, value) in taken:
        return []
    return [f"{name} on the GPU is {dtype_name(name, value)}; the kernel takes {', '.join(taken)}"]


def features(call: Call, stream: int, *, lse: bool) -> tuple[Features, list[Any]]:
    """Return what the kernel must handle, and its optional arrays in the order of its signature."""
    rule, options = call.rule, call.options
    full = (rule.shape.B, rule.shape.Hq, rule.shape.Tq, rule.shape.Tk)

    def option(name: str, kind: str, ndim: int, host: Any) -> tuple[str, View]:
        """Return the dtype of an optional array, "" if it is absent, and the array as the kernel sees it."""
        value = options.get(name)
        if value is None:
            return "", absent(kind, ndim)
        given = view(name, host if is_host(value) else value, stream)
        return given.dtype, broadcast(given, full) if ndim == 4 else given

    mask, mask_view = option("attn_mask", "bool", 4, options.get("attn_mask"))
    bias, bias_view = option("bias", "float32", 4, _as_float32(options.get("bias")))
    alibi, slopes_view = option("alibi_slopes", "float32", 1, rule.slopes)
    q_lengths, q_view = option("q_lengths", "int64", 1, rule.q_lengths)
    k_lengths, k_view = option("k_lengths", "int64", 1, rule.k_lengths)
    kept, kept_view = option("dropout_mask", "bool", 4, options.get("dropout_mask"))
    found = Features(
        causal=("bottom_right" if options.get("causal") == "bottom_right" else "top_left") * rule.causal,
        mask=bool(mask),
        bias=bias,
        alibi=bool(alibi),
        softcap=rule.softcap is not None,
        q_lengths=q_lengths,
        k_lengths=k_lengths,
        dropout="mask" if kept else "philox" if rule.dropout_p else "",
        lse=lse,
    )
    without = (
        absent("uint8", 4),
        (absent("float32", 1),),
    )  # states of tiles, and arrays of the user's functions
    return found, [mask_view, bias_view, slopes_view, q_view, k_view, kept_view, *without]


def numbers(rule: ScoreRule) -> list[np.generic]:
    """Return the scalars in the order of a kernel's signature."""
    return [
        np.float32(rule.scale),
        np.float32(rule.softcap or 0.0),
        np.uint64(rule.seed),
        np.uint64(drop_threshold(rule.dropout_p)),
        np.float32(1.0 / (1.0 - rule.dropout_p)),
    ]


def _common_dtype(tensors: Mapping[str, Any]) -> str:
    dtypes = {dtype_name(name, value) for name, value in tensors.items()}
    if len(dtypes) > 1:
        *most, last = tensors
        raise DTypeError(f"{', '.join(most)} and {last}: expected one dtype, got {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def _as_float32(bias: Any) -> Any:
    """Return a bias on the host as float32, before it is broadcast."""
    if bias is None or not is_host(bias):
        return bias
    (array,) = floating(bias=bias)
    return widen(array).astype(np.float32, copy=False)
