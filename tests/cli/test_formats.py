import csv
import io
import json
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from cli.formats import jsonable, render
from cli.result import Column, Result, View

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=40)
ROWS = st.lists(st.fixed_dictionaries({"name": TEXT, "size_bytes": st.integers(0, 2**70)}), max_size=5)
COLUMNS = (Column("name"), Column("size_bytes", "size", right=True))


def _render(result, form, **options):
    return render(result, form, command="demo", inputs={"n": (1, 2)}, **options)


@given(ROWS)
def test_json_holds_everything_in_order(rows):
    document = json.loads(_render(Result(rows, COLUMNS, totals={"n": len(rows)}, sources=["a"]), "json"))
    assert list(document) == ["schema", "command", "inputs", "rows", "totals", "sources"]
    assert document["schema"] == "frugal/1"
    assert document["rows"] == rows
    assert document["inputs"] == {"n": [1, 2]}


@given(ROWS)
def test_csv_reads_back(rows):
    found = list(csv.DictReader(io.StringIO(_render(Result(rows, COLUMNS), "csv"))))
    assert found == [{key: str(value) for key, value in row.items()} for row in rows]


@given(st.lists(TEXT.filter(lambda text: text == text.strip()), min_size=1, max_size=5))
def test_a_table_without_a_width_loses_nothing(names):
    lines = _render(Result([{"name": name} for name in names], [Column("name")]), "table").split("\n")
    assert [line.rstrip() for line in lines[2 : 2 + len(names)]] == names


def test_a_long_cell_stays_on_its_line_in_a_pipe_and_is_folded_on_a_terminal():
    result = Result([{"name": "word " * 60 + "end", "size_bytes": 1}], COLUMNS)
    assert "word " * 60 + "end" in _render(result, "table")
    folded = _render(result, "table", width=60)
    assert max(map(len, folded.split("\n"))) <= 60
    assert folded.count("word") == 60
    assert "…" not in folded


def test_what_is_no_finite_number_is_null():
    rows = [{"a": float("nan"), "b": float("inf"), "c": Fraction(1, 2), "d": Fraction(8, 2), "e": None}]
    document = json.loads(_render(Result(rows, [Column("a")]), "json"))
    assert document["rows"] == [{"a": None, "b": None, "c": 0.5, "d": 4, "e": None}]


def test_big_integers_stay_exact():
    assert jsonable(2**80 + 1) == 2**80 + 1
    assert jsonable(Fraction(2**80 + 1)) == 2**80 + 1


def test_brackets_are_no_markup():
    assert "[red]x[/red] [0, 1]" in _render(
        Result([{"name": "[red]x[/red] [0, 1]"}], [Column("name")]), "table"
    )


def test_markdown_keeps_pipes_inside_cells():
    text = _render(Result([{"name": "a|b\nc", "size_bytes": 1}], COLUMNS), "markdown")
    assert "| a\\|b c | 1 |" in text
    assert "| --- | ---: |" in text


def test_colors_only_when_asked_for():
    result = Result([{"name": "a"}], [Column("name", style=lambda value: "red")])
    assert "\x1b[" not in _render(result, "table")
    assert "\x1b[" in _render(result, "table", color=True)


def test_views_with_the_same_columns_line_up():
    views = [View("one", [Column("a"), Column("b")], [{"a": "x" * 20, "b": "first"}])]
    views.append(View("two", [Column("a"), Column("b")], [{"a": "x", "b": "second"}]))
    lines = _render(Result([], (), views=views), "table").split("\n")
    at = [line.index(word) for word in ("first", "second") for line in lines if word in line]
    assert at[0] == at[1]


def test_the_keys_of_nested_rows_survive_csv():
    rows = [{"entries": [1, 2], "made": [{"x": 1}], "ok": True, "none": None}]
    found = next(csv.DictReader(io.StringIO(_render(Result(rows, [Column("entries")]), "csv"))))
    assert found["entries"] == "1 2"
    assert json.loads(found["made"]) == [{"x": 1}]
    assert found["ok"] == "true"
    assert found["none"] == ""
