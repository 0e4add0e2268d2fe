"""``frugal bench growth``: slopes of times made up, counts against prices; no speed is asserted."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cli import growth
from cli.growth import FITTED, TOLERANCE, growth_result, least_squares_slope, measured, processor_seconds
from cli.growth_methods import BLOCK, HEAD, METHODS, NAMES, RADIUS, Method
from refimpl.errors import OptionError
from refimpl.memory import Memory
from refimpl.registry import Case

Rows = Callable[..., dict[str, Any]]


def played(function: Callable[..., Any], **changes: Any) -> Method:
    """A method that runs `function` of N."""

    class Played(Method):
        def load(self) -> Callable[..., Any]:
            return function

    return Played(
        "method", "stage:play", 1, None, lambda n: Case((n,)), lambda case: 3 * case.args[0]
    )._replace(**changes)


class Play:
    """Methods whose calls move a clock, by a law of their own, and hold so many bytes."""

    def __init__(self) -> None:
        self.now = 0.0

    def method(self, name: str, theory: int, seconds: Callable[[int], float], **changes: Any) -> Method:
        def play(n: int) -> Any:
            self.now += seconds(n)
            return np.ones(100_000 * n**theory, np.int8)

        return played(play, name=name, theory=theory, **changes)

    def clock(self) -> float:
        return self.now


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``play(name=seconds(n), ...)`` is the result of growth for such methods of theory 1."""

    def run(*, theory: int = 1, rounds: int = 2, sizes: Any = (8, 16, 32, 64), **laws: Any) -> Any:
        stage = Play()
        methods = tuple(stage.method(name, theory, seconds) for name, seconds in laws.items())
        monkeypatch.setattr(growth, "METHODS", methods)
        return growth_result(tuple(laws), sizes, rounds, stage.clock)

    return run


def test_slopes_are_those_of_the_times(play: Callable[..., Any]) -> None:
    result = play(line=lambda n: 0.125 * n, square=lambda n: 0.0625 * n**2)
    line, square = result.views[1].rows
    assert line["time_slope"] == pytest.approx(1.0)
    assert square["time_slope"] == pytest.approx(2.0)
    assert line["flops_slope"] == pytest.approx(1.0)
    assert line["memory_slope"] == pytest.approx(1.0, abs=0.02)  # a few kilobytes are not of the arrays
    assert (line["within"], square["within"]) == (True, False)
    assert result.exit_code == 1
    assert result.problem == "slopes off by more than 0.15: square"
    assert result.totals == {"methods": 2, "within": 1, "outside": 1, "not_judged": 0}
    assert [row["time_s"] for row in result.rows[:4]] == pytest.approx([1.0, 2.0, 4.0, 8.0])


@pytest.mark.parametrize(("power", "within"), [(1.14, True), (1.16, False), (0.86, True), (0.84, False)])
def test_the_tolerance(play: Callable[..., Any], power: float, within: bool) -> None:
    (slope,) = play(method=lambda n: 0.25 * n**power).views[1].rows
    assert abs(slope["time_slope"] - 1) == pytest.approx(abs(power - 1))
    assert slope["within"] is within
    assert TOLERANCE == 0.15


def test_only_the_top_four_sizes_make_the_slope(play: Callable[..., Any]) -> None:
    result = play(method=lambda n: 100.0 if n < 8 else 0.125 * n, sizes=(2, 4, 8, 16, 32, 64))
    assert len(result.rows) == 6
    assert result.views[1].rows[0]["time_slope"] == pytest.approx(1.0)
    assert FITTED == 4


def test_fewer_sizes_have_no_verdict(play: Callable[..., Any]) -> None:
    result = play(method=lambda n: 0.125 * n**2, sizes=(8, 16, 32))
    (slope,) = result.views[1].rows
    assert (slope["time_slope"], slope["within"], result.exit_code) == (None, None, 0)
    assert result.details[-1] == "No verdict on method: a slope needs 4 sizes; give more with --n."
    assert result.totals == {"methods": 1, "within": 0, "outside": 0, "not_judged": 1}


def test_the_least_of_the_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Play()
    disturbed = itertools.chain([9.0, 9.0, 5.0, 1.0, 7.0], itertools.repeat(9.0))
    method = stage.method("method", 1, lambda _n: next(disturbed))
    (row,) = measured(
        method, [8], 3, stage.clock
    )  # two calls come before: the first one, and that for memory
    assert row["time_s"] == 1.0


def test_short_calls_are_repeated() -> None:
    stage, calls = Play(), []
    method = stage.method("method", 1, lambda n: calls.append(n) or 1e-3)
    (row,) = measured(method, [8], 1, stage.clock)
    assert row["time_s"] == pytest.approx(1e-3)
    assert 50 <= len(calls) < 500


def test_lengths_that_do_not_fit_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Play()
    method = stage.method("full", 1, lambda n: 0.125 * n, longest=16)
    monkeypatch.setattr(growth, "METHODS", (method,))
    result = growth_result(("full",), (64, 16, 8, 16), 1, stage.clock)
    assert [row["n"] for row in result.rows] == [8, 16]
    assert result.details[0] == "full: no lengths above 16, whose scores do not fit."
    with pytest.raises(OptionError, match="full: at most 16; got 64"):
        growth_result(("full",), (64,), 1, stage.clock)


def test_slope_by_least_squares_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y = 2.0 ** np.arange(5), rng.uniform(1, 9, 5)
    assert least_squares_slope(list(x), list(y)) == pytest.approx(np.polyfit(np.log(x), np.log(y), 1)[0])


def test_memory_is_that_of_inputs_and_call() -> None:
    """An input of 10 MB and an output of 20 MB: 30 MB, whatever the run for the times holds."""

    def double(x: Any) -> Any:
        return np.ones(2 * x.size, np.int8)

    method = played(double, case=lambda n: Case((np.ones(10_000_000, np.int8),)), flops=lambda _case: 1)
    (row,) = measured(method, [1], 1, processor_seconds)
    assert row["peak_bytes"] == pytest.approx(3e7, rel=0.01)


def test_processor_time_passes_while_something_is_computed() -> None:
    before = processor_seconds()
    while processor_seconds() == before:
        sum(range(1000))
    assert processor_seconds() > before


@pytest.mark.parametrize("name", ["sliding", "bigbird", "linear"])
def test_prices_are_what_the_calls_count(name: str) -> None:
    method, memory = METHODS[NAMES.index(name)], Memory()
    case = method.case(700)
    case.replace(memory=memory).call(method.load())
    assert method.flops(case) == memory.flops


def _priced(name: str, n: int) -> int:
    method = METHODS[NAMES.index(name)]
    return method.flops(method.case(n))


def test_operations_are_those_of_formulas() -> None:
    n = 1024
    products = 4 * HEAD  # of a pair: its score, and its value times its weight
    assert _priced("full", n) == products * n**2
    inner = n * (RADIUS + 2 * RADIUS) - 2 * RADIUS * RADIUS  # the first and last tile see one side only
    assert _priced("sliding", n) == products * inner
    blocks = n // BLOCK
    # Two global blocks see everything; a block sees 3 neighbours, 2 global and 3 random ones, but of these 7
    # where its window holds a global block.
    seen = 2 * blocks + 8 * (blocks - 4) + 2 * 7
    assert _priced("bigbird", n) == products * BLOCK**2 * seen
    assert _priced("mamba", 2 * n) == 2 * _priced("mamba", n)


def test_the_command(rows: Rows) -> None:
    found = rows("bench", "growth", "--n", "64,128", "--rounds", "1")
    assert [(row["method"], row["n"]) for row in found["rows"]] == [(m, n) for m in NAMES for n in (64, 128)]
    assert all(row["time_s"] > 0 and row["peak_bytes"] > 0 and row["flops"] > 0 for row in found["rows"])
    assert {row["within"] for row in found["rows"]} == {None}
    assert found["totals"] == {"methods": 5, "within": 0, "outside": 0, "not_judged": 5}


def test_tables_and_picture(run: Callable[..., Any], tmp_path: Any) -> None:
    picture = tmp_path / "growth.svg"
    shown = run("bench", "growth", "--n", "32,64", "--rounds", "1", "--method", "linear,mamba",
                "--plot", str(picture))  # fmt: skip
    assert "Powers of N, over the top 4 sizes" in shown.stdout
    assert "linear_attention_chunked" in shown.stdout
    assert "full" not in shown.stdout.replace("full's", "")
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.count("<!-- linear -->") == drawn.count("<!-- mamba -->") == 2  # two legends


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("growth", "--shape", "1,2,3,4"), "--shape is no option of growth, but of kernels"),
        (("growth", "--backend", "cuda"), "--backend is no option of growth, but of kernels"),
        (("growth", "--causal"), "--causal is no option of growth, but of kernels"),
        (("attention", "--n", "64"), "--n is no option of attention, but of growth"),
        (("int8", "--method", "full"), "--method is no option of int8, but of growth"),
        (("growth", "--method", "mumba"), "'mumba' is not one of"),
        (("growth", "--n", "0"), "expected a whole number of at least 1"),
        (("growth", "--rounds", "0"), "Invalid value for '--rounds'"),
    ],
)
def test_usage(run: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    assert message in " ".join(run("bench", *arguments, code=2).stderr.split())
