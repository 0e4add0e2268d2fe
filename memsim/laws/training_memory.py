"""Laws of training memory: states by every convention, activations by formula and by operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

from memsim.estimate import Estimate
from memsim.laws.comparison import same
from memsim.model import Model, dense
from refimpl.registry import Case, law
from refimpl.testing import require

Count = Callable[..., Estimate]
ACTIVATIONS = ("cost.training_memory.korthikanti", "cost.training_memory.activations")


# States (cost.training_memory.states)


@law("cost.training_memory.states")
def a_parameter_has_its_sources_bytes(f: Count, case: Case, _close: object) -> None:
    """One rank that offloads nothing holds what the source prints a parameter, whatever the stage."""
    each = {"zero": 16, "deepspeed": 18, "megatron": 18, "fp32": 16, "bf16": 8, "sgd": 12}
    each["adam8bit"] = 2 + 2 + 4 + 2 + Fraction(8, 2048)  # type: ignore[assignment]
    held = case.replace(ranks=1, offload="none").call(f).total
    same(held, each[case.kwargs["convention"]] * case.kwargs["parameters"], "states of one rank")


@law("cost.training_memory.states")
def stages_and_ranks_save(f: Count, case: Case, _close: object) -> None:
    """On several ranks each stage holds less than the one before; more ranks never hold more each."""
    ranks = case.kwargs["ranks"] + 1
    totals = [case.replace(ranks=ranks, stage=stage, offload="none").call(f).total for stage in range(4)]
    require(all(a > b for a, b in pairwise(totals)), f"stages do not save: {totals}")
    more = case.replace(ranks=2 * ranks).call(f).total
    require(more <= case.replace(ranks=ranks).call(f).total, "states grew with the ranks")


@law("cost.training_memory.states")
def the_host_takes_what_it_is_given(f: Count, case: Case, _close: object) -> None:
    """Offloading everything leaves nothing; offloading the optimizer leaves the weights."""
    same(case.replace(offload="all").call(f).total, 0, "states after offloading everything")
    kept = case.replace(offload="optimizer").call(f)
    same(kept.total, case.replace(offload="none").call(f)["weights"], "states after offloading the optimizer")


@law("cost.training_memory.states")
def ranks_together_hold_each_state(f: Count, case: Case, _close: object) -> None:
    """In stage 3 all ranks together hold what one rank alone would."""
    ranks = case.kwargs["ranks"]
    divided = case.replace(stage=3).call(f).total * ranks
    same(divided, case.replace(stage=3, ranks=1).call(f).total, "states of all ranks")


# Activations (cost.training_memory.korthikanti, cost.training_memory.activations)


@law(*ACTIVATIONS)
def recomputing_saves(f: Count, case: Case, _close: object) -> None:
    """Recomputing scores keeps no more than recomputing nothing, recomputing layers no more than either.

    With Korthikanti's formula 2 s b h can exceed 34 s b h/t, where t is above 17.
    """
    totals = [case.replace(recompute=mode).call(f).total for mode in ("none", "selective", "full")]
    require(totals == sorted(totals, reverse=True), f"recomputation keeps more: {totals}")


@law(*ACTIVATIONS)
def dividing_the_sequence_saves(f: Count, case: Case, _close: object) -> None:
    """Dividing norms along the sequence keeps no more, and as much where there is one rank."""
    apart, whole = (case.replace(sequence_parallel=on).call(f).total for on in (True, False))
    require(apart <= whole, f"a divided sequence keeps {apart}, a whole one {whole}")
    if case.kwargs["tensor"] == 1:
        same(apart, whole, "activations of one rank")


@law(*ACTIVATIONS)
def sequences_keep_alike(f: Count, case: Case, _close: object) -> None:
    """Twice as many sequences keep twice as much."""
    once, twice = (case.replace(batch=case.kwargs["batch"] * n).call(f).total for n in (1, 2))
    same(twice, 2 * once, "activations of twice the batch")


@law("cost.training_memory.korthikanti")
def a_plain_layer_has_34_bytes_and_its_scores(f: Count, case: Case, _close: object) -> None:
    """One rank that recomputes nothing keeps 34 s b h + 5 a s² b bytes a layer, as equation 1 says."""
    given = case.kwargs
    alone = case.replace(tensor=1, pipeline=1, interleave=1, recompute="none").call(f).total
    tokens = given["batch"] * given["sequence"]
    layer = tokens * (34 * given["hidden"] + 5 * given["heads"] * given["sequence"])
    same(alone, given["layers"] * layer, "activations of one rank")


@law("cost.training_memory.korthikanti")
def one_chunk_a_stage_keeps_the_whole_model(f: Count, case: Case, _close: object) -> None:
    """The first of any number of stages keeps L layers' worth; interleaving adds (p - 1)/(p v) of that."""
    alone = case.replace(pipeline=1, interleave=1).call(f).total
    same(case.replace(interleave=1).call(f).total, alone, "activations of the first stage")
    p, v = case.kwargs["pipeline"], case.kwargs["interleave"]
    if v > 1:
        same(case.call(f).total, alone * (1 + Fraction(p - 1, p * v)), "activations, interleaved")


def _layers(model: Model, factor: int) -> Model:
    stacks = (replace(s, layers=s.layers * factor) if s.name == "block" else s for s in model.stacks)
    return replace(model, stacks=tuple(stacks))


@law("cost.training_memory.activations")
def layers_keep_alike(f: Count, case: Case, _close: object) -> None:
    """Each further layer keeps as much as the one before."""
    model = case.kwargs["model"]
    one, two, three = (case.replace(model=_layers(model, n)).call(f).total for n in (1, 2, 3))
    same(two - one, three - two, "activations of further layers")


@law("cost.training_memory.activations")
def a_gpt_keeps_what_korthikanti_counts(f: Count, case: Case, _close: object) -> None:
    """A GPT with dropout and matrices of scores keeps equation 1 and the statistics of its norms."""
    model = dense(layers=2, width=24, heads=3, ffn=96, vocabulary=7)
    b, s = case.kwargs["batch"], case.kwargs["sequence"]
    gpt = case.replace(
        model=model, tensor=1, attention="standard", dropout=True, recompute="none", fused_gate=False
    )
    layers = sum(item.value for item in gpt.call(f).terms if item.name.startswith("block: "))
    same(layers, 2 * b * s * (34 * 24 + 5 * 3 * s + 2 * 8), "activations of a GPT")


@law("cost.training_memory.activations")
def flash_keeps_no_square(f: Count, case: Case, _close: object) -> None:
    """With flash attention, twice the sequence keeps twice as much; dropout on scores keeps nothing."""
    tensor = case.kwargs["tensor"]
    flash = case.replace(attention="flash", sequence=case.kwargs["sequence"] * tensor)
    once, twice = (flash.replace(sequence=flash.kwargs["sequence"] * n).call(f).total for n in (1, 2))
    same(twice, 2 * once, "activations of twice the sequence")
    square = case.replace(attention="standard", recompute="none")
    once, twice = (square.replace(sequence=square.kwargs["sequence"] * n).call(f).total for n in (1, 2))
    require(twice > 2 * once, f"scores do not grow with the square of the sequence: {once}, {twice}")
