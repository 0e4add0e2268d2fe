"""What any machine can judge of a command line of ``frugal bench``, before a GPU is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from cli.bench_problems import AXES, DEFAULT_SHAPES, GROUPED, Wanted
from cli.contest import tiers
from cli.problems import Problem
from refimpl.errors import BackendUnavailableError

__all__ = ["check_names", "check_options", "check_shapes", "check_simulated", "check_simulation"]

MOST_ELEMENTS = 10**12  # of an array: a terabyte of codes
# Measured are 15 to 170 microseconds for one of them, all functions of a shape together.
MOST_SIMULATED = 1_000_000
MOST_PARTS = 64  # of a cache, each a block of threads
TILE = 16  # the smallest side of a tile: threads without an element take their time, too


def check_options(
    what: str,
    wanted: Wanted,
    models: Sequence[str],
    tokens: Any,
    merge: Sequence[Sequence[str]],
    mods: Sequence[str],
) -> None:
    """Refuse options that say nothing about what is measured.

    Raises
    ------
    click.UsageError
        If there is one.
    """
    if what not in ("attention", "int8-attention") and wanted.causal is not None:
        raise click.UsageError("--causal is an option of attention")
    if what not in ("attention", "flexible") and (wanted.direction or "fwd") != "fwd":
        raise click.UsageError(f"{what} has no backward pass; --pass is an option of attention and flexible")
    kinds = set(wanted.dtypes or ())
    if what not in ("attention", "flexible", "decode") and not kinds <= {"float16", "bfloat16"}:
        raise click.UsageError(f"--dtype of {what} is float16 or bfloat16")
    if "float64" in kinds:
        raise click.UsageError(f"--dtype of {what} is float16, bfloat16 or float32")
    if what != "int8" and (models or tokens or merge):
        raise click.UsageError("--model, --tokens and --merge are options of int8")
    if tokens and not models:
        raise click.UsageError("--tokens are the rows of a --model")
    if merge and not models:
        raise click.UsageError("--merge is of projections of a --model")
    for names in merge:
        if len(names) < 2 or len(set(names)) != len(names):
            given = ",".join(names)
            raise click.UsageError(f"--merge: expected two names or more, each once; got {given!r}")
    if what != "flexible" and (wanted.forms or mods):
        raise click.UsageError("--form and --mod are options of flexible")
    if what != "decode" and wanted.splits:
        raise click.UsageError("--splits is an option of decode")


def check_simulation(ctx: click.Context) -> None:
    """Refuse options that are about times, of which the simulator has none, and a cache in too many parts.

    Raises
    ------
    click.UsageError
        If there is one.
    """
    for name in ("hardware", "rounds", "plot_file"):
        if ctx.params.get(name) is not None:
            flag = next(item.opts[0] for item in ctx.command.params if item.name == name)
            raise click.UsageError(f"{flag} is about times, and the simulator has none: --backend cuda")
    if (ctx.params["splits"] or 0) > MOST_PARTS:
        raise click.UsageError(
            f"--splits: expected no more than {MOST_PARTS} in the simulator; got {ctx.params['splits']}"
        )


def check_shapes(what: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse shapes that do not fit what is measured.

    Raises
    ------
    click.UsageError
        If one has other axes, or heads that do not divide each other.
    """
    for shape in shapes:
        grouped = what in GROUPED and len(shape) == len(AXES[what]) + 1
        shown = "x".join(map(str, shape))
        if len(shape) != len(AXES[what]) and not grouped:
            raise click.UsageError(f"--shape of {what} is {','.join(AXES[what])}; got {shown}")
        if (grouped or what == "decode") and shape[1] % shape[2]:
            raise click.UsageError(f"--shape: Hkv must divide H, got {shown}")
        if _elements(what, shape) > MOST_ELEMENTS:
            raise click.UsageError(f"no GPU holds arrays as large as those of {what} at {shown}")


def _elements(what: str, shape: tuple[int, ...]) -> int:
    """Return how many elements the largest array has."""
    if what in ("int8", "weight-only"):
        M, K, N = shape
        return max(M * K, K * N, M * N)
    B, H, *_, tokens, width = shape
    return B * H * tokens * width


def check_simulated(what: str, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse shapes that take hours in the simulator, where a thread of a GPU is a thread of Python.

    Raises
    ------
    click.UsageError
        If there is one.
    """
    for shape in shapes:
        count = _products(what, shape)
        if count > MOST_SIMULATED:
            fine, shown = ("x".join(map(str, sizes)) for sizes in (DEFAULT_SHAPES[what, "cudasim"][0], shape))
            raise click.UsageError(
                f"{what} at {shown} is too large for the simulator: {count:.1e} multiply-adds, sizes counted"
                f" as {TILE} at least, and {MOST_SIMULATED:.0e} take it minutes; {fine} is fine, and times"
                " need a GPU: --backend cuda"
            )


def _products(what: str, shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of a product, all sizes but batch and heads filled up to a tile.

    >>> _products("int8", (1, 100, 16)), _products("attention", (2, 4, 1, 20, 8))
    (28672, 131072)
    """
    if what in ("int8", "weight-only"):
        return math.prod(_tiled(size) for size in shape)
    *_, tokens, width = shape
    queries = 1 if what == "decode" else _tiled(tokens)
    return shape[0] * shape[1] * queries * _tiled(tokens) * _tiled(width)


def _tiled(size: int) -> int:
    return -(-size // TILE) * TILE


def check_names(problems: Sequence[Problem], backend: str, tier: str | None, chosen: Sequence[str]) -> None:
    """Refuse a tier that none of ours has, and parts of names that no rival has.

    Raises
    ------
    click.UsageError
        If there is one.
    BackendUnavailableError
        If a GPU has the tier: that is no mistake in the simulator, but missing.
    """
    known = dict.fromkeys(name for problem in problems for name in problem.rival_names)
    for part in chosen:
        if not part or not any(part in name for name in known):
            raise click.UsageError(f"--rival: none of {', '.join(known)} has {part!r} in its name")
    if tier is None:
        return
    here, real = ({x for problem in problems for x in tiers(problem, on)} for on in (backend, "cuda"))
    if tier in here:
        return
    if tier in real:
        raise BackendUnavailableError(f"tier {tier} needs a GPU: --backend cuda")
    raise click.UsageError(f"--tier: expected one of {', '.join(sorted(here | real))}; got {tier!r}")
