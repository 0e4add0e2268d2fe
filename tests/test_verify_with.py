"""`frugal verify --with` judges somebody else's attention: PyTorch's passes, a broken copy does not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _frugal(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_pytorch_passes() -> None:
    pytest.importorskip("torch")
    done = _frugal("verify", "attention.dense", "--with", "tests.adapters:torch_sdpa", "--examples", "4")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_copy_fails_with_a_reproducer_that_reproduces() -> None:
    pytest.importorskip("torch")
    done = _frugal("verify", "attention.dense", "--with", "tests.adapters:off_by_one", "--examples", "4")
    assert done.returncode == 1
    line = re.search(r"reproduce: frugal (.*)", done.stdout + done.stderr)
    assert line is not None
    again = _frugal(*shlex.split(line[1]))
    assert again.returncode == 1
    assert "failed 1" in again.stdout or "FAILED" in again.stdout + again.stderr
    assert "Traceback" not in again.stdout + again.stderr
