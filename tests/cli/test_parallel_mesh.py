"""`frugal parallel mesh` and `pipeline`, and the picture of schedules."""

from __future__ import annotations

from unittest import mock

import pytest

from cli import mesh_experiment
from memsim.pipeline import pipeline_in_flight
from memsim.prices.mesh import mesh_phases
from refimpl.parallel import mesh_program, schedules


def test_a_mesh_agrees_with_one_device_and_with_the_models(rows):
    command = ("parallel", "mesh", "--tp", "2", "--pp", "1,2", "--dp", "2", "--stage", "3", "--steps", "2")
    document = rows(*command, "--sequence-parallel", "--recompute")
    assert document["totals"] == {"runs": 2, "disagree": 0, "parameters": 9360}
    for row in document["rows"]:
        assert row["difference"] <= 1e-10
        for name in ("held_bytes", "in_flight", "sent_bytes", "sent_messages"):
            assert row[name] == row[f"model_{name}"]
    collectives = {row["collective"] for row in document["rows"] if row["pipeline"] == 2}
    assert collectives == {
        "activation gradients", "activations", "gradients", "parameters", "sequence gradients", "statistics",
        "tensor all-gather", "tensor reduce-scatter", "tied embedding", "vocabulary all-reduce",
    }  # fmt: skip
    # A stage sends 4 micro-batches of 2 sequences of 8 tokens, half of them on each of 2 ranks, width 16.
    sent = {row["collective"]: row["sent_bytes"] for row in document["rows"] if row["pipeline"] == 2}
    assert sent["activations"] == [2 * 4 * 2 * 4 * 16 * 8] * 4 + [0] * 4


def test_a_mesh_with_experts_agrees(rows):
    document = rows("parallel", "mesh", "--tp", "1", "--experts", "4", "--steps", "2", "--stage", "2")
    assert document["totals"]["disagree"] == 0
    sent = {row["collective"]: row["sent_bytes"] for row in document["rows"]}
    # 2 steps of 4 micro-batches, 2 layers a stage, 2 of 4 experts away, 2 sequences of 8 places, width 16.
    assert sent["dispatch"] == sent["combine gradients"] == [2 * 4 * 2 * 2 * 16 * 16 * 8] * 4


def test_one_rank_alone_and_ranks_without_layers_agree(rows, run):
    document = rows("parallel", "mesh", "--tp", "1", "--pp", "1,6", "--dp", "1", "--steps", "1")
    assert document["totals"]["disagree"] == 0
    alone, *_ = document["rows"]
    assert (alone["collective"], alone["sent_bytes"], alone["model_sent_bytes"]) == ("none", [0], [0])
    table = run("parallel", "mesh", "--tp", "1", "--pp", "1", "--dp", "1", "--steps", "1").stdout
    assert [line.split()[-2:] for line in table.splitlines() if " none " in line] == [["0", "yes"]]


def test_a_mesh_that_differs_is_seen(run):
    with mock.patch.object(mesh_program, "sum_of_both_ends", lambda pipe, gradient: gradient):
        done = run("parallel", "mesh", "--tp", "1", "--dp", "1", "--steps", "2", code=1)
    assert "rows differ from the models, or from one device" in done.stderr


def _moved(name):
    """Return training whose result has one field moved by a little."""
    train = mesh_experiment.mesh_training

    def trained(*args, **options):
        found = train(*args, **options)
        return found._replace(**{name: getattr(found, name) + (1 if "held" in name else 1e-8)})

    return trained


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mesh_training", _moved("parameters")),
        ("mesh_training", _moved("losses")),
        ("mesh_training", _moved("spread")),
        ("mesh_training", _moved("held_bytes")),
        ("pipeline_in_flight", lambda rank, **shape: pipeline_in_flight(rank=0, **shape)),
        ("mesh_phases", lambda case: mesh_phases(case)[::-1]),
    ],
)
def test_whatever_differs_is_seen(run, name, wrong):
    with mock.patch.object(mesh_experiment, name, wrong):
        run("parallel", "mesh", "--tp", "1", "--dp", "1", "--steps", "1", code=1)


def test_schedules_in_time(rows):
    document = rows("parallel", "pipeline", "--ranks", "8", "--micro", "32")
    found = {row["schedule"]: row for row in document["rows"]}
    for row in found.values():
        for name in ("makespan", "idle_share", "in_flight"):
            assert row[name] == pytest.approx(row[f"model_{name}"])
    assert round(100 * found["gpipe"]["idle_share"], 1) == 17.9
    assert found["1f1b"]["in_flight"] == [8, 7, 6, 5, 4, 3, 2, 1]
    slow = rows("parallel", "pipeline", "--ranks", "8", "--micro", "32", "--send", "0.5")["rows"][0]
    assert slow["makespan"] == slow["model_makespan"] + 2 * 7 * 0.5


def test_a_schedule_that_differs_from_the_formulas_is_seen(run):
    one_by_one = schedules._one_by_one
    with mock.patch.object(schedules, "_one_by_one", lambda f, b, warm_up: one_by_one(f, b, warm_up + 1)):
        done = run("parallel", "pipeline", code=1)
    assert "2 of 3 schedules differ from the formulas" in done.stderr


def test_numbers_that_are_none_and_steps_without_end_are_refused(run):
    for value in ("nan", "inf", "1e308", "-1"):
        assert "--send" in run("parallel", "pipeline", "--send", value, code=2).stderr
    assert "--timeout" in run("parallel", "mesh", "--timeout", "nan", code=2).stderr
    assert "at most 1000000 steps" in run("parallel", "pipeline", "--micro", "1e9", code=2).stderr


def test_pictures(run, tmp_path):
    pytest.importorskip("matplotlib")
    for name, command in (
        ("a.svg", ("show", "parallel.pipeline")),
        ("b.png", ("parallel", "pipeline", "--ranks", "2", "--micro", "4", "--schedule", "1f1b")),
        ("many.png", ("parallel", "pipeline", "--ranks", "40", "--micro", "40")),
    ):
        run(*command, "--plot", str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 5000
    done = run("show", "attention.flash", "--plot", str(tmp_path / "c.svg"), code=2)
    assert "there is nothing to draw" in done.stderr
