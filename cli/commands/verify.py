"""``frugal verify``: hold the registered implementations, or anyone's function, to a definition."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import click

from cli.commands.env import BACKENDS, why_not
from cli.foreign import accepted_dtypes, untrusted
from cli.output import output_options, progress
from cli.parameters import AXES, DTYPES, TECHNIQUE, AxisValue
from cli.processes import another_speaks, together
from cli.result import Result
from cli.verify_checks import known_axes, refuse_hours
from cli.verify_jobs import Job, jobs_of
from cli.verify_result import SHOWN_FAILURES, SHOWN_REASONS, outcome_rows, unloaded_row, verify_result

__all__ = ["command"]

KERNELS = ("cuda", "cudasim")
# Whose kernels ``--tier`` means: on Hopper those for Ampere's tensor cores are some techniques' fast ones.
TIERS = {"portable": ("portable",), "ampere": ("ampere",), "hopper": ("ampere", "hopper")}


@click.command(
    epilog="""\b
Examples:
  frugal verify                                            everything registered
  frugal verify attention.flash --axes Tq=65,D=80 --seed 7
  frugal verify attention.flash --with my.module:f --dtype float32
  frugal verify attention.dense --backend cudasim
  frugal verify --backend cuda --tier hopper               kernels for tensor cores
  frugal verify attention.flexible --mod mine.py:capped --backend cudasim
  frugal verify --model path/to/all-MiniLM-L6-v2""",
    short_help="Hold implementations to their definitions.",
)
@click.argument("names", metavar="[NAME]...", nargs=-1, type=TECHNIQUE)
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="numpy", show_default=True, help="Where to run."
)
@click.option(
    "--tier",
    type=click.Choice(list(TIERS)),
    help="Only kernels of this tier; hopper has those for Ampere's tensor cores, too.  [default: all]",
)
@click.option(
    "--with",
    "with_",
    metavar="MODULE:FUNCTION",
    help="Check this function of yours instead; needs one NAME. The current directory is importable.",
)
@click.option(
    "--mod",
    "mod",
    metavar="FILE:FUNCTION",
    help="Of attention.flexible: check this mask or score of yours, and attention with it.",
)
@click.option(
    "--model",
    "model",
    metavar="DIR",
    help="Check on the weights and activations of a BERT-shaped checkpoint instead; takes no NAME.",
)
@click.option("--dtype", "dtypes", type=DTYPES, help="Number formats.  [default: those of the backend]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first case.")
@click.option(
    "--examples",
    type=click.IntRange(1, 100_000),
    default=8,
    show_default=True,
    help="Random cases beside edge cases.",
)
@click.option("--axes", type=AXES, help="Fix axes and options of the cases, as a reproducer does.")
@click.option(
    "--all-failures",
    is_flag=True,
    help=f"Print every failure and reason, not {SHOWN_FAILURES} and {SHOWN_REASONS} of each row.",
)
@output_options()
def command(
    names: tuple[str, ...],
    backend: str,
    tier: str | None,
    with_: str | None,
    mod: str | None,
    model: str | None,
    dtypes: tuple[str, ...] | None,
    seed: int,
    examples: int,
    axes: dict[str, AxisValue] | None,
    all_failures: bool,
) -> Result:
    """Check functions against the laws, edge cases, gradients and counted costs of what they compute.

    Without a NAME, everything that is registered for the backend is checked.  Every failure comes with the
    command that reproduces it.  The exit code is 1 if a check failed, or if nothing could be checked.

    A function of yours is called as the reference: arrays positional, for attention [B, T, H, D], options by
    keyword; it must return the dtype that it is given.  An option that its signature lacks is left out where
    it has its default; other such calls, and those that it refuses with NotImplementedError, are counted as
    refused, with the reason.  Cases of which a law says nothing, or in which the format loses all, are
    invalid, with the reason, and count for nobody.  For attention, causal is False, "top_left" or
    "bottom_right".  The simulator runs about one case a second.

    Kernels of all tiers are held to the same cases; those of shapes, formats or GPUs that a kernel does not
    take are counted as refused, with the reason.

    With --model, twenty sentences go through the encoder: it is held to transformers (where installed), every
    registered attention to the definition on its queries, keys and values, and LLM.int8() to its error bound
    on its activations, with the outliers that it finds there.

    With --mod, a score's gradient, the function with _vjp behind its name, is held to finite differences of
    the score, and kernels with the functions, of a CUDA backend, to the definition; cudasim compiles the
    functions for a GPU as well, where the CUDA toolkit is installed.
    """
    if tier is not None and (backend not in KERNELS or (with_, mod, model) != (None, None, None)):
        raise click.UsageError("--tier needs --backend cuda or cudasim, and no --with, --mod or --model")
    if backend == "cudasim":
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # numba reads it once, when it is first imported
    if mod is not None:
        if names != ("attention.flexible",) or with_ is not None or model is not None or axes is not None:
            raise click.UsageError(
                "--mod needs the NAME attention.flexible alone, no --with, --model or --axes"
            )
        return _of_mod(mod, backend, dtypes, seed, examples, all_failures)
    if model is not None:
        if names or with_ is not None or axes is not None:
            raise click.UsageError("--model takes no NAME, no --with and no --axes: it has cases of its own")
        from cli.model_check import check_model, read_model

        read = read_model(model)
        _open(backend)
        return check_model(model, read, backend, dtypes or ("float32",))
    if with_ is not None and len(names) != 1:
        raise click.UsageError(f"--with checks one function against one NAME; got {len(names)} names")
    from refimpl import registry

    registry.load()
    techniques = [registry.get(name) for name in dict.fromkeys(names) or sorted(registry.TECHNIQUES)]
    fixed = {record.name: known_axes(record, axes) for record in techniques} if axes is not None else {}
    if backend == "cudasim":
        for record in techniques:
            refuse_hours(record, fixed.get(record.name, {}))
    jobs = [
        job
        for record in techniques
        for job in jobs_of(record, backend, with_)
        if tier is None or job.tier in TIERS[tier]
    ]
    _open(backend, tier)  # last: what any machine can tell of the command line has been told
    check_job = partial(_check, backend=backend, seed=seed, examples=examples, fixed=fixed, dtypes=dtypes)
    with together(backend):
        rows = _run(jobs, backend, check_job)
    tried = {job.technique.name for job in jobs}
    totals = {
        "techniques": len(tried),
        "without_implementation": len(techniques) - len(tried),
        "functions": len(jobs),
    }
    sought = backend if tier is None else f"{backend} in tier {tier}"
    return replace(verify_result(rows, totals, sought, all_failures), silent=another_speaks(backend))


def _of_mod(
    mod: str, backend: str, dtypes: tuple[str, ...] | None, seed: int, examples: int, all_failures: bool
) -> Result:
    """Check a mask or a score of the user's."""
    from cli.flexible_forms import users_form
    from cli.flexible_verify import mod_outcomes

    form = users_form(mod)
    _open(backend)
    with untrusted(mod, "--mod"):
        outcomes = mod_outcomes(form, mod, backend, dtypes, seed, examples, lambda: _poisoned(backend))
    totals = {"techniques": 1, "without_implementation": 0, "functions": 1}
    result = verify_result(outcome_rows(outcomes), totals, backend, all_failures)
    note = ["Not compiled for a GPU: --backend cudasim and cuda do that."] if backend == "numpy" else []
    return replace(result, details=[*result.details, *note])


def _run(
    jobs: list[Job], backend: str, check_job: Callable[[Job], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Do the jobs, and return the rows of all; one whose backend is missing is refused, not failed.

    Raises
    ------
    BackendUnavailableError
        If it is missing for all of them.
    """
    from refimpl.errors import BackendUnavailableError

    rows: list[dict[str, Any]] = []
    missing = ""
    for job in progress(jobs, "verify", lambda job: f"{job.technique.name} {job.target}"):
        try:
            rows += check_job(job)
        except BackendUnavailableError as error:
            missing = f"{job.target}: {error}"
            rows.append(unloaded_row(job.technique.name, job.target, backend, str(error), refused=True))
    if missing and not any(row["passed"] or row["failed"] for row in rows):
        raise BackendUnavailableError(missing)
    return rows


def _check(
    job: Job,
    *,
    backend: str,
    seed: int,
    examples: int,
    fixed: Mapping[str, dict[str, AxisValue]],
    dtypes: tuple[str, ...] | None,
) -> list[dict[str, Any]]:
    """Return the rows of one job."""
    from refimpl.testing import check

    try:
        f = job.load()
    except (ImportError, AttributeError) as error:
        return [unloaded_row(job.technique.name, job.target, backend, str(error), refused=False)]
    axes = fixed.get(job.technique.name)
    with untrusted(job.target, "--axes" if axes else None), _poisoned(backend):
        found = check(
            job.technique.name,
            f,
            label=job.target,
            backend=backend,
            seed=seed,
            examples=examples,
            axes=axes,
            dtypes=dtypes or (accepted_dtypes(job.technique, f, seed) if job.with_ and f else None),
            target=job.with_,
            tier=job.tier if backend in KERNELS else "",
        )
    return outcome_rows(found.outcomes)


def _open(backend: str, tier: str | None = None) -> None:
    """See that `backend` can run here and can have such a tier.

    Raises
    ------
    BackendUnavailableError
        With the reason.
    """
    reason = why_not(backend)
    if reason is None and backend == "cudasim" and tier not in (None, "portable"):
        reason = f"tier {tier} needs a GPU: --backend cuda"
    if reason is not None:
        from refimpl.errors import BackendUnavailableError

        raise BackendUnavailableError(f"backend {backend}: {reason}")


def _poisoned(backend: str) -> AbstractContextManager[None]:
    """Fill outputs on the device with NaN before a kernel runs, so that what it does not write shows."""
    if backend not in KERNELS:
        return nullcontext()
    from cuda_backend.arrays import poisoned_outputs

    return poisoned_outputs()
