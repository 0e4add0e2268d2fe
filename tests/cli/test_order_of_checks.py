"""What can be judged on any machine is judged on every machine: bad input exits with 2, GPU or no GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# No test runs where CUDA works, so each of these would exit with 3 if the backend came first.
BENCH = [
    (("attention", "--tier", "nope"), "--tier: expected one of hopper, portable; got 'nope'"),
    (("attention", "--tier", ""), "--tier: expected one of"),
    (("attention", "--pass", "bwd", "--tier", "nope"), "hopper, hopper deterministic, portable; got 'nope'"),
    (("int8", "--tier", "nope"), "--tier: expected one of hopper, portable; got 'nope'"),
    (("weight-only", "--tier", "nope"), "--tier: expected one of decode; got 'nope'"),
    (("int8-attention", "--tier", "nope"), "--tier: expected one of fp16, int8; got 'nope'"),
    (("flexible", "--tier", "nope"), "--tier: expected one of hopper, portable; got 'nope'"),
    (("decode", "--tier", "nope"), "--tier: expected one of ampere, portable; got 'nope'"),
    (("int8", "--rival", "cudnn"), "has 'cudnn' in its name"),
    (("int8", "--model", "llama-2-70c"), "did you mean llama-2-70b"),
    (("int8", "--model", "mamba-130m"), "mamba-130m has no attention or feed-forward network"),
    (("int8", "--model", "bart-base"), "several kinds, encoder block, decoder block"),
    (("int8", "--merge", "k,v"), "--merge is of projections of a --model"),
    (("attention", "--merge", "k,v"), "--merge are options of int8"),
    (("growth", "--merge", "k,v"), "--merge is no option of growth"),
    (("int8", "--model", "llama-2-70b", "--merge", "k"), "two names or more, each once; got 'k'"),
    (("int8", "--model", "llama-2-70b", "--merge", "k,v,k"), "two names or more, each once; got 'k,v,k'"),
    (("int8", "--model", "llama-2-70b", "--merge", "k,w"), "'w' is not one of 'q', 'k', 'v', 'o', 'gate'"),
    (
        ("int8", "--model", "gpt2", "--merge", "gate,up"),
        "gpt2 has no projection 'gate'; it has q, k",
    ),
    (
        ("int8", "--model", "llama-2-7b", "--merge", "q,o"),
        "of one input are q, k, v; gate, up",
    ),
    (
        ("int8", "--model", "llama-2-7b", "--merge", "gate,up,down"),
        "gate, up, down of llama-2-7b read different",
    ),
    (
        ("int8", "--model", "llama-2-70b", "--tokens", "20M", "--merge", "gate,up"),
        "no GPU holds arrays as large as those of int8 at 20000000x8192x57344",
    ),
    (
        ("int8", "--model", "llama-2-7b", "--model", "gpt2", "--merge", "k,v", "--merge", "v,up"),
        "v, up of llama-2-7b read different inputs",
    ),
    (("attention", "--hardware", "h2000"), "h200"),
    (("flexible", "--mod", "not_there.py:f"), "not_there.py"),
]
VERIFY = [
    (("attention.flush",), "did you mean attention.flash"),
    (("attention.flash", "--axes", "Zq=1"), "has no axis 'Zq'"),
    (("attention.flash", "--axes", "Tq=-1"), "Tq is a size"),
    (("attention.flash", "--with", "no_such_module:f"), "No module named 'no_such_module'"),
    (("attention.flush", "--tier", "hopper"), "did you mean attention.flash"),
    (("attention.flexible", "--mod", "not_there.py:f"), "not_there.py"),
    (("--model", "no-such-folder"), "no-such-folder"),
]


@pytest.mark.parametrize(("arguments", "said"), BENCH)
def test_bench(run: Callable[..., Any], arguments: tuple[str, ...], said: str) -> None:
    done = run("bench", *arguments, code=2)
    assert said in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize(("arguments", "said"), VERIFY)
@pytest.mark.parametrize("backend", ["cuda", "cudasim"])
def test_verify(run: Callable[..., Any], backend: str, arguments: tuple[str, ...], said: str) -> None:
    if backend == "cudasim" and "--tier" in arguments:
        arguments = (*arguments, "--tier", "ampere")  # which the simulator lacks
    done = run("verify", *arguments, "--backend", backend, code=2)
    assert said in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "attention", "--tier", "hopper"),
        ("bench", "int8", "--model", "llama-2-70b", "--rival", "_int_mm", "--hardware", "h200"),
        (
            "bench",
            "int8",
            "--model",
            "llama-2-70b",
            "--merge",
            "v,k",
            "--merge",
            "q,k,v",
            "--merge",
            "up,gate",
        ),
        ("bench", "flexible", "--form", "sliding", "--tier", "portable"),
        ("verify", "attention.flash", "--axes", "Tq=3", "--backend", "cuda", "--tier", "hopper"),
        ("verify", "attention.dense", "--with", "math:sqrt", "--backend", "cuda"),
    ],
)
def test_what_is_right_still_needs_a_gpu(run: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    assert run(*arguments, code=3).stderr.startswith("Error: backend cuda: ")


def test_a_users_file_is_read_before_a_gpu_is_asked_for(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def near(b, h, i, j):\n    return j <= i\n")
    target = str(tmp_path / "mine.py")
    for command in (("bench", "flexible"), ("verify", "attention.flexible", "--backend", "cuda")):
        assert "has no function 'far'" in run(*command, "--mod", f"{target}:far", code=2).stderr
        assert "backend cuda" in run(*command, "--mod", f"{target}:near", code=3).stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("bench", "attention", "--tier", "nope"), 2),
        (("bench", "int8", "--tier", "nope"), 2),
        (("bench", "weight-only", "--tier", "nope"), 2),
        (("bench", "int8-attention", "--tier", "nope"), 2),
        (("bench", "flexible", "--form", "sliding", "--tier", "nope"), 2),
        (("bench", "decode", "--tier", "nope"), 2),
        (("bench", "decode", "--tier", "ampere"), 3),
        (("verify", "attention.flush", "--backend", "cuda"), 2),
        (("verify", "attention.flash", "--backend", "cuda"), 3),
    ],
)
def test_without_numba_too(arguments: tuple[str, ...], code: int) -> None:
    program = "import sys\nsys.modules['numba'] = None\nfrom cli.main import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1, done.stderr
