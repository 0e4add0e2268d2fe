"""Geometric means of docs/performance.md and README are those of the tables beside them."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
NUMBER = r"\d+(?:\.\d+)?"


def mean(ratios: list[float]) -> float:
    return prod(ratios) ** (1 / len(ratios))


def rows(begin: str, end: str) -> list[list[str]]:
    """Return the cells of the rows between two sentences."""
    part = PAGE.split(begin)[1].split(end)[0]
    return [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in part.splitlines() if "|" in line
    ]


def flexible(begin: str, column: int) -> tuple[float, float]:
    """Return the means over all forms but softcap, with BigBird and without."""
    ratios = {}
    for cells in rows(begin, "| geometric mean"):
        found = re.findall(NUMBER, cells[column])
        if len(found) == 3 and not cells[0].startswith("softcap"):
            ratios[cells[0].split()[0].strip(",")] = float(found[1 if begin.startswith("Forward") else 2])
    assert {name for name in ratios if name != "a"} == {
        "causal",
        "BigBird",
        "twelve" if "twelve" in ratios else "documents",
        "ALiBi",
    }
    return mean(list(ratios.values())), mean([ratio for name, ratio in ratios.items() if name != "BigBird"])


def test_of_flexible_attention() -> None:
    forward, backward = "Forward (ms; ratio", "Backward (ms; in turn"
    for begin in (forward, backward):
        said = re.findall(rf"({NUMBER}) \(({NUMBER})\)", PAGE.split(begin)[1].split("| geometric mean")[1])
        for column, found in zip((1, 2), said, strict=False):
            assert tuple(f"{value:.2f}" for value in flexible(begin, column)) == found
    wide, narrow, slow_narrow, slow_wide = (
        flexible(begin, column)
        for begin, column in ((forward, 1), (forward, 2), (backward, 1), (backward, 2))
    )
    assert (
        f"{narrow[1]:.1f} (D = 64) and {wide[1]:.1f} (D = 128) times compiled FlexAttention, "
        f"with BigBird {narrow[0]:.1f} and {wide[0]:.1f}" in README
    )
    said_of_gradients = f"{slow_narrow[1]:.1f} and {slow_wide[1]:.1f} times, "
    assert f"{said_of_gradients}with BigBird {slow_narrow[0]:.1f} and {slow_wide[0]:.1f}" in README


def test_of_dense_attention() -> None:
    for begin, end, name in (
        ("made of, run before the command existed)", "Geometric mean over these 52", "attention, forward"),
        ("tensor copies, see below):", "Geometric means over 24", "attention, gradients"),
    ):
        pairs = [re.findall(NUMBER, cells[-1]) for cells in rows(begin, end)]
        found = mean([float(x) for pair in pairs if len(pair) == 2 for x in pair])
        assert re.search(rf"\| {name}, D up to \d+ \| {found:.2f} times cuDNN", README)
    wide = [
        float(x)
        for cells in rows("With P and dS behind named barriers", "Geometric mean over these seven")
        for x in re.findall(r"\d\.\d\d", cells[-1])
    ]
    assert len(wide) == 7
    assert f"D of 192 and 256 | {mean(wide):.2f} times cuDNN" in README


def test_of_products() -> None:
    ratios = [
        float(ratio)
        for cells in rows("**GEMM with scales**", "Geometric means over the seven layers")
        for cell in cells[4:]
        for ratio in re.findall(r"/ (\d\.\d\d) \(", cell)
    ]
    assert len(ratios) == 21
    assert f"{mean(ratios):.2f} times `torch._int_mm`" in README
    weights = [cells for cells in rows("### 1 to 16 tokens", "The goals for one token") if cells[0] == "1"]
    assert len(weights) == 3
    int8, nf4 = (mean([float(cells[column].strip("*")) for cells in weights]) for column in (4, 8))
    assert f"{nf4:.1f} and {int8:.1f} times PyTorch's fp16 product" in README


def test_of_attention_in_int8() -> None:
    bold = "*"
    table = rows("### Attention in int8", "**The goal was")
    said = next(cells for cells in table if cells[0] == "geometric mean")
    measured = [cells for cells in table if re.match(r"\d", cells[0])]
    assert len(measured) == 6
    for column in (4, 7):
        ratios = [float(cells[column].strip(bold)) for cells in measured]
        assert f"{mean(ratios):.3f}" == said[column].strip(bold)
        assert sum(ratio >= 1.1 for ratio in ratios) == (4 if column == 4 else 6)
    for begin, end, first, count in (
        ("Times fp16 in bursts (third run), where codes", "Predictions held within", 1, 6),
        ("The fourth run, with codes by phases", "Against 8 of 16 that is", 2, 5),
    ):
        tries = [cells for cells in rows(begin, end) if re.match(r"\d\.\d\d\d$", cells[first])]
        assert len(tries) == count
        for cells in tries:
            ratios = [float(cell) for cell in cells[first : first + 6]]
            assert abs(mean(ratios) - float(cells[first + 6].strip(bold))) < 0.001
    kept = next(cells for cells in tries if cells[0].startswith(bold))
    assert [float(cell) for cell in kept[2:8]] == [float(cells[4].strip(bold)) for cells in measured]
    assert [cell.strip(bold) for cell in kept[8:]] == [said[column].strip(bold) for column in (4, 7)]
