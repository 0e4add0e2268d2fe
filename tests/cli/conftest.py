"""Running the command in this process, and as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli.main import frugal


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``run("list", "--json")`` in this process; an exception that reaches the user fails the test."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(frugal, list(arguments))
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code, (result.stdout, result.stderr)
        return result

    return invoke


@pytest.fixture
def rows(run: Callable[..., Result]) -> Callable[..., dict[str, Any]]:
    """``rows("list")`` is the parsed JSON of the command."""

    def invoke(*arguments: str, code: int = 0) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(
            run(*arguments, "--json", code=code).stdout, parse_constant=_refuse
        )
        return document

    return invoke


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``shell("list", code=0)`` in a process of its own."""

    def invoke(*arguments: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment | options.pop("env", {}),
            **options,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, (done.stdout, done.stderr)
        return done

    return invoke
