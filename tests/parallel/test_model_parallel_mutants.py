"""Programs of ranks that split a model wrongly in one way; laws, oracles and references must catch each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from refimpl import registry
from refimpl.parallel import (
    mesh_program,
    mixture,
    pipeline_program,
    schedules,
    tensor_layers,
    vocabulary_layers,
)
from refimpl.parallel import pipedream as pipedream_module
from refimpl.parallel import pipeline as pipeline_module
from refimpl.parallel.collectives import ring_all_reduce, sum_pair
from refimpl.parallel.mesh import Mesh
from refimpl.parallel.mesh_training import mesh_training
from refimpl.parallel.pipeline import pipeline_parallel
from refimpl.parallel.schedules import pipeline_schedule
from refimpl.parallel.tensor import tensor_parallel, tensor_parallel_vjp
from refimpl.parallel.vocabulary import vocabulary_embedding, vocabulary_loss
from refimpl.testing import check
from refimpl.transformer import layers
from refimpl.transformer.activations import activate

registry.load()
Function = Callable[..., Any]


def changed(f: Function, module: Any, **replacements: Any) -> Function:
    """Return `f` with names of a module replaced while it runs."""

    def mutant(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.multiple(module, **replacements):
            return f(*args, **kwargs)

    return mutant


# Tensor parallelism


def bias_before_the_sum(weights: Any, name: str) -> Any:
    """Let the split layer add the bias too: p times, one a rank."""
    return weights


def no_bias(weights: Any, name: str) -> Any:
    return layers.Layer(lambda x: x, lambda x, dy: (dy, {}))


def rows_before_the_activation(x: Any, w_1: Any, w_2: Any, *, activation: str, **biases: Any) -> Any:
    """Split the first matrix by rows, and sum what the activation makes of each part."""
    parts = [slice(0, x.shape[-1] // 2), slice(x.shape[-1] // 2, None)]
    b_1 = biases.get("b_1", 0) / 2
    hidden = sum(activate(activation, x[..., own] @ w_1[own] + b_1) for own in parts)
    return hidden @ w_2 + biases.get("b_2", 0)


def nothing_sent(comm: Any) -> Any:
    return lambda weights, x: (x, lambda weights, dy: (dy, {}))


def own_gradients_alone(comm: Any, part: Any) -> Any:
    return part


# Vocabulary


def everyone_has_every_token(tokens: Any, comm: Any, rows: int) -> Any:
    return np.ones(tokens.shape, bool), tokens % rows


def rank_zero_from_one(tokens: Any, comm: Any, rows: int) -> Any:
    """Rows counted from 1: a rank misses its first token."""
    place = tokens - comm.rank * rows
    mine = (place > 0) & (place < rows)
    return mine, np.where(mine, place, 0)


def largest_of_its_own(comm: Any, x: Any, combine: Any = sum_pair) -> Any:
    return x if combine is np.maximum else ring_all_reduce(comm, x, combine)


def nothing_subtracted(comm: Any, x: Any, combine: Any = sum_pair) -> Any:
    return np.zeros_like(x) if combine is np.maximum else ring_all_reduce(comm, x, combine)


# Pipelines


def tag_without_the_micro_batch(step: Any, stage: int, stages: int) -> int:
    return 2 * stage + step.backward


def last_rank_turns_micro_batches(comm: Any, steps: Any, *args: Any) -> Any:
    """The last rank goes back in another order, and the others take what comes for what they wait for."""
    back = iter([step for step in steps if step.backward][::-1])
    turned = [next(back) if step.backward and comm.rank == comm.size - 1 else step for step in steps]
    return WHOLE["execute"](comm, turned, *args)


def one_table_alone(pipe: Any, gradient: Any) -> Any:
    return gradient


def last_micro_batch_alone(sums: Any, key: str, found: Any) -> None:
    sums[key] = dict(found)


def runs_ahead(forward: Any, backward: Any, warm_up: int) -> Any:
    return WHOLE["one_by_one"](forward, backward, warm_up + 1)


def waits_too_early(forward: Any, backward: Any, warm_up: int) -> Any:
    return WHOLE["one_by_one"](forward, backward, max(warm_up - 1, 0))


def in_forward_order(rank: int, micro_batches: int) -> Any:
    """Micro-batches go back in the order in which they came, the gradients of two swapped."""
    steps = WHOLE["all_forward"](rank, micro_batches)
    back = [step for step in steps if step.backward]
    return steps[:micro_batches] + (back[1:] + back[:1])


WHOLE: dict[str, Any] = {
    "one_by_one": schedules._one_by_one,
    "all_forward": schedules._all_forward,
    "execute": pipeline_program.execute,
    "zero_update": mesh_program.zero_update,
    "reduce_gradient": mesh_program.reduce_gradient,
    "counted": mesh_program._counted_here,
}


def newest_weights_go_back(weights: Any) -> Any:
    """No stash: what went forward through old weights comes back through new ones."""
    return weights


# Meshes


def weights_of_the_step_before(comm: Any, units: Any, state: Any, *args: Any, **options: Any) -> Any:
    after = WHOLE["zero_update"](comm, units, state, *args, **options)
    return after._replace(parameters=state.parameters)


def replicas_apart(comm: Any, gradient: Any) -> Any:
    total = np.zeros(comm.size * -(-gradient.size // comm.size), gradient.dtype)
    total[: gradient.size] = gradient
    return np.array(total.reshape(comm.size, -1)[comm.rank])


def copies_count_again(plan: Any, place: Any, units: Any) -> Any:
    return np.ones_like(WHOLE["counted"](plan, place, units))


def micro_batches_averaged(comm: Any, value: float) -> float:
    """As if each data-parallel rank divided by its own tokens."""
    return value * comm.size


def first_experts_everywhere(weights: Any, rank: int, ranks: int) -> Any:
    return mixture.own_experts(weights, 0, ranks)


def own_part_alone(comm: Any, x: Any) -> Any:
    return x


TENSOR = {"ranks": 2, "B": 1, "tokens": 2, "M": 8, "heads": 1, "group": 1, "units": 2, "extra": "none"}
TOKENS = {**TENSOR, "split": "tensor", "make": "gpt2"}
SEQUENCE = {**TENSOR, "split": "sequence", "make": "gpt2"}
VOCABULARY = {"ranks": 2, "B": 1, "T": 3, "rows": 2, "M": 3}
PIPELINE = {
    "ranks": 2, "micro": 3, "layers": 2, "B": 1, "T": 2, "schedule": "gpipe", "make": "llama",
    "recompute": False,
}  # fmt: skip
MESH = {
    "tensor": 2, "pipeline": 2, "data": 2, "steps": 2, "micro": 1, "B": 2, "tokens": 2, "make": "llama",
    "schedule": "1f1b", "stage": 1, "split": "tensor", "extra": "none",
}  # fmt: skip
MIXTURE = {**MESH, "make": "mixture", "pipeline": 1}
PLAN = {"ranks": 4, "rounds": 2, "rest": 2, "chunks": 2, "schedule": "1f1b"}
STALE = {"ranks": 3, "micro": 4, "layers": 3, "B": 1, "T": 2}
MUTANTS: dict[str, tuple[str, Function, dict[str, Any]]] = {
    "bias added p times": (
        "parallel.tensor",
        changed(tensor_parallel, tensor_layers, _without=bias_before_the_sum, _bias=no_bias),
        TOKENS,
    ),
    "row split before the activation": (
        "parallel.tensor", changed(tensor_parallel, layers, ffn=rows_before_the_activation), TOKENS
    ),
    "no all-reduce at the end": (
        "parallel.tensor", changed(tensor_parallel, tensor_layers, summed=nothing_sent), TOKENS
    ),
    "no all-reduce on the way back": (
        "parallel.tensor.backward", changed(tensor_parallel_vjp, tensor_layers, copied=nothing_sent), TOKENS
    ),
    "gains of its own tokens alone": (
        "parallel.tensor.backward",
        changed(tensor_parallel_vjp, tensor_layers, gradients_summed=own_gradients_alone),
        SEQUENCE,
    ),
    "every rank looks up every token": (
        "parallel.tensor.embedding",
        changed(vocabulary_embedding, vocabulary_layers, _own=everyone_has_every_token),
        {**VOCABULARY, "scaled": False},
    ),
    "rows counted from one": (
        "parallel.tensor.embedding",
        changed(vocabulary_embedding, vocabulary_layers, _own=rank_zero_from_one),
        {**VOCABULARY, "scaled": False},
    ),
    "a target on every rank": (
        "parallel.tensor.cross_entropy",
        changed(vocabulary_loss, vocabulary_layers, _own=everyone_has_every_token),
        {**VOCABULARY, "size": "small"},
    ),
    "largest logit of its own": (
        "parallel.tensor.cross_entropy",
        changed(vocabulary_loss, vocabulary_layers, ring_all_reduce=largest_of_its_own),
        {**VOCABULARY, "size": "small"},
    ),
    "exponentials overflow": (
        "parallel.tensor.cross_entropy",
        changed(vocabulary_loss, vocabulary_layers, ring_all_reduce=nothing_subtracted),
        {**VOCABULARY, "size": "large"},
    ),
    "wrong micro-batch order": (
        "parallel.pipeline",
        changed(
            pipeline_parallel,
            pipeline_program,
            execute=last_rank_turns_micro_batches,
            _tag=tag_without_the_micro_batch,
        ),
        PIPELINE,
    ),
    "tied tables not summed": (
        "parallel.pipeline", changed(pipeline_parallel, pipeline_module, sum_of_both_ends=one_table_alone),
        PIPELINE,
    ),
    "last micro-batch alone": (
        "parallel.pipeline",
        changed(pipeline_parallel, pipeline_module, add_gradients=last_micro_batch_alone),
        PIPELINE,
    ),
    "1F1B runs ahead": (
        "parallel.pipeline", changed(pipeline_parallel, schedules, _one_by_one=runs_ahead),
        {**PIPELINE, "schedule": "1f1b"},
    ),
    "a schedule that runs ahead": (
        "parallel.pipeline.schedule", changed(pipeline_schedule, schedules, _one_by_one=runs_ahead), PLAN
    ),
    "a schedule that waits for ever": (
        "parallel.pipeline.schedule", changed(pipeline_schedule, schedules, _one_by_one=waits_too_early), PLAN
    ),
    "a schedule that turns micro-batches": (
        "parallel.pipeline.schedule", changed(pipeline_schedule, schedules, _all_forward=in_forward_order),
        {**PLAN, "schedule": "gpipe"},
    ),
    "no weight stash": (
        "parallel.pipeline.pipedream",
        changed(pipedream_module.pipedream, pipedream_module, stashed=newest_weights_go_back),
        STALE,
    ),
    "stale weights": (
        "parallel.mesh", changed(mesh_training, mesh_program, zero_update=weights_of_the_step_before), MESH
    ),
    "replicas apart": (
        "parallel.mesh", changed(mesh_training, mesh_program, reduce_gradient=replicas_apart), MESH
    ),
    "tied tables not summed, in a mesh": (
        "parallel.mesh", changed(mesh_training, mesh_program, sum_of_both_ends=one_table_alone), MESH
    ),
    "a mean over ranks": (
        "parallel.mesh", changed(mesh_training, mesh_program, sum_over_ranks=micro_batches_averaged), MESH
    ),
    "the first experts everywhere": (
        "parallel.mesh", changed(mesh_training, mesh_program, own_experts=first_experts_everywhere), MIXTURE
    ),
    "router's gradient of half the units": (
        "parallel.mesh", changed(mesh_training, mixture, ring_all_reduce=own_part_alone), MIXTURE
    ),
    "copies count again in the norm": (
        "parallel.mesh", changed(mesh_training, mesh_program, _counted_here=copies_count_again),
        {**MESH, "extra": "clip"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTANTS)
def test_mutant_is_caught(what: str) -> None:
    name, mutant, axes = MUTANTS[what]
    report = check(name, mutant, axes=axes, edges=False)
    assert report.failed, f"survived {report.counts()}"


@pytest.mark.parametrize("what", [what for what, (name, _, _) in MUTANTS.items() if "schedule" in name])
def test_a_wrong_schedule_breaks_a_law(what: str) -> None:
    name, mutant, axes = MUTANTS[what]
    assert any(outcome.check.startswith("parallel.") for outcome in check(name, mutant, axes=axes).failed)


def test_the_unbroken_pass() -> None:
    for name, _, axes in {name: (name, f, axes) for name, f, axes in MUTANTS.values()}.values():
        assert check(name, axes=axes, edges=False).ok, name


@pytest.mark.parametrize("mesh", [Mesh(2, 1, 1), Mesh(1, 2, 1), Mesh(1, 1, 2)], ids=str)
def test_a_copy_that_drifts_is_seen(mesh: Mesh) -> None:
    """One rank ends with a hair more of everything: norms, a tied table, a replica differ from another's."""
    module = importlib.import_module(
        "refimpl.parallel.mesh_training"
    )  # the package has its function by the name
    train_rank = module.train_rank

    def drifting(comm: Any, *args: Any) -> Any:
        trained = train_rank(comm, *args)
        moved = [[unit + 1e-9 * comm.rank for unit in share] for share in trained.parameters]
        return trained._replace(parameters=moved)

    axes = {**MESH, **mesh._asdict()}
    drifted = changed(mesh_training, module, train_rank=drifting)
    failed = {outcome.check for outcome in check("parallel.mesh", drifted, axes=axes, edges=False).failed}
    assert "parallel.copies_stay_identical" in failed


def test_stale_weights_are_not_sgd() -> None:
    """The counterexample: the same pipeline, not flushed, is no gradient of one device any more."""
    from refimpl.parallel.laws_pipeline import sgd_on_one_device

    record = registry.get("parallel.pipeline.pipedream")
    assert record.sample is not None
    case = record.sample(np.random.default_rng(3), **{**STALE, "B": 2})
    stale, fresh = case.call(pipedream_module.pipedream).parameters, sgd_on_one_device(case)
    moved = float(np.max(np.abs(fresh - case.args[0])))
    assert 1e-3 * moved < float(np.max(np.abs(stale - fresh))) < moved
