"""A step of training counted again from shapes: tensors that are kept, products, messages."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memsim.hardware import hardware
from memsim.inference import Serving, inference
from memsim.planning.division import Division, reason_against
from memsim.planning.training_setting import Setting
from memsim.planning.training_step import training_step
from memsim.sparse_model import sparse
from tests.memsim.counted_step import Hand, Shape

F = Fraction


SHAPES = st.builds(
    Shape,
    layers=st.sampled_from((4, 6)),
    width=st.sampled_from((64, 512, 4096)),
    heads=st.just(8),
    key_heads=st.sampled_from((4, 8)),
    head=st.sampled_from((16, 64)),
    ffn=st.sampled_from((0, 96, 1024)),
    experts=st.sampled_from((0, 4)),
    active=st.sampled_from((1, 2)),
    expert=st.sampled_from((48, 2048)),
    gated=st.booleans(),
    tied=st.booleans(),
)
DIVISIONS = st.builds(
    Division,
    tensor=st.sampled_from((1, 2, 4)),
    pipeline=st.sampled_from((1, 2)),
    data=st.sampled_from((1, 2, 4)),
    context=st.sampled_from((1, 2)),
    expert=st.sampled_from((1, 2)),
    interleave=st.sampled_from((1, 2)),
    micro_batch=st.sampled_from((1, 2)),
    zero=st.integers(0, 3),
    recompute=st.sampled_from(("none", "selective", "full")),
    sequence_parallel=st.booleans(),
    offload=st.booleans(),
    precision=st.sampled_from(("bf16", "fp8", "fp32")),
)
OPTIONS = st.fixed_dictionaries(
    {
        "attention": st.sampled_from(("flash", "standard")),
        "dropout": st.booleans(),
        "states": st.sampled_from(("megatron", "zero")),
        "compute": st.sampled_from((F(1), F(1, 2))),
        "scores": st.sampled_from((None, F(1, 3))),
        "memory": st.sampled_from((F(1), F(3, 4))),
    }
)


@settings(max_examples=80, deadline=None)
@given(SHAPES, DIVISIONS, OPTIONS)
def test_a_step_is_what_its_shapes_say(shape: Shape, division: Division, options: dict[str, Any]) -> None:
    assume(agrees(shape, division, options))


def agrees(shape: Shape, division: Division, options: dict[str, Any]) -> bool:
    """Compare every quantity, of the nearest division that can be run; return whether there is one."""
    if not shape.ffn + shape.experts:
        shape = replace(shape, ffn=48)
    if division.pipeline > 1 and division.zero > 1:
        division = replace(division, zero=division.zero - 2)
    if division.data * division.context == 1:
        division = replace(division, zero=0)
    if division.tensor == 1:
        division = replace(division, sequence_parallel=False)
    if not shape.experts or division.data % division.expert:
        division = replace(division, expert=1)
    if division.pipeline == 1:
        division = replace(division, interleave=1)
    if options["attention"] == "flash" and division.recompute == "selective":
        division = replace(division, recompute="full")
    ranks = division.tensor * division.pipeline * division.data * division.context
    setting = Setting(shape.model(), "h100-sxm", ranks, 16, 256, **options)
    if reason_against(setting, division) is not None:
        return False
    step, hand = training_step(setting, division), Hand(shape, setting, division)
    first, last, host = hand.states()
    assert (step.value("states_first"), step.value("states_last"), step.value("host")) == (first, last, host)
    assert (step.value("a_layer"), step.value("a_kept")) == hand.kept()
    assert (step.value("first"), step.value("last")) == hand.memory()
    found = hand.operators()
    for name, (forward, back) in found.items():
        assert step.value(f"FLOP_{name}") == hand.layers * forward.flop, name
        assert step.value(f"bytes_{name}") == hand.layers * forward.moved, name
        assert step.value(f"f_{name}") == hand.layers * hand.seconds(name, forward), name
        assert step.value(f"g_{name}") == hand.layers * hand.seconds(name, back), name
    ways = [hand.layers * sum(hand.seconds(k, pair[way]) for k, pair in found.items()) for way in (0, 1)]
    assert [step.value("forward"), step.value("gradient")] == ways
    scores = step.value("f_core") + step.value("f_softmax")
    again = {"none": 0, "selective": scores, "full": ways[0]}[division.recompute]
    assert step.value("again") == again
    forward, back = hand.head()
    assert (step.value("FLOP_head"), step.value("bytes_head")) == (forward.flop, forward.moved)
    assert step.value("head") == hand.seconds("head", forward) + hand.seconds("head", back)
    return True


def test_experts_exchange_the_part_of_a_sequence_that_a_rank_has() -> None:
    """4 of 8 ranks hold the same tokens: divided along the sequence, each sends a quarter of them."""
    shape = Shape(4, 64, 8, 8, 8, 96, 4, 2, 48, gated=True, tied=True)
    setting = Setting(shape.model(), "h100-sxm", 8, 16, 256, latency=F(1, 1000))
    division = Division(tensor=4, data=2, expert=2)
    whole = training_step(setting, division)
    parted = training_step(setting, replace(division, sequence_parallel=True))
    tokens, layers = 256, 4
    sent = 2 * layers * F(1, 2) * 2 * 2 * tokens * 64  # two ways, half leaves, bytes, experts a token
    assert whole.value("sent_e") == sent
    assert parted.value("sent_e") == sent / 4
    # One message to each other rank, there and back, in each layer that has experts.
    few = sparse(
        layers=4, moe_layers=1, width=64, heads=8, head_width=8, experts=4, active=2, expert_width=48, ffn=96,
        vocabulary=1024, gated=True, norm="rms",
    )  # fmt: skip
    one = training_step(replace(setting, model=few), division)
    assert one.value("expert_f") == sent / 4 / 450_000_000_000 + 2 * F(1, 1000)


# Of 16 ranks on two nodes of 8; shares of a network port's bandwidth, or None for the node's own links.
PLACES: tuple[tuple[Division, str, int | None], ...] = (
    (Division(tensor=8, data=2), "β_t", None),
    (Division(tensor=8, data=2), "β_d", 1),  # eight rings cross, a port each
    (Division(tensor=2, data=8), "β_d", 4),  # two rings share eight ports
    (Division(tensor=1, data=16), "β_d", 8),
    (Division(tensor=16), "β_t", 8),
    (Division(tensor=4, context=4), "β_c", 2),
    (Division(tensor=4, context=2, data=2), "β_c", None),
    (Division(tensor=4, data=4, expert=2), "β_x", 1),  # the same expert stands on two nodes
    (Division(tensor=4, data=4, expert=2), "β_e", None),
    (Division(tensor=4, data=4, expert=4), "β_e", 1),
    (Division(tensor=4, context=2, data=2, expert=2), "β_e", 1),
    (Division(tensor=8, pipeline=2), "β_p", 1),
)


@pytest.mark.parametrize(("division", "name", "share"), PLACES)
def test_links_of_a_group_are_those_of_its_place(division: Division, name: str, share: int | None) -> None:
    shape = Shape(4, 64, 16, 16, 8, 96, 4, 2, 48, gated=True, tied=True)
    setting = Setting(shape.model(), "h100-sxm", 16, 16, 256, network=F(1, 2))
    link, port = 450_000_000_000, 50_000_000_000
    expected = link if share is None else min(link, share * port)
    assert training_step(setting, division).value(name) == F(expected, 2)


def test_keys_and_values_hide_behind_scores_both_ways() -> None:
    """A round forward, twice as much back behind 2.5 times the work; recomputed scores bring one more."""
    shape = Shape(2, 64, 4, 4, 16, 96, 0, 1, 48, gated=True, tied=True)
    setting = Setting(shape.model(), "h100-sxm", 4, 4, 4096, latency=F(1, 10**5), overlap=F(1, 2))
    for options, again in (({}, 1), ({"attention": "standard"}, 2)):
        recompute: Any = "selective" if options else "none"
        step = training_step(
            replace(setting, **options),
            Division(context=4, recompute=recompute),  # type: ignore[arg-type]
        )
        tokens, layers = 1024, 2
        ring = layers * 3 * (F(2 * tokens * 2 * 64, 450_000_000_000) + F(1, 10**5))
        forward = ring - step.value("f_core") / 2
        back = 2 * ring - step.value("g_core") / 2
        assert 0 < forward < back
        assert step.value("context") == again * forward + back


# Inference


def test_a_prompt_and_a_step_on_16_ranks_by_hand() -> None:
    """Llama-2-70B in NF4 on two nodes: 80 layers, 64 heads, 8 of keys, width 8192, network 28672."""
    t, b, s, g, lag = 16, 64, 512, 101, F(1, 10**5)
    serving = Serving("llama-2-70b", "h100-sxm", t, b, s, g, "nf4", "fp8", latency=lag, network=F(1, 2))
    served = inference(serving)
    layers, width, ffn, rows, keys = 80, 8192, 28672, 32000, 1024
    peak, hbm, port = hardware("h100-sxm").peak("bf16").value, 3_350_000_000_000, 50_000_000_000
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * ffn)
    norms = (2 * layers + 1) * width
    ends = 2 * rows * width + width  # the last norm is counted as divided with the head
    expected = F(weights * F(9, 16), t) + F(ends, t) * 2 + (norms - width) * 2
    assert served.value("weights") == expected
    cached = b * (s + g) * layers * F(2 * keys, 8)  # fp8; of 16 ranks two hold the same
    assert served.value("cache") == cached
    working = 2 * s * (2 * width + F(width + 2 * keys + 3 * ffn, t))
    assert served.value("working") == working
    assert served.value("memory") == expected + cached + working
    assert served.value("limit") == (80 * 10**9 - expected - working) / (cached / b)
    assert served.value("limit") == served.value("capacity_left") / (cached / b)
    for name, tokens in (("prompt", b * s), ("step", b)):
        ring = 2 * (t - 1) * (lag + F(tokens * width * 2, t) / (port // 2))
        assert served.value(f"links_{name}") == layers * 2 * ring
        products = max(F(2 * tokens * weights, t * peak), F(weights * 9, 16 * t * hbm))
        assert served.value(f"weights_{name}") == products
        head = max(F(2 * b * rows * width, t * peak), F(2 * rows * width, t * hbm))
        assert served.value(f"head_{name}") == head
    many = inference(replace(serving, batch=1000))  # whose heads are bound by computation
    assert many.value("head_step") == many.value("head_prompt") == F(2 * 1000 * rows * width, t * peak)


def test_key_heads_that_ranks_cannot_divide_evenly_fill_some_ranks_more() -> None:
    """4 key heads on 3 ranks: one of them holds two."""
    shape = Shape(2, 96, 12, 4, 8, 96, 0, 1, 48, gated=True, tied=True)
    served = inference(Serving(shape.model(), "h100-sxm", tensor=3, prompt=10, generated=6))
    assert served.value("cache") == 16 * 2 * 2 * (2 * 2 * 8)  # tokens, layers, bytes, keys and values
    alone = inference(Serving(shape.model(), "h100-sxm", tensor=12, prompt=10, generated=6))
    assert alone.value("cache") == 16 * 2 * 2 * (2 * 8)
