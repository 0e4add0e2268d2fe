"""What ``frugal verify`` says of its checks: rows of counts, failures with reproducers, and other reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.result import Column, Result

if TYPE_CHECKING:
    from refimpl.testing import Outcome

__all__ = ["SHOWN_FAILURES", "SHOWN_REASONS", "outcome_rows", "unloaded_row", "verify_result"]

STATUSES = ("passed", "failed", "refused", "invalid")
REASONS = {"refused": "refusals", "invalid": "invalid_reasons"}  # keys of rows, by status
SHOWN_FAILURES, SHOWN_REASONS = 3, 5
COLUMNS = (
    Column("technique"),
    Column("implementation"),
    Column("backend"),
    Column("dtype"),
    *(Column(status, right=True) for status in STATUSES),
)


def _row(technique: str, implementation: str, backend: str, dtype: str) -> dict[str, Any]:
    return {
        "technique": technique,
        "implementation": implementation,
        "backend": backend,
        "dtype": dtype,
        **dict.fromkeys(STATUSES, 0),
        "failures": [],
        **{key: {} for key in REASONS.values()},
    }


def _count(row: dict[str, Any], status: str, reason: str) -> None:
    row[status] += 1
    if status in REASONS:
        reasons = row[REASONS[status]]
        reasons[reason] = reasons.get(reason, 0) + 1


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return one row for each implementation and dtype, with the number of checks by status."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for outcome in outcomes:
        key = (outcome.technique, outcome.implementation, outcome.backend, outcome.dtype)
        row = rows.setdefault(key, _row(*key))
        # A law that says nothing of a case is named, for others may say something.
        law = f"{outcome.check}: " if outcome.status == "invalid" else ""
        _count(row, outcome.status, law + outcome.detail)
        if outcome.status == "failed":
            row["failures"].append(
                {"check": outcome.check, "detail": outcome.detail, "reproducer": outcome.reproducer}
            )
    return list(rows.values())


def unloaded_row(technique: str, target: str, backend: str, reason: str, *, refused: bool) -> dict[str, Any]:
    """Return the row of a function that could not be loaded, for which there may be a good reason."""
    row = _row(technique, target, backend, "")
    _count(row, "refused" if refused else "failed", reason)
    if not refused:
        again = f"frugal verify {technique}"
        row["failures"].append({"check": "import", "detail": reason, "reproducer": again})
    return row


def verify_result(
    rows: Sequence[dict[str, Any]], totals: Mapping[str, int], sought: str, all_failures: bool
) -> Result:
    """Return the result: exit code 1 if a check failed, or if nothing was checked.

    Parameters
    ----------
    rows
        Of `outcome_rows`.
    totals
        Of techniques and functions.
    sought
        Where functions were looked for, in words.
    all_failures
        Whether every failure and every reason is told.
    """
    counts = {status: sum(row[status] for row in rows) for status in STATUSES}
    problem = ""
    if counts["failed"]:
        problem = f"{counts['failed']} checks failed"
    elif not counts["passed"]:
        idle = [status for status in REASONS if counts[status]]
        why = f"all {sum(counts.values())} were {' or '.join(idle)}" if idle else f"no function for {sought}"
        problem = f"nothing was checked: {why}"
    return Result(
        rows,
        COLUMNS,
        totals={**totals, **counts},
        details=[line for row in rows for line in _details(row, all_failures)],
        problem=problem,
        exit_code=1 if problem else 0,
    )


def _details(row: Mapping[str, Any], everything: bool) -> Iterator[str]:
    """Yield lines on the failures of a row, then why cases were refused, and which said nothing."""
    shown = row["failures"] if everything else row["failures"][:SHOWN_FAILURES]
    for failure in shown:
        yield f"FAILED {row['technique']} {row['implementation']}: {failure['check']}"
        yield f"  {failure['detail']}"
        yield f"  reproduce: {failure['reproducer']}"
    if len(row["failures"]) > len(shown):
        hidden = len(row["failures"]) - len(shown)
        yield f"  ... and {hidden} more of {row['implementation']} (--all-failures)"
    where = f"{row['implementation']} in {row['dtype'] or 'every format'}"
    if row["refused"]:
        skipped = "" if any(row[status] for status in STATUSES if status != "refused") else "SKIPPED: all "
        yield f"{skipped}refused by {where}:"
        yield from _reasons(row["refusals"], everything)
    if row["invalid"]:
        yield f"invalid, for they say nothing of {where}:"
        yield from _reasons(row["invalid_reasons"], everything)


def _reasons(reasons: Mapping[str, int], everything: bool) -> Iterator[str]:
    often = sorted(reasons.items(), key=lambda item: -item[1])
    shown = often if everything else often[:SHOWN_REASONS]
    yield from (f"  {count} x {reason}" for reason, count in shown)
    if len(often) > len(shown):
        hidden = sum(count for _, count in often[len(shown) :])
        yield f"  ... and {hidden} for other reasons (--all-failures)"
