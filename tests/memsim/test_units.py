"""Units, exact numbers, printed digits, and formulas that are evaluated as printed."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memsim.estimate import estimate, term
from memsim.formula import evaluate, substitute
from memsim.units import (
    exact,
    format_number,
    format_quantity,
    parse_bytes,
    parse_count,
    printed_decimals,
    round_half_up,
    truncate,
)
from refimpl.errors import OptionError, UnknownNameError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7.5B", 7_500_000_000),
        ("7.5e9", 7_500_000_000),
        ("1T", 10**12),
        ("125m", 125_000_000),
        ("64", 64),
        ("1_000", 1000),
        ("0.5", Fraction(1, 2)),
    ],
)
def test_counts(text: str, value: object) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("40GB", 40 * 10**9), ("192KiB", 192 * 1024), ("1.5GiB", 3 * 2**29), ("512", 512)]
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "7.5X", "B", "1GB", "nan"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(OptionError):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "7 parameters", "0.3", "1.5GFLOP"])
def test_bad_bytes(text: str) -> None:
    with pytest.raises(OptionError):
        parse_bytes(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, [1]])
def test_exact_refuses(value: object) -> None:
    with pytest.raises(OptionError):
        exact(value)  # type: ignore[arg-type]


def test_exact_loses_nothing() -> None:
    assert exact(np.int64(2**62)) == 2**62
    assert exact(0.1) == Fraction(1, 10)
    assert type(exact(7.5e9)) is int
    assert type(exact(Fraction(4, 2))) is int


def test_the_two_roundings_of_table_1() -> None:
    assert round_half_up(Fraction("41.25"), 1) == Decimal("41.3")  # Python's round gives 41.2
    assert truncate(Fraction("4187.5"), 0) == 4187
    assert round_half_up(Fraction("4187.5"), 0) == 4188
    assert round_half_up(Fraction("-41.25"), 1) == Decimal("-41.3")
    assert truncate(Fraction("-0.19"), 1) == Decimal("-0.1")


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(0, 5))
@settings(max_examples=50)
def test_rounding_is_within_half_a_digit(numerator: int, denominator: int, decimals: int) -> None:
    value, step = Fraction(numerator, denominator), Fraction(1, 10**decimals)
    assert abs(Fraction(round_half_up(value, decimals)) - value) <= step / 2
    cut = Fraction(truncate(value, decimals))
    assert abs(cut) <= abs(value) < abs(cut) + step


def test_printed_decimals() -> None:
    assert [printed_decimals(text) for text in ("4187", "41.3", "1.88")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (16_640_625_000, "B", "16.64 GB"),
        (120_000_000_000, "B", "120 GB"),
        (0, "B", "0 B"),
        (512, "B", "512 B"),
        (999_960, "B", "1000 kB"),
        (Fraction(1, 12), "1", "0.08333"),
        (Fraction(3375, 4), "s", "14.06 min"),
        (Fraction(73, 10000), "s", "7.3 ms"),
    ],
)
def test_format_quantity(value: int, unit: str, text: str) -> None:
    assert format_quantity(value, unit) == text


@given(st.integers(-(10**18), 10**18))
@settings(max_examples=50)
def test_format_number_is_exact(value: int) -> None:
    assert Fraction(format_number(value)) == value


@given(st.integers(1, 10**12), st.integers(1, 4096))
@settings(max_examples=30)
def test_formula_is_what_it_says(Ψ: int, N: int) -> None:
    values = {"Ψ": Ψ, "N": N}
    assert evaluate("2Ψ + 14Ψ/N", values) == 2 * Ψ + Fraction(14 * Ψ, N)
    assert evaluate("3(N - 1)² + ceil(Ψ/N)·2", values) == 3 * (N - 1) ** 2 + 2 * -(-Ψ // N)


def test_formula_prints_its_numbers() -> None:
    assert substitute("ceil(M/(4d)) + T_c", {"M": 98304, "d": 64, "T_c": 3}) == "ceil(98304/(4*64)) + 3"


@pytest.mark.parametrize("formula", ["__import__('os')", "x.y", "x if x else 1", "x**-1", "'a'", "x[0]"])
def test_formula_is_arithmetic_only(formula: str) -> None:
    with pytest.raises(ValueError, match=r"arithmetic|powers"):
        evaluate(formula, {"x": 2})


def test_estimate_totals_by_unit() -> None:
    values = {"n": 3}
    mixed = estimate("both", [term("a", "2n", values, "B", "s"), term("b", "n", values, "FLOP", "s")])
    assert mixed.totals == {"B": 6, "FLOP": 3}
    with pytest.raises(ValueError, match="one unit"):
        _ = mixed.total
    with pytest.raises(UnknownNameError):
        mixed["c"]
    assert mixed["b"] == 3


def test_estimate_refuses_a_total_that_is_not_the_sum() -> None:
    values = {"n": 3}
    with pytest.raises(ValueError, match="not the sum"):
        estimate("x", [term("a", "2n", values, "B", "s")], formula="3n", values=values)
