"""Laws of the losses that language models are trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array, BoolArray, FloatArray
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Loss = Callable[..., Any]


def _weights(case: Case) -> FloatArray:
    """Return the weight of every token as a label, shape (B, T), from what the case says of labels."""
    tokens = case.args[1]
    given = case.args[2] if len(case.args) > 2 else case.kwargs.get("weights")
    w = np.ones(tokens.shape) if given is None else np.asarray(given, np.float64).copy()
    ids = case.kwargs.get("document_ids")
    if ids is not None:
        w[:, 1:][ids[:, 1:] != ids[:, :-1]] = 0
    w[:, :1] = 0
    return w


def _predicting(case: Case) -> BoolArray:
    """Return which positions have logits that predict a label: one before each label."""
    w = _weights(case)
    found = np.zeros(w.shape, bool)
    found[:, :-1] = w[:, 1:] != 0
    return found


def _with_logits(case: Case, logits: Array) -> Case:
    return case.replace(logits, *case.args[1:])


def _rows(case: Case, part: slice) -> Case:
    """Return the case with some of its sequences."""
    return case.map_arrays(lambda array: array[part])


@law("objectives.next_token", "objectives.instruction")
def uniform_logits_cost_log_vocabulary(f: Loss, case: Case, close: Close) -> None:
    """A model that knows nothing loses log V on every label."""
    logits, w = case.args[0], _weights(case)
    if not np.any(w):
        return
    flat = _with_logits(case, np.full_like(logits, 3.0))
    each = w.sum() if case.kwargs["reduction"] == "sum" else 1.0
    close.on(flat)(flat.call(f), each * np.log(logits.shape[-1]), "loss of equal logits")


@law("objectives.next_token", "objectives.instruction")
def a_hopeless_label_costs_its_distance(f: Loss, case: Case, close: Close) -> None:
    """A label 4096 below V - 1 equal logits costs 4096 + log(V - 1), without overflow."""
    logits, w = case.args[0], _weights(case)
    if not np.any(w) or logits.shape[-1] < 2:
        return
    hopeless = np.full_like(logits, 4096)
    for b, t in np.argwhere(_predicting(case)):
        hopeless[b, t, case.args[1][b, t + 1]] = 0
    far = _with_logits(case, hopeless)
    each = w.sum() if case.kwargs["reduction"] == "sum" else 1.0
    close.on(far)(far.call(f), each * (4096 + np.log(logits.shape[-1] - 1)), "loss of hopeless labels")


@law("objectives.next_token", "objectives.instruction")
def shift_invariant(f: Loss, case: Case, close: Close) -> None:
    """A number added to all logits of a position changes nothing."""
    logits = case.args[0]
    steps = np.arange(logits.shape[0] * logits.shape[1]).reshape(*logits.shape[:2], 1) % 5
    shifted = _with_logits(case, (logits + steps).astype(logits.dtype))
    if logits.dtype == np.float64:
        close.on(shifted)(shifted.call(f), case.call(f), "loss after a shift", factor=4.0)


@law("objectives.next_token", "objectives.instruction")
def only_predicting_logits_count(f: Loss, case: Case, close: Close) -> None:
    """Logits change nothing if they are the last, or come before a prompt, a pad or another document."""
    logits = case.args[0].copy()
    logits[~_predicting(case)] = 7.0
    close(_with_logits(case, logits).call(f), case.call(f), "loss after other logits that predict no label")


@law("objectives.next_token", "objectives.instruction")
def only_labels_count(f: Loss, case: Case, close: Close) -> None:
    """A token that is no label changes nothing, whatever its id: the first, a prompt's, a pad's."""
    logits, tokens, *rest = case.args
    other = np.where(_weights(case) == 0, (tokens + 1) % logits.shape[-1], tokens)
    close(case.replace(logits, other, *rest).call(f), case.call(f), "loss after other tokens in the prompt")


@law("objectives.next_token", "objectives.instruction")
def every_label_counts(f: Loss, case: Case, close: Close) -> None:  # noqa: ARG001
    """Raising one label's logit at the position before it lowers the loss, the first output token's too."""
    logits, tokens = case.args[0].copy(), case.args[1]
    logits = np.clip(logits, -4, 4)  # so that no label is certain already
    places = np.argwhere(_predicting(case))
    if logits.shape[-1] < 2:
        return
    before = float(_with_logits(case, logits).call(f))
    for b, t in (*places[:1], *places[-1:]):
        raised = logits.copy()
        raised[b, t, tokens[b, t + 1]] += 1
        after = float(_with_logits(case, raised).call(f))
        require(after < before, f"logits [{b}, {t}] of the label after them: {before} became {after}")


@law("objectives.next_token", "objectives.instruction")
def vocabulary_may_be_permuted(f: Loss, case: Case, close: Close) -> None:
    """Renaming the tokens, in logits and labels alike, changes nothing."""
    logits, tokens, *rest = case.args
    order = np.roll(np.arange(logits.shape[-1])[::-1], 1)
    renamed = case.replace(logits[..., order], np.argsort(order)[tokens], *rest)
    close(renamed.call(f), case.call(f), "loss with renamed tokens")


@law("objectives.next_token", "objectives.instruction")
def parts_add_by_weight(f: Loss, case: Case, close: Close) -> None:
    """The loss of a batch is the mean of its halves, weighted by their labels: not the mean of means."""
    w, reduction = _weights(case), case.kwargs["reduction"]
    half = len(w) // 2
    if not half:
        return
    total = 0.0
    sizes = []
    for part in (slice(None, half), slice(half, None)):
        size = float(np.any(w[part], axis=1).sum() if reduction == "sequence" else w[part].sum())
        sizes.append(1.0 if reduction == "sum" else size)
        total += sizes[-1] * float(_rows(case, part).call(f))
    whole = total if reduction == "sum" else total / (sum(sizes) or 1.0)
    close(case.call(f), whole, "loss of both halves", factor=2.0)


@law("objectives.next_token")
def weights_are_relative(f: Loss, case: Case, close: Close) -> None:
    """Twice the weights give the same mean, and twice the sum."""
    weights = case.kwargs.get("weights")
    twice = 2 * (np.ones(case.args[1].shape, np.int64) if weights is None else weights.astype(np.int64))
    doubled = case.replace(weights=twice)
    factor = 2.0 if case.kwargs["reduction"] == "sum" else 1.0
    close.on(doubled)(doubled.call(f), factor * float(case.call(f)), "loss with twice the weights")


@law("objectives.next_token", "objectives.instruction")
def packing_changes_nothing(f: Loss, case: Case, close: Close) -> None:
    """Two rows laid end to end with document ids have the loss of the two rows."""
    B, T = case.args[1].shape
    if case.kwargs["reduction"] == "sequence" or "document_ids" in case.kwargs:
        return  # rows are not sequences then
    end_to_end = case.map_arrays(lambda array: array.reshape(1, B * T, *array.shape[2:]))
    packed = end_to_end.replace(document_ids=np.repeat(np.arange(B), T)[None])
    close(packed.call(f), case.call(f), "loss of packed rows", factor=2.0)


@law("objectives.instruction")
def without_a_prompt_it_is_pretraining(f: Loss, case: Case, close: Close) -> None:
    """If everything is output the loss is the plain mean over all next tokens."""
    if "document_ids" in case.kwargs or case.kwargs["reduction"] == "sequence" or not case.args[1].size:
        return
    logits, tokens, _ = case.args
    everything = case.replace(logits, tokens, np.ones(tokens.shape, bool))
    costs = [
        np.logaddexp.reduce(row) - row[label]
        for z, x in zip(logits.astype(np.float64), tokens, strict=True)
        for row, label in zip(z[:-1], x[1:], strict=True)
    ]
    expected = sum(costs) if case.kwargs["reduction"] == "sum" else sum(costs) / max(len(costs), 1)
    close.on(everything)(everything.call(f), expected, "loss of nothing but output")
