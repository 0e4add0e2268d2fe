"""Functions of the user's as the Hopper kernels write them down: the same numbers, in 32 bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cuda_backend.attention.traced import source_of
from cuda_backend.attention.traced_values import LONGEST
from refimpl.attention import mods
from refimpl.attention.samples_flexible import MASKS, SCORES, sample_flexible
from refimpl.attention.user_functions import as_mod

RNG = np.random.default_rng(0)
SHAPE: dict[str, Any] = {"B": 2, "Tq": 11, "Tk": 13, "Hkv": 2, "group": 2, "D": 3, "Dv": 2}


def int32(x: Any) -> int:
    """Return a number that fits, as a register holds it."""
    assert -(2**31) <= x < 2**31, "does not fit"
    return int(x)


def uint32(x: Any) -> int:
    assert 0 <= x < 2**32, "does not fit"
    return int(x)


def float32(x: Any) -> Any:
    return np.float32(x)


def run(
    function: Any, aux: tuple[Any, ...], result: str, entries: Any, scale: float = 0.25
) -> list[tuple[Any, Any]]:
    """Return what the traced and what the given function say of each entry."""
    mod = as_mod("given", function, () if result == "bool" else ("score",))
    arrays = tuple(("float32" if x.dtype.kind == "f" else x.dtype.name, x.ndim) for x in aux)
    source = source_of(mod, arrays, result)
    assert source is not None
    scope = {
        "int32": int32, "uint32": uint32, "float32": float32, "infinity": np.float32(np.inf),
        "exp2": lambda x: np.exp2(x, dtype=np.float32), "reciprocal": lambda x: np.float32(1) / x,
    }  # fmt: skip
    exec(source, scope)
    narrow = tuple(x.astype(np.float32) if x.dtype.kind == "f" else x for x in aux)
    traced: Any = scope["traced"]
    factor = np.float32(scale)

    def asked(score: Any, b: int, h: int, i: int, j: int) -> Any:
        """Ask of the place of a score in tiles of rows and columns of four."""
        parts = (i - i % 4, j - j % 4, i % 4, j % 4)
        scales = factor, np.float32(1) / factor
        found = traced(score / factor, scales, b, h, i, j, *map(np.float32, parts), narrow)
        return found * factor if result == "folded" else found

    return [
        (
            traced(*entry, narrow) if result == "bool" else asked(*entry),
            function(*entry, *((aux,) if mod.takes_aux else ())),
        )
        for entry in entries
    ]


def indices(count: int = 300) -> Any:
    return zip(*(RNG.integers(0, n, count).tolist() for n in (2, 4, 11, 11)), strict=True)


@pytest.mark.parametrize("name", [mask for mask in MASKS if mask != "none"])
def test_masks(name: str) -> None:
    case = sample_flexible(RNG, mask=name, **SHAPE)
    for found, wanted in run(case.kwargs["mask_mod"], case.kwargs.get("aux", ()), "bool", indices()):
        assert bool(found) == bool(wanted)


@pytest.mark.parametrize("name", [score for score in SCORES if score != "none"])
def test_scores(name: str) -> None:
    case = sample_flexible(RNG, score=name, **SHAPE)
    scores = RNG.standard_normal(300).astype(np.float32)
    entries = [(score, *entry) for score, entry in zip(scores, indices(), strict=True)]
    given = case.kwargs["score_mod"], case.kwargs.get("aux", ())
    for result in ("float", "folded") if name == "alibi" else ("float",):
        for found, wanted in run(*given, result, entries):
            assert found.dtype == np.float32
            assert abs(found - wanted) <= 4e-6 * (1 + abs(wanted))


def chained(b: Any, h: Any, i: Any, j: Any) -> Any:
    return b <= j < i + h or (not (i % 3) and min(i, j) > 2)


def hashed(b: Any, h: Any, i: Any, j: Any) -> Any:
    """Numbers beyond 32 bits, and what is left of them."""
    return ((i * 100003 + j * 7919 + 31 * h) % 5 != 0) ^ (-i // 3 + 7 > j - b)


def test_logic_and_large_numbers() -> None:
    large = [(1, 3, int(i), int(j)) for i, j in RNG.integers(0, LONGEST, (100, 2))]
    for function in (chained, hashed):
        for found, wanted in run(function, (), "bool", [*indices(), *large]):
            assert bool(found) == bool(wanted)


def test_a_mask_rounds_as_the_user_does() -> None:
    def within(b: Any, h: Any, i: Any, j: Any) -> Any:
        return np.float32(0.1) * i * np.float32(10.0) <= i

    entries = [(0, 0, i, 0) for i in range(1000)]
    found = run(within, (), "bool", entries)
    assert len({bool(wanted) for _, wanted in found}) == 2
    assert all(bool(x) == bool(wanted) for x, wanted in found)


def test_floats_of_indices() -> None:
    def score(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        far = max(float(i - j), 0.0) / 7.0
        return -math.inf if far > 1.2 else score * 0.5**1 + math.exp(-far) - abs(far - 0.5) * (j > 4)

    entries = [(np.float32(0.3), *entry) for entry in indices()]
    for found, wanted in run(score, (), "float", entries):
        assert found == wanted or abs(found - wanted) < 1e-6


def biased(score: Any, b: Any, h: Any, i: Any, j: Any, aux: Any) -> Any:
    """Terms beside a score: of arrays, a constant, none; it is asked for itself, too."""
    if j > i + 3:
        return -math.inf
    near = 3.0 * aux[0][h, i] * aux[1][b] - (2.5 if score > 1.0 and aux[2][j % 3] else -0.25)
    return 1.5 - (float(i - j) * 0.125 - score) + near


def bent(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 3.0 * (0.5 * math.tanh(score * 2.0 / 3.0)) - 0.1 * (0.3 * (i - j))


ARRAYS = RNG.standard_normal((4, 11)), RNG.standard_normal(2), np.array([1, 0, 2])


@pytest.mark.parametrize("result", ["float", "folded"])
@pytest.mark.parametrize("scale", [0.125, 3.0])
def test_scores_with_terms(result: str, scale: float) -> None:
    scores = RNG.standard_normal(300).astype(np.float32)
    entries = [(score, *entry) for score, entry in zip(scores, indices(), strict=True)]
    for found, wanted in run(biased, ARRAYS, result, entries, scale):
        assert found == wanted or abs(found - wanted) <= 4e-6 * (1 + abs(wanted))
    if result == "float":
        for found, wanted in run(bent, (), result, entries, scale):
            assert abs(found - wanted) <= 4e-6 * (1 + abs(wanted))


def test_what_folds() -> None:
    """A score with products beside it; not one that is bent or multiplied, nor where nothing is saved."""
    named = {name: as_mod("score_mod", mod, ("score",)) for name, mod in {
        "alibi": mods.alibi(), "biased": biased, "softcap": mods.softcap(2.0), "bent": bent,
        "twice": lambda score, b, h, i, j: 2 * score - j, "itself": lambda score, b, h, i, j: score,
        "less": lambda score, b, h, i, j: 0.5 * j - score, "both": lambda score, b, h, i, j: score + score,
        "near": lambda score, b, h, i, j: score - 0.5 * j if i > j else score,
    }.items()}  # fmt: skip
    arrays = (("float32", 1),)
    kinds = {"biased": (("float32", 2), ("float32", 1), ("int64", 1))}
    found = {name for name, mod in named.items() if source_of(mod, kinds.get(name, arrays), "folded")}
    assert found == {"alibi", "biased", "less", "near"}


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, i, j: i / 2 < j,  # a double on the device
        lambda b, h, i, j: i // (j - 3) == 0,  # may divide by 0
        lambda b, h, i, j: (i & 7) == 0,
        lambda b, h, i, j: any(j == n for n in range(i)),
        lambda b, h, i, j: j,
        lambda b, h, i, j: np.logical_and(i < j, j < 4),
        lambda b, h, i, j: i * j * i * j < 7,
        lambda b, h, i, j: near.nonsense(i),  # type: ignore[name-defined]  # noqa: F821
    ],
)
def test_the_rest_is_left_to_the_compiler(function: Any) -> None:
    assert source_of(as_mod("mask_mod", function), (), "bool") is None


def test_nothing_is_wider_than_it_needs() -> None:
    source = source_of(as_mod("mask_mod", mods.sliding(5)), (), "bool")
    assert source is not None
    assert all("int32(" in line or "<=" in line for line in source.splitlines()[1:-1])
