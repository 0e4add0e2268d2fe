import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from cli.main import COMMANDS
from refimpl import registry


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(run, name):
    text = run(name, "--help").stdout
    assert f"frugal {name}" in text.partition("Example")[2]
    assert text == run(name, "-h").stdout
    leaves = [text]
    if "Commands:" in text:  # a group has no output of its own, its commands have
        group = importlib.import_module(f"cli.commands.{name}").command
        leaves = [run(name, leaf, "--help").stdout for leaf in group.commands]
    for leaf in leaves:
        assert "--output" in leaf
        assert "--format" in leaf


def test_help_lists_the_commands_and_exit_codes(run):
    text = run("--help").stdout
    for word in (*COMMANDS, "Exit codes", "Completion"):
        assert word in text
    assert run("--version").stdout.startswith("frugal ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("show",),
        ("show", "attention.flush"),
        ("show", "cost.attention_io", "--trace"),
        ("list", "--family", "attentoin"),
        ("list", "--bogus"),
        ("list", "--kind", "x"),
        ("io", "--n", "-1"),
        ("io", "--n", "nan"),
        ("io", "--hardware", "a100"),
        ("io", "--algorithm", "flash9"),
        ("reproduce", "--section", "zeor"),
        ("reproduce", "--only", "nothing.*"),
        ("verify", "attention.flush"),
        ("verify", "--with", "math:sqrt"),
        ("verify", "attention.dense", "--axes", "Zq=1"),
        ("verify", "attention.dense", "--axes", "Tq=-1"),
        ("verify", "attention.dense", "--axes", "Tq=true"),
        ("verify", "attention.dense", "--axes", "causal=sideways"),
        ("verify", "attention.dense", "--axes", "Hkv=0", "--examples", "1"),
        ("verify", "attention.dense", "--examples", "0"),
        ("verify", "attention.dense", "--with", "no_such_module:f"),
        ("verify", "attention.dense", "--with", "math:no_such_function"),
        ("verify", "attention.dense", "--with", "math"),
        ("verify", "attention.dense", "--with", "math:pi"),
    ],
)
def test_usage_errors_are_one_line(run, arguments):
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_a_near_name_is_offered(run):
    assert "did you mean attention.flash" in run("show", "attention.flush", code=2).stderr
    assert "did you mean list" in run("lits", code=2).stderr


def test_an_error_of_the_system_names_the_file(run, monkeypatch):
    def fail():
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(registry, "load", fail)
    assert run("list", code=2).stderr == "Error: /some/file: Permission denied\n"


def test_a_bug_of_ours_is_not_hidden(monkeypatch):
    from cli.main import frugal

    monkeypatch.setattr(registry, "load", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        frugal(["list"])


def test_no_arguments_shows_help_and_is_usage(run):
    assert "Commands:" in run(code=2).stderr


def test_a_closed_pipe_is_quiet(shell):
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (("list", "--json"), ("--help",)):
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments], stdout=writer, stderr=subprocess.PIPE, check=False
        )
        assert (done.returncode, done.stderr) == (141, b""), arguments
    os.close(writer)


# A shell ignores SIGINT for what it runs in the background, and children inherit that.
INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from cli.main import main\nmain()"
)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_is_quiet(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ndef f(q, k, v, /, **options):\n    open('started', 'w').close()\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "verify", "attention.dense", "--with", "slow:f"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


@pytest.mark.parametrize("arguments", [("--help",), ("list",), ("reproduce",)])
def test_quick_commands_load_nothing_heavy(arguments):
    """Their time budgets are printed by CI, never asserted: the machine is shared."""
    code = f"""
import sys
from cli.main import frugal
try:
    frugal({list(arguments)!r})
except SystemExit as stop:
    print(stop.code, sorted({{"numba", "torch", "matplotlib", "scipy"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split(" ", 1) == ["0", "[]\n"]


def test_completion_knows_names(shell):
    done = shell(
        env={"_FRUGAL_COMPLETE": "bash_complete", "COMP_WORDS": "frugal show attention.fl", "COMP_CWORD": "2"}
    )
    assert "plain,attention.flash" in done.stdout.split()
