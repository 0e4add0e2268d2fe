"""Commands of this folder end in a line: code 3 without a GPU, PyTorch or pytest, 2 for wrong arguments."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import cuda_backend.torch_ops
from tests.cuda import need_gpu

FOLDER = Path(__file__).parent
COMMANDS = sorted(
    path.stem
    for path in FOLDER.glob("[!t]*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
ARGUMENTS = {
    "hopper_under_tools": ["small"],
    "measure": ["folder"],
    "measure_memory": ["folder"],
    "measure_traffic": ["run", "file"],
}


def ended(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_without_a_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(need_gpu, "find_spec", lambda _name: True)
    monkeypatch.setattr(cuda_backend.torch_ops, "missing", lambda: "torch finds no GPU")
    monkeypatch.setitem(sys.modules, "pytest", None)  # no command imports it before it says what it needs
    assert ended(name, monkeypatch, *ARGUMENTS.get(name, [])) == 3
    said = "Error: this command needs a GPU and PyTorch on it: torch finds no GPU\n"
    assert capsys.readouterr().err == said


def test_without_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(need_gpu, "find_spec", lambda _name: None)
    assert ended("flexible_hopper_table", monkeypatch) == 3
    assert capsys.readouterr().err.endswith("pip install torch pytest\n")


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("hopper_under_tools", "", "small or traffic or gradients or gradient_traffic; got no argument"),
        ("measure", "", "FOLDER; got no argument"),
        ("measure", "one two", "FOLDER; got one two"),
        ("measure_memory", "", "FOLDER; got no argument"),
        ("measure_memory", "--help", "FOLDER; got --help"),
        ("measure_traffic", "", "run FILE or write FILE COLD WARM FOLDER; got no argument"),
        ("measure_traffic", "write a b c", "run FILE or write FILE COLD WARM FOLDER; got write a b c"),
    ],
)
def test_wrong_arguments(
    name: str, given: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said first, on a machine with a GPU as on others."""
    assert ended(name, monkeypatch, *given.split()) == 2
    assert capsys.readouterr().err == f"Error: expected {said}\n"
