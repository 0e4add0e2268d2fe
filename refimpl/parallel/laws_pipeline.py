"""Laws of pipeline parallelism: a flushed pipeline computes what one device does, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.parallel.decoder_stages import decoder_params, decoder_vector
from refimpl.parallel.laws_tensor import sent_bytes
from refimpl.parallel.network import cross_entropy
from refimpl.registry import Case, law
from refimpl.testing import Close, require
from refimpl.transformer.model import decoder_logits, decoder_logits_vjp

Function = Callable[..., Any]
PIPELINE = "parallel.pipeline"


def on_one_device(case: Case) -> tuple[FloatArray, float]:
    """Return gradients and loss of all micro-batches, one behind the other, on one device."""
    parameters, tokens, mask = case.args
    config = case.kwargs["config"]
    params = decoder_params(config, parameters)
    counted = max(int(mask.sum()), 1)
    total, loss = np.zeros_like(parameters), 0.0
    for words, counts in zip(tokens, mask, strict=True):
        logits = decoder_logits(params, words[:, :-1], config=config)
        summed, dlogits = cross_entropy(logits, words[:, 1:], counts)
        gradients = decoder_logits_vjp(params, words[:, :-1], dlogits / counted, config=config)
        total += decoder_vector(config, gradients)
        loss += summed / counted
    return total, loss


@law(PIPELINE)
def the_gradient_is_the_sequential_one(f: Function, case: Case, close: Close) -> None:
    """Whatever the schedule, the number of ranks and of micro-batches: gradient and loss of one device."""
    gradient, loss = on_one_device(case)
    found = case.call(f)
    close(found[0], gradient, "gradient on one device", of="dparameters", factor=8.0)
    close(found[1], np.array(loss), "loss on one device", of="loss", factor=8.0)


@law(PIPELINE)
def the_order_of_steps_changes_nothing(f: Function, case: Case, close: Close) -> None:
    """GPipe, 1F1B, recomputation: the same gradient."""
    expected = case.call(f)[0]
    plain = case.replace(chunks=1, recompute=False)
    for schedule in ("gpipe", "1f1b"):
        other = plain.replace(schedule=schedule).call(f)
        close(other[0], expected, f"gradient by {schedule}", of="dparameters", factor=8.0)


@law(PIPELINE)
def ranks_hold_as_many_as_the_schedule_lets_them(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Activations in flight, counted as the program runs: m, or p - r, or 2(p-r-1) + (v-1)p + 1."""
    p, v, m = case.kwargs["ranks"], case.kwargs["chunks"], len(case.args[1])
    expected = {
        "gpipe": [m] * p,
        "1f1b": [min(m, p - r) for r in range(p)],
        "interleaved": [min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)],
    }[case.kwargs["schedule"]]
    found = list(case.call(f)[2])
    require(found == expected, f"activations in flight: expected {expected}, got {found}")


@law(PIPELINE)
def each_boundary_is_crossed_once_each_way(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Ranks together send m B T M activations, and as many gradients, over each of p v - 1 boundaries."""
    parameters, _, mask = case.args
    p, v = case.kwargs["ranks"], case.kwargs["chunks"]
    crossed = (p * v - 1 if p > 1 else 0) * mask.size * case.kwargs["config"].width
    for phase in ("activations", "activation gradients"):
        found = sum(sent_bytes(f, case, (phase,)))
        expected = crossed * parameters.dtype.itemsize
        require(found == expected, f"bytes of {phase}: expected {expected}, got {found}")


# Weights of different ages (parallel.pipeline.pipedream)

STALE = "parallel.pipeline.pipedream"


def sgd_on_one_device(case: Case) -> FloatArray:
    """Return the parameters after one step of SGD a micro-batch, each with the newest weights."""
    parameters, tokens, mask = case.args
    for words, counts in zip(tokens, mask, strict=True):
        gradient, _ = on_one_device(case.replace(parameters, words[None], counts[None]))
        parameters = parameters - case.kwargs["lr"] * gradient
    newest: FloatArray = parameters
    return newest


@law(STALE)
def on_one_rank_nothing_is_stale(f: Function, case: Case, close: Close) -> None:
    """One rank runs SGD."""
    found = case.replace(ranks=1).call(f)[0]
    close(found, sgd_on_one_device(case), "SGD", of="parameters", factor=8.0)


@law(STALE)
def a_rank_is_behind_by_the_ranks_after_it(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Rank r sends micro-batch t forward through the weights of max(0, t - (p-1-r)) updates."""
    p, m = case.kwargs["ranks"], len(case.args[1])
    expected = np.maximum(np.arange(m) - (p - 1 - np.arange(p))[:, None], 0)
    found = case.call(f)[1]
    require(np.array_equal(found, expected), f"updates seen: expected {expected.tolist()}, got {found}")


@law(STALE)
def the_first_micro_batch_is_never_stale(f: Function, case: Case, close: Close) -> None:
    """One micro-batch alone is a step of SGD on any number of ranks."""
    parameters, tokens, mask = case.args
    one = case.replace(parameters, tokens[:1], mask[:1])
    close(one.call(f)[0], sgd_on_one_device(one), "a step of SGD", of="parameters", factor=8.0)
