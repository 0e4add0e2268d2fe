"""A step of training counted again from shapes: tensors that are kept, products, messages.

Nothing here reads a formula or a letter of the model: each product is a shape, each tensor a list of axes.
All layers of these decoders are alike, so that a stage is a number of layers times one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memsim.division import Division, reason_against
from memsim.hardware import hardware
from memsim.inference import Serving, inference
from memsim.sparse_model import sparse
from memsim.training_setting import Setting
from memsim.training_step import training_step

F = Fraction


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers, with experts or without, RMS norms."""

    layers: int
    width: int
    heads: int
    key_heads: int
    head: int
    ffn: int  # of every layer: the network, or what stands beside the experts
    experts: int
    active: int
    expert: int
    gated: bool
    tied: bool
    vocabulary: int = 1024

    def model(self) -> Any:
        one: dict[str, Any] = {
            "layers": self.layers, "width": self.width, "heads": self.heads, "key_heads": self.key_heads,
            "head_width": self.head, "gated": self.gated, "tied": self.tied, "norm": "rms",
            "vocabulary": self.vocabulary, "experts": max(self.experts, 1), "active": self.active,
            "expert_width": self.expert,
        }  # fmt: skip
        if self.experts:
            return sparse(**one, shared_width=self.ffn)
        return sparse(**one, moe_layers=0, ffn=self.ffn)


@dataclass
class Work:
    """Products and passes over memory of one layer and micro-batch on one rank."""

    flop: Any = 0
    moved: Any = 0

    def product(self, tokens: Any, columns: Any, rows: Any, itemsize: int) -> Work:
        """[tokens, columns] times [columns, rows]: two operations a multiply-add; all three move once."""
        self.flop += 2 * tokens * columns * rows
        self.moved += itemsize * (columns * rows + tokens * columns + tokens * rows)
        return self


class Hand:
    """One rank's share of a step, counted."""

    def __init__(self, shape: Shape, setting: Setting, division: Division) -> None:
        self.shape, self.setting, self.division = shape, setting, division
        self.tokens = F(division.micro_batch * setting.sequence, division.context)
        self.micro_batches = setting.batch // (division.data * division.micro_batch)
        chunk = -(-shape.layers // (division.pipeline * division.interleave))
        self.layers = chunk * division.interleave
        self.queries, self.keys = shape.heads * shape.head, shape.key_heads * shape.head
        self.matrices = 3 if shape.gated else 2
        self.bytes = 4 if division.precision == "fp32" else 2
        self.operand = 1 if division.precision == "fp8" else self.bytes
        self.flash, self.dropout = setting.attention == "flash", setting.dropout
        # What tensor parallelism leaves whole is divided along the sequence.
        self.outside = self.tokens / (division.tensor if division.sequence_parallel else 1)

    # Parameters of a rank, but for experts, and of its experts

    def parameters(self) -> tuple[Any, Any, Any]:
        s, t = self.shape, self.division.tensor
        attention = s.width * (self.queries + 2 * self.keys) + self.queries * s.width
        layer = F(attention + self.matrices * s.width * s.ffn, t) + 2 * s.width + s.width * s.experts
        own = F(s.experts, self.division.expert) * self.matrices * s.width * F(s.expert, t)
        table = F(s.vocabulary * s.width, t)
        norm = F(s.width, t)  # counted as divided with the head
        first = last = self.layers * layer
        if self.division.pipeline > 1:
            first, last = first + table, last + norm + table
        else:
            first = last = first + norm + table * (1 if s.tied else 2)
        return first, last, self.layers * own

    def states(self) -> tuple[Any, Any, Any]:
        d, zero = self.division, self.division.zero
        sizes = (self.bytes, 4 if self.setting.states == "megatron" else self.bytes)
        optimizer = 8 if d.precision == "fp32" else 12
        first, last, own = self.parameters()
        everyone = d.data * d.context

        def held(ranks: Any) -> Any:
            each = [F(size, ranks if zero >= stage else 1) for size, stage in zip(sizes, (3, 2), strict=True)]
            return sum(each) + (0 if d.offload else F(optimizer, ranks if zero >= 1 else 1))

        experts = own * held(F(everyone, d.expert))
        host = sum(
            count * F(optimizer, ranks if zero >= 1 else 1)
            for count, ranks in ((first, everyone), (own, F(everyone, d.expert)))
        )
        return first * held(everyone) + experts, last * held(everyone) + experts, host if d.offload else 0

    def kept(self) -> tuple[Any, Any]:
        """Bytes kept of a layer until its backward pass: all of it, and as recomputation leaves it."""
        s, t, d, y = self.shape, self.division.tensor, self.division, self.bytes
        everywhere = [(y, 4), (1, 2 * self.dropout)]  # two norms, inputs of two halves; two masks
        size = sum(itemsize * count * self.outside * s.width for itemsize, count in everywhere)
        size += y * self.tokens * F(2 * self.queries + 2 * self.keys, t)
        scores = F(s.heads, t) * self.tokens * self.setting.sequence
        if d.recompute == "none":
            softmax = y + (y + 1) * self.dropout  # its output; dropout's and a mask of bytes
            size += 4 * self.tokens * F(s.heads, t) if self.flash else softmax * scores
        size += y * self.tokens * self.matrices * F(s.ffn + self.routed * s.expert, t)
        size += y * self.outside * s.width * self.routed  # what is sent to experts
        return size, (y * self.outside * s.width if d.recompute == "full" else size)

    @property
    def routed(self) -> int:
        return self.shape.active if self.shape.experts else 0

    def memory(self) -> tuple[Any, Any]:
        d, s, m = self.division, self.shape, self.micro_batches
        p, v = d.pipeline, d.interleave
        whole, kept = self.kept()
        first, last, _ = self.states()
        # Of each of its v chunks, what a rank holds at its fullest; see the replay of schedules.
        chunks = (p * v + p - 1, (v - 1) * p + 1) if v > 1 else (p, 1)
        again = whole if d.recompute == "full" else 0
        embedding = self.dropout * self.outside * s.width * min(m, p)
        logits = 2 * self.bytes * self.outside * s.width + 4 * self.tokens * F(s.vocabulary, d.tensor)
        activations = [kept * self.layers * min(m, F(count, v)) + again for count in chunks]
        ends = [embedding, logits] if p > 1 else [embedding + logits] * 2
        dense, _, own = self.parameters()
        table = F(s.vocabulary * s.width, d.tensor)
        around = table if p > 1 else table * (1 if s.tied else 2) + F(s.width, d.tensor)
        a_layer = (dense - around + own) * F(p, s.layers)  # of the mean stage, as the formula has it
        fetched = 2 * self.bytes * a_layer if d.zero == 3 else 0
        return tuple(
            held + more + end + fetched
            for held, more, end in zip((first, last), activations, ends, strict=True)
        )  # type: ignore[return-value]

    # Operators: forward and backward

    def operators(self) -> dict[str, tuple[Work, Work]]:
        s, t, x, y = self.shape, self.division.tensor, self.tokens, self.operand
        found: dict[str, tuple[Work, Work]] = {}

        def add(name: str, forward: Work, flop: Any = 2, moved: Any = 2) -> None:
            found[name] = forward, Work(forward.flop * flop, forward.moved * moved)

        add("qkv", Work().product(x, s.width, F(self.queries + 2 * self.keys, t), y))
        add("out", Work().product(x, F(self.queries, t), s.width, y))
        wide = F(s.ffn, t)
        add("up", Work().product(x, s.width, (self.matrices - 1) * wide, y) if s.ffn else Work())
        add("down", Work().product(x, wide, s.width, y) if s.ffn else Work())
        if s.experts:
            own, routed, wide = F(s.experts, self.division.expert), x * s.active, F(s.expert, t)
            experts = Work()
            experts.flop = 2 * routed * self.matrices * s.width * wide
            experts.moved = y * own * self.matrices * s.width * wide  # every expert that is here
            experts.moved += y * routed * (2 * s.width + self.matrices * wide)
            add("experts", experts)
        # Scores: a rank's queries meet all keys of the sequence, which travel around the ring.
        y, pairs = self.bytes, x * self.setting.sequence * F(s.heads, t)
        core = Work(2 * 2 * pairs * s.head / (2 if self.flash else 1))
        everyone = self.division.context * x  # tokens
        core.moved = y * (2 * x * F(self.queries, t) + 2 * everyone * F(self.keys, t))
        if not self.flash:  # scores are written and weights are read
            core.moved += pairs * 2 * y
            # Between them softmax reads and writes, and dropout, with a mask; back, softmax reads one more.
            masked = self.dropout * (2 * y + 1)
            found["softmax"] = Work(0, pairs * (2 * y + masked)), Work(0, pairs * (3 * y + masked))
        add("core", core, flop=F(5, 2) if self.flash else 2)
        norms, additions, masks = 2 * 2, 2 * 3, 2 * self.dropout
        point = Work(0, (y * (norms + additions) + masks) * self.outside * s.width)
        point.moved += y * x * self.matrices * F(s.ffn + self.routed * s.expert, t)
        add("pointwise", point, moved=F(3, 2))
        return found

    def head(self) -> tuple[Work, Work]:
        s, t, x, y = self.shape, self.division.tensor, self.tokens, self.bytes
        rows = F(s.vocabulary, t)
        forward = Work(2 * x * s.width * rows, y * (s.width * rows + x * s.width) + 3 * 4 * x * rows)
        return forward, Work(2 * forward.flop, 2 * forward.moved)

    def seconds(self, name: str, work: Work) -> Any:
        card, setting = hardware(self.setting.hardware), self.setting
        products = {"bf16": "bf16", "fp8": "fp8", "fp32": "tf32"}[self.division.precision]
        format_ = products if name in ("qkv", "out", "up", "down", "experts") else products.replace("8", "")
        rate = card.peak("bf16" if format_ == "fp" else format_).value
        share = setting.compute if name != "core" or setting.scores is None else setting.scores
        flop = F(work.flop) / (rate * F(share))
        return max(flop, F(work.moved) / (card.hbm_bandwidth.value * F(setting.memory)))


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
