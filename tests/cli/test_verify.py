import json
import shlex

import pytest

ONE_CASE = ("--axes", "B=1,Tq=3,Tk=4,Hkv=1,group=1,D=2,Dv=2,causal=false,extra=none,return_lse=false")
CANDIDATES = """
import sys
import numpy as np
from refimpl.attention import scaled_dot_product_attention as dense

print("printed while importing")

def good(q, k, v, /, **options):
    print("printed while running")
    return dense(q, k, v, **options)

def wrong(q, k, v, /, *, causal=False, return_lse=False):
    return np.asarray(1.01, q.dtype) * dense(q, k, v, causal=causal)

def plain(q, k, v, /):
    return dense(q, k, v)

def only_float32(q, k, v, /):
    if q.dtype != np.float32:
        raise TypeError("float32, please")
    return dense(q, k, v)

def refuses(q, k, v, /, **options):
    raise NotImplementedError("not today")

def leaves(q, k, v, /, **options):
    sys.exit(0)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with a module of the user's."""
    (tmp_path / "candidates_of_mine.py").write_text(CANDIDATES)
    (tmp_path / "broken_of_mine.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "syntax_of_mine.py").write_text("def f(:\n")
    (tmp_path / "exits_of_mine.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _with(name):
    return ("verify", "attention.dense", "--with", f"candidates_of_mine:{name}", *ONE_CASE)


def test_a_good_function_passes_and_its_prints_stay_off_stdout(here, shell):
    done = shell(*_with("good"), "--json")
    document = json.loads(done.stdout)
    assert document["totals"]["failed"] == 0
    assert document["totals"]["passed"] > 3
    assert [row["dtype"] for row in document["rows"]] == ["float64"]
    assert "printed while importing" in done.stderr
    assert "printed while running" in done.stderr


def test_a_wrong_function_fails_and_its_reproducer_fails_too(here, run):
    result = run(*_with("wrong"), code=1)
    assert "error 0." in result.stdout
    assert "checks failed" in result.stderr
    line = next(line for line in result.stdout.split("\n") if "reproduce: " in line)
    words = shlex.split(line.partition("reproduce: ")[2])
    assert words[0] == "frugal"
    assert "reference" in run(*words[1:], code=1).stdout


def test_failures_are_rows_of_the_json(here, rows):
    document = rows(*_with("wrong"), code=1)
    failures = document["rows"][0]["failures"]
    assert len(failures) == document["totals"]["failed"]
    assert set(failures[0]) == {"check", "detail", "reproducer"}


def test_failures_are_shown_in_part_unless_all_are_asked_for(here, run):
    arguments = ("verify", "attention.dense", "--with", "candidates_of_mine:wrong", "--examples", "2")
    few, every = (run(*arguments, *extra, code=1).stdout for extra in ((), ("--all-failures",)))
    assert few.count("reproduce: ") == 3
    assert "(--all-failures)" in few
    assert every.count("reproduce: ") > 3
    assert "(--all-failures)" not in every


def test_csv_failures_go_to_stderr(here, run):
    result = run(*_with("wrong"), "--csv", code=1)
    assert "reproduce: " in result.stderr
    assert result.stdout.startswith("technique,implementation,backend,dtype,passed,failed,refused,invalid")


def test_what_a_function_lacks_is_refused_not_failed(here, rows):
    axes = ONE_CASE[1].replace("causal=false", "causal=top_left")
    document = rows("verify", "attention.dense", "--with", "candidates_of_mine:plain", "--axes", axes, code=1)
    assert document["totals"]["failed"] == 0
    assert document["totals"]["refused"] > 0


def test_nothing_checked_is_a_failure(here, run):
    assert "nothing was checked: all" in run(*_with("refuses"), code=1).stderr


def test_dtypes_are_those_that_the_function_takes(here, rows):
    document = rows(*_with("only_float32"))
    assert [row["dtype"] for row in document["rows"]] == ["float32"]
    assert document["totals"]["failed"] == 0
    assert {row["dtype"] for row in rows(*_with("good"), "--dtype", "float32,fp16")["rows"]} == {
        "float32",
        "float16",
    }


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("candidates_of_mine:nope", "has no attribute 'nope'"),
        ("broken_of_mine:f", "No module named 'no_such_module_anywhere'"),
        ("syntax_of_mine:f", "SyntaxError"),
        ("exits_of_mine:f", "ended the program"),
        ("candidates_of_mine:leaves", "ended the program"),
    ],
)
def test_a_function_that_cannot_be_tried_is_one_line(here, run, target, reason):
    result = run("verify", "attention.dense", "--with", target, *ONE_CASE, code=2)
    assert reason in result.stderr
    errors = [line for line in result.stderr.split("\n") if not line.startswith("printed") and line]
    assert len(errors) == 1


def test_the_reference_and_its_numpy_rewrites_are_checked(rows):
    document = rows("verify", "attention.online_softmax", "--examples", "2")
    assert document["totals"]["failed"] == 0
    assert document["totals"]["passed"] > 0
    assert document["inputs"]["backend"] == "numpy"


def test_the_word_none_means_the_choice_of_that_name(rows, monkeypatch):
    seen = []
    monkeypatch.setattr("refimpl.testing.check", lambda name, f, **options: seen.append(options) or _Empty)
    rows("verify", "attention.dense", *ONE_CASE, code=1)
    assert seen[0]["axes"]["extra"] == "none"
    assert seen[0]["axes"]["causal"] is False


class _Empty:
    outcomes = ()


def test_a_missing_backend_exits_3_with_the_reason(run, monkeypatch):
    monkeypatch.setattr("cli.commands.verify.why_not", lambda backend: f"no {backend} today")
    assert run("verify", "--backend", "cuda", code=3).stderr == "Error: backend cuda: no cuda today\n"


def test_techniques_without_an_implementation_are_counted(rows, monkeypatch):
    monkeypatch.setattr("cli.commands.verify.why_not", lambda backend: None)
    document = rows("verify", "attention.head_decomposition", "--backend", "mpi", code=1)
    assert document["totals"]["without_implementation"] == 1
    assert document["totals"]["functions"] == 0


def test_an_implementation_that_does_not_import_is_a_failure(rows, monkeypatch):
    from refimpl import registry

    registry.load()
    broken = registry.Implementation("attention.online_softmax", "no_such_module:f", ("mpi",), "")
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", [*registry.IMPLEMENTATIONS, broken])
    monkeypatch.setattr("cli.commands.verify.why_not", lambda backend: None)
    document = rows("verify", "attention.online_softmax", "--backend", "mpi", code=1)
    assert document["rows"][0]["failures"][0]["check"] == "import"


NEEDS = """
import numpy as np
from refimpl.attention import scaled_dot_product_attention as dense
from refimpl.errors import BackendUnavailableError

def needy(q, k, v, /, **options):
    raise BackendUnavailableError("no such GPU here")

def sometimes(q, k, v, /, **options):
    if q.shape[1] > 1:
        raise BackendUnavailableError("no such GPU here")
    return dense(q, k, v, **options)

def wrong_then_needy(q, k, v, /, **options):
    if q.shape[1] > 9:
        raise BackendUnavailableError("no such GPU here")
    return dense(q, k, v, **options) + 1
"""


def test_a_missing_backend_hides_no_failure(here, rows):
    (here / "needs_of_mine.py").write_text(NEEDS)
    (row,) = rows("verify", "attention.dense", "--with", "needs_of_mine:wrong_then_needy", code=1)["rows"]
    assert row["failed"] == len(row["failures"]) > 0
    assert row["refusals"]["no such GPU here"] > 0


@pytest.mark.parametrize("name", ["needy", "sometimes"])
def test_a_function_that_lacks_its_backend_is_not_judged(here, run, name):
    """Nobody can tell whether it is right: neither a failure, nor passed for the cases that needed no GPU."""
    (here / "needs_of_mine.py").write_text(NEEDS)
    done = run("verify", "attention.dense", "--with", f"needs_of_mine:{name}", code=3)
    assert (done.stdout, done.stderr) == ("", f"Error: needs_of_mine:{name}: no such GPU here\n")


def test_a_kernel_for_hopper_without_a_gpu_is_a_missing_backend(run):
    done = run("verify", "attention.flash", "--with", "cuda_backend:flash_attention_hopper", code=3)
    assert done.stdout == ""
    assert done.stderr.startswith("Error: cuda_backend:flash_attention_hopper: ")
    assert done.stderr.count("\n") == 1


HIDING = ("verify", "attention.varlen", "--examples", "2", "--seed", "3")


def test_why_cases_are_invalid_is_said(rows, run):
    document = rows(*HIDING)
    row = document["rows"][0]
    reason = "attention.a_window_hides_what_lies_beyond_it: there are fewer keys than queries"
    assert row["invalid_reasons"] == {reason: row["invalid"]}
    lines = run(*HIDING).stdout.split("\n")
    assert f"invalid, for they say nothing of {row['implementation']} in float64:" in lines
    assert f"  {row['invalid']} x {reason}" in lines
    assert f"  {row['invalid']} x {reason}" in run(*HIDING, "--csv").stderr.split("\n")


def test_what_is_all_invalid_is_not_for_want_of_a_function(here, run, monkeypatch):
    from refimpl.testing import Outcome, Report

    where = ("attention.dense", "mine", "numpy", "float64")
    report = Report([Outcome(*where, "reference", "invalid", f"reason {n}") for n in range(7)])
    monkeypatch.setattr("refimpl.testing.check", lambda *_, **__: report)
    few, every = (run(*_with("good"), *flag, code=1) for flag in ((), ("--all-failures",)))
    assert few.stderr.endswith("nothing was checked: all 7 were invalid\n")
    assert "  1 x reference: reason 4\n  ... and 2 for other reasons (--all-failures)" in few.stdout
    assert "reason 5" not in few.stdout
    assert "reason 6" in every.stdout
    report.outcomes.append(Outcome(*where, "reference", "refused", "not today"))
    assert "all 8 were refused or invalid" in run(*_with("good"), code=1).stderr


@pytest.mark.parametrize(
    ("technique", "axes", "said"),
    [
        ("attention.flash", "Tq=4096", "--axes: Tq=4096 make cases of attention.flash"),
        ("attention.flash", "Tq=400,Tk=400,causal=false", "--axes: Tq=400, Tk=400 make cases"),
        ("quant.int8_matmul", "K=1000000", "times as large as its record"),
    ],
)
def test_the_simulator_refuses_what_would_take_hours(run, technique, axes, said):
    done = run("verify", technique, "--backend", "cudasim", "--axes", axes, code=2)
    assert said in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


def test_the_simulator_takes_the_reproducer_of_every_edge_case():
    from cli.verify_checks import refuse_hours
    from refimpl import registry

    registry.load()
    for record in registry.TECHNIQUES.values():
        for edge in record.edges:
            refuse_hours(record, edge)


def test_an_edge_case_that_is_large_for_its_record_runs_in_the_simulator(rows):
    axes = "K=256,bias=false,values=scaled,M=16,N=5,group_size=128"
    (row,) = rows("verify", "quant.weight_only_int8", "--backend", "cudasim", "--axes", axes,
                  "--dtype", "fp16")["rows"]  # fmt: skip
    assert row["passed"] > 0
