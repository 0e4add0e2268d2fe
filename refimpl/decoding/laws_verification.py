"""Laws of parallel verification: what causality promises, and what a rollback owes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import Array
from refimpl.registry import Case, law
from refimpl.testing import Close

Verifier = Callable[..., Any]


def _call(f: Verifier, case: Case) -> tuple[Array, Array]:
    logits, resumed = case.call(f)
    return np.asarray(logits), np.asarray(resumed)


def _others(tokens: Array, case: Case) -> Array:
    """Return other tokens of the vocabulary, where it has any."""
    return np.asarray((tokens + 1) % case.kwargs["config"].vocabulary)


@law("decoding.verification")
def one_pass_equals_sequential_passes(f: Verifier, case: Case, close: Close) -> None:
    """Row i of the pass over all drafts is the pass over the first i drafts alone."""
    prefix, drafted, following = case.args
    logits, _ = _call(f, case)
    for i in range(drafted.shape[1] + 1):
        text = np.concatenate([prefix, drafted[:, :i]], axis=1)
        alone, _ = _call(f, case.replace(text, drafted[:, :0], following, accepted=0))
        close(alone, logits[:, i : i + 1], f"row {i} of the pass over all drafts", of="logits")


@law("decoding.verification")
def rejected_drafts_leave_no_trace(f: Verifier, case: Case, close: Close) -> None:
    """What is read after the rollback does not depend on rejected drafts, nor on there having been any."""
    prefix, drafted, following = case.args
    n = case.kwargs["accepted"]
    _, resumed = _call(f, case)
    other = np.concatenate([drafted[:, :n], _others(drafted[:, n:], case)], axis=1)
    _, with_others = _call(f, case.replace(prefix, other, following))
    close(with_others, resumed, "after other rejected drafts", of="resumed")
    _, without = _call(f, case.replace(prefix, drafted[:, :n], following))
    close(without, resumed, "without the rejected drafts", of="resumed")


@law("decoding.verification")
def accepted_drafts_become_text(f: Verifier, case: Case, close: Close) -> None:
    """Reading on after n accepted drafts is reading on after a prefix that ends in them."""
    prefix, drafted, following = case.args
    n = case.kwargs["accepted"]
    _, resumed = _call(f, case)
    text = np.concatenate([prefix, drafted[:, :n]], axis=1)
    _, as_text = _call(f, case.replace(text, drafted[:, :0], following, accepted=0))
    close(as_text, resumed, "the accepted drafts as a part of the prefix", of="resumed")


@law("decoding.verification")
def later_drafts_change_no_earlier_row(f: Verifier, case: Case, close: Close) -> None:
    """A draft changes only the rows after it."""
    prefix, drafted, following = case.args
    logits, _ = _call(f, case)
    for i in range(drafted.shape[1]):
        other = np.concatenate([drafted[:, :i], _others(drafted[:, i:], case)], axis=1)
        changed, _ = _call(f, case.replace(prefix, other, following))
        close(
            changed[:, : i + 1], logits[:, : i + 1], f"rows up to {i} with other drafts after it", of="logits"
        )
