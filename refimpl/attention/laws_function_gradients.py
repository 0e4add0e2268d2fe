"""Laws of the backward passes of flexible attention and of packed sequences."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from refimpl.attention.laws_flexible import by_name, first_three, overruling
from refimpl.numerics import Array, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Backward = Callable[..., Any]
FUNCTIONS = ("mask_mod", "score_mod", "score_mod_vjp", "aux")
GRADIENTS = ("dq", "dk", "dv")


def _everything(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    return i - j < 1 << 30


def _same(score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
    return score


def _same_vjp(gradient: Any, _score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
    return gradient


def _first_two(_b: Any, _h: Any, _i: Any, j: Any) -> Any:
    return j < 2


@law("attention.flexible_backward")
def functions_that_do_nothing_leave_gradients(f: Backward, case: Case, close: Close) -> None:
    """A mask that allows all and a score that stays itself have the gradients that no functions have."""
    bare = _forwarded(case.without(*FUNCTIONS))
    idle = bare.replace(mask_mod=_everything, score_mod=_same, score_mod_vjp=_same_vjp)
    found = idle.call(f)
    close.on(bare)(found, bare.call(f), "gradients with functions that do nothing")


@law("attention.flexible_backward")
def keys_behind_the_mask_have_no_gradient(f: Backward, case: Case, close: Close) -> None:  # noqa: ARG001
    """Keys and values that the mask leaves out get exactly 0."""
    found = _forwarded(case.without(*FUNCTIONS).replace(mask_mod=_first_two)).call(f)
    for name in ("dk", "dv"):
        require(widen(getattr(found, name))[:, 2:] == 0, f"{name} of a key that nobody sees is not 0")


@law("attention.flexible_backward")
def tiles_rule_gradients(f: Backward, case: Case, close: Close) -> None:
    """Dead tiles have no gradient and full ones all of it, whatever the function says of their scores."""
    tiles, meant = overruling(case.args[0].shape[1], case.args[1].shape[1])
    named = _forwarded(case.without(*FUNCTIONS).replace(mask_mod=by_name, aux=(meant,)))
    asked = named.without("aux").replace(mask_mod=first_three, block_mask=tiles)
    close.on(named)(asked.call(f), named.call(f), "gradients where states overrule the function")


@law("attention.varlen_backward")
def gradients_of_a_sequence_are_as_if_alone(f: Backward, case: Case, close: Close) -> None:
    """A packed sequence has the gradients that it has when no other is there."""
    q, k, v, starts, key_starts, o, lse, do = case.args
    found = case.call(f)
    for queries, keys in zip(_parts(starts), _parts(key_starts), strict=True):
        if queries.start == queries.stop:
            continue
        arrays, sizes = (q[queries], k[keys], v[keys]), (q[queries], k[keys])
        alone = case.replace(
            *arrays,
            *(np.array([0, len(x)], np.int32) for x in sizes),
            o[queries],
            lse[:, queries],
            do[queries],
        )
        packed = found.dq[queries], found.dk[keys], found.dv[keys]
        for name, part, expected in zip(GRADIENTS, packed, alone.call(f), strict=False):
            close(widen(part), widen(expected), f"{name} of a sequence alone", of=name)


@law("attention.varlen_backward")
def padding_has_no_gradient(f: Backward, case: Case, close: Close) -> None:  # noqa: ARG001
    """Tokens behind the last sequence get exactly 0."""
    _, _, _, starts, key_starts, *_ = case.args
    found = case.call(f)
    require(widen(found.dq)[int(starts[-1]) :] == 0, "dq of padding is not 0")
    for name in ("dk", "dv"):
        require(widen(getattr(found, name))[int(key_starts[-1]) :] == 0, f"{name} of padding is not 0")


def _parts(starts: Array) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in pairwise(starts)]


def _forwarded(case: Case) -> Case:
    """Return the call with the output and log-sum-exp of its own forward pass."""
    from refimpl.attention.flexible import flexible_attention

    q, k, v, o, lse, do = case.args
    out = Case((q, k, v), case.kwargs).replace(return_lse=True).call(flexible_attention)
    return case.replace(q, k, v, out.out.astype(o.dtype), out.lse.astype(lse.dtype), do)
