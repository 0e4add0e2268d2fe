"""A step of training against the papers' own formulas, written out again here, and against its limits."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.communication import zero_communication
from memsim.decoder import PARAMETERS, decoder_letters
from memsim.model import dense, model_names
from memsim.parameters import parameters
from memsim.planning.division import Division, reason_against
from memsim.planning.training_setting import AS_IN_2022, Setting
from memsim.planning.training_step import training_step
from refimpl.errors import OptionError

GIB = 2**30
MEGATRON = Setting("gpt3-175b", "a100-80gb", accelerators=64, batch=64, sequence=2048, **AS_IN_2022)
PAPER = Division(tensor=8, pipeline=8, interleave=3, recompute="selective", sequence_parallel=True)


def gpt(layers: int, width: int, heads: int, vocabulary: int = 51200) -> Any:
    shape = {"layers": layers, "width": width, "heads": heads, "ffn": 4 * width}
    return dense(**shape, vocabulary=vocabulary, positions=2048)


def korthikanti(s: int, b: int, h: int, a: int, t: int, *, parallel: bool, recompute: str) -> Fraction:
    """Table 2 of arXiv:2205.05198, a row for each technique."""
    scores = Fraction(5 * a * s, h)
    if recompute == "full":
        return Fraction(2 * s * b * h, t if parallel else 1)
    if recompute == "selective":
        scores = Fraction(0)
    if parallel:
        return s * b * h * (34 + scores) / t
    return s * b * h * (10 + 24 / Fraction(t) + scores / t)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_activations_of_a_layer_are_table_2(parallel: bool, recompute: Any, tensor: int) -> None:
    setting = Setting(gpt(4, 64, 8), "a100-80gb", tensor, 2, 32, attention="standard", dropout=True)
    division = Division(tensor=tensor, micro_batch=2, recompute=recompute, sequence_parallel=parallel)
    found = training_step(setting, division).value("a_kept")
    assert found == korthikanti(32, 2, 64, 8, tensor, parallel=parallel, recompute=recompute)


# h, L, a; tensor, stages, chunks; batch, micro-batch; GiB of activations with sequence parallelism and
# recomputed scores, per rank: arXiv:2205.05198, figures 1 and 7, reached by its formulas (no embedding).
@pytest.mark.parametrize(
    ("h", "L", "a", "p", "v", "batch", "micro", "gib"),
    [
        (6144, 48, 64, 1, 1, 4, 4, 9.5625),
        (12288, 96, 96, 8, 3, 64, 1, 12.352),
        (20480, 105, 128, 35, 3, 280, 1, 23.076),
        (25600, 128, 160, 64, 1, 512, 1, 26.5625),
    ],
)
def test_activations_of_the_paper(
    h: int, L: int, a: int, p: int, v: int, batch: int, micro: int, gib: float
) -> None:
    setting = Setting(gpt(L, h, a), "a100-80gb", 8 * p, batch, 2048, **AS_IN_2022)
    division = replace(PAPER, pipeline=p, interleave=v, micro_batch=micro)
    step = training_step(setting, division)
    assert float(step.value("a_kept") * step.value("l_first")) / GIB == pytest.approx(gib, abs=6e-4)


@pytest.mark.parametrize("name", ["llama-2-7b", "gpt3-175b", "deepseek-v2", "mixtral-8x7b", "opt-1.3b"])
def test_letters_hold_every_parameter(name: str) -> None:
    letters = decoder_letters(name)
    assert sum(letters[key] for key in PARAMETERS) == parameters(model=name).total


def test_every_model_has_letters_or_a_reason() -> None:
    read = 0
    for name in model_names():
        try:
            letters = decoder_letters(name)
        except OptionError:
            with pytest.raises(OptionError, match=r"expected (a decoder|feed-forward networks)"):
                decoder_letters(name)
            continue
        read += 1
        assert sum(letters[key] for key in PARAMETERS) == parameters(model=name).total
        assert 0 <= letters["W_a"] <= letters["W_x"]
    assert read > 30


def test_the_paper_s_plan_is_a_lower_bound_of_its_measurement() -> None:
    """13.75 s were measured (Table 5); with every efficiency 1 the model may not be slower."""
    step = training_step(MEGATRON, PAPER)
    assert 9 < step.time.total < 13.75
    full = training_step(MEGATRON, replace(PAPER, recompute="full", sequence_parallel=False))
    assert step.time.total < full.time.total < 18.13
    # Korthikanti et al., appendix A: model FLOPs 72BLsh²(1 + s/6h + V/12Lh), of which full recomputation
    # adds a third of all but the head's.
    B, L, s, h, V = 64, 96, 2048, 12288, 50257
    model = 72 * B * L * s * h**2 * (1 + Fraction(s, 6 * h) + Fraction(V, 12 * L * h))
    assert full.value("FLOP_model") == model
    assert full.value("FLOP_again") == 24 * B * L * s * h**2 * (1 + Fraction(s, 6 * h))
    assert step.value("FLOP_again") == 24 * B * L * s * h**2 * Fraction(s, 6 * h)


def test_states_are_divided_as_zero_divides_them() -> None:
    setting = Setting("gpt2", "a100-80gb", 8, 8, 1024, states="zero")
    count = parameters(model="gpt2").total
    for stage, expected in enumerate((Fraction(16), 4 + Fraction(12, 8), 2 + Fraction(14, 8), Fraction(2))):
        step = training_step(setting, Division(data=8, zero=stage))
        assert step.value("states_first") == expected * count
    offloaded = training_step(setting, Division(data=8, zero=2, offload=True))
    assert offloaded.value("states_first") == (2 + Fraction(2, 8)) * count
    assert offloaded.value("host") == Fraction(12, 8) * count
    assert training_step(setting, Division(data=8, zero=2)).value("host") == 0


def test_data_parallelism_sends_what_rings_send() -> None:
    """Without overlap: 2, 2, m + 1 and 3m phases of Ψ (d - 1)/d elements, over the link of the node."""
    setting = Setting("gpt2", "a100-80gb", 8, 32, 1024, states="zero", overlap=0)
    count, link = parameters(model="gpt2").total, 300_000_000_000
    one = Fraction(2 * count * 7, 8 * link)
    for stage, phases in enumerate((2, 2, 4 + 1, 3 * 4)):
        step = training_step(setting, Division(data=8, zero=stage))
        assert step.value("m") == 4
        assert step.value("data_step") == phases * one


def test_tensor_parallelism_sends_four_all_reduces_a_layer() -> None:
    setting = Setting("gpt2", "a100-80gb", 4, 4, 1024)
    step = training_step(setting, Division(tensor=4))
    sent = 4 * 2 * Fraction(3, 4) * 2 * 1024 * 768 * 12  # all-reduces, ring, bytes, tokens, width, layers
    assert step.value("tensor_step") == 4 * sent / 300_000_000_000
    again = training_step(setting, Division(tensor=4, recompute="full"))
    assert again.value("tensor_step") == step.value("tensor_step") * Fraction(6, 4)
    assert step.sent.total == 4 * sent
    assert again.sent.total == 4 * sent * Fraction(6, 4)


def test_gradients_of_products_are_two_products() -> None:
    """And those of FlashAttention five, of the two that were; of scores in memory four."""
    flash, standard = (
        training_step(Setting("llama-2-7b", "a100-80gb", 1, 1, 4096, attention=kind), Division())
        for kind in ("flash", "standard")
    )
    for name in ("qkv", "out", "up", "down", "head"):
        assert flash.value(f"g_{name}") == 2 * flash.value(f"f_{name}")
    assert flash.value("g_core") == Fraction(5, 2) * flash.value("f_core")
    assert standard.value("FLOP_core") == 2 * flash.value("FLOP_core")  # no half is left out
    # Layers, heads; the products write S and read P; softmax reads S and writes P; its gradient reads P and
    # dP and writes dS; 2 bytes each.
    scores = 32 * 32 * 4096**2
    assert standard.value("bytes_core") - flash.value("bytes_core") == 4 * scores
    assert standard.value("bytes_softmax") == 4 * scores
    assert standard.value("g_softmax") * 2_039_000_000_000 == 6 * scores
    assert flash.value("bytes_softmax") == flash.value("g_softmax") == 0


def test_dropout_of_scores_has_a_mask_of_bytes() -> None:
    step = training_step(
        Setting("llama-2-7b", "a100-80gb", 1, 1, 4096, attention="standard", dropout=True), Division()
    )
    scores = 32 * 32 * 4096**2  # dropout reads and writes 2 bytes, and writes a byte; its gradient reads it
    assert step.value("bytes_softmax") == (4 + 5) * scores
    assert step.value("g_softmax") * 2_039_000_000_000 == (6 + 5) * scores


def test_all_reduces_hide_behind_gradients_of_weights() -> None:
    """Those of the backward pass, as long as products take; half of them with sequence parallelism."""
    # Narrow products are too short to hide what is sent.
    for model, parallel in product(("gpt3-175b", "gpt2"), (False, True)):
        shown, hidden = (
            training_step(
                Setting(model, "a100-80gb", 4, 8, 1024, tensor_overlap=overlap),
                Division(tensor=4, sequence_parallel=parallel),
            )
            for overlap in (False, True)
        )
        room = hidden.value("f_qkv") + hidden.value("f_up")
        sent = hidden.value("tensor_f") * (Fraction(1, 2) if parallel else 1)
        assert shown.value("tensor_hidden") == 0
        assert shown.value("tensor") - hidden.value("tensor") == min(room, sent) > 0
        assert (sent > room) == (model == "gpt2")


def test_selective_recomputation_is_attention_again() -> None:
    step = training_step(MEGATRON, PAPER)
    assert step.value("again") == step.value("f_core") + step.value("f_softmax")
    assert step.value("f_core") > 0
    assert step.value("f_softmax") > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_volumes_are_those_of_zero(stage: Any) -> None:
    setting = Setting("gpt2", "a100-80gb", 8, 32, 1024, states="zero")
    step = training_step(setting, Division(data=8, zero=stage))
    ring: Any = {"ranks": 8, "stage": stage, "micro_batches": 4, "convention": "ring"}
    elements = zero_communication(parameters=parameters(model="gpt2").total, **ring).total
    assert step.sent["data parallelism"] == 2 * elements
    assert step.sent.total == 2 * elements  # nothing else is sent


def test_volumes_of_every_other_kind() -> None:
    """Bytes of a step counted in words: 2 bytes an element, 8 micro-batches of 1024 tokens of width 4096."""
    base = {"hardware": "h100-sxm", "batch": 16, "sequence": 1024}
    setting = Setting("mixtral-8x7b", accelerators=16, **base)
    division = Division(tensor=2, pipeline=2, data=2, context=2, expert=2)
    sent = training_step(setting, division).sent
    m, tokens, layers, width = 8, 512, 16, 4096  # of a rank: half of the sequence, half of the layers
    all_reduces = 4 * layers  # 2 forward, 2 backward, of a layer; on 2 ranks each sends half twice
    assert sent["tensor parallelism"] == m * all_reduces * 2 * Fraction(1, 2) * 2 * tokens * width
    # A rank that keeps half of the tokens gathers the inputs of both halves of a layer once more.
    parted = training_step(setting, replace(division, sequence_parallel=True)).sent
    gathers = (4 * 2 + 2) * layers  # an all-reduce is two rings; each sends half
    assert parted["tensor parallelism"] == m * gathers * Fraction(1, 2) * 2 * tokens * width
    keys_and_values = 2 * 8 * 128 // 2  # of a tensor-parallel rank
    assert sent["context parallelism"] == m * layers * (1 + 2) * 2 * tokens * keys_and_values
    exchanges = 4 * layers  # dispatch and combine, forward and backward, of 2 experts a token; half stays
    assert sent["expert parallelism"] == m * exchanges * Fraction(1, 2) * 2 * 2 * tokens * width
    assert sent["pipeline parallelism"] == m * 2 * 2 * tokens * width / 2


DIVISIONS = st.builds(
    Division,
    tensor=st.sampled_from((1, 2, 4)),
    pipeline=st.sampled_from((1, 2, 4)),
    data=st.sampled_from((1, 2, 4)),
    context=st.sampled_from((1, 2)),
    expert=st.sampled_from((1, 2)),
    interleave=st.sampled_from((1, 3)),
    micro_batch=st.sampled_from((1, 2)),
    zero=st.integers(0, 3),
    recompute=st.sampled_from(("none", "selective", "full")),
    sequence_parallel=st.booleans(),
    offload=st.booleans(),
    precision=st.sampled_from(("bf16", "fp32", "fp8")),
)


def runnable(division: Division, **options: Any) -> Setting | None:
    ranks = division.tensor * division.pipeline * division.data * division.context
    model = "mixtral-8x7b" if division.expert > 1 else "gpt2"
    setting = Setting(model, "h100-sxm", ranks, 16, 1024, **{"attention": "standard", **options})
    return None if reason_against(setting, division) else setting


@settings(max_examples=60, deadline=None)
@given(DIVISIONS)
def test_worse_machines_are_slower_and_sums_are_sums(division: Division) -> None:
    setting = runnable(division)
    if setting is None:
        return
    step = training_step(setting, division)
    assert step.time.total == step.value("step")
    assert step.memory.total == step.value("memory")
    assert 0 < step.value("mfu") <= step.value("hfu")
    for name in ("compute", "memory", "network"):
        slower = training_step(replace(setting, **{name: Fraction(1, 2)}), division)
        assert step.time.total <= slower.time.total <= 2 * step.time.total
        assert slower.memory.total == step.memory.total
    assert training_step(replace(setting, overlap=0), division).time.total >= step.time.total
    assert training_step(replace(setting, latency=1e-5), division).time.total >= step.time.total
    every = training_step(replace(setting, compute=0.5, memory=0.5, network=0.5), division)
    assert every.time.total == 2 * step.time.total  # time has no other scale, but for what overlaps


@settings(max_examples=60, deadline=None)
@given(DIVISIONS)
def test_limits(division: Division) -> None:
    setting = runnable(division)
    if setting is None:
        return
    step = training_step(setting, division)
    m, p, v = step.value("m"), division.pipeline, division.interleave
    assert step.value("bubble") == Fraction(p - 1) / (v * m) * m * step.value("slot")
    for size, name in (
        (division.tensor, "tensor_step"),
        (division.context, "context_step"),
        (division.expert, "expert_step"),
        (division.pipeline, "hops_step"),
        (division.data * division.context, "data"),
    ):
        if size == 1:
            assert step.value(name) == 0
    for stage in range(division.zero):
        less = replace(division, zero=stage)
        assert training_step(setting, less).value("states_first") >= step.value("states_first")
    if division.recompute != "none":
        kept = replace(division, recompute="none")
        assert training_step(setting, kept).value("a_kept") >= step.value("a_kept")
        assert training_step(setting, kept).time.total <= step.time.total


def test_stages_that_do_not_divide_the_layers_are_as_slow_as_the_fullest() -> None:
    """Llama 3 405B on 16 stages: 126 layers, so that 14 of them hold 8 layers."""
    setting = Setting("llama-3.1-405b", "h100-sxm", 128, 64, 8192)
    step = training_step(setting, Division(tensor=8, pipeline=16))
    assert step.value("l_chunk") == 8
    even = Setting(
        dense(
            layers=128, width=16384, heads=128, key_heads=8, ffn=53248, vocabulary=128256, gated=True,
            bias=False, norm="rms", tied=False,
        ),
        "h100-sxm", 128, 64, 8192,
    )  # fmt: skip
    more = training_step(even, Division(tensor=8, pipeline=16))
    assert step.time.total == more.time.total  # two layers more fill the other stages, and nobody waits
    assert step.memory.total == more.memory.total
    assert step.value("mfu") < more.value("mfu")
    two = training_step(setting, Division(tensor=8, pipeline=16, interleave=2))
    assert (two.value("l_chunk"), two.value("ρ")) == (4, Fraction(8, 126))


@pytest.mark.parametrize(
    ("division", "reason"),
    [
        (Division(data=2), "accelerators"),
        (Division(data=8, micro_batch=3), "batch"),
        (Division(pipeline=8, interleave=2), "layers"),
        (Division(pipeline=2, data=4, interleave=4), "fewer chunks"),
        (Division(tensor=8), "heads"),
        (Division(data=4, pipeline=2, zero=2), "ZeRO 0 or 1"),
        (Division(data=8, expert=2), "experts"),
        (Division(data=8, interleave=2), "interleave"),
        (Division(data=8, sequence_parallel=True), "tensor parallelism"),
        (Division(data=8, recompute="selective"), "FlashAttention"),
    ],
)
def test_what_cannot_be_run_says_why(division: Division, reason: str) -> None:
    setting = Setting("gpt2", "a100-80gb", 8, 64, 1024)
    with pytest.raises(OptionError, match=reason):
        training_step(setting, division)


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "none"},
        {"states": "adam"},
        {"compute": 2},
        {"network": 0},
        {"overlap": -1},
        {"latency": -1},
        {"batch": 0.5},
        {"hardware": "v100-32gb"},
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any]) -> None:
    setting = replace(Setting("gpt2", "a100-80gb", 8, 64, 1024), **change)
    with pytest.raises(OptionError):
        training_step(setting, Division(data=8))


def test_printed_formulas_hold_their_value() -> None:
    line = training_step(MEGATRON, PAPER).quantities["bubble"].explain()
    assert line.startswith("pipeline bubble: (p - 1)*slot/v = (8 - 1)*")
    assert math.isfinite(float(training_step(MEGATRON, PAPER).value("hfu")))
