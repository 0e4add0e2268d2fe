"""README holds: its table is the records', its Python runs, its commands are those that CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cli.main import frugal
from tests import coverage
from tests.coverage import PAGE
from tests.readme import README, renewed

ROOT = Path(__file__).resolve().parents[1]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_table_is_fresh() -> None:
    assert README.read_text(encoding="utf-8") == renewed(), "run python -m tests.readme"


def test_the_python_runs() -> None:
    (code,) = _blocks("python")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["show attention.flash --trace", "io --n 1024", "errata --run"])
def test_the_commands_under_more_run(command: str) -> None:
    lines = re.findall(r"`frugal ([^`]*)`", README.read_text(encoding="utf-8"))
    (line,) = [found for found in lines if found.startswith(command)]
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *line.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_command_and_option_named_exists() -> None:
    lines = re.findall(
        r"(?:^|`)frugal ([a-z][^`\n|]*)", README.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert len(lines) >= 10
    for line in lines:
        words, command = line.split(), frugal
        while words and isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words.pop(0))
            assert found is not None, line
            command = found
        options = {name for option in command.params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= options, line


def test_ci_runs_the_first_two_commands_verbatim() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "README.md" in script, "CI reads its commands from README"
    assert _blocks("sh")[0].startswith("python3 -m venv .venv")
    assert "pytest" in _blocks("sh")[1]


def test_the_page_of_techniques_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == coverage.renewed(), "run python -m tests.coverage"
