"""``frugal bench int8 --model --merge``: layers of a model, and several of them as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest

import cuda_backend
from cli import contest
from cli.bench_result import with_times_apart
from cli.commands import bench
from cli.contest import Supply
from cli.projections import NAMES, layers_of, projections
from cuda_backend.timing import Timing
from cuda_backend.torch_rivals import Rival
from memsim.model import Model, dense, model, model_names
from memsim.parameters import parameters
from refimpl import quant, registry

TINY = ("--model", "tiny", "--tokens", "3")


def tiny(_name: str) -> Model:
    """Stand in for a model of the data files: k and v are half as wide as q."""
    return dense(layers=2, width=16, heads=4, key_heads=2, ffn=24, vocabulary=5, gated=True, norm="rms")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let NumPy play a GPU on which a call takes 10 us, and 1 us for each column of its output."""

    def interleaved(contestants: Mapping[str, Callable[[int], Any]], **_: Any) -> dict[str, Timing]:
        found = {}
        for name, call in contestants.items():
            out = call(0)
            columns = getattr(out, "codes", out).shape[1]
            seconds = 1e-6 * (10 + columns) * (2 if "torch" in name else 1)
            found[name] = Timing(seconds, seconds, 5e-6)
        return found

    functions = {"int8_matmul": quant.int8_matmul, "llm_int8_fused": quant.llm_int8_linear_fused}

    def implementations_of(name: str) -> list[Any]:
        function = functions[name.removeprefix("quant.")]
        return [SimpleNamespace(tier="hopper", backends=("cuda",), load=lambda: function)]

    def scaled_int8_matmul(a: Any, b: Any, *, dtype: str, **scales: Any) -> Any:
        return quant.dequantize_product(quant.int8_matmul(a, b), *scales.values(), dtype=np.dtype(dtype))

    monkeypatch.setattr("memsim.model.model", tiny)
    monkeypatch.setattr(bench, "why_not", lambda _: None)
    monkeypatch.setattr(
        contest, "supply_of", lambda _: Supply(contest._draw_on_host, lambda array, _: array, None)
    )
    monkeypatch.setattr(contest, "_law_broken", lambda *_: None)
    monkeypatch.setattr(registry, "implementations_of", implementations_of)
    for name in ("int8_matmul", "dequantize_product", "quantize_rows", "quantize_columns"):
        monkeypatch.setattr(cuda_backend, name, getattr(quant, name))
    monkeypatch.setattr(cuda_backend, "quantize_rows_hopper", quant.quantize_rows)
    monkeypatch.setattr(cuda_backend, "scaled_int8_matmul", scaled_int8_matmul)
    monkeypatch.setattr(
        "cuda_backend.torch_rivals.linear_rivals", lambda: {"torch matmul": Rival(lambda x, w: x @ w)}
    )
    monkeypatch.setattr("cuda_backend.torch_rivals.llm_int8_rivals", lambda _: {})
    monkeypatch.setattr("cuda_backend.timing.interleaved", interleaved)
    monkeypatch.setattr("cuda_backend.timing.input_sets", lambda _: 1)
    monkeypatch.setattr("cuda_backend.timing.device_name", lambda: "NVIDIA H200")


def linear_rows(document: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return rows of the whole linear layer by layers and function."""
    return {
        (" ".join(row["layers"]), row["function"]): row
        for row in document["rows"]
        if row["operation"] == "LLM.int8() linear"
    }


@pytest.mark.usefixtures("gpu")
def test_merged_layers_stand_beside_those_apart(rows: Callable[..., Any]) -> None:
    document = rows("bench", "int8", *TINY, "--merge", "v,k", "--merge", "q,k,v", "--rival", "torch matmul")
    assert document["inputs"]["merge"] == [["v", "k"], ["q", "k", "v"]]
    assert {row["model"] for row in document["rows"]} == {"tiny"}
    found = linear_rows(document)
    sizes = {layers: row["shape"] for (layers, name), row in found.items() if name == "frugal hopper"}
    assert sizes == {
        "q o": [3, 16, 16],
        "k v": [3, 16, 8],
        "gate up": [3, 16, 24],
        "down": [3, 24, 16],
        "k+v": [3, 16, 16],
        "q+k+v": [3, 16, 32],
    }
    times = {key: (row["time_s"], row["apart_s"]) for key, row in found.items()}
    us = pytest.approx
    assert times["k+v", "frugal hopper"] == (us(26e-6), us(2 * 18e-6))
    assert times["k+v", "torch matmul"] == (us(52e-6), us(4 * 18e-6))
    assert times["q+k+v", "frugal hopper"] == (us(42e-6), us(26e-6 + 2 * 18e-6))
    assert {apart for (layers, _), (_, apart) in times.items() if "+" not in layers} == {None}
    quantised = [row for row in document["rows"] if row["operation"] == "rows quantised"]
    apart = {" ".join(row["layers"]): row["apart_s"] for row in quantised if row["apart_s"] is not None}
    assert apart == {"k+v": us(2 * 26e-6), "q+k+v": us(3 * 26e-6)}


@pytest.mark.usefixtures("gpu")
def test_what_several_layers_share_is_timed_once(
    rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one width are quantised alike, whichever layer reads them; k and v as one are as large as q."""
    import cuda_backend.timing

    real, asked = cuda_backend.timing.interleaved, []

    def counted(contestants: Mapping[str, Any], **options: Any) -> Any:
        asked.append(sorted(contestants))
        return real(contestants, **options)

    monkeypatch.setattr("cuda_backend.timing.interleaved", counted)
    document = rows("bench", "int8", *TINY, *TINY, "--merge", "k,v")
    problems = {(row["operation"], tuple(row["shape"])) for row in document["rows"]}
    assert len(asked) == len(problems)
    labelled = [(row["operation"], row["function"], tuple(row["layers"])) for row in document["rows"]]
    assert len(labelled) > len(set(labelled)) > len(problems)


@pytest.mark.usefixtures("gpu")
def test_every_format_says_what_was_merged(run: Callable[..., Any]) -> None:
    arguments = ("bench", "int8", *TINY, "--merge", "gate,up")
    table, csv, markdown = (run(*arguments, *form) for form in ((), ("--csv",), ("--markdown",)))
    for text in (table.stdout, markdown.stdout):
        assert "gate+up" in text
        assert "apart/us" in text
        assert "68.0" in text
    keys, *lines = (line.split(",") for line in csv.stdout.splitlines())
    cells = [dict(zip(keys, line, strict=True)) for line in lines if line[0] == "LLM.int8() linear"]
    assert {(row["layers"], row["apart_s"]) for row in cells} == {
        ("q o", ""),
        ("k v", ""),
        ("gate up", ""),
        ("down", ""),
        ("gate+up", "6.8e-05"),
    }
    said = "LLM.int8() linear 3x16x48 (gate+up of tiny) float16: frugal hopper 58.0, apart 68.0 us"
    assert said in table.stderr


@pytest.mark.usefixtures("gpu")
def test_without_a_model_nothing_speaks_of_layers(
    run: Callable[..., Any], rows: Callable[..., Any], tmp_path: Any
) -> None:
    shape = ("bench", "int8", "--shape", "3,16,8")
    assert not {"layers", "model", "apart/us"} & set(run(*shape).stdout.split())
    assert {(row["model"], row["layers"], row["apart_s"]) for row in rows(*shape)["rows"]} == {
        (None, None, None)
    }
    both = rows(*shape, *TINY)["rows"]
    assert {tuple(row["shape"]) for row in both if not row["layers"]} == {(3, 16, 8), (3, 16)}
    pytest.importorskip("matplotlib")
    run(*shape, *TINY, "--merge", "k,v", "--plot", str(tmp_path / "bench.svg"))
    assert "k+v of tiny" in (tmp_path / "bench.svg").read_text()


def test_apart_is_none_if_a_layer_was_not_timed() -> None:
    base = {"model": "m", "operation": "o", "dtype": "d", "function": "f"}
    q = {**base, "shape": [1, 2, 4], "layers": ["q"], "time_s": 1.0}
    k = {**base, "shape": [1, 2, 2], "layers": ["k"], "time_s": 2.0}
    joint = {**base, "shape": [1, 2, 6], "layers": ["q+k"], "time_s": 2.5}

    def apart(*earlier: dict[str, Any]) -> float | None:
        (row,) = with_times_apart([joint], earlier)
        found: float | None = row["apart_s"]
        return found

    assert apart(q, k) == 3.0
    assert apart(q) is None
    assert apart(q, {**k, "time_s": None}) is None
    for key in base:
        assert apart(q, {**k, key: "other"}) is None
    assert apart(q, {**k, "shape": [8, 2, 2]}) is None, "other rows"
    assert apart(q, k, {**joint, "time_s": 9.0}) == 3.0
    assert [row["apart_s"] for row in with_times_apart([q], [q])] == [None], "it is apart itself"


def test_the_layers_of_a_model() -> None:
    assert [layer.shape for layer in layers_of("llama-2-7b", [1, 2])] == [
        (M, K, N) for M in (1, 2) for K, N in ((4096, 4096), (4096, 11008), (11008, 4096))
    ]
    assert [layer.names for layer in layers_of("gpt2", [1])] == [("q", "k", "v", "o"), ("up",), ("down",)]
    merged = layers_of("llama-2-7b", [1, 2], [("v", "q"), ("q", "v"), ("up", "gate")])
    assert [(layer.names, layer.shape) for layer in merged if "+" in layer.names[0]] == [
        ((name,), (M, 4096, N)) for M in (1, 2) for name, N in (("q+v", 8192), ("gate+up", 22016))
    ]


@pytest.mark.parametrize("name", model_names())
def test_the_sizes_of_layers_are_those_of_which_parameters_are_counted(name: str) -> None:
    try:
        found = projections(name)
    except click.UsageError:
        return
    assert set(found) <= set(NAMES)
    (block,) = (stack for stack in model(name).stacks if stack.layers > 1)
    parts = [part for part in block.parts if part.kind in ("attention", "ffn")]
    assert len({part.kind for part in parts}) == len(parts), "names would be of two layers"
    counted = sum(
        int(term.value) // block.layers
        for term in parameters(model=name).terms
        if term.name in {f"{block.name}: {part.name}" for part in parts}
    )
    matrices = sum(inputs * outputs for _, inputs, outputs in found.values())
    vectors = sum(outputs for _, _, outputs in found.values())
    assert matrices <= counted <= matrices + vectors
    if not any(part.choices.get("bias") or part.choices.get("sinks") for part in parts):
        assert matrices == counted
