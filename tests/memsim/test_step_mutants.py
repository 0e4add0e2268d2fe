"""Each formula of a step changed a little must be caught by a test that says what it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

import memsim.inference
import memsim.planning.training_step
from memsim.derivation import Definition
from memsim.planning.division import Division
from memsim.planning.division_memory import MEMORY
from memsim.planning.division_time import TIME
from memsim.planning.training_setting import Setting
from memsim.planning.training_step import training_step
from memsim.serving_formulas import SERVING
from memsim.step_timeline import Durations, step_tasks
from memsim.streams import makespan, play
from refimpl.parallel.schedules import pipeline_schedule
from tests.memsim import test_inference as inference_tests
from tests.memsim import test_step_by_hand as hand
from tests.memsim import test_training_step as step_tests
from tests.memsim.counted_step import Shape

TABLE_2 = [(parallel, recompute) for parallel in (False, True) for recompute in ("none", "selective", "full")]


def table_2() -> None:
    for parallel, recompute in TABLE_2:
        step_tests.test_activations_of_a_layer_are_table_2(parallel, recompute, 4)


def paper() -> None:
    step_tests.test_activations_of_the_paper(12288, 96, 96, 8, 3, 64, 1, 12.352)


def volumes() -> None:
    step_tests.test_volumes_of_every_other_kind()


def bounds() -> None:
    """Step times of two layouts are sums of parts counted by hand, on a link and a card of round numbers."""
    step_tests.test_data_parallelism_sends_what_rings_send()
    step_tests.test_tensor_parallelism_sends_four_all_reduces_a_layer()


def optimizer() -> None:
    """A gradient of 4 bytes is read for the norm, clipped in place, read by Adam and set to zero: 20 bytes.

    Adam reads and writes 12 and writes 2.  Offloaded, 4 and 2 cross the link to the host.
    """
    setting = Setting("gpt2", "a100-80gb", 1, 1, 64)
    step = training_step(setting, Division())
    count = step.value("P_first")
    assert step.value("optimizer") * 2_039_000_000_000 == count * (20 + 24 + 2)
    away = training_step(setting, Division(offload=True))
    assert away.value("optimizer") * 32_000_000_000 == count * 6


def pipeline() -> None:
    """The closed form is what the timeline plays, with a head and interleaving."""
    division = Division(tensor=2, pipeline=4, interleave=3)
    step = training_step(Setting("gpt2", "a100-80gb", 8, 8, 512), division)
    v = 3
    one = [step.value(name) / v for name in ("forward", "gradient", "tensor_f")]
    back = (step.value("tensor") - step.value("tensor_f")) / v
    durations = Durations(*one, back, step.value("f_head"), step.value("g_head"))
    schedule = pipeline_schedule(schedule="interleaved", ranks=4, micro_batches=8, chunks=3)
    hops = step.value("hops_step") + 3 * step.value("hops") / v
    assert makespan(play(step_tasks(durations, schedule))) == step.value("step") - hops - step.value(
        "optimizer"
    )


def utilization() -> None:
    step_tests.test_the_paper_s_plan_is_a_lower_bound_of_its_measurement()


SHAPES = (
    Shape(4, 64, 8, 4, 16, 96, 4, 2, 48, gated=True, tied=False),
    Shape(6, 512, 8, 8, 64, 1024, 0, 1, 48, gated=False, tied=True),
    Shape(4, 4096, 8, 4, 64, 0, 4, 1, 2048, gated=True, tied=True),
)
CASES: tuple[tuple[Division, dict[str, Any]], ...] = (
    (Division(tensor=2, data=2, expert=2, zero=3, sequence_parallel=True), {"attention": "flash"}),
    (Division(tensor=2, pipeline=2, interleave=2, offload=True, zero=1), {"attention": "standard"}),
    (Division(pipeline=2, data=2, expert=2, zero=1, offload=True), {"attention": "flash"}),
    (Division(context=2, recompute="selective"), {"attention": "standard", "dropout": True}),
    (
        Division(tensor=4, micro_batch=2, recompute="full"),
        {"attention": "flash", "scores": Fraction(1, 10**4)},
    ),
)


def shapes() -> None:
    """Against tensors and products counted from their shapes."""
    for shape, case in itertools.product(SHAPES, CASES):
        assert hand.agrees(shape, *case)


def exchanges() -> None:
    hand.test_experts_exchange_the_part_of_a_sequence_that_a_rank_has()


def places() -> None:
    for division, name, share in hand.PLACES:
        hand.test_links_of_a_group_are_those_of_its_place(division, name, share)


def rings() -> None:
    hand.test_keys_and_values_hide_behind_scores_both_ways()


STEP_MUTANTS: list[tuple[str, str, str, Callable[[], None]]] = [
    ("bytes_experts", "W_x/(e*t)", "W_x/t", shapes),
    ("bytes_experts", "2h*K_x", "h*K_x", shapes),
    ("FLOP_experts", "2x", "x", shapes),
    ("bytes_core", "c*A_k", "A_k", shapes),
    ("bytes_core", "2y*b", "y*b", shapes),
    ("bytes_softmax", "2y + 1", "2y", shapes),
    ("g_softmax", "3y", "2y", shapes),
    ("again", "f_core + f_softmax", "f_core", shapes),
    ("bytes_up", "h*L_f", "h*L", shapes),
    ("bytes_head", "12x", "4x", shapes),
    ("bytes_pointwise", "10h", "8h", shapes),
    ("g_pointwise", "1.5", "2", shapes),
    ("f_core", "η_a", "η_m", shapes),
    ("a_s", "4H*x/t", "4H*x", shapes),
    ("a_f", "F + F_x", "F", shapes),
    ("a_x", "L*u", "L", shapes),
    ("a_out", "4x", "2x", shapes),
    ("gathered", "2y_w", "y_w", shapes),
    ("P_expert", "e*t", "e", shapes),
    ("P_last", "P_e", "0", shapes),
    ("host", " + P_expert/x_o", "", shapes),
    ("x_o", "d*c/e", "d*c", shapes),
    ("l_last", "*p + 1", "*p", shapes),
    ("sent_e", "e*u", "e", exchanges),
    ("expert_f", "L_x", "L", exchanges),
    ("β_d", "max(1, N/(t))", "1", places),
    ("β_e", "t*c*e", "e", places),
    ("β_x", "t*e", "t", places),
    ("β_c", "t*c <= N", "c <= N", places),
    ("context", "2ring_f", "ring_f", rings),
    ("ring_f", "(c - 1)*α", "c*α", rings),
    ("a_r", "4y", "2y", table_2),
    ("a_r", "/u", "/t", table_2),
    ("a_a", "A_v", "0", table_2),
    ("a_s", "y + 1", "y", table_2),
    ("a_s", "r > 0", "r > 1", table_2),
    ("a_f", "y*x*j", "y*x", table_2),
    ("a_kept", "y*x*h/u", "y*x*h", table_2),
    ("l_first", "(p - 1)", "p", paper),
    ("ρ", "l_chunk*v", "l_chunk", paper),
    ("l_first", "(p - 1)/v", "p - 1", paper),
    ("state", "y_g/n_g", "y_g/n_w", step_tests.test_states_are_divided_as_zero_divides_them),
    ("n_g", "z > 1", "z > 2", step_tests.test_states_are_divided_as_zero_divides_them),
    ("host", "o*y_o", "y_o", step_tests.test_states_are_divided_as_zero_divides_them),
    ("sent_t", "4(t - 1)", "2(t - 1)", volumes),
    ("sent_q", "2(t - 1)", "(t - 1)", volumes),
    ("sent_q", "if q > 0", "if q > 1", volumes),
    ("tensor_volume", "3 if", "4 if", bounds),
    ("tensor", "3 if r > 1 else 2", "2", bounds),
    ("sent_c", "(c - 1)", "c", volumes),
    ("context_volume", "+ 2", "+ 1", volumes),
    ("sent_e", "2(e - 1)", "(e - 1)", volumes),
    ("sent_p", "2v", "v", volumes),
    ("data", "2gather_d", "gather_d", bounds),
    ("data", "2reduce_d", "reduce_d", bounds),
    ("bubble", "/v", "", pipeline),
    ("compute", "+ head", "", pipeline),
    ("bubble", "(p - 1)", "p", pipeline),
    ("g_qkv", "2*FLOP", "FLOP", step_tests.test_gradients_of_products_are_two_products),
    ("optimizer", "2y_o", "y_o", optimizer),
    ("optimizer", "5y_g", "y_g", optimizer),
    ("again", "f_core + f_softmax", "f_core", step_tests.test_selective_recomputation_is_attention_again),
    ("bytes_softmax", "(2y + 1)", "2y", step_tests.test_dropout_of_scores_has_a_mask_of_bytes),
    ("g_softmax", "(3y", "(2y", step_tests.test_gradients_of_products_are_two_products),
    (
        "tensor_hidden",
        "min(f_qkv + f_up, ",
        "(",
        step_tests.test_all_reduces_hide_behind_gradients_of_weights,
    ),
    ("tensor_hidden", "(1 - q/2)", "1", step_tests.test_all_reduces_hide_behind_gradients_of_weights),
    ("optimizer", "/(C*", "/(M*", optimizer),
    ("FLOP_model", "6B*s*s", "12B*s*s", utilization),
    ("FLOP_again", "2B*s*(W_q", "2B*s*(W_h + W_q", utilization),
]


def changed(definitions: tuple[Definition, ...], name: str, old: str, new: str) -> tuple[Definition, ...]:
    found = [item for item in definitions if item.name == name]
    if not found:
        return definitions
    assert old in found[0].formula, found[0]
    mutant = found[0]._replace(formula=found[0].formula.replace(old, new))
    return tuple(mutant if item.name == name else item for item in definitions)


@pytest.mark.parametrize(
    ("name", "old", "new", "check"), STEP_MUTANTS, ids=[f"{m[0]}: {m[1]} -> {m[2]}" for m in STEP_MUTANTS]
)
def test_a_changed_formula_of_a_step_is_caught(
    name: str, old: str, new: str, check: Callable[[], None], monkeypatch: Any
) -> None:
    check()
    assert any(item.name == name for item in (*MEMORY, *TIME))
    monkeypatch.setattr(memsim.planning.training_step, "MEMORY", changed(MEMORY, name, old, new))
    monkeypatch.setattr(memsim.planning.training_step, "TIME", changed(TIME, name, old, new))
    with pytest.raises(AssertionError):
        check()


def by_hand() -> None:
    inference_tests.test_one_sequence_reads_every_weight()


def nodes() -> None:
    hand.test_a_prompt_and_a_step_on_16_ranks_by_hand()


SERVING_MUTANTS: list[tuple[str, str, str, Callable[[], None]]] = [
    ("weights", "(P_i + P_o)*y_h", "(P_i + P_o)*y_w", nodes),
    ("weights", "P_r*y_h", "P_r*y_h/t", nodes),
    ("working", "j*max", "2max", nodes),
    ("links_step", "+ α", "+ α/t", nodes),
    ("β", "t <= N", "t <= 2N", nodes),
    ("head_prompt", "2b", "b", nodes),
    (
        "d_c",
        "ceil(H_c/t)",
        "(H_c/t)",
        hand.test_key_heads_that_ranks_cannot_divide_evenly_fill_some_ranks_more,
    ),
    ("FLOP_prompt", "2b", "b", by_hand),
    ("read_step", "W_o", "0", by_hand),
    ("attention_step", "(n + a)", "n", by_hand),
    ("attention_prompt", "κ", "1", by_hand),
    ("head_step", "y_h", "y_w*2", by_hand),
    ("n", "(g + 1)/2", "g", by_hand),
    ("weights", "(P_i + P_o)", "P_i", by_hand),
    ("d_c", "H_c/ceil(H_c/t)", "t", inference_tests.test_few_key_heads_and_latents_are_copied_among_ranks),
    ("touched_step", "1 - K_x", "1 - 2K_x", inference_tests.test_experts_are_read_as_a_batch_needs_them),
    ("capacity_left", "- working", "", inference_tests.test_the_batch_limit_is_where_memory_ends),
    ("answer", "(g - 1)", "g", inference_tests.test_answers_add_up),
]


@pytest.mark.parametrize(
    ("name", "old", "new", "check"),
    SERVING_MUTANTS,
    ids=[f"{m[0]}: {m[1]} -> {m[2]}" for m in SERVING_MUTANTS],
)
def test_a_changed_formula_of_serving_is_caught(
    name: str, old: str, new: str, check: Callable[[], None], monkeypatch: Any
) -> None:
    check()
    monkeypatch.setattr(memsim.inference, "SERVING", changed(SERVING, name, old, new))
    with pytest.raises(AssertionError):
        check()
