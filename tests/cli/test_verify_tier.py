"""``frugal verify --tier``: kernels of a tier on a GPU that is played, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from refimpl import attention
from refimpl.errors import UnsupportedError

Rows = Callable[..., dict[str, Any]]
FLEXIBLE = ("verify", "attention.flexible", "--backend", "cuda", "--tier", "hopper")


@pytest.fixture(autouse=True)
def _available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.commands.verify.why_not", lambda backend: None)


def played(
    q: Any, k: Any, v: Any, *, mods: Any, arrays: Any, blocks: Any, stream: Any, **options: Any
) -> Any:
    """Stand in for the Hopper kernel where `cuda_backend.flexible_attention` asks for it."""
    if q.dtype.name == "float32" or 0 in (*q.shape, *k.shape):
        raise UnsupportedError("flexible_attention_hopper: not for me")
    functions = {"mask_mod": mods.mask, "score_mod": mods.score}
    given = {name: mod.function for name, mod in functions.items() if mod is not None}
    return attention.flexible_attention(q, k, v, block_mask=blocks, **given, **options)


@pytest.mark.cudasim
def test_kernels_that_are_told_their_tier(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is a row of its own; what it refuses is counted, never passed, and the reason is said."""
    monkeypatch.setattr("cuda_backend.attention.call_flexible_hopper.flexible_attention_hopper", played)
    document = rows(*FLEXIBLE, "--examples", "2")
    taken = {row["dtype"]: row for row in document["rows"]}
    assert {row["implementation"] for row in document["rows"]} == {
        "cuda_backend.attention.flexible:flexible_attention(tier='hopper')"
    }
    assert document["totals"]["failed"] == 0
    for dtype in ("float16", "bfloat16"):
        assert taken[dtype]["passed"] > 20
        assert taken[dtype]["refused"] > 2  # an empty batch, no queries, no keys
        assert all("not for me; tier='portable'" in reason for reason in taken[dtype]["refusals"])
    assert taken["float32"]["passed"] == 0
    assert taken["float32"]["refused"] > 10


@pytest.mark.cudasim
def test_a_failure_is_reproduced_in_its_tier(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arrays: Any, **options: Any) -> Any:
        return played(*arrays, **{**options, "scale": 1.0})

    monkeypatch.setattr("cuda_backend.attention.call_flexible_hopper.flexible_attention_hopper", wrong)
    document = rows(*FLEXIBLE, "--examples", "1", "--dtype", "float16", code=1)
    (row,) = document["rows"]
    assert row["failed"] > 0
    assert all(" --backend cuda --tier hopper " in failure["reproducer"] for failure in row["failures"])


def test_hopper_has_the_kernels_for_ampere_too(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Nothing:
        outcomes = ()

    def noted(_name: str, _f: Any, *, label: str, **_how: Any) -> type[Nothing]:
        seen.append(label)
        return Nothing

    monkeypatch.setattr("refimpl.testing.check", noted)
    names = ("attention.flash", "attention.paged", "quant.weight_only_nf4")
    rows("verify", *names, "--backend", "cuda", "--tier", "hopper", code=1)
    assert [label.partition(":")[2] for label in seen] == [
        "flash_attention_hopper", "paged_attention(tier='ampere')", "nf4_linear_decode",
    ]  # fmt: skip
    seen.clear()
    rows("verify", *names, "--backend", "cuda", "--tier", "ampere", code=1)
    assert len(seen) == 2
    seen.clear()
    rows("verify", *names, "--backend", "cuda", code=1)
    assert len(seen) == 6


def test_a_tier_that_nothing_has_is_said(run: Callable[..., Any]) -> None:
    arguments = ("verify", "attention.linear", "--backend", "cuda", "--tier", "hopper")
    assert "no function for cuda in tier hopper" in run(*arguments, code=1).stderr
    assert "needs a GPU" in run("verify", "--backend", "cudasim", "--tier", "ampere", code=3).stderr
    assert "--tier needs --backend cuda" in run("verify", "--tier", "hopper", code=2).stderr
