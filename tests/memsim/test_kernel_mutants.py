"""The laws of kernels changed a little, each caught by a test that says what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import memsim.kernel_times
import memsim.planning.training_step
from memsim.kernel_times import KERNELS
from memsim.planning.division_time import KERNEL_TIME
from tests.memsim import test_kernel_times as kernel_tests

# Kind, field, old and new text, and the test that sees it.
KERNEL_MUTANTS: list[tuple[str, str, str, str, Callable[[], None]]] = [
    ("copy", "moved", "2bytes", "bytes", kernel_tests.test_kernels_by_hand),
    ("product", "computed", "256", "128", kernel_tests.test_kernels_by_hand),
    ("product", "moved", " + M*N", "", kernel_tests.test_kernels_by_hand),
    ("attention", "computed", " + 1/R_e", "", kernel_tests.test_what_an_h200_took),
    ("attention", "computed", "1/R_e", "2/R_e", kernel_tests.test_what_an_h200_took),
    ("attention", "computed", "ceil(N/128) + 1", "ceil(N/128)", kernel_tests.test_what_an_h200_took),
    ("attention", "exposed", "4B*H*N*D/β", "0", kernel_tests.test_what_an_h200_took),
    ("attention", "exposed", "4B", "2B", kernel_tests.test_what_an_h200_took),
    ("attention", "exposed", "4B", "8B", kernel_tests.test_what_an_h200_took),
    ("gradient", "computed", "2.5", "2", kernel_tests.test_gradients_that_were_measured_elsewhere),
    (
        "gradient",
        "computed",
        "1/R_e",
        "1/(2.5*R_e)",
        kernel_tests.test_gradients_that_were_measured_elsewhere,
    ),
    ("gradient", "exposed", "18B", "4B", kernel_tests.test_kernels_by_hand),
]
# Quantity, old and new text; seen in a step of one layer.
STEP_MUTANTS: list[tuple[str, str, str, Callable[[], None]]] = [
    ("f_qkv", " + start_qkv", "", kernel_tests.test_a_step_is_made_of_the_same_kernels),
    ("g_down", "2*start_down", "start_down", kernel_tests.test_a_step_is_made_of_the_same_kernels),
    ("g_core", "2.5", "2", kernel_tests.test_a_step_is_made_of_the_same_kernels),
    ("g_core", "(3 if", "(1 if", kernel_tests.test_a_step_is_made_of_the_same_kernels),
    ("f_core", "exposed_core", "0", kernel_tests.test_a_step_is_made_of_the_same_kernels),
    ("exposed_core", "A_o", "A_k", lambda: kernel_tests.test_grouped_keys_are_hidden()),
    ("exposed_back", "2A_v", "2A_q", lambda: kernel_tests.test_grouped_keys_are_hidden()),
    ("exp_core", "*κ", "", kernel_tests.test_a_step_is_made_of_the_same_kernels),
    ("exp_core", "H*", "H_k*", lambda: kernel_tests.test_grouped_keys_are_hidden()),
    ("whole_core", "2*128", "128", kernel_tests.test_a_step_is_made_of_the_same_kernels),
    ("start_pointwise", "5L", "L", lambda: kernel_tests.test_kernels_only_add("flash")),
    ("start_softmax", "(0 if φ > 0 else L*ρ)", "0", lambda: kernel_tests.test_kernels_only_add("standard")),
    ("start_core", "2L*ρ", "L*ρ", lambda: kernel_tests.test_kernels_only_add("standard")),
]


@pytest.mark.parametrize(
    ("kind", "field", "old", "new", "check"),
    KERNEL_MUTANTS,
    ids=[f"{m[0]}: {m[2]} -> {m[3]}" for m in KERNEL_MUTANTS],
)
def test_a_changed_law_of_kernels_is_caught(
    kind: str, field: str, old: str, new: str, check: Callable[[], None], monkeypatch: Any
) -> None:
    check()
    text = getattr(KERNELS[kind], field)
    assert old in text
    mutant = KERNELS[kind]._replace(**{field: text.replace(old, new)})
    monkeypatch.setitem(memsim.kernel_times.KERNELS, kind, mutant)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    ("name", "old", "new", "check"), STEP_MUTANTS, ids=[f"{m[0]}: {m[1]} -> {m[2]}" for m in STEP_MUTANTS]
)
def test_a_changed_kernel_of_a_step_is_caught(
    name: str, old: str, new: str, check: Callable[[], None], monkeypatch: Any
) -> None:
    check()
    (found,) = (item for item in KERNEL_TIME if item.name == name)
    assert old in found.formula
    mutant = found._replace(formula=found.formula.replace(old, new))
    chain = tuple(mutant if item.name == name else item for item in KERNEL_TIME)
    monkeypatch.setattr(memsim.planning.training_step, "KERNEL_TIME", chain)
    with pytest.raises(AssertionError):
        check()
