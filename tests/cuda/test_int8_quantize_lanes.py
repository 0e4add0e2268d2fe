"""What threads of the Hopper quantiser do one by one: absmax and codes of a row, marks of outliers."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from cuda_backend.int8 import arithmetic, quantize_hopper
from cuda_backend.int8.quantize_hopper import Variant
from cuda_backend.int8.rows_hopper import sixteen_bit_limit
from refimpl import quant
from tests.cuda.int8_hopper_played import KINDS
from tests.cuda.int8_judge import differing, matrix
from tests.cuda.lanes_played import Lanes
from tests.cuda.test_int8_lanes import mutant, placed

THREADS = 64
GARBAGE = 0x55


def product(a: Any, b: Any) -> Any:
    """Return a product as a GPU rounds it, whose NaN ends in a byte that is no 0."""
    found = np.float32(a) * np.float32(b)
    return np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0] if np.isnan(found) else found


def difference(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    K: int,
    threshold: Any,
    convention: Any,
    vectors: int,
    module: Any = quantize_hopper,
) -> str | None:
    """Return how codes of columns without outliers, absmax and marks differ from the reference.

    The rows: usual ones, one of zeros, one so small that its scale is infinite, special numbers.
    """
    x = np.concatenate([matrix(K, (2, K), kind), matrix(K + 1, (1, K), kind, 0.02), np.zeros((2, K))])
    x[3, :3] = [1e-39, -2e-39, 5e-40]
    x[0, 4] = threshold or 0  # an outlier under "released"
    x = placed(x.astype(KINDS[kind]))
    T, pitch = len(x), -(-K // 16) * 16
    with np.errstate(all="ignore"):
        expected = quant.quantize_rows(x, threshold=threshold, convention=convention)
    codes, absmax = placed(np.full((T, pitch), GARBAGE, np.int8)), placed(np.full(T, -1, np.float32))
    marks = placed(np.zeros(pitch, np.uint8))
    limit = 0 if threshold is None else sixteen_bit_limit(kind, threshold, convention)
    passes = [""] if threshold is None else ["cells"] if convention == "released" else ["mark", "columns"]
    for what in passes:
        lanes = Lanes(T, THREADS)
        lanes.install(monkeypatch, (arithmetic, quantize_hopper, module))
        monkeypatch.setattr(module, "product", product)
        kernel = module.build(Variant(kind, what, K % 8 == 0, THREADS, vectors))
        addresses = [x.ctypes.data, 2 * K, codes.ctypes.data, pitch, absmax.ctypes.data, marks.ctypes.data]
        given = (*map(np.uint64, addresses), np.int32(K), np.int32(limit))
        lanes.run(functools.partial(kernel, *given))
    if not np.array_equal(np.flatnonzero(marks), expected.outliers):
        return "marks differ"
    if np.any(codes[:, -(-K // 8) * 8 :] != GARBAGE):
        return "codes beyond a row"
    found = codes[:, :K].copy()
    if convention == "released":  # any codes
        found[:, expected.outliers] = 0
    return differing(expected._replace(codes=found, absmax=absmax), expected)


CALLS = [
    ("float16", 520, None, "released", 2),
    ("bfloat16", 1030, None, "released", 4),  # rows that are not whole vectors
    ("float16", 1024, 6.0, "released", 2),
    ("bfloat16", 520, 2.5, "paper", 2),
    ("float16", 1111, 6.0, "released", 0),  # rows that are read twice
    ("bfloat16", 1040, 2.5, "paper", 0),
]


@pytest.mark.parametrize("asked", CALLS)
def test_rows(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    assert difference(monkeypatch, *asked) is None


PLAIN, UNUSUAL, CELLS, COLUMNS = CALLS[:4]
TWICE = CALLS[5]
DROPPED = "                if COLUMNS:\n                    drop_marked(words, 0, column, mask, K)\n"
OWN = "            if column < K:\n                write("
HELD = f"            column = int32(WIDTH * (thread + v * THREADS))\n{OWN}"
MISTAKES = {
    "all rows are usual": (UNUSUAL, "            if usual:  #", "            if True:  #"),
    "unusual rows are written as usual ones": (UNUSUAL, "scale, False, target", "scale, True, target"),
    "unusual rows are not written": (UNUSUAL, "write_held(words, thread, scale, False, target, K)", "pass"),
    "infinite scales are usual": (UNUSUAL, "uint32(scale.view(np.uint32)) < uint32(INFINITE) and ", ""),
    "of rows that are read twice, all are usual": (TWICE, "usual = is_usual(largest, scale)", "usual = True"),
    "other rows of codes": (UNUSUAL, "codes + row * codes_row", "codes"),
    "the first vector of a thread": (UNUSUAL, "write(words, 4 * v, scale", "write(words, 0, scale"),
    "vectors lie side by side": (UNUSUAL, HELD, HELD.replace("thread + v * THREADS", "thread * VECTORS + v")),
    "codes beyond a row": (PLAIN, OWN, OWN.replace("K:", "K + WIDTH:")),
    "outliers in the maximum": (CELLS, "if MARK and top >= uint32(limit):", "if False:"),
    "outliers from the next number on": (CELLS, "if bits < uint32(limit)", "if bits <= uint32(limit)"),
    "marked columns stay": (COLUMNS, "words[first + i // 2] &= ~", "_ = ~"),
    "marked columns stay when they are read again":
        (TWICE, DROPPED + "                write(", "                write("),
    "marks of the other four": (COLUMNS, "flags[i // 4]", "flags[1 - i // 4]"),
    "the first warp's maximum": (CELLS, "tops[lane] if lane < WARPS", "tops[0] if lane < WARPS"),
    "absmax of another row": (CELLS, "absmax + uint64(4) * row", "absmax"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MISTAKES)
def test_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    asked, old, new = MISTAKES[wrong]
    assert difference(monkeypatch, *asked, mutant(quantize_hopper, old, new)) is not None
