"""`frugal memory inference`: rows, batch limits, drafts, errors."""

from __future__ import annotations

import pytest


def test_llama_2_7b(rows):
    arguments = ("--model", "llama-2-7b", "--prompt", "3072", "--generated", "1024", "--batch", "1,31")
    one, many = rows("memory", "inference", *arguments)["rows"]
    assert one["token_bytes"] == 524288
    assert one["cache_bytes"] == 2 * 2**30
    assert one["batch_limit"] == many["batch_limit"] == 30
    assert (one["fits"], many["fits"]) == (True, False)
    (most,) = rows("memory", "inference", *arguments[:-1], "30")["rows"]
    assert most["fits"]
    room = ("--batch", "30", "--capacity", f"{most['memory_bytes']:.0f}")
    assert rows("memory", "inference", *arguments[:-2], *room)["rows"][0]["fits"]  # to the byte
    # 31 sequences share the 13 GB of weights, not their 55 GB of cache.
    assert 5 < many["tokens_per_s"] / one["tokens_per_s"] < 10
    assert one["decode_bound"] == "memory"


def test_lists_formats_and_drafts(rows, run, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ("--model", "llama-2-70b", "--tp", "8", "--weights", "bf16,nf4", "--draft", "llama-2-7b")
    wide, narrow = rows("memory", "inference", *arguments)["rows"]
    assert narrow["weights_bytes"] < wide["weights_bytes"] / 3
    assert wide["speedup"] > 2
    text = run("memory", "inference", *arguments, "--explain", "--plot", str(tmp_path / "x.svg")).stdout
    assert "cache of a token: A_c*L*y_c = 2048*80*2 = 327.7 kB" in text
    assert "drafts gain" in text


def test_a_draft_takes_memory_of_the_target(rows, run):
    base = ("--model", "llama-2-70b", "--tp", "8", "--prompt", "1000", "--generated", "24", "--batch", "4")
    (alone,) = rows("memory", "inference", *base)["rows"]
    (both,) = rows("memory", "inference", *base, "--draft", "llama-2-7b")["rows"]
    assert both["draft_weights_bytes"] == pytest.approx(2 * 6738415616 / 8, rel=1e-3)  # norms are whole
    assert both["draft_cache_bytes"] == 4 * 1024 * 524288 / 8
    assert (
        both["memory_bytes"]
        == alone["memory_bytes"] + both["draft_weights_bytes"] + both["draft_cache_bytes"]
    )
    (most,) = rows("memory", "inference", *base[:-1], str(both["batch_limit"]), "--draft", "llama-2-7b")[
        "rows"
    ]
    (more,) = rows("memory", "inference", *base[:-1], str(both["batch_limit"] + 1), "--draft", "llama-2-7b")[
        "rows"
    ]
    assert most["memory_bytes"] <= 80e9 < more["memory_bytes"]
    assert (most["fits"], more["fits"]) == (True, False)
    assert "fits" in run("memory", "inference", *base[:-1], "1,2000").stdout
    assert "fits" not in run("memory", "inference", *base).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "llama-2-7b", "--weights", "int3"), "int3"),
        (("--model", "llama-2-7b", "--tp", "3"), "heads"),
        (("--model", "bert-base,jamba"), "decoder"),
    ],
)
def test_what_is_impossible_is_one_line(run, arguments, said):
    assert said in run("memory", "inference", *arguments, code=2).stderr
