"""Oracles of NF4, double quantisation, QLoRA, codebooks: bitsandbytes, scipy, scikit-learn, plain loops."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library

# The upper half of each gap between levels, written out again from the released decision tree's midpoints.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def _nearest(value: float, levels: Any) -> int:
    """Walk up while the next level is strictly nearer."""
    index = 0
    while index + 1 < len(levels) and value > (levels[index] + levels[index + 1]) / 2:
        index += 1
    return index


def _reciprocal(absmax: float) -> float:
    return 1 / absmax if absmax > 0 and math.isfinite(1 / absmax) else 0.0


def _nf4_blocks(numbers: list[float], block_size: int) -> tuple[list[int], list[float]]:
    codes, scales = [], []
    for start in range(0, len(numbers), block_size):
        block = numbers[start : start + block_size]
        absmax = max(abs(number) for number in block)
        scales.append(absmax)
        codes += [_nearest(number * _reciprocal(absmax), NF4) for number in block]
    return codes, scales


@oracle("quant.nf4")
def nf4_number_by_number(x: Any, /, *, block_size: int = 64) -> Any:
    codes, scales = _nf4_blocks([float(number) for number in x.reshape(-1)], block_size)
    codes += [7] * (len(codes) % 2)
    packed = [16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    return np.array(packed, np.uint8), np.array(scales, np.float64)


def _bitsandbytes() -> Any:
    """Return bitsandbytes' functions; its CPU build warns on import about kernels it does not find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library("bitsandbytes")
        return library("bitsandbytes.functional")


@oracle("quant.nf4")
def bitsandbytes_nf4(x: Any, /, *, block_size: int = 64) -> Any:
    functional, torch = _bitsandbytes(), library("torch")
    narrow = x.astype(np.float32)
    if block_size != 64 or not x.size or not x.any():
        raise NotImplementedError("blocks of 64; the absmax of zeros is 1e-38 there")
    packed, state = functional.quantize_4bit(torch.from_numpy(narrow), quant_type="nf4", blocksize=64)
    return packed.numpy().reshape(-1), state.absmax.double().numpy()


def _dynamic_map() -> list[float]:
    levels = [0.0, 1.0]
    for i in range(7):
        for j in range(2**i):
            middle = 0.1 + 0.9 * (j + 0.5) / 2**i
            levels += [middle * 10.0 ** (i - 6), -middle * 10.0 ** (i - 6)]
    return sorted(levels)


@oracle("quant.double")
def double_number_by_number(absmax: Any, /, *, block_size: int = 256) -> Any:
    numbers = [float(number) for number in absmax]
    offset = math.fsum(numbers) / len(numbers) if numbers else 0.0
    levels = [float(np.float32(level)) for level in _dynamic_map()]
    codes, scales = [], []
    for start in range(0, len(numbers), block_size):
        block = [number - offset for number in numbers[start : start + block_size]]
        largest = max(abs(number) for number in block)
        scales.append(largest)
        codes += [_nearest(number * _reciprocal(largest), levels) for number in block]
        if largest <= 1e-12 * abs(offset):
            raise NotImplementedError("differences that are nothing but the rounding of the mean")
    return np.array(codes, np.uint8), np.array(scales), np.array([offset])


@oracle("quant.double")
def bitsandbytes_blockwise(absmax: Any, /, *, block_size: int = 256) -> Any:
    """What ``quantize_4bit`` does with its absmax to compress them: mean off, then 8 bits in blocks."""
    functional, torch = _bitsandbytes(), library("torch")
    offset = np.array([math.fsum(absmax) / max(len(absmax), 1)])
    centered = absmax - offset
    blocks = [centered[i : i + block_size] for i in range(0, len(absmax), block_size)]
    exact = np.array([np.abs(block).max() for block in blocks])
    if not blocks or exact.min() < 1e-6 * offset[0]:
        raise NotImplementedError("differences that are nothing but the rounding of the mean")
    codes, state = functional.quantize_blockwise(
        torch.from_numpy(centered.astype(np.float32)), blocksize=block_size
    )
    levels = state.code.double().numpy()
    np.testing.assert_allclose(levels, _dynamic_map(), atol=6.1e-8)  # it is made in float32 throughout
    scales = state.absmax.double().numpy()
    scaled = centered / np.repeat(exact, block_size)[: len(absmax)]
    near = np.abs(scaled[:, None] - (levels[1:] + levels[:-1]) / 2).min()
    if near < 2.0**-16:  # the step of the table in which its CPU kernel looks codes up
        raise NotImplementedError("a number too near to the middle of two levels")
    np.testing.assert_allclose(scales, exact, rtol=1e-6)
    return codes.numpy().reshape(-1), exact, offset


@oracle("quant.qlora")
def qlora_with_a_dense_weight(
    x: Any, a: Any, b: Any, weight: Any, /, *, lora_alpha: float, block_size: int, scale_block_size: int
) -> Any:
    """The layer with its weight replaced by the dequantised copy, made number by number."""
    codes, absmax = _nf4_blocks([float(number) for number in weight.reshape(-1)], block_size)
    if not weight.size:
        return np.zeros((x.shape[0], weight.shape[1]))
    indices, scales, (offset,) = double_number_by_number(np.array(absmax), block_size=scale_block_size)
    levels = [float(np.float32(level)) for level in _dynamic_map()]
    restored = [levels[int(i)] * scales[n // scale_block_size] + offset for n, i in enumerate(indices)]
    flat = [NF4[code] * restored[n // block_size] for n, code in enumerate(codes)]
    return x @ (np.array(flat).reshape(weight.shape) + lora_alpha / max(a.shape[1], 1) * (a @ b))


@oracle("quant.codebook")
def scipy_kmeans2(x: Any, initial: Any, /, *, iterations: int) -> Any:
    from scipy.cluster.vq import ClusterError, kmeans2, vq

    if not x.size:
        raise NotImplementedError("no vectors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            centroids, _ = kmeans2(x, initial.copy(), iter=iterations, minit="matrix", missing="raise")
        except ClusterError:
            raise NotImplementedError("a cluster is empty") from None
    return vq(x, centroids)[0], centroids


@oracle("quant.codebook")
def sklearn_kmeans(x: Any, initial: Any, /, *, iterations: int) -> Any:
    cluster = library("sklearn.cluster")
    if len(x) < len(initial) or len(np.unique(x, axis=0)) < len(initial):
        raise NotImplementedError("fewer vectors than centroids")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged is what we ask for
        fit = cluster.KMeans(
            len(initial), init=initial, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd"
        )
        fit.fit(x)
    near = np.argmin(((x[:, None] - fit.cluster_centers_) ** 2).sum(axis=2), axis=1)
    first = np.argmin(((x[:, None] - initial) ** 2).sum(axis=2), axis=1)
    if len(np.unique(near)) < len(initial) or len(np.unique(first)) < len(initial):
        raise NotImplementedError("scikit-learn moves an empty cluster elsewhere")
    return near, fit.cluster_centers_


@oracle("quant.codebook.optimal")
def best_of_all_partitions(x: Any, /, *, k: int) -> Any:
    """Try every way to cut the sorted numbers."""
    numbers = sorted(float(number) for number in x)
    distinct = sorted(set(numbers))
    if len(distinct) > 9 or k >= len(distinct):
        raise NotImplementedError("too many partitions, or one centroid for each number")
    best: tuple[float, list[float]] = (math.inf, [])
    for cuts in itertools.combinations(distinct[1:], k - 1):
        borders = [-math.inf, *cuts, math.inf]
        groups = [
            [number for number in numbers if low <= number < high]
            for low, high in itertools.pairwise(borders)
        ]
        means = [math.fsum(group) / len(group) for group in groups]
        cost = math.fsum(
            (number - mean) ** 2 for group, mean in zip(groups, means, strict=True) for number in group
        )
        if cost < best[0] - 1e-12:
            best = cost, means
    return np.array(best[1])[:, None]


def _remaining_optimum(weight: Any, rounded: Any, h: Any, done: int) -> Any:
    """Return the later features' weights that are best once the first `done` are what they are."""
    left = slice(done, None)
    error = weight[:done] - rounded[:done]
    return weight[left] + np.linalg.solve(h[left, left], h[left, :done] @ error)


def _damped(x: Any, size: int, damping: float) -> Any:
    h = np.zeros((size, size))
    for row in x:
        h += np.outer(row, row)
    added = damping * np.trace(h) / max(size, 1)
    for k in range(size):
        h[k, k] = h[k, k] or 1.0  # any number: a feature without inputs neither gives nor takes errors
    return h + added * np.eye(size)


@oracle("quant.gptq")
def gptq_by_least_squares(weight: Any, x: Any, /, *, bits: int, damping: float) -> Any:
    """After each feature, solve anew for the best weights of those that are left."""
    K, N = weight.shape
    h, top = _damped(x, K, damping), 2 ** (bits - 1) - 1
    scale = np.array([max(map(abs, column), default=0.0) / top or 1.0 for column in weight.T])
    rounded = np.zeros_like(weight)
    for k in range(K):
        now = _remaining_optimum(weight, rounded, h, k)[0]
        steps = now / scale
        if np.any(np.abs(steps - np.floor(steps) - 0.5) < 1e-9):
            raise NotImplementedError("a tie that rounding decides")
        rounded[k] = np.clip(np.rint(steps), -top, top) * scale
    return np.rint(rounded / scale), scale.reshape(N)


@oracle("quant.qmoe.ternary")
def ternary_by_least_squares(weight: Any, x: Any, /, *, damping: float) -> Any:
    K, N = weight.shape
    h = _damped(x, K, damping)
    low = np.array([min([0.0, *column]) for column in weight.T])
    high = np.array([max([0.0, *column]) for column in weight.T])
    codes, rounded = np.zeros((K, N)), np.zeros((K, N))
    for k in range(K):
        now = _remaining_optimum(weight, rounded, h, k)[0]
        for n in range(N):
            code = (
                1 if now[n] > high[n] / 2 and high[n] > 0 else -1 if now[n] < low[n] / 2 and low[n] < 0 else 0
            )
            codes[k, n], rounded[k, n] = code, (low[n], 0.0, high[n])[code + 1]
    return codes, low, high


@oracle("quant.qmoe")
def qmoe_by_all_sequences(weights: Any, /, *, bits: int, max_pairs: int) -> Any:
    """Rank every sequence up to a length, then match the longest beginning by trying all of them."""
    if bits > 5:
        raise NotImplementedError("too many sequences to list")
    chance = {-1: Fraction(575, 10000), 0: Fraction(885, 1000), 1: Fraction(575, 10000)}
    pairs = list(itertools.product((-1, 0, 1), repeat=2))
    every = [
        (-math.prod(chance[a] * chance[b] for a, b in sequence), tuple(map(pairs.index, sequence)), sequence)
        for length in range(1, 4)
        for sequence in itertools.product(pairs, repeat=length)
    ]
    # Runs of zeros are the only long sequences among the most probable of a small dictionary.
    for length in range(4, max_pairs + 1):
        for place in (None, *itertools.product(range(length), range(9))):
            run: list[tuple[int, ...]] = [(0, 0)] * length
            if place is not None:
                run[place[0]] = pairs[place[1]]
            item = (
                -math.prod(chance[a] * chance[b] for a, b in run),
                tuple(map(pairs.index, run)),
                tuple(run),
            )
            if item not in every:
                every.append(item)
    ranked = sorted(item for item in every if len(item[2]) <= max_pairs)
    dictionary: list[tuple[tuple[int, ...], ...]] = []
    singles = 9
    for _, _, sequence in ranked:
        if len(dictionary) + singles == 2**bits:
            break
        singles -= len(sequence) == 1
        dictionary.append(sequence)
    dictionary += [sequence for _, _, sequence in ranked if len(sequence) == 1 and sequence not in dictionary]
    codes, starts = [], [0]
    for row in weights.tolist():
        row = row + [0] * (len(row) % 2)
        left = list(zip(row[::2], row[1::2], strict=True))
        while left:
            fitting = [s for s in dictionary if tuple(left[: len(s)]) == s]
            longest = max(fitting, key=len)
            codes.append(dictionary.index(longest))
            left = left[len(longest) :]
        starts.append(len(codes))
    return np.array(codes, np.uint16), np.array(starts, np.int32)
