"""`frugal timeline`: rows a stage, the closed form beside it, a trace and a picture."""

from __future__ import annotations

import json

import pytest

ZERO = (
    "--model",
    "gpt2",
    "--gpus",
    "8",
    "--batch",
    "64",
    "--sequence",
    "1024",
    "--division",
    "data=8,zero=3",
)
PIPE = ("--model", "gpt2", "--gpus", "8", "--batch", "16", "--sequence", "1024")
PIPE += ("--division", "tensor=2,pipeline=4,sequence_parallel=true")


def test_stages_spend_the_whole_time(rows):
    document = rows("timeline", *PIPE)
    totals = document["totals"]
    assert (totals["tensor"], totals["pipeline"]) == (2, 4)
    assert totals["sequence_parallel"] is True
    assert "zero" not in totals
    assert [row["rank"] for row in document["rows"]] == [0, 1, 2, 3]
    for row in document["rows"]:
        spent = row["computing_s"] + row["exposed_s"] + row["idle_s"]
        assert spent == pytest.approx(totals["time_s"], rel=1e-12)
    idle = sum(row["idle_s"] for row in document["rows"])
    assert totals["bubble_share"] == pytest.approx(idle / 4 / totals["time_s"], rel=1e-12)
    assert totals["time_s"] < totals["closed_form_s"]
    worse = rows("timeline", *PIPE, "--schedule", "gpipe")["totals"]
    assert worse["time_s"] >= totals["time_s"] * 0.99


def test_zero_3_gathers_ahead(rows):
    ahead, behind = (rows("timeline", *ZERO, "--prefetch", n)["totals"] for n in ("1", "0"))
    assert ahead["time_s"] < behind["time_s"]
    assert ahead["exposed_share"] < behind["exposed_share"]


def test_trace_and_picture(rows, run, tmp_path):
    pytest.importorskip("matplotlib")
    trace, picture = tmp_path / "step.json", tmp_path / "step.svg"
    done = run("timeline", *PIPE, "--trace", str(trace), "--plot", str(picture))
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    assert f"wrote {len([e for e in events if e['ph'] == 'X'])} events" in done.stderr
    text = picture.read_text()
    assert all(word in text for word in ("0 compute", "forward", "backward", "send", "links", "optimizer"))
    assert "MFU counts scores in full" in done.stdout
    totals = rows("timeline", *PIPE)["totals"]
    assert f"bubble {100 * totals['bubble_share']:.1f} %, exposed" in done.stdout
    assert f"MFU {100 * totals['mfu']:.1f} %" in done.stdout
    assert "MFU counts" not in run("timeline", *PIPE, "--attention", "standard").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*PIPE, "--schedule", "interleaved"), "interleave"),
        ((*ZERO[:-1], "data=4,zero=1,offload=true"), "got data=4,zero=1,offload=true on 8 accelerators"),
        ((*PIPE, "--trace", "/no/such/folder/x.json"), "cannot write"),
    ],
)
def test_what_is_impossible_is_one_line(run, arguments, said):
    assert said in run("timeline", *arguments, code=2).stderr
