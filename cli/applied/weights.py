"""Techniques that replace a matrix by another way to store it: each is one call of its reference.

What is stored is counted from the arrays themselves: codes, scales, masks, offsets.

>>> w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
>>> [f(w).nbytes for f in (int8, nf4, two_of_four)]
[4352, 2120, 8704]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cli.applied.model import Stored, dense
from refimpl.compress.factorization import break_even_rank, truncated_svd
from refimpl.numerics import BoolArray, FloatArray
from refimpl.prune.magnitude import magnitude, n_m
from refimpl.quant.codebook import codebook, codebook_dequantize
from refimpl.quant.gptq import gptq_blocked
from refimpl.quant.grid import dequantize
from refimpl.quant.optimal_codebook import optimal_codebook
from refimpl.quant.qlora import qlora_dequantize, qlora_quantize
from refimpl.quant.uniform import uniform

__all__ = [
    "CENTROIDS",
    "GPTQ_BITS",
    "GPTQ_DAMPING",
    "OnMatrix",
    "codebook16",
    "gptq4",
    "half_rank",
    "int8",
    "largest_half",
    "nf4",
    "two_of_four",
]

OnMatrix = Callable[[FloatArray], Stored]

# A few far weights stretch the range, and centroids spread evenly over it stay empty out there: 20 rounds
# from them end further off than 5 rounds from the optimum of a sample.
CENTROIDS, SAMPLE, ROUNDS = 16, 256, 5
# A few hundred tokens of calibration span less than the features, which damping as strong as the mean
# diagonal makes good; with the usual 0.01 the result is worse than plain rounding on texts it has not seen.
GPTQ_BITS, GPTQ_BLOCK, GPTQ_DAMPING = 4, 128, 1.0


def int8(w: FloatArray) -> Stored:
    """Return int8 codes and one scale a column; a symmetric grid has no zero points to store."""
    found = uniform(w, block=(None, 1))
    return _coded(dequantize(found, block=(None, 1)), found.codes.nbytes + found.scale.nbytes)


def nf4(w: FloatArray) -> Stored:
    """Return NF4 codes with their absmax quantised too."""
    found = qlora_quantize(w)
    parts = (found.codes, found.absmax_codes, found.scale, found.offset)
    return _coded(qlora_dequantize(found), sum(part.nbytes for part in parts))


def codebook16(w: FloatArray) -> Stored:
    """Return indices into 16 centroids of the matrix: Lloyd's rounds from the optimum of a sample."""
    from memsim.compression import codebook_bits

    column = w.reshape(-1, 1)
    first = optimal_codebook(column[:: -(-w.size // SAMPLE)], k=CENTROIDS)
    found = codebook(column, first, iterations=ROUNDS)
    bits = codebook_bits(n=w.size, k=CENTROIDS, bits=8 * found.centroids.itemsize).total
    return _coded(codebook_dequantize(*found).reshape(w.shape), -(-int(bits) // 8))


def gptq4(w: FloatArray, inputs: FloatArray) -> Stored:
    """Return 4-bit codes, two a byte, and one scale a column in the dtype of the weight."""
    codes, step = gptq_blocked(w, inputs, bits=GPTQ_BITS, block=GPTQ_BLOCK, damping=GPTQ_DAMPING)
    scale = step.astype(w.dtype)
    return _coded(codes.astype(w.dtype) * scale, _bytes_of(codes.size * GPTQ_BITS) + scale.nbytes)


def largest_half(w: FloatArray) -> Stored:
    """Return the half of largest magnitude, and one bit a weight that says where they stood."""
    return _sparse(w, magnitude(w, keep=w.size // 2), w.size)


def two_of_four(w: FloatArray) -> Stored:
    """Return two of every four inputs of an output, and two bits for each that say which."""
    keep = n_m(w.T).T
    return _sparse(w, keep, 2 * int(keep.sum()))


def half_rank(w: FloatArray) -> Stored:
    """Return two factors of half the rank at which they would take as much as the matrix."""
    left, right = truncated_svd(w, rank=max(break_even_rank(*w.shape) // 2, 1))
    count = left.size + right.size
    return Stored(left @ right.T, left.nbytes + right.nbytes, count, count)


def _coded(values: FloatArray, nbytes: int) -> Stored:
    """Return a matrix of as many numbers, each met by every token, in fewer bytes."""
    return dense(values)._replace(nbytes=nbytes)


def _sparse(w: FloatArray, keep: BoolArray, mask_bits: int) -> Stored:
    """Return the kept weights in their dtype and a mask."""
    count = int(keep.sum())
    values = np.where(keep, w, w.dtype.type(0))
    return Stored(values, count * w.itemsize + _bytes_of(mask_bits), count, count)


def _bytes_of(bits: int) -> int:
    return -(-bits // 8)
