"""Backward kernels that are wrong in one place, run in the simulator: the comparison must notice each."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

from cuda_backend.attention import backward, backward_portable, scores_portable, tiles_portable
from refimpl.registry import Case
from tests.cuda.judge import arrays
from tests.cuda.judge_backward import backward_of, gradient_difference

pytestmark = pytest.mark.cudasim

# Name: the module, what stands there, and the mistake in its place.
MUTANTS = {
    "scale missing in dK": (backward_portable, "p, _, dproduct = gradient(", "p, dproduct, _ = gradient("),
    "delta omitted": (scores_portable, "ds = p * (factor * dp - delta)", "ds = p * (factor * dp)"),
    "causal off by one": (scores_portable, "j <= i + offset", "j <= i + offset - 1"),
    "first tile of queries off by one": (
        backward_portable, "max(0, first - offset) // Br * Br", "max(0, first - offset + Br) // Br * Br"
    ),
    "group sum dropped": (backward_portable, "for member in range(group)", "for member in range(1)"),
    "last tile of queries dropped": (
        backward_portable, "range(begin, end, Br)", "range(begin, end - Br, Br)"
    ),
    "last tile of keys dropped": (backward_portable, "range(0, end, Bc)", "range(0, end - Bc, Bc)"),
    "last row of each tile dropped": (
        tiles_portable, "variant.tile(passing), variant", "variant.tile(passing) - 1, variant"
    ),
    "dropout missing in dV": (scores_portable, "return factor * p, ds", "return p, ds"),
    "dropout missing in dP": (scores_portable, "(factor * dp - delta)", "(dp - delta)"),
    "slope of the softcap missing": (scores_portable, "(_ONE - bent * bent)", "_ONE"),
}  # fmt: skip


def mutated(module: ModuleType, old: str, new: str) -> Any:
    """Return a copy of `module` with one place of its source changed."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    copy = ModuleType(f"{module.__name__}_mutant")
    exec(compile(source.replace(old, new), copy.__name__, "exec"), copy.__dict__)
    return copy


@pytest.fixture(scope="module")
def case() -> Case:
    options = {"causal": "bottom_right", "softcap": 2.0, "dropout_p": 0.25, "rng": 7, "block_sizes": (3, 4)}
    return backward_of(Case(arrays((1, 8, 10, 2, 1, 4, 3), "float32"), options), "float32")


def test_the_kernels_pass(case: Case) -> None:
    assert gradient_difference(backward.flash_attention_vjp, case, "float32") is None


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new = MUTANTS[name]
    copy = mutated(module, old, new)
    monkeypatch.setattr(
        backward_portable, "build", getattr(copy, "build", backward_portable.build.__wrapped__)
    )
    for factory in ("score_gradient", "accumulation"):
        if factory in vars(copy):
            monkeypatch.setattr(backward_portable, factory, getattr(copy, factory))
    assert gradient_difference(backward.flash_attention_vjp, case, "float32") is not None


def test_unwritten_outputs_are_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "launch", lambda *a, **o: None)
    assert "finite" in (gradient_difference(backward.flash_attention_vjp, case, "float32") or "")
