"""``frugal bench flexible`` and ``decode``: what is checked, that wrong outputs are seen, users' files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import cuda_backend
from cli import contest
from cli.decode_problems import decode_problems
from cli.flexible_forms import FORMS, form_of, users_form
from cli.flexible_problems import flexible_problem
from refimpl.attention import (
    AttentionGradients,
    flexible_attention,
    flexible_attention_vjp,
    paged_attention,
    split_kv_attention,
)
from refimpl.numerics import widen

SHAPE = (1, 4, 2, 40, 8)  # heads in groups
FORM_NAMES = tuple(FORMS)


def keep(array: Any, _dtype: str) -> Any:
    return array


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel as it computes: in float32 between reading and writing."""

    def kernel(*arrays: Any, **options: Any) -> Any:
        return function(*(widen(x).astype(np.float32) for x in arrays), **options)

    return kernel


@pytest.mark.parametrize("name", FORM_NAMES)
def test_sampled_rows_are_those_of_the_form(name: str) -> None:
    problem = flexible_problem(name, SHAPE, "float16", backward=False)
    operands, _ = problem.operands(contest._draw_on_host, 0)
    *arrays, aux = operands
    form = form_of(name, 4, 40)
    out = in_float32(flexible_attention)(*arrays, aux=aux, **form.options).astype(np.float16)
    assert problem.check(operands, out, keep) is None
    assert "batch 0, head 0" in str(problem.check(operands, np.roll(out, 1, axis=1), keep))
    bare = in_float32(flexible_attention)(*arrays).astype(np.float16)
    assert problem.check(operands, bare, keep) is not None


@pytest.mark.parametrize("name", ["documents", "alibi", "softcap", "groups"])
def test_sampled_gradients_are_those_of_the_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arrays: Any, tier: str, **given: Any) -> Any:
        assert tier == "auto", "the fastest"
        return flexible_attention(*arrays, **given)

    monkeypatch.setattr(cuda_backend, "flexible_attention", forward)
    problem = flexible_problem(name, SHAPE, "float16", backward=True)
    operands, theirs = problem.operands(contest._draw_on_host, 0)
    q, k, v, _, _, do, aux = operands
    assert [x is y for x, y in zip(theirs, (q, k, v, do, aux), strict=True)] == [True] * 5
    options = form_of(name, 4, 40).options
    found = in_float32(flexible_attention_vjp)(q, k, v, do, aux=aux, **options)
    right = AttentionGradients(*(x.astype(np.float16) for x in found[:3]))
    assert problem.check(operands, right, keep) is None
    for part in ("dq", "dk", "dv"):
        wrong = getattr(right, part).copy()
        wrong[0, -1] += np.float16(0.1)
        assert part in str(problem.check(operands, right._replace(**{part: wrong}), keep))


def test_work_is_that_of_live_tiles() -> None:
    """Causal tiles of 128: three of four, of products of 2 N² D operations, five times in a backward pass."""
    forward = flexible_problem("causal", (2, 3, 256, 8), "float16", backward=False)
    backward = flexible_problem("causal", (2, 3, 256, 8), "float16", backward=True)
    assert forward.work == 2 * 2 * (2 * 3) * (3 * 128 * 128) * 8
    assert backward.work == 5 * forward.work // 2


def test_a_users_file(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import math\n"
        "def near(b, h, i, j):\n    return abs(i - j) < 3 and j <= i\n"
        "def bent(score, b, h, i, j):\n    return 2.0 * math.tanh(score)\n"
        "def bent_vjp(gradient, score, b, h, i, j):\n    return gradient / math.cosh(score) ** 2 * 2\n"
        "def reading(b, h, i, j, aux):\n    return aux[0][i] == j\n"
        "def other(s, b, h, i, j):\n    return s\n"
        "def lacking(b, h, i, j):\n    import not_there_at_all\n    return j <= i\n"
        "def unknown(score, b, h, i, j):\n    return not_named(score)\n"
        "def late(b, h, i, j):\n    if i == 2:\n        raise ValueError('the third')\n    return j <= i\n"
        "def numbers(b, h, i, j):\n    return i - j\n"
    )
    assert set(users_form(f"{path}:bent").options) == {"score_mod", "score_mod_vjp"}
    for name, said in (
        ("reading", r"expected reading\(b, h, i, j\)"),
        ("none", "has no function 'none'"),
        ("other", r"other\(score, b, h, i, j\) of a score, its first argument so named, got other\(s, b, "),
    ):
        with pytest.raises(click.UsageError, match=said):
            users_form(f"{path}:{name}")
    with pytest.raises(click.UsageError, match="FILE:FUNCTION"):
        users_form("near")
    with pytest.raises(click.UsageError, match="FileNotFoundError"):
        users_form(f"{tmp_path / 'absent.py'}:near")
    problem = flexible_problem(users_form(f"{path}:near"), (1, 1, 12, 4), "float16", backward=False)
    operands, _ = problem.operands(contest._draw_on_host, 0)
    out = in_float32(flexible_attention)(
        *operands[:3], mask_mod=users_form(f"{path}:near").options["mask_mod"]
    )
    assert problem.check(operands, out.astype(np.float16), keep) is None
    simulated = ("bench", "flexible", "--backend", "cudasim", "--shape", "1,1,6,4", "--mod")
    assert "--mod" in run(*simulated, "near", code=2).stderr
    for name, said in (
        ("lacking", "own.py, line 13: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("unknown", "own.py, line 16: NameError: name 'not_named'"),
        ("late", "own.py, line 19: ValueError: the third"),
        ("numbers", "got int64 from"),
    ):
        (line,) = run(*simulated, f"{path}:{name}", code=1).stderr.splitlines()
        assert said in line


@pytest.mark.cudasim
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("module", "line 3: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("unknown", "line 7: NameError: "),
        ("wrong", "line 11: IndexError: "),
    ],
)
def test_what_only_a_branch_lacks_is_the_users(
    name: str, said: str, run: Callable[..., Any], tmp_path: Path
) -> None:
    """The first query and key see nothing of it; what is raised later names file and line."""
    path = tmp_path / "own.py"
    path.write_text(
        "def module(b, h, i, j):\n    if i > 5:\n        import not_there_at_all\n    return j <= i\n"
        "def unknown(score, b, h, i, j):\n    if i > 5:\n        return not_named(score)\n    return score\n"
        "def wrong(b, h, i, j):\n    if i > 5:\n        return [][3]\n    return j <= i\n"
    )
    asked = "bench", "flexible", "--backend", "cudasim", "--shape", "1,1,10,4", "--mod", f"{path}:{name}"
    assert f"--mod: {path}, {said}" in run(*asked, code=1).stderr


@pytest.mark.cudasim
def test_the_simulator_runs_both(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text("def near(b, h, i, j):\n    return abs(i - j) < 3 and j <= i\n")
    flexible = run(
        "bench", "flexible", "--backend", "cudasim", "--shape", "1,1,10,4", "--form", "softcap",
        "--mod", f"{path}:near", "--pass", "both", "--rivals",
    ).stdout  # fmt: skip
    for operation in ("softcap forward", "softcap backward", "near forward", "near backward"):
        assert operation in flexible
    assert flexible.count("timed") == 5  # four problems, and the total
    assert "causal" not in flexible  # a form has its mask: --causal says nothing of it
    lacking = run("bench", "flexible", "--backend", "cudasim", "--form", "causal", "--tier", "hopper", code=3)
    assert "tier hopper needs a GPU" in lacking.stderr
    decode = run("bench", "decode", "--backend", "cudasim", "--shape", "1,2,1,9,4", "--splits", "2").stdout
    assert decode.count("timed") == 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FORM_NAMES)
def test_rivals_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without being compiled, and SDPA with the whole mask, on the host in double."""
    torch = pytest.importorskip("torch")
    from cuda_backend.torch_rivals import flexible_rivals

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    form, rng = form_of(name, 4, 40), np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, heads, 8)) for heads in (4, 2, 2))
    options: dict[str, Any] = dict(form.options)
    expected = flexible_attention(q, k, v, aux=form.aux, **options)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    aux = tuple(torch.from_numpy(x) for x in form.aux)
    rivals = flexible_rivals(form.options.get("mask_mod"), form.options.get("score_mod"), backward=False)
    assert set(rivals) == ({"FlexAttention"} if "score_mod" in form.options else {"FlexAttention", "SDPA"})
    for rival in rivals.values():
        out = rival.function(*rival.prepare(*tensors, aux)).transpose(1, 2).numpy()
        assert np.abs(out - expected).max() < 1e-6  # slopes are float32


def test_the_backward_rival_gives_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from cuda_backend.torch_rivals import flexible_rivals

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    form, rng = form_of("sliding", 2, 20), np.random.default_rng(0)
    options: dict[str, Any] = dict(form.options)
    q, k, v, do = (rng.standard_normal((1, 20, 2, 4)) for _ in range(4))
    rival = flexible_rivals(form.options["mask_mod"], None, backward=True)["SDPA"]
    found = rival.function(*rival.prepare(*map(torch.from_numpy, (q, k, v, do)), ()))
    wanted = flexible_attention_vjp(q, k, v, do, **options)
    for gradient, truth in zip(found, wanted[:3], strict=True):
        assert np.abs(gradient.numpy() - truth).max() < 1e-12


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_sampled_heads_of_a_cache(dtype: str) -> None:
    functions: tuple[Any, Any] = split_kv_attention, paged_attention
    for problem, function in zip(decode_problems((2, 4, 2, 130, 8), dtype, 3), functions, strict=True):
        assert problem.functions is not None
        assert set(problem.functions("cudasim")) == {"frugal portable"}
        assert set(problem.functions("cuda")) == {"frugal portable", "frugal ampere"}
        operands, theirs = problem.operands(contest._draw_on_host, 0)
        assert [x.shape for x in theirs] == [(2, 1, 4, 8), (2, 130, 2, 8), (2, 130, 2, 8)]
        given = dict(zip(("k_lengths",), operands[4:], strict=False))
        out = function(*operands[:4], splits=3, **given)
        assert problem.check(operands, out, keep) is None
        assert "key head 0" in str(problem.check(operands, out[:, :, ::-1], keep))
        shorter = given | {"k_lengths": np.full(2, 129)}
        wrong = function(*operands[:4], splits=3, **shorter)
        assert problem.check(operands, wrong, keep) is not None


def test_rivals_of_a_cache() -> None:
    """SDPA computes the same, on the host; the copy reads as many bytes as it writes, together those read."""
    torch = pytest.importorskip("torch")
    problem = decode_problems((2, 4, 2, 130, 8), "float32")[0]
    _, theirs = problem.operands(contest._draw_on_host, 0)
    tensors, rivals = [torch.from_numpy(x) for x in theirs], problem.rivals()
    assert tuple(rivals) == problem.rival_names
    sdpa, copy = rivals.values()
    out = sdpa.function(*sdpa.prepare(*tensors)).transpose(1, 2).numpy()
    assert problem.check(theirs, out, keep) is None
    source, target = copy.prepare(*tensors)
    assert abs(2 * 4 * source.numel() - problem.compulsory_bytes) <= 2 * tensors[0].numel() * 4
    target.zero_()
    copy.function(source, target)
    assert torch.equal(source, target)


def test_parts_fill_the_gpu_and_bytes_are_those_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        cuda_backend, "split_kv_attention", lambda *_, **options: asked.append(options), raising=False
    )
    long, wide = (
        decode_problems(shape, "float16")[0] for shape in ((1, 32, 8, 131072, 128), (64, 32, 8, 64, 8))
    )
    for problem in (long, wide):
        assert problem.functions is not None
        for function in problem.functions("cuda").values():
            function(1, 2, 3)
    parts = [(options["tier"], options["splits"]) for options in asked]
    assert parts == [("ampere", None), ("portable", 33), ("ampere", None), ("portable", 1)]
    assert long.compulsory_bytes == 2 * (2 * 8 * 131072 * 128 + 2 * 32 * 128)
