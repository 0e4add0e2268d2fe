"""Laws of decode steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Attention = Callable[..., Any]


@law("attention.split_kv", "attention.paged")
def parts_do_not_matter(f: Attention, case: Case, close: Close) -> None:
    """Any number of parts of the cache gives the same output and the same log-sum-exp."""
    case = case.replace(return_lse=True)
    close = close.on(case)
    whole = case.replace(splits=1).call(f)
    for splits in (2, 5, 40):
        found = case.replace(splits=splits).call(f)
        close(widen(np.asarray(found[0])), widen(np.asarray(whole[0])), f"{splits} parts")
        close(np.asarray(found[1]), np.asarray(whole[1]), f"log-sum-exp of {splits} parts", of="lse")


@law("attention.split_kv")
def an_earlier_query_sees_a_shorter_cache(f: Attention, case: Case, close: Close) -> None:
    """The first of several new queries gives what it gave when it was the newest."""
    case = case.without("k_lengths", "return_lse")
    q, k, v = case.args
    later = q.shape[1] - 1
    if later < 1 or k.shape[1] <= later:
        return
    alone = case.replace(q[:, :1], k[:, :-later], v[:, :-later])
    close.on(case)(
        widen(np.asarray(case.call(f)))[:, :1], widen(np.asarray(alone.call(f))), "the first query alone"
    )


@law("attention.paged")
def the_order_of_pages_does_not_matter(f: Attention, case: Case, close: Close) -> None:
    """Pages laid elsewhere, and the table with them, change nothing."""
    q, k, v, table = case.args
    order = np.random.default_rng(0).permutation(len(k))
    moved = np.where(table >= 0, np.argsort(order)[table] if len(k) else table, -1)
    case = case.without("return_lse")
    elsewhere = case.replace(q, k[order], v[order], moved)
    close.on(case)(widen(np.asarray(elsewhere.call(f))), widen(np.asarray(case.call(f))), "pages moved")


@law("attention.paged")
def what_lies_behind_the_length_does_not_matter(f: Attention, case: Case, close: Close) -> None:
    """Other tokens behind the last valid key of a page change nothing."""
    q, k, v, table = case.args
    case, kept = case.without("return_lse"), np.zeros(k.shape[:2], bool)
    for row, length in zip(table, case.kwargs["k_lengths"], strict=True):
        for place in range(int(length)):
            kept[row[place // k.shape[1]], place % k.shape[1]] = True
    other = [np.where(kept[..., None, None], x, round_to(widen(x) + np.float32(1), x.dtype)) for x in (k, v)]
    changed = case.replace(q, *other, table)
    close.on(case)(widen(np.asarray(changed.call(f))), widen(np.asarray(case.call(f))), "behind it")
