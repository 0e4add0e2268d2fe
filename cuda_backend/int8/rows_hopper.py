"""Rows quantised on Hopper, settled but for addresses: which kernels, in which order, with what memory."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cuda_backend._numba import cuda
from cuda_backend.arrays import View
from cuda_backend.context import checked, driver
from cuda_backend.int8 import outliers_hopper, quantize_hopper
from cuda_backend.int8.launches_hopper import Launch, function_of
from cuda_backend.int8.memory_hopper import Arena, padded
from cuda_backend.int8.operands import inlier_limit
from cuda_backend.int8.product_hopper import NOTHING, After, side_by_side
from refimpl.quant.absmax import Convention

__all__ = ["Rows", "gpu_reasons", "in_vectors", "reasons", "sixteen_bit_limit"]

KINDS = ("float16", "bfloat16")
BLOCKS = 8  # of the kernel that sets outliers aside, on each multiprocessor


class Rows:
    """Quantisation of the rows of x [T, K], and of what is set aside the part that a product needs.

    Parameters
    ----------
    x : View
        Without an objection of `reasons`; its address comes with each call.
    threshold, convention
        As for `refimpl.quant.quantize_rows`.
    N : int
        Columns of the weight, if a product that follows puts outliers side by side; otherwise 0.
    beside : bool
        A product follows and sees to the outliers.
    sharing : bool
        As of `Launch`.
    scratch, zeros : Arena
        Where memory is reserved.
    device, processors : int
        Ordinal of the current GPU, and its multiprocessors.
    """

    def __init__(
        self,
        x: View,
        threshold: float | None,
        convention: Convention,
        N: int,
        *,
        scratch: Arena,
        zeros: Arena,
        device: int,
        processors: int,
        beside: bool = False,
        sharing: bool = False,
    ) -> None:
        T, K = x.shape
        self._beside = beside
        self._row = x.strides[0]
        self.pitch = padded(K)
        self.aligned = aligned = in_vectors(x)
        self._set_aside = None
        if threshold is None:
            passes, limit = [""], 0
        else:
            passes = ["cells"] if convention == "released" else ["mark", "columns"]
            limit = sixteen_bit_limit(x.dtype, threshold, convention)
        self._passes = []
        for what in passes:
            variant = quantize_hopper.choose(x.dtype, what, aligned, K)
            function = function_of("quantize", variant, device)
            launch = Launch(function, 6, [K, limit], blocks=T, threads=variant.threads, sharing=sharing)
            self._passes.append(launch)
        if threshold is None:
            return
        aside = side_by_side(K)
        self._marks = zeros.reserve(self.pitch)
        self._indices, self._number = scratch.reserve(4 * K), scratch.reserve(4)
        self._counters = zeros.reserve(16)
        room = 3 * aside if N else 0  # numbers of 16 bits and codes, for a product that sets aside
        self._x_aside, self._w_aside = scratch.reserve(T * room), scratch.reserve(N * room)
        function = function_of("outliers", outliers_hopper.Variant(), device)
        rows = outliers_hopper.THREADS // outliers_hopper.MEMBERS
        blocks = max(1, min(BLOCKS * processors, -(-T // rows)))
        threads = outliers_hopper.THREADS
        self._set_aside = Launch(function, 5, [T, K], blocks=blocks, threads=threads, early=True)

    def run(
        self,
        stream: int,
        memory: tuple[int, int],
        x: int,
        codes: int,
        absmax: int,
        met: After = NOTHING,
        kept: bool = True,
    ) -> After:
        """Queue the kernels; return `met`, which says what outliers meet, with what was set aside.

        Codes of outliers are 0 if codes are `kept`, or no product follows that takes them away.
        """
        scratch, zeros = memory
        marks = zeros + self._marks if self._set_aside else 0
        for launch in self._passes:
            launch(stream, x, self._row, codes, self.pitch, absmax, marks)
        if self._set_aside is None:
            return met._replace(a_absmax=absmax)
        number, indices = scratch + self._number, scratch + self._indices
        x_aside, w_aside = scratch + self._x_aside, scratch + self._w_aside
        if kept or not self._beside:
            self._set_aside(stream, marks, indices, number, codes, self.pitch)
        return After(
            absmax, met.b_absmax, met.bias, number, indices, marks, x_aside, w_aside, x, self._row, 2,
            met.w, met.w_feature, met.w_column, codes, self.pitch, zeros + self._counters,
        )  # fmt: skip

    def clear(self, stream: int, zeros: int) -> None:
        """Clear the marks, where no product follows that does."""
        if self._set_aside is not None:
            checked(driver.cuMemsetD8Async(zeros + self._marks, 0, self.pitch, stream))


def gpu_reasons() -> list[str]:
    """Return the reason why the kernels refuse the current GPU, if they do."""
    major, minor = cuda.get_current_device().compute_capability
    if (major, minor) == (9, 0):
        return []
    return [f"the GPU has compute capability {major}.{minor}; the kernel needs 9.0"]


def reasons(x: View) -> list[str]:
    """Return the reasons why the Hopper kernels refuse activations that the reference takes."""
    found = gpu_reasons()
    if x.dtype not in KINDS:
        found.append(f"inputs are {x.dtype}; the kernel takes float16 or bfloat16")
    elif 0 in x.shape:
        pass
    elif x.shape[1] > 1 and x.strides[1] != 2:
        found.append(f"x has strides of {x.strides} bytes: the last must be 2")
    elif x.shape[0] > 1 and x.strides[0] < 0:
        found.append(f"x has strides of {x.strides} bytes: none may be negative")
    return found


def in_vectors(x: View) -> bool:
    """Return whether rows can be read in vectors of 16 bytes, if the first begins at a multiple of them."""
    T, K = x.shape
    return K % quantize_hopper.WIDTH == 0 and (T == 1 or x.strides[0] % 16 == 0)


@functools.lru_cache(maxsize=64)
def sixteen_bit_limit(kind: str, threshold: float, convention: Convention) -> int:
    """Return the least bits of a magnitude of `kind` that is an outlier.

    >>> hex(sixteen_bit_limit("float16", 6.0, "released")), hex(sixteen_bit_limit("float16", 6.0, "paper"))
    ('0x4600', '0x4601')
    """
    patterns: Any = np.arange(1 << 15, dtype=np.uint16)
    if kind == "float16":
        wide = patterns.view(np.float16).astype(np.float32).view(np.uint32)
    else:
        wide = patterns.astype(np.uint32) << 16
    return int(np.searchsorted(wide, np.uint32(inlier_limit(threshold, convention))))
