"""Laws of what tensor parallelism costs: the formulas are what rings send and what a rank keeps."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from memsim.estimate import Estimate
from memsim.laws.comparison import same
from memsim.prices.tensor import block_phases
from memsim.training_memory import block_activations
from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Estimate]
SENT, KEPT = "cost.tensor_parallel", "cost.tensor_parallel.activations"


@law(SENT)
def a_block_sends_what_is_counted(f: Model, case: Case, _close: object) -> None:
    """Where the tokens divide, the formula is what `parallel.tensor` counts, tokens split or not."""
    given = case.kwargs
    t, passes = given["ranks"], 3 if given["recompute"] == "full" else 2
    whole = case.replace(batch=t * given["batch"])
    for split in (False, True):
        phases = block_phases(
            tokens=whole.kwargs["batch"] * given["sequence"],
            width=given["hidden"],
            itemsize=1,
            ranks=t,
            passes=passes,
            replicated=(),
            sequence_parallel=split,
            backward=True,
        )
        counted = given["layers"] * sum(sent.bytes for sent in phases.values())
        same(whole.call(f).total, counted, "elements sent, counted")


@law(SENT)
def recomputation_sends_half_more(f: Model, case: Case, _close: object) -> None:
    """A pass that runs again sends again: 12 b s h L instead of 8; one rank sends nothing."""
    plain, again = (case.replace(recompute=kind).call(f).total for kind in ("none", "full"))
    same(2 * again, 3 * plain, "twice what recomputation sends")
    same(case.replace(ranks=1).call(f).total, 0, "elements that a lone rank sends")


@law(KEPT)
def one_rank_keeps_what_the_layer_keeps(f: Model, case: Case, _close: object) -> None:
    """On one rank, without recomputation, it is s b h (34 + 5 a s / h), tokens split or not."""
    shape = {name: case.kwargs[name] for name in ("batch", "sequence", "hidden", "heads")}
    expected = block_activations(layers=1, **shape).total
    for split in (False, True):
        found = case.replace(ranks=1, recompute="none", sequence_parallel=split).call(f)
        same(found.total, expected, "activations of one rank")


@law(KEPT)
def split_tokens_leave_a_share_on_each_rank(f: Model, case: Case, _close: object) -> None:
    """With sequence parallelism a rank keeps 1/t of it all; without, ten s b h stay whole."""
    t, kind = case.kwargs["ranks"], case.kwargs["recompute"]
    if kind == "full":
        return
    alone = case.replace(ranks=1, sequence_parallel=True).call(f).total
    same(case.replace(sequence_parallel=True).call(f).total, Fraction(alone, t), "kept on each of t ranks")
    stays = 10 * case.kwargs["sequence"] * case.kwargs["batch"] * case.kwargs["hidden"]
    plain = case.replace(sequence_parallel=False).call(f).total
    same(plain, Fraction(alone - stays, t) + stays, "kept where tokens are not split")


@law(KEPT)
def recomputing_more_keeps_less(f: Model, case: Case, _close: object) -> None:
    """Selective recomputation keeps less than none, on any number of ranks."""
    kept = [case.replace(recompute=kind).call(f).total for kind in ("none", "selective")]
    require(kept[1] < kept[0], f"recomputing the scores keeps more: {kept}")
