"""`frugal parallel`: ranks held to Adam and to the models, ideal scaling, data against model parallelism."""

from __future__ import annotations

import time
from unittest import mock

import pytest

from refimpl.parallel import zero as zero_module


def test_ranks_agree_with_adam_and_with_the_models(rows):
    document = rows("parallel", "train", "--ranks", "1,4", "--steps", "3", "--micro", "2")
    assert document["totals"] == {"runs": 6, "disagree": 0, "parameters": 350}
    found = {(row["ranks"], row["stage"]): row for row in document["rows"]}
    assert all(row["difference"] <= 1e-12 and row["owned_once"] == 350 for row in found.values())
    # Units of 55, 120, 120, 55 on 4 ranks: shards of 14 + 30 + 30 + 14 = 88 elements, all of float64.
    assert found[4, 1]["held_bytes"] == [8 * (2 * 350 + 3 * 88)] * 4
    assert found[4, 2]["held_bytes"] == [8 * (350 + 4 * 88)] * 4
    assert found[4, 3]["held_bytes"] == [8 * 5 * 88] * 4
    # 3 hops of 88 elements a phase; m = 2: 2, 3 and 6 phases a step; 3 numbers summed in 6 messages each.
    for stage, phases in ((1, 2), (2, 3), (3, 6)):
        row = found[4, stage]
        assert row["sent_bytes"] == row["model_sent_bytes"] == [3 * 8 * (3 * 88 * phases + 3 * 6)] * 4
        assert row["sent_messages"] == row["model_sent_messages"] == [3 * (3 * 4 * phases + 3 * 6)] * 4
        assert row["over_data_parallel"] == phases / 2
    assert found[1, 3]["sent_bytes"] == [0]
    assert found[1, 3]["over_data_parallel"] is None


def test_states_are_saved_and_resumed_on_other_ranks(rows, tmp_path):
    folder = str(tmp_path / "states")
    rows("parallel", "train", "--ranks", "3", "--stage", "2", "--steps", "2", "--save", folder)
    (row,) = rows("parallel", "train", "--ranks", "4", "--stage", "3", "--steps", "4", "--resume", folder)[
        "rows"
    ]
    assert (row["resumed_after"], row["steps"], row["agrees"]) == (2, 2, True)


def test_a_wrong_step_is_seen(run):
    whole = zero_module.ring_reduce_scatter
    with mock.patch.object(zero_module, "ring_reduce_scatter", lambda comm, x: 1.001 * whole(comm, x)):
        done = run("parallel", "train", "--ranks", "2", "--steps", "2", "--stage", "3", code=1)
    assert "1 of 1 runs differ" in done.stderr


def test_a_rank_that_fails_ends_the_run(run):
    def fails(comm, chunk):
        if comm.rank == 1:
            raise zero_module.OptionError("lost")
        return chunk

    with mock.patch.object(zero_module, "ring_all_gather", fails):
        done = run("parallel", "train", "--ranks", "3", "--stage", "3", code=2)
    assert done.stderr.strip().splitlines()[-1] == "Error: lost"


def _waits(comm, _chunk):
    return comm.recv((comm.rank + 1) % comm.size, tag=9)


def _stalls(comm, chunk):
    if comm.rank == 1:
        time.sleep(1)
    return chunk if comm.rank == 1 else _waits(comm, chunk)


@pytest.mark.parametrize(
    ("gather", "said"),
    [
        (_waits, "Error: deadlock: rank 0 waits for rank 1 (tag 9), rank 1 waits for rank 0 (tag 9)"),
        (_stalls, "Error: no message for 0.1 s: rank 1 has not returned, rank 0 waits for rank 1 (tag 9)"),
    ],
)
def test_ranks_that_wait_for_nothing_fail_the_check(run, gather, said):
    """Nothing is wrong with the command line, so it is no usage error."""
    with mock.patch.object(zero_module, "ring_all_gather", gather):
        done = run("parallel", "train", "--ranks", "2", "--stage", "3", "--timeout", "0.1", code=1)
    assert done.stderr.strip().splitlines()[-1] == said


def test_ideal_and_limited_scaling(rows):
    document = rows("parallel", "scaling", "--time", "10d", "--devices", "1,1024", "--serial", "0,0.01")
    found = {(row["devices"], row["serial_share"]): row for row in document["rows"]}
    assert found[1024, 0]["time_s"] == 10 * 86400 / 1024
    assert found[1024, 0]["efficiency"] == 1
    assert found[1024, 0.01]["speed_up"] == pytest.approx(1 / (0.01 + 0.99 / 1024))
    assert found[1, 0.01]["time_s"] == 864000


def test_data_against_model_parallelism(rows):
    shape = ["--hidden", "4096", "--layers", "36", "--sequence", "2048", "--batch", "8"]
    document = rows("parallel", "compare", "--params", "7.5B", "--ranks", "8", *shape)
    data, model = document["rows"]
    assert (data["copies"], data["memory_bytes"], data["sent_elements"]) == (8, 120e9, 15e9)
    assert (model["copies"], model["memory_bytes"]) == (1, 15e9)
    assert model["sent_elements"] == 8 * 8 * 2048 * 4096 * 36
    assert document["totals"]["crossover_batch"] == pytest.approx(15e9 / (8 * 2048 * 4096 * 36))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--ranks", "2,3", "--save", "x"], "one number of ranks and one --stage"),
        (["train", "--ranks", "0"], "expected a whole number"),
        (["train", "--ranks", "2", "--stage", "0"], "--stage"),
        (["train", "--ranks", "2", "--stage", "1", "--resume", "nowhere"], "nowhere"),
        (["scaling"], "--time"),
        (["scaling", "--time", "10x"], "one of s, min, h, d"),
        (["scaling", "--time", "-1d"], "above 0"),
        (["scaling", "--time", "nand"], "one of s, min, h, d"),
        (["scaling", "--time", "1d", "--serial", "1.5"], "--serial"),
        (["compare", "--params", "1B"], "--sequence"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    done = run("parallel", *arguments, code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_rounding_of_many_steps_is_no_disagreement(rows):
    """After 200 steps two ranks have left one device by more than after ten, and by no mistake."""
    document = rows("parallel", "train", "--ranks", "2", "--stage", "2", "--steps", "200")
    assert document["totals"]["disagree"] == 0
