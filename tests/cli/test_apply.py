"""`frugal apply` on a small checkpoint: its rows, its picture, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli.applied.report as report
import cli.sentences as ours
from cli.applied.model import load
from cli.applied.techniques import APPLICABLE, Applicable, find
from refimpl.errors import OptionError
from tests.transformer.test_bert import write_tiny

pytest.importorskip("tokenizers")
SENTENCES = ("The cat.", "A dog.", "Cats, the dogs.", "Dogs.", "The the dog a cat.", "A a.", "")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_tiny(tmp_path))


@pytest.fixture
def sentences(tmp_path: Path) -> str:
    file = tmp_path / "sentences.txt"
    file.write_text("\n".join(SENTENCES), encoding="utf-8")
    return str(file)


def test_all_techniques(rows: Any, model: str, sentences: str) -> None:
    document = rows("apply", "--all", "--model", model, "--sentences", sentences)
    assert [row["technique"] for row in document["rows"]] == [one.name for one in APPLICABLE]
    assert document["totals"]["judged_sentences"] == document["totals"]["calibration_sentences"] == 3
    for row in document["rows"]:
        assert row["bytes_after"] <= row["bytes_before"]
        assert row["flops_after"] <= row["flops_before"]
        saved = 1 - min(row["bytes_share"], row["parameters_share"], row["flops_share"])
        assert saved > 0 or row["technique"] == "attention.sliding_window"  # wider than these sentences
        assert len(row["relative_error_by_layer"]) == 2
        assert row["relative_error_last"] == row["relative_error_by_layer"][-1]
        assert -1 <= row["cosine_least"] <= row["cosine_mean"] <= 1 + 1e-12
        assert -1 <= row["rank_correlation"] <= 1 + 1e-12


@pytest.mark.parametrize(("name", "registered"), [("int8", "quant.uniform"), ("quant.double", "quant.nf4")])
def test_one_technique(name: str, registered: str, rows: Any, model: str) -> None:
    (row,) = rows("apply", name, "--model", model)["rows"]
    assert row["technique"] == registered
    assert (
        row["model_bytes_before"] - row["model_bytes_after"] == row["bytes_before"] - row["bytes_after"] > 0
    )


def test_people_are_told_what_counts(run: Any, model: str, sentences: str) -> None:
    text = run("apply", "2:4", "--model", model, "--sentences", sentences).stdout
    for words in ("takes a sparse kernel", "which no technique here touches", "in float32", "1, 3, 5"):
        assert words in text
    assert "calibrated: quant.gptq" in run("apply", "gptq", "--model", model).stdout
    assert "sparse" not in run("apply", "gptq", "--model", model).stdout
    lines = run("apply", "nf4", "--model", model, "--csv").stdout.splitlines()
    assert lines[0].startswith("technique,with,setting")
    assert run("apply", "nf4", "--model", model, "--markdown").stdout.count("| quant.nf4 |") == 2


def test_the_first_third_and_fifth_are_judged(model: str) -> None:
    seen: list[Any] = []

    def spy(given: Any, texts: Any) -> Any:
        seen.extend(texts)
        return given, given

    found = report.apply_all([Applicable("spy", (), "", spy)], model, SENTENCES[:5])
    checkpoint = load(model)
    expected = report.texts_of(checkpoint, SENTENCES[1:5:2])
    assert [ids.tolist() for ids in seen] == [ids.tolist() for ids in expected]
    assert found.totals["judged_sentences"] == 3
    with pytest.raises(OptionError, match="at least 2"):
        report.apply_all([find("int8")], model, SENTENCES[:1])


def test_two_sentences_have_no_order(run: Any, rows: Any, model: str, tmp_path: Path) -> None:
    file = tmp_path / "two.txt"
    file.write_text("\ufeffThe cat.\n\nA dog.\n", encoding="utf-8")
    (row,) = rows("apply", "int8", "--model", model, "--sentences", str(file))["rows"]
    assert row["rank_correlation"] is None
    assert row["cosine_least"] == row["cosine_mean"] > 0.99
    assert "quant.uniform" in run("apply", "int8", "--model", model, "--sentences", str(file)).stdout


def test_a_picture(run: Any, model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "apply.svg"
    run("apply", "--all", "--model", model, "--plot", str(file))
    text = file.read_text(encoding="utf-8")
    for one in APPLICABLE:
        assert f"<!-- {one.name}" in text
    assert "relative error of the last states" in text


@pytest.mark.parametrize("one", [one for one in APPLICABLE if not one.unsaveable], ids=lambda one: one.name)
def test_what_is_saved_computes_what_was_judged(one: Any, run: Any, model: str, tmp_path: Path) -> None:
    target = tmp_path / "after"
    text = run("apply", one.name, "--model", model, "--save", str(target)).stdout
    assert f"written: {target}" in text
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    source, saved = load(model), load(str(target))
    judged, calibration = (report.texts_of(source, ours.SENTENCES[start::2]) for start in (0, 1))
    _, after = one.apply(source.model, calibration)
    for ids in judged[:4]:
        for a, b in zip(after.states(ids), saved.model.states(ids), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    assert {array.dtype for array in saved.tensors.values()} == {np.dtype(np.float32)}
    hidden = json.loads((target / "config.json").read_text(encoding="utf-8"))["intermediate_size"]
    assert hidden == (15 if one.name == "prune.structured" else 20)


def test_transformers_reads_what_is_saved(run: Any, model: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    target = str(tmp_path / "after")
    run("apply", "neurons", "--model", model, "--save", target)
    document = json.loads(run("verify", "--model", target, "--json").stdout)
    encoders = [row for row in document["rows"] if row["technique"] == "transformer.encoder"]
    assert [row["passed"] for row in encoders] == [21, 21]
    assert document["totals"]["failed"] == 0


@pytest.mark.parametrize("one", [one for one in APPLICABLE if one.unsaveable], ids=lambda one: one.name)
def test_what_no_checkpoint_can_hold_is_refused(one: Any, run: Any, model: str, tmp_path: Path) -> None:
    done = run("apply", one.name, "--model", model, "--save", str(tmp_path / "after"), code=2)
    assert f"{one.name} has no checkpoint: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "after").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(
    run: Any, model: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refimpl.checkpoint.write_tensors", full)
    before = sorted(tmp_path.iterdir())
    done = run("apply", "int8", "--model", model, "--save", str(tmp_path / "after"), code=2)
    assert "No space left on device" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["int9", "--model", "MODEL"], "did you mean int8"),
        (["int8"], "Missing option '--model'"),
        (["int8", "--model", "nowhere"], "Directory 'nowhere' does not exist"),
        (["--model", "MODEL"], "expected either a NAME or --all"),
        (["int8", "--all", "--model", "MODEL"], "expected either a NAME or --all"),
        (["--all", "--model", "MODEL", "--save", "x"], "--save takes the result of one NAME"),
        (["int8", "--model", "MODEL", "--save", "MODEL"], "exists already"),
        (["int8", "--model", "MODEL", "--save", "nowhere/x"], "there is no directory"),
        (["int8", "--model", "MODEL", "--sentences", "nowhere"], "does not exist"),
        (["int8", "--model", "MODEL", "--sentences", "EMPTY"], "at least two sentences"),
        (["int8", "--model", "MODEL", "--sentences", "BINARY"], "expected UTF-8"),
        (["int8", "--model", "OTHER"], "expected model_type 'bert', got 'gpt2'"),
        (["int8", "--model", "BARE"], "config.json"),
    ],
)
def test_refusals(arguments: list[str], message: str, run: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "EMPTY").write_text("\n  \n", encoding="utf-8")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00a\n")
    for name in ("OTHER", "BARE"):
        (tmp_path / name).mkdir()
    (tmp_path / "OTHER" / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    places = {"MODEL": model, **{name: str(tmp_path / name) for name in ("EMPTY", "BINARY", "OTHER", "BARE")}}
    done = run("apply", *(places.get(argument, argument) for argument in arguments), code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_points_stand_where_their_numbers_say() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    from cli.applied.picture import FLOOR, draw

    def row(name: str, of_bytes: float, of_flops: float, error: float) -> dict[str, Any]:
        return {
            "technique": name, "bytes_share": of_bytes, "flops_share": of_flops, "relative_error_last": error
        }  # fmt: skip

    axes = figures.Figure().add_subplot()
    draw(axes, [row("a", 0.25, 1.0, 0.3), row("b", 0.9, 0.6, 5.0), row("c", 0.99, 1.0, 1e-7)])
    points = [(line.get_xdata(), line.get_ydata(), line.get_marker()) for line in axes.lines[:3]]
    assert [(float(x[0]), float(y[0]), marker) for x, y, marker in points] == [
        (75.0, 0.3, "o"), (pytest.approx(40.0), 5.0, "s"), (pytest.approx(1.0), FLOOR, "v")
    ]  # fmt: skip
    assert [text.get_text() for text in axes.texts] == ["a", "b", "c (error 1e-07)"]
    assert axes.get_ylim()[1] > 5
