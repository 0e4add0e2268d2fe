"""The product of int8 matrices for every CUDA GPU and Numba's simulator, with what may stand around it.

A block owns a tile of the output, in registers.  It walks along K: while it multiplies the words in shared
memory, four codes an instruction, those of the next step are on their way to registers.  Then, if asked for::

    out = ((A B * c_x) * c_w) / 127² + bias,    each product rounded to float32, as in the reference
    out = out + x[:, outliers] W[outliers]      in float32, over as many columns as the device counted

so that nothing but the output is written.  The same code begins at an int32 product, or at an output to which
only the outliers are missing: that is LLM.int8() in the steps of its released code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cuda_backend._numba import cuda, device_function, kernel, types
from cuda_backend.formats import storage_type
from cuda_backend.int8.arithmetic import dot_product, product, reader, writer
from cuda_backend.int8.variant_portable import CODES_PER_WORD, Variant
from refimpl.quant.absmax import LIMIT

__all__ = ["build", "signature", "source"]

_INDEX = 0x7FFFFFFF  # as an operand of & it tells the compiler that an index is not negative
_ZERO, _LIMIT, _INVERSE = np.float32(0), np.float32(LIMIT), np.float32(1 / LIMIT**2)
_int32, _uint32, _float32 = types.int32, types.uint32, types.float32


def signature(variant: Variant) -> Any:
    """Return the argument types of the kernel; arrays may have any strides, absent ones are never read."""

    def array(dtype: Any, ndim: int) -> Any:
        return types.Array(dtype, ndim, "A")

    codes = {True: types.uint32, False: types.uint8}
    number = types.float32 if variant.kind == "int32" else storage_type(variant.kind)
    return types.void(
        array(codes[variant.a_words], 2), array(codes[variant.b_words], 2),  # a [M, K], b [N, K]
        types.int64,                                                         # K
        array(types.int32, 2),                                               # product [M, N]
        array(types.float32, 1), array(types.float32, 1),                    # x_absmax, weight_absmax
        array(number, 1),                                                    # bias
        array(number, 2), array(number, 2),                                  # x [M, K], weight [K, N]
        array(types.int64, 1), array(types.int64, 1),                        # indices, count of outliers
        array(types.int32 if variant.kind == "int32" else number, 2),        # out [M, N]
    )  # fmt: skip


@functools.cache
def build(variant: Variant) -> Any:
    """Return the compiled kernel of `variant`."""
    return kernel(signature(variant))(source(variant))


def source(variant: Variant) -> Callable[..., None]:
    """Return the kernel of `variant` as a Python function; the constants of its closure shape the code."""
    BM, BN, BK, SIDE, THREADS = variant.BM, variant.BN, variant.BK, variant.side, variant.threads
    MR, MC = BM // SIDE, BN // SIDE
    CELLS, OWN_A, OWN_B = MR * MC, BM * BK // THREADS, BN * BK // THREADS
    AS, BS, B = variant.a_stride, variant.b_stride, variant.b_offset
    MULTIPLY, OUTPUT = variant.begin == "codes", variant.begin == "output"
    SCALE, BIAS, OUTLIERS = variant.kind != "int32", variant.bias, variant.outliers != ""
    number = variant.kind if SCALE else "float32"
    load, store = reader(number), writer(number)
    word_of_a, word_of_b = _word(variant.a_words), _word(variant.b_words)
    outlier_weight = _outlier_weight(variant)

    def int8_product(
        a: Any, b: Any, K: Any, given: Any, x_absmax: Any, weight_absmax: Any, bias: Any,
        x: Any, weight: Any, indices: Any, count: Any, out: Any,
    ) -> None:  # fmt: skip
        words = cuda.shared.array(0, _uint32)  # the tile of a, then at B that of b
        values = cuda.shared.array(0, _float32)  # the same memory, for outliers and their weights
        next_a = cuda.local.array(OWN_A, _uint32)
        next_b = cuda.local.array(OWN_B, _uint32)
        total = cuda.local.array(CELLS, _int32)
        y = cuda.local.array(CELLS, _float32)

        thread = cuda.threadIdx.x & (THREADS - 1)
        j0 = thread & (SIDE - 1)
        i0 = thread // SIDE
        tiles = (out.shape[1] + BN - 1) // BN
        row = (cuda.blockIdx.x & _INDEX) // tiles * BM
        column = (cuda.blockIdx.x & _INDEX) % tiles * BN

        if OUTPUT and count[0] == 0:
            return  # nothing to add: the output stands

        for cell in range(CELLS):
            total[cell] = 0
        if MULTIPLY:
            for e in range(OWN_A):
                next_a[e] = word_of_a(a, K, row + (thread + e * THREADS) // BK, thread % BK)
            for e in range(OWN_B):
                next_b[e] = word_of_b(b, K, column + (thread + e * THREADS) // BK, thread % BK)
            for start in range(0, (K + 3) // 4, BK):
                for e in range(OWN_A):
                    words[thread % BK * AS + (thread + e * THREADS) // BK] = next_a[e]
                for e in range(OWN_B):
                    words[B + thread % BK * BS + (thread + e * THREADS) // BK] = next_b[e]
                cuda.syncthreads()
                after = (start + BK + thread % BK) & _INDEX
                for e in range(OWN_A):
                    next_a[e] = word_of_a(a, K, row + (thread + e * THREADS) // BK, after)
                for e in range(OWN_B):
                    next_b[e] = word_of_b(b, K, column + (thread + e * THREADS) // BK, after)
                for e in range(BK):
                    k = e & _INDEX
                    for i in range(MR):
                        left = words[k * AS + i0 + i * SIDE]
                        for j in range(MC):
                            right = words[B + k * BS + j0 + j * SIDE]
                            total[i * MC + j] = dot_product(left, right, total[i * MC + j])
                cuda.syncthreads()

        if SCALE:
            for i in range(MR):
                m = row + i0 + i * SIDE
                for j in range(MC):
                    n = column + j0 + j * SIDE
                    value = _ZERO
                    if m < out.shape[0] and n < out.shape[1]:
                        if OUTPUT:
                            value = load(out[m, n])
                        else:
                            whole = total[i * MC + j]
                            if not MULTIPLY:
                                whole = given[m, n]
                            value = product(np.float32(whole), x_absmax[m])
                            value = product(product(value, weight_absmax[n]), _INVERSE)
                            if BIAS:
                                value += load(bias[n])
                    y[i * MC + j] = value
        if OUTLIERS:
            for start in range(0, count[0], BK):
                for e in range(thread, BM * BK, THREADS):
                    z, r = (e & _INDEX) % BK, (e & _INDEX) // BK
                    value = _ZERO
                    if start + z < count[0] and row + r < out.shape[0]:
                        value = load(x[row + r, indices[(start + z) & _INDEX] & _INDEX])
                    values[z * AS + r] = value
                for e in range(thread, BN * BK, THREADS):
                    z, r = (e & _INDEX) // BN, (e & _INDEX) % BN
                    value = _ZERO
                    if start + z < count[0] and column + r < out.shape[1]:
                        feature = indices[(start + z) & _INDEX] & _INDEX
                        value = outlier_weight(b, weight_absmax, weight, feature, column + r)
                    values[B + z * BS + r] = value
                cuda.syncthreads()
                for e in range(BK):
                    k = e & _INDEX
                    for i in range(MR):
                        value = values[k * AS + i0 + i * SIDE]
                        for j in range(MC):
                            y[i * MC + j] += value * values[B + k * BS + j0 + j * SIDE]
                cuda.syncthreads()

        for i in range(MR):
            m = row + i0 + i * SIDE
            for j in range(MC):
                n = column + j0 + j * SIDE
                if m < out.shape[0] and n < out.shape[1]:
                    if SCALE:
                        out[m, n] = store(y[i * MC + j])
                    else:
                        out[m, n] = total[i * MC + j]

    return int8_product


@device_function
def _whole_word(codes: Any, K: Any, row: Any, index: Any) -> Any:  # noqa: ARG001
    """Return word `index` of a row of words, 0 beyond the matrix."""
    if row < codes.shape[0] and index < codes.shape[1]:
        return codes[row & _INDEX, index & _INDEX]
    return np.uint32(0)


@device_function
def _word_of_bytes(codes: Any, K: Any, row: Any, index: Any) -> Any:
    """Return four neighbouring codes of a row of bytes as a word, 0 beyond the matrix."""
    word = np.uint32(0)
    if row < codes.shape[0]:
        for i in range(CODES_PER_WORD):
            k = (CODES_PER_WORD * index + i) & _INDEX
            if k < K:
                word = np.uint32(word | np.uint32(np.uint32(codes[row & _INDEX, k]) << np.uint32(8 * i)))
    return word


def _word(whole: bool) -> Callable[..., Any]:
    return _whole_word if whole else _word_of_bytes


def _outlier_weight(variant: Variant) -> Callable[..., Any]:
    """Return the device function that gives the weight of feature k and output n, as outliers meet it."""
    kind = "float32" if variant.kind == "int32" else variant.kind
    load, store, whole = reader(kind), writer(kind), variant.b_words

    if variant.outliers == "paper":

        @device_function
        def as_given(b: Any, absmax: Any, weight: Any, k: Any, n: Any) -> Any:  # noqa: ARG001
            return load(weight[k, n])

        return as_given

    @device_function
    def dequantised(b: Any, absmax: Any, weight: Any, k: Any, n: Any) -> Any:  # noqa: ARG001
        if whole:
            byte = (b[n, k // 4] >> np.uint32(8 * (k % 4))) & np.uint32(0xFF)
        else:
            byte = np.uint32(b[n, k])
        code = np.int32(byte)
        if code > LIMIT:
            code -= 256
        value = product(np.float32(code), absmax[n] / _LIMIT)
        return load(store(value))

    return dequantised
