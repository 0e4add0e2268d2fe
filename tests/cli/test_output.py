import builtins
import json
import os
import stat
from pathlib import Path

import click
import pytest

from cli.output import write_whole


def test_a_file_is_written_and_stdout_stays_empty(run, tmp_path):
    target = tmp_path / "list.json"
    assert run("list", "--json", "-o", str(target)).stdout == ""
    assert json.loads(target.read_text("utf-8"))["command"] == "list"
    assert os.listdir(tmp_path) == ["list.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    target = tmp_path / "table"
    target.write_bytes(b"old")

    def full(self, _target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(click.UsageError, match="No space left"):
        write_whole(str(target), b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table"]


def test_permissions_and_links_stay(tmp_path):
    target, link = tmp_path / "table", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_whole(str(link), b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_permissions(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.write_bytes(b"")
    write_whole(str(ours), b"")
    assert ours.stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_regular_file_is_written_to_and_stays_what_it_is(tmp_path):
    # A pipe of our own: a bug here, run by root, would replace a device of the machine.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(str(pipe), b"data")
        assert os.read(reader, 100) == b"data"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(run, tmp_path, option, monkeypatch):
    monkeypatch.setattr("cli.attention_traffic._row", lambda *_: pytest.fail("it worked before it looked"))
    for place in (tmp_path / "missing" / "x.png", tmp_path.with_name("x.png") / "y.png"):
        message = run("io", option, str(place), code=2).stderr
        assert message.count("\n") == 1
        assert "cannot write" in message
    (tmp_path / "folder.png").mkdir()
    assert "directory" in run("io", option, str(tmp_path / "folder.png"), code=2).stderr


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_picture_is_drawn_and_the_same_twice(run, tmp_path, suffix, magic):
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        run("io", "--n", "1024,2048", "--plot", str(file), "--json")
    assert files[0].read_bytes().startswith(magic)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_other_pictures_are_refused(run, tmp_path):
    assert ".png or .svg" in run("io", "--plot", str(tmp_path / "x.pdf"), code=2).stderr


def test_without_matplotlib_the_extra_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    message = run("io", "--plot", str(tmp_path / "x.png"), code=3).stderr
    assert "pip install 'frugal-lm[plot]'" in message
    assert not os.listdir(tmp_path)


def test_a_plot_that_fails_writes_no_table_either(run, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("cli.attention_traffic._draw", broken)
    message = run("io", "--plot", str(tmp_path / "x.png"), "-o", str(tmp_path / "x.csv"), code=2).stderr
    assert "Input/output error" in message
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("form", ["json", "csv", "markdown"])
def test_switches_are_formats(run, form):
    assert run("list", f"--{form}").stdout == run("list", "--format", form).stdout


def test_colors_follow_the_environment(shell):
    assert "\x1b[" not in shell("list").stdout
    assert "\x1b[" in shell("list", env={"FORCE_COLOR": "1"}).stdout
    assert "\x1b[" not in shell("list", env={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stdout
    assert "\x1b[" not in shell("list", "--json", env={"FORCE_COLOR": "1"}).stdout


def test_messages_are_not_data(run):
    assert builtins.bool(run("errata").stdout)
    assert run("errata").stderr == ""
