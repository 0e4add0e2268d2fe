"""Laws of tensor parallelism: blocks, embeddings and losses are those of one device; what is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.parallel.comm import Traffic
from refimpl.registry import Case, law
from refimpl.testing import Close, require
from refimpl.tolerances import outputs
from refimpl.transformer.blocks import decoder, decoder_vjp

Function = Callable[..., Any]
FORWARD, BACKWARD = "parallel.tensor", "parallel.tensor.backward"
SPLIT = ("ranks", "sequence_parallel")
TENSOR_PHASES = ("tensor all-reduce", "tensor all-gather", "tensor reduce-scatter")


def sent_bytes(f: Function, case: Case, phases: tuple[str, ...]) -> list[int]:
    """Return the bytes that each rank sends in these phases."""
    traffic = Traffic()
    case.replace(traffic=traffic).call(f)
    return [sum(traffic.sent(rank, phase).bytes for phase in phases) for rank in traffic.ranks]


def _same_outputs(found: Any, expected: Any, close: Close, what: str) -> None:
    named = outputs(found)
    for name, wanted in outputs(expected).items():
        require(name in named, f"{what}: no {name}")
        close(named[name], wanted, f"{what}: {name}", of=name, factor=4.0)


@law(FORWARD)
def any_split_is_the_unsplit_block(f: Function, case: Case, close: Close) -> None:
    """On any number of ranks the block is `transformer.decoder`, to which its parts of weights add up."""
    close(case.call(f), case.without(*SPLIT).call(decoder), "the unsplit block", factor=4.0)


@law(BACKWARD)
def any_split_has_the_unsplit_gradients(f: Function, case: Case, close: Close) -> None:
    """Gradients of tokens and of every weight are those of the unsplit block."""
    _same_outputs(case.call(f), case.without(*SPLIT).call(decoder_vjp), close, "the unsplit block")


@law(FORWARD, BACKWARD)
def sequence_parallelism_changes_no_value(f: Function, case: Case, close: Close) -> None:
    """Splitting the tokens too gives the same outputs."""
    if case.args[0].shape[1] % case.kwargs["ranks"]:
        return
    apart, together = (case.replace(sequence_parallel=split).call(f) for split in (True, False))
    _same_outputs(apart, together, close, "tokens split")


@law(FORWARD, BACKWARD)
def two_all_reduces_of_the_tokens_each_way(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A rank sends 4 (p-1)/p B T M elements forward and as many back, whether or not tokens are split."""
    x, p = case.args[0], case.kwargs["ranks"]
    ways = len(case.args)  # the backward pass runs the forward one first
    expected = [ways * 4 * (p - 1) * -(-x.size // p) * x.dtype.itemsize] * p
    for split in (False, True):
        if split and x.shape[1] % p:
            continue
        found = sent_bytes(f, case.replace(sequence_parallel=split), TENSOR_PHASES)
        require(found == expected, f"bytes of tokens: expected {expected}, got {found}")


@law(FORWARD)
def heads_may_change_ranks(f: Function, case: Case, close: Close) -> None:
    """Heads in reverse order, with their columns and rows, give the same: a rank's heads are any heads."""
    given = dict(case.kwargs)
    heads = given["num_heads"]
    kv = given.get("num_kv_heads") or heads
    for name in ("w_q", "b_q", "w_k", "b_k", "w_v", "b_v"):
        if name in given:
            given[name] = _reversed_heads(given[name], -1, heads if name[-1] == "q" else kv)
    given["w_o"] = _reversed_heads(given["w_o"], 0, heads)
    if "alibi_slopes" in given:
        given["alibi_slopes"] = given["alibi_slopes"][::-1].copy()
    close(Case(case.args, given).call(f), case.call(f), "heads in reverse", factor=4.0)


def _reversed_heads(array: Any, axis: int, heads: int) -> Any:
    parts = np.split(array, heads, axis=axis)
    return np.concatenate(parts[::-1], axis=axis)


# Vocabulary over ranks (parallel.tensor.embedding, parallel.tensor.cross_entropy)

EMBEDDING, LOSS = "parallel.tensor.embedding", "parallel.tensor.cross_entropy"


@law(EMBEDDING)
def rows_of_ranks_add_up_to_the_table(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A token's row comes from the one rank that has it, unchanged: sums with zeros are exact."""
    table, tokens = case.args
    expected = table[tokens] * case.kwargs["scale"]
    require(np.array_equal(case.call(f), expected), "rows of the table: not what one device looks up")


@law(EMBEDDING)
def one_all_reduce_of_embeddings(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A rank sends 2 (p-1)/p B T M elements, however large the vocabulary."""
    (table, tokens), p = case.args, case.kwargs["ranks"]
    expected = [2 * (p - 1) * -(-tokens.size * table.shape[1] // p) * table.dtype.itemsize] * p
    require(sent_bytes(f, case, TENSOR_PHASES) == expected, f"bytes: expected {expected}")


@law(LOSS)
def the_split_loss_is_the_unsplit_one(f: Function, case: Case, close: Close) -> None:
    """On any number of ranks the loss is that of one rank."""
    close(case.call(f), case.replace(ranks=1).call(f), "loss on one rank", factor=4.0)


@law(LOSS)
def logits_never_travel(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """A rank sends 3 numbers a token, all-reduced: one and two together, each padded to the ranks."""
    hidden, _, targets = case.args
    p, n = case.kwargs["ranks"], targets.size
    expected = [2 * (p - 1) * (-(-n // p) + -(-2 * n // p)) * hidden.dtype.itemsize] * p
    traffic = Traffic()
    case.replace(traffic=traffic).call(f)
    found = [traffic.sent(rank).bytes for rank in range(p)]
    require(found == expected, f"bytes: expected {expected}, got {found}")


@law(LOSS)
def probabilities_sum_to_one(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """Over all targets exp(-loss) sums to 1."""
    hidden, table, targets = case.args
    V = len(table)
    each = np.array([case.replace(hidden, table, np.full_like(targets, v)).call(f) for v in range(V)])
    # A loss is a difference of logits, whose rounding is the relative error of the probability.
    logits = float(np.max(np.sum(np.abs(hidden), axis=-1), initial=0) * np.max(np.abs(table)))
    room = 8 * V * np.finfo(each.dtype).eps * (1 + logits)
    worst = float(np.max(np.abs(np.exp(-each).sum(axis=0) - 1), initial=0))
    require(worst <= room, f"probabilities sum to 1 but for {worst}; expected at most {room}")
