"""Laws of attention with functions of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.block_mask import DEAD, FULL, PARTIAL, BlockMask, block_mask
from refimpl.errors import LawViolation
from refimpl.numerics import BoolArray, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Attention = Callable[..., Any]
FUNCTIONS = ("mask_mod", "score_mod", "score_mod_vjp", "aux")


def _everything(_b: Any, _h: Any, i: Any, j: Any) -> Any:
    return i - j < 1 << 30


def _same(score: Any, _b: Any, _h: Any, _i: Any, _j: Any) -> Any:
    return score


def _lifted(score: Any, _b: Any, _h: Any, i: Any, _j: Any) -> Any:
    return score + 0.25 * (i % 4)


def _odd_rows(_b: Any, _h: Any, i: Any, _j: Any) -> Any:
    return i % 2 == 1


def first_three(_b: Any, _h: Any, _i: Any, j: Any) -> Any:
    """Return whether a key is one of the first three."""
    return j < 3


def _infinite_behind_three(score: Any, _b: Any, _h: Any, _i: Any, j: Any) -> Any:
    return score if j < 3 else float("-inf")


def _out(case: Case, f: Attention) -> Any:
    return widen(np.asarray(case.without("return_lse").call(f)))


@law("attention.flexible")
def functions_that_do_nothing_change_nothing(f: Attention, case: Case, close: Close) -> None:
    """A mask that allows all and a score that stays itself give what no functions give."""
    bare = case.without(*FUNCTIONS)
    asked = bare.replace(mask_mod=_everything, score_mod=_same)
    close.on(bare)(_out(asked, f), _out(bare, f), "functions that do nothing")


@law("attention.flexible")
def a_term_alike_for_all_keys_cancels(f: Attention, case: Case, close: Close) -> None:
    """What a score_mod adds to all scores of a query leaves its output alone and moves its log-sum-exp."""
    lifted = case.without("score_mod_vjp").replace(score_mod=_lifted, return_lse=True)
    plain = case.without("score_mod", "score_mod_vjp").replace(return_lse=True)
    found, expected = lifted.call(f), plain.call(f)
    close = close.on(lifted)
    close(
        widen(np.asarray(found[0])), widen(np.asarray(expected[0])), "a term alike for all keys", factor=2.0
    )
    lift = 0.25 * (np.arange(case.args[0].shape[1]) % 4)
    close(np.asarray(found[1]), np.asarray(expected[1]) + lift, "its log-sum-exp", of="lse", factor=2.0)


@law("attention.flexible")
def an_infinite_score_is_a_mask(f: Attention, case: Case, close: Close) -> None:
    """A score_mod that returns -inf does what a mask_mod that says no does."""
    bare = case.without(*FUNCTIONS)
    masked, infinite = bare.replace(mask_mod=first_three), bare.replace(score_mod=_infinite_behind_three)
    close.on(masked)(_out(infinite, f), _out(masked, f), "-inf in place of a mask")


@law("attention.flexible")
def keys_behind_the_mask_do_not_matter(f: Attention, case: Case, close: Close) -> None:
    """What stands at keys that the mask leaves out changes nothing."""
    masked = case.without(*FUNCTIONS).replace(mask_mod=first_three)
    q, k, v = masked.args
    hidden = (np.arange(k.shape[1]) >= 3)[:, None, None]
    other = [np.where(hidden, round_to(widen(x) + np.float32(1.0), x.dtype), x) for x in (k, v)]
    close.on(masked)(_out(masked.replace(q, *other), f), _out(masked, f), "other keys behind the mask")


@law("attention.flexible")
def queries_without_keys_are_zero(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """A query that the mask leaves no key gets exactly 0."""
    out = _out(case.without(*FUNCTIONS).replace(mask_mod=_odd_rows), f)
    if np.any(out[:, ::2] != 0):
        raise LawViolation("a row with every key masked is not 0")


@law("attention.flexible")
def states_of_tiles_computed_before_change_nothing(f: Attention, case: Case, close: Close) -> None:
    """A call that is given the block mask of its function gives what it gives without."""
    if case.kwargs.get("mask_mod") is None:
        return
    mask, aux = case.kwargs["mask_mod"], case.kwargs.get("aux", ())
    (B, Tq, Hq, _), Tk = case.args[0].shape, case.args[1].shape[1]
    tiles = block_mask(mask, B, Hq, Tq, Tk, block_sizes=(4, 6), aux=aux)
    expected = _out(case, f)
    close.on(case)(_out(case.replace(block_mask=tiles), f), expected, "with a block mask")
    close.on(case)(_out(case.without("mask_mod").replace(block_mask=tiles), f), expected, "with it alone")


@law("attention.flexible")
def tiles_have_the_last_word(f: Attention, case: Case, close: Close) -> None:
    """Dead tiles are masked and full ones are not, whatever the function says; it speaks in partial ones."""
    tiles, meant = overruling(case.args[0].shape[1], case.args[1].shape[1])
    bare = case.without(*FUNCTIONS)
    asked = bare.replace(mask_mod=first_three, block_mask=tiles)
    named = bare.replace(mask_mod=by_name, aux=(meant,))
    close.on(named)(_out(asked, f), _out(named, f), "states that overrule the function")


def overruling(Tq: int, Tk: int) -> tuple[BlockMask, BoolArray]:
    """Return states of small tiles, and what they and `first_three` allow together."""
    rows, columns = np.ogrid[: -(-Tq // 2), : -(-Tk // 3)]
    states = np.array([DEAD, PARTIAL, FULL], np.uint8)[(rows + columns) % 3]
    state = states.repeat(2, axis=0)[:Tq].repeat(3, axis=1)[:, :Tk]
    meant = np.where(state == PARTIAL, np.arange(Tk) < 3, state == FULL)
    return BlockMask(states[None, None], (2, 3), (Tq, Tk)), meant


def by_name(_b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
    """Return what the first array says of a score."""
    return aux[0][i, j]
