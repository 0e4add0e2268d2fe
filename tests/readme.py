"""Renew the table of techniques in README: ``python -m tests.readme``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- begin: frugal list --format markdown -->\n", "<!-- end -->"


def renewed() -> str:
    """Return README with the table that the records make now."""
    command = [sys.executable, "-m", "cli.main", "list", "--format", "markdown"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table.strip()}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(renewed(), encoding="utf-8")
