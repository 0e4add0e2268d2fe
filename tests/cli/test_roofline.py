"""`frugal roofline`: operators of a layer against their counts."""

from __future__ import annotations

import pytest

from memsim.model_flops import model_flops


def test_llama_2_7b_on_one_card(rows, run, tmp_path):
    document = rows("roofline", "--model", "llama-2-7b", "--gpus", "1", "--batch", "1", "--sequence", "4096")
    found = {row["name"]: row for row in document["rows"]}
    assert "experts" not in found
    width, ffn, layers, tokens = 4096, 11008, 32, 4096
    assert found["qkv"]["flop"] == 2 * tokens * 3 * width**2 * layers
    assert found["up"]["flop"] == 2 * tokens * 2 * width * ffn * layers
    assert found["out"]["moved_bytes"] == 2 * layers * (width**2 + 2 * tokens * width)
    assert found["qkv"]["bound"] == "compute"
    assert found["pointwise"]["bound"] == "memory"
    assert found["pointwise"]["intensity"] == 0
    # All products, the scores' causal half apart, are the model's.
    total = sum(row["flop"] for row in found.values()) + found["core"]["flop"]
    assert total == float(model_flops(model="llama-2-7b", sequence=4096, direction="forward").total)
    times = sum(row["forward_s"] for row in found.values() if row["name"] != "head")
    assert times == pytest.approx(document["totals"]["forward_s"], rel=1e-12)
    pytest.importorskip("matplotlib")
    arguments = ("--model", "mixtral-8x7b", "--gpus", "8", "--batch", "8", "--sequence", "512")
    run("roofline", *arguments, "--division", "data=8,expert=8", "--plot", str(tmp_path / "x.svg"))
    assert "experts" in (tmp_path / "x.svg").read_text()
