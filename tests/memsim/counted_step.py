"""A rank's share of a step counted from shapes: tensors that are kept, products, passes over memory.

Nothing here reads a formula or a letter of the model: each product is a shape, each tensor a list of axes.
All layers of these decoders are alike, so that a stage is a number of layers times one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from memsim.hardware import hardware
from memsim.planning.division import Division
from memsim.planning.training_setting import Setting
from memsim.sparse_model import sparse

__all__ = ["Hand", "Shape", "Work"]

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
