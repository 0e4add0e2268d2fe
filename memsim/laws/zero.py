"""Laws of ZeRO's costs: memory, communication, what is left of activations and buffers."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

from memsim.estimate import Estimate
from memsim.laws.comparison import same
from refimpl.registry import Case, law
from refimpl.testing import require

Model = Callable[..., Estimate]
PARTITIONED = ("cost.zero_memory.partitioned", "cost.zero_communication.partitioned")
SENT = ("cost.zero_communication", "cost.zero_communication.partitioned")


# ZeRO (cost.zero_memory, cost.zero_communication)


@law("cost.zero_memory")
def one_rank_saves_nothing(f: Model, case: Case, _close: object) -> None:
    """On one rank every stage holds 16 bytes a parameter."""
    same(case.replace(ranks=1).call(f).total, 16 * case.kwargs["parameters"], "model states of one rank")


@law("cost.zero_memory")
def each_stage_saves_more(f: Model, case: Case, _close: object) -> None:
    """On several ranks a higher stage holds less, and no stage grows with the ranks."""
    ranks = case.kwargs["ranks"] + 1
    totals = [case.replace(ranks=ranks, stage=stage).call(f).total for stage in range(4)]
    require(all(a > b for a, b in pairwise(totals)), f"stages do not save: {totals}")
    more = case.replace(ranks=2 * ranks).call(f).total
    require(more <= case.replace(ranks=ranks).call(f).total, "model states grew with the ranks")


@law("cost.zero_memory")
def ranks_together_hold_it_all(f: Model, case: Case, _close: object) -> None:
    """What a stage divides, the ranks hold once; what it does not divide, each of them holds."""
    ranks, Ψ = case.kwargs["ranks"], case.kwargs["parameters"]
    replicated = {0: 16, 1: 4, 2: 2, 3: 0}[case.kwargs["stage"]]
    expected = ranks * replicated * Ψ + (16 - replicated) * Ψ
    same(case.call(f).total * ranks, expected, "model states of all ranks")


@law(*SENT)
def stage_three_sends_half_more(f: Model, case: Case, _close: object) -> None:
    """Of one micro-batch, stages 1 and 2 send what data parallelism sends, and stage 3 1.5 times that."""
    sent = [case.replace(stage=stage, micro_batches=1).call(f).total for stage in range(4)]
    same(sent[1:3], [sent[0]] * 2, "stages 1 and 2")
    same(2 * sent[3], 3 * sent[0], "twice stage 3")


@law("cost.zero_communication")
def alone_a_rank_sends_nothing(f: Model, case: Case, _close: object) -> None:
    """Counted exactly, one rank sends nothing, and N ranks send (N-1)/N of the paper's volume."""
    ranks = case.kwargs["ranks"]
    same(case.replace(convention="ring", ranks=1).call(f).total, 0, "a lone rank")
    paper = case.replace(convention="paper").call(f).total
    same(case.replace(convention="ring").call(f).total, Fraction(ranks - 1, ranks) * paper, "ring volume")


@law(*SENT)
def accumulation_costs_stages_two_and_three(f: Model, case: Case, _close: object) -> None:
    """Of m micro-batches, stages 0 and 1 send what one sends, stage 2 (m + 1)/2 and stage 3 m times that."""
    m = case.kwargs["micro_batches"]
    for stage, twice in ((0, 2), (1, 2), (2, m + 1), (3, 2 * m)):
        one = case.replace(stage=stage, micro_batches=1).call(f).total
        same(2 * case.replace(stage=stage).call(f).total, twice * one, f"twice what stage {stage} sends")


# Partitions with padding (cost.zero_memory.partitioned, cost.zero_communication.partitioned)


@law(*PARTITIONED)
def units_add(f: Model, case: Case, _close: object) -> None:
    """Each unit is padded by itself, so several cost what they cost one by one."""
    alone = sum(case.replace(units=[unit]).call(f).total for unit in case.kwargs["units"])
    same(case.call(f).total, alone, "cost of all units")


@law(*PARTITIONED)
def padding_costs_less_than_an_element_a_rank(f: Model, case: Case, _close: object) -> None:
    """A unit costs at most what it costs rounded up to a multiple of the ranks, and no less than itself."""
    ranks, unit = case.kwargs["ranks"], case.kwargs["units"][0]
    rounded = -(-unit // ranks) * ranks
    found, most = (case.replace(units=[size]).call(f).total for size in (unit, rounded))
    least = Fraction(case.replace(units=[ranks * unit]).call(f).total, ranks)
    require(least <= found <= most, f"cost of {unit} parameters: expected {least} to {most}, got {found}")


@law("cost.zero_memory.partitioned")
def one_rank_holds_everything_in_every_stage(f: Model, case: Case, _close: object) -> None:
    """On one rank there is nothing to divide: two low-precision arrays and three of the optimizer's."""
    sizes = 2 * case.kwargs["model_itemsize"] + 3 * case.kwargs["state_itemsize"]
    same(case.replace(ranks=1).call(f).total, sizes * sum(case.kwargs["units"]), "model states of one rank")


@law("cost.zero_communication.partitioned")
def a_lone_rank_is_silent(f: Model, case: Case, _close: object) -> None:
    """One rank sends nothing."""
    same(case.replace(ranks=1).call(f).total, 0, "bytes of a lone rank")


# ZeRO-R (cost.zero_r)


@law("cost.zero_r")
def checkpoints_are_divided_by_the_model_parallel_degree(f: Model, case: Case, _close: object) -> None:
    """Partitioned checkpoints are 1/M of the replicated ones where M divides; offloaded ones are gone."""
    ways = case.kwargs["model_parallel"]
    divisible = case.replace(hidden=ways * case.kwargs["hidden"])
    whole, part, away = (
        divisible.replace(checkpoints=kind).call(f)["checkpoints"]
        for kind in ("replicated", "partitioned", "offloaded")
    )
    same(ways * part, whole, "partitioned checkpoints of all ranks")
    same(away, 0, "offloaded checkpoints")


@law("cost.zero_r")
def layers_and_tokens_multiply_checkpoints(f: Model, case: Case, _close: object) -> None:
    """Checkpoints grow with the layers, and replicated ones with the batch; the buffer with neither."""
    whole = case.replace(checkpoints="replicated")
    for axis in ("layers", "batch"):
        one, thrice = whole.call(f), whole.replace(**{axis: 3 * whole.kwargs[axis]}).call(f)
        same(thrice["checkpoints"], 3 * one["checkpoints"], f"checkpoints of three times the {axis}")
        same(thrice["fused buffer"], one["fused buffer"], f"buffer of three times the {axis}")


@law("cost.zero_r")
def the_buffer_stops_growing(f: Model, case: Case, _close: object) -> None:
    """Up to C parameters the fused fp32 buffer holds them all; beyond, it stays as it is."""
    size = case.kwargs["buffer"]
    small, full, large = (case.replace(parameters=n).call(f)["fused buffer"] for n in (1, size, 5 * size))
    same((small, full, large), (4, 4 * size, 4 * size), "fused buffer of 1, C and 5C parameters")
