"""Laws of collectives, of Adam and mixed precision, and of data parallelism and ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, widen
from refimpl.parallel import array_collectives
from refimpl.parallel.adam import AdamW
from refimpl.parallel.mixed_precision import LossScale
from refimpl.registry import Case, law
from refimpl.testing import Close

Function = Callable[..., Any]
PREFIX = "parallel.collectives"
STEPS = ("parallel.mixed_precision.adam", "parallel.mixed_precision.adamw")


def _require_equal(found: Any, expected: Any, what: str) -> None:
    a, b = (widen(np.asarray(x)) for x in (found, expected))
    if a.shape != b.shape or not np.array_equal(a, b, equal_nan=True):
        raise LawViolation(f"{what}: expected {b.tolist()}, got {a.tolist()}")


# Collectives


@law(PREFIX, f"{PREFIX}.all_gather", f"{PREFIX}.broadcast")
def ranks_agree(f: Function, case: Case, _close: Close) -> None:
    """Every rank ends with the same bits."""
    rows = case.call(f)
    for rank in range(len(rows)):
        _require_equal(rows[rank], rows[0], f"rank {rank} against rank 0")


@law(PREFIX, f"{PREFIX}.reduce_scatter", f"{PREFIX}.reduce")
def renumbering_ranks_keeps_the_sum(f: Function, case: Case, close: Close) -> None:
    """Which rank adds what does not matter but for rounding."""
    turned = case.replace(case.args[0][::-1].copy())
    close.on(turned)(turned.call(f), case.call(f), "ranks in reverse order")


@law(PREFIX, f"{PREFIX}.reduce_scatter", f"{PREFIX}.reduce")
def a_rank_of_zeros_adds_nothing(f: Function, case: Case, close: Close) -> None:
    """The sum is that of the other ranks, wherever the rank of zeros stands."""
    (x,) = case.args
    silent = x.copy()
    silent[-1] = 0
    moved = case.replace(silent + x[-1:] / len(x))
    close.on(moved)(moved.call(f), case.call(f), "one rank's addend shared out among all", factor=4.0)


@law(PREFIX)
def reduce_scatter_then_all_gather(f: Function, case: Case, close: Close) -> None:
    """An all-reduce is a reduce-scatter followed by an all-gather."""
    (x,) = case.args
    both = array_collectives.all_gather(array_collectives.reduce_scatter(x))[:, : x.shape[1]]
    close(case.call(f), both, "all-reduce against both halves")


@law(f"{PREFIX}.reduce_scatter")
def padding_holds_zeros(f: Function, case: Case, _close: Close) -> None:
    """What stands behind the end of the vector is 0."""
    (x,) = case.args
    found = case.call(f)
    _require_equal(found.shape, (len(x), -(-x.shape[1] // len(x))), "shape of the chunks")
    _require_equal(found.ravel()[x.shape[1] :], np.zeros(found.size - x.shape[1]), "padding")


@law(f"{PREFIX}.all_gather")
def every_chunk_stands_at_its_rank(f: Function, case: Case, _close: Close) -> None:
    """On rank s, chunk r is what rank r gave."""
    (x,) = case.args
    gathered = case.call(f).reshape(len(x), *x.shape)
    for rank in range(len(x)):
        _require_equal(gathered[:, rank], np.broadcast_to(x[rank], x.shape), f"chunk of rank {rank}")


@law(f"{PREFIX}.all_to_all")
def twice_is_nothing(f: Function, case: Case, _close: Close) -> None:
    """Exchanging twice gives everything back."""
    _require_equal(case.replace(case.call(f)).call(f), case.args[0], "exchanged twice")


@law(f"{PREFIX}.all_to_all")
def blocks_arrive_where_they_are_meant_for(f: Function, case: Case, _close: Close) -> None:
    """Block s of rank r comes from rank s, where it was block r."""
    (x,) = case.args
    found = case.call(f)
    for rank in range(len(x)):
        _require_equal(found[rank], x[:, rank], f"blocks of rank {rank}")


@law(f"{PREFIX}.broadcast")
def only_the_root_matters(f: Function, case: Case, _close: Close) -> None:
    """The root's row arrives, whatever the others hold."""
    (x,) = case.args
    root = case.kwargs["root"]
    other = x + 1
    other[root] = x[root]
    _require_equal(case.replace(other).call(f), np.broadcast_to(x[root], x.shape), "other rows changed")


# Adam (parallel.mixed_precision.adam, .adamw) and mixed precision


def _fresh(case: Case) -> tuple[Array, Array, Array]:
    """Return parameters, a gradient that is far from 0, and zeros."""
    p, g, *_ = case.args
    return p, np.where(g < 0, g - 1, g + 1).astype(g.dtype), np.zeros_like(p)


@law(*STEPS)
def first_step_has_the_size_of_the_rate(f: Function, case: Case, _close: Close) -> None:
    """The first step of Adam is ±lr, whatever the size of the gradient: bias correction undoes the zeros."""
    p, g, zero = _fresh(case)
    settings = replace(case.kwargs["optimizer"], weight_decay=0.0, eps=1e-12)
    for factor in (1.0, 1000.0):
        after = f(p, factor * g, zero, zero, step=1, optimizer=settings)[0]
        moved = widen(p) - widen(after)
        spacing = 4 * np.spacing(np.abs(p) + settings.lr) + 1e-9
        if not np.all(np.abs(moved - settings.lr * np.sign(g)) <= spacing):
            raise LawViolation(f"first step: expected ±{settings.lr}, got {moved.tolist()}")


@law(*STEPS)
def elements_are_independent(f: Function, case: Case, _close: Close) -> None:
    """Any part of the vectors is stepped as it would be alone: optimizer states can be sharded."""
    whole = case.call(f)
    for part in (slice(0, 1), slice(1, None, 2)):
        alone = case.replace(*(x[part].copy() for x in case.args)).call(f)
        for name, a, b in zip(("parameters", "momentum", "variance"), alone, whole, strict=True):
            _require_equal(a, b[part], f"{name} of a part of the vector")


@law("parallel.mixed_precision.adamw")
def decay_stays_out_of_the_moments(f: Function, case: Case, close: Close) -> None:
    """A weight decay shrinks the parameters by lr * decay and leaves both moments alone (AdamW)."""
    plain = replace(case.kwargs["optimizer"], weight_decay=0.0)
    decayed = replace(plain, weight_decay=0.25)
    a, b = (case.replace(optimizer=settings).call(f) for settings in (plain, decayed))
    _require_equal(b[1], a[1], "momentum")
    _require_equal(b[2], a[2], "variance")
    p = widen(case.args[0])
    close.on(case)(b[0], (widen(a[0]) - plain.lr * 0.25 * p).astype(a[0].dtype), "decay", factor=4.0)


def _survives(case: Case, factor: float) -> bool:
    """Whether no scaled gradient overflows or loses bits in the model's format, also times `factor`."""
    scale = case.kwargs["loss_scale"].scale
    limits = np.finfo(case.kwargs["model_dtype"])
    sizes = np.abs(widen(case.args[1])).astype(np.float64)
    sizes = sizes[sizes > 0] * scale * 2.0 ** len(case.args[1])
    least = sizes * min(factor, 1.0) / 4.0 ** len(case.args[1])
    return bool(np.all(np.isfinite(sizes)) and np.all(sizes * max(factor, 1.0) < limits.max)) and bool(
        np.all(least > limits.smallest_normal)
    )


@law("parallel.mixed_precision")
def a_power_of_two_changes_nothing(f: Function, case: Case, _close: Close) -> None:
    """Without overflow and underflow, eight times the loss scale leaves every bit of the states as it is."""
    scale = case.kwargs["loss_scale"]
    if not _survives(case, 8.0):
        return
    a, b = case.call(f), case.replace(loss_scale=scale._replace(scale=8 * scale.scale)).call(f)
    for name, x, y in zip(("parameters", "master", "momentum", "variance"), a, b, strict=False):
        _require_equal(y, x, f"{name} under eight times the loss scale")
    _require_equal(b[5], 8 * a[5], "final scale")


@law("parallel.mixed_precision")
def a_skipped_step_changes_no_state(f: Function, case: Case, _close: Close) -> None:
    """An infinite gradient halves the scale and leaves parameters, moments and the step count alone."""
    p, g = case.args
    if not len(p):
        return
    bad = np.zeros((1, len(p)), g.dtype)
    bad[0, -1] = np.inf
    before, after = case.call(f), case.replace(p, np.concatenate([g, bad])).call(f)
    for index, name in enumerate(("parameters", "master", "momentum", "variance", "steps")):
        _require_equal(after[index], before[index], f"{name} after a skipped step")
    _require_equal(after[5], before[5] / 2, "scale after a skipped step")
    _require_equal(after[6], 0, "good steps after a skipped step")


@law("parallel.mixed_precision")
def small_updates_survive_in_the_master(f: Function, case: Case, _close: Close) -> None:
    """Updates below the resolution of the parameters' format add up in the master copy."""
    p = np.ones(1, case.args[0].dtype)
    options = {"model_dtype": "float16", "optimizer": AdamW(lr=1e-4), "loss_scale": LossScale(2.0**10)}
    after = f(p, -np.ones((100, 1), p.dtype), **options)
    if not abs(float(after[1][0]) - 1.01) < 1e-4 or float(after[0][0]) == 1.0:
        raise LawViolation(f"100 steps of 1e-4 from 1: master {after[1][0]}, parameter {after[0][0]}")
