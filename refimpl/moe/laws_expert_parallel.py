"""Laws of experts over ranks: ranks are groups of tokens, and where an expert stands changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, in_float64
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Layer = Callable[..., Any]

FORWARD, BACKWARD = "moe.expert_parallel", "moe.expert_parallel.backward"


def _out(case: Case, f: Layer) -> FloatArray:
    return in_float64(case.call(f))


def _rank(case: Case, rank: int) -> Case:
    """Return the case with the tokens of one rank alone, and so on one rank."""
    x, w_router, w_in, w_out, *dy = case.args
    part = slice(rank, rank + 1)
    return case.replace(x[part], w_router, w_in, w_out, *(array[part] for array in dy))


@law(FORWARD)
def a_rank_alone_gives_its_part(f: Layer, case: Case, close: Close) -> None:
    """What a rank's tokens become depends neither on other ranks nor on where the experts are."""
    whole = _out(case, f)
    for rank in range(len(whole)):
        close(_out(_rank(case, rank), f), whole[rank : rank + 1], f"rank {rank} alone, with all experts")


@law(FORWARD)
def experts_may_stand_anywhere(f: Layer, case: Case, close: Close) -> None:
    """Permuting experts together with the router's columns, and so their ranks, changes nothing."""
    x, w_router, w_in, w_out = case.args
    order = np.arange(len(w_in))[::-1]
    gate = case.kwargs.get("w_gate")
    options = {} if gate is None else {"w_gate": gate[order]}
    moved = case.replace(x, w_router[:, order], w_in[order], w_out[order], **options)
    close(_out(moved, f), _out(case, f), "experts in reverse")


@law(FORWARD)
def without_places_everything_is_dropped(f: Layer, case: Case, close: Close) -> None:
    """A capacity of 0 gives 0."""
    closed = case.replace(capacity=0)
    close(_out(closed, f), np.zeros(case.args[0].shape), "no places")


@law(FORWARD)
def tokens_past_the_capacity_are_dropped(f: Layer, case: Case, close: Close) -> None:
    """Where all tokens of a rank want one expert that has one place, the first token alone gets something."""
    x, w_router, w_in, w_out = case.args
    same = np.repeat(x[:, :1], x.shape[1], axis=1)
    tight = case.replace(same, w_router, w_in, w_out, capacity=1)
    close(_out(tight, f)[:, 1:], np.zeros_like(x[:, 1:], np.float64), "tokens behind the first")


def _gradients(case: Case, f: Layer) -> list[FloatArray]:
    found = case.call(f)
    return [in_float64(array) for array in found if array is not None]


@law(BACKWARD)
def weights_collect_the_gradients_of_all_ranks(f: Layer, case: Case, close: Close) -> None:
    """Gradients of router and experts are the sums of those that each rank's tokens give alone."""
    names = ("dx", "dw_router", "dw_in", "dw_out", "dw_gate")
    whole = _gradients(case, f)
    alone = [_gradients(_rank(case, rank), f) for rank in range(len(case.args[0]))]
    for index, name in enumerate(names[: len(whole)]):
        parts = [gradients[index] for gradients in alone]
        together = np.concatenate(parts) if name == "dx" else np.sum(parts, axis=0)
        close(whole[index], together, f"{name} of ranks alone", of=name, factor=float(len(parts)))


@law(BACKWARD)
def gradients_scale_with_the_cotangent(f: Layer, case: Case, close: Close) -> None:
    """A cotangent twice as large gives gradients twice as large."""
    *arrays, dy = case.args
    names = ("dx", "dw_router", "dw_in", "dw_out", "dw_gate")
    for name, one, two in zip(
        names, _gradients(case, f), _gradients(case.replace(*arrays, 2 * dy), f), strict=False
    ):
        close(two, 2 * one, f"{name} for twice the cotangent", of=name, factor=2.0)


@law(BACKWARD)
def dropped_tokens_have_no_gradient(f: Layer, case: Case, close: Close) -> None:  # noqa: ARG001
    """Without places every gradient is 0."""
    for gradient in _gradients(case.replace(capacity=0), f):
        require(gradient == 0, "a gradient came through a dropped token")
