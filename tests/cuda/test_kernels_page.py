"""What docs/kernels.md shows is what happens."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
TORCH = re.search(r"## From PyTorch\n.*?(?=\n## )", PAGE, re.DOTALL)


def run(text: str) -> doctest.TestResults:
    test = doctest.DocTestParser().get_doctest(text, {}, "kernels.md", "docs/kernels.md", 0)
    return doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, clear_globs=False)


@pytest.mark.cudasim
def test_the_examples_of_the_page() -> None:
    assert TORCH is not None
    found = run(PAGE.replace(TORCH[0], ""))
    assert found.attempted > 30
    assert found.failed == 0


@pytest.mark.cudasim
def test_the_examples_with_pytorch() -> None:
    pytest.importorskip("torch")
    assert TORCH is not None
    found = run(TORCH[0])
    assert found.attempted > 6
    assert found.failed == 0


def test_what_needs_a_gpu_is_python_and_readme_names_the_page() -> None:
    (block,) = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)
    compile(block, "kernels.md", "exec")
    assert "[docs/kernels.md](docs/kernels.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
