"""The options that every command shares, ``--format``, ``--output`` and ``--plot``, and what they do.

Data go to stdout or to a file, messages and progress to stderr.  A file is written whole or not at all.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from cli.formats import Format, render
from cli.result import Result

__all__ = ["output_options", "progress", "say", "writable", "write_whole"]

T = TypeVar("T")
_FORMATS: tuple[Format, ...] = ("table", "json", "csv", "markdown")
_PLOT_FORMATS = (".png", ".svg")


def output_options(*, plot: bool = False) -> Callable[[Callable[..., Result]], Callable[..., int]]:
    """Give a command the shared options, and write down the `Result` that it returns.

    Parameters
    ----------
    plot : bool
        Whether it has ``--plot``: its results then have a `draw`.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., int]:
        @functools.wraps(function)
        def command(
            *, form: Format | None, output_file: str, plot_file: str | None = None, **options: Any
        ) -> int:
            if (
                plot_file
                and output_file != "-"
                and os.path.realpath(plot_file) == os.path.realpath(output_file)
            ):
                raise click.UsageError(f"--output and --plot both write {plot_file!r}")
            context = click.get_current_context()
            name = context.command_path.partition(" ")[2]  # without the program: "memory zero"
            inputs = {key.rstrip("_"): value for key, value in options.items()}
            result = function(**options)
            if result.silent:
                return result.exit_code
            screen = sys.stdout if output_file == "-" else None
            text = render(
                result,
                form or "table",  # no default of the option: the switches share its name
                command=name,
                inputs=inputs,
                width=_width(screen),
                color=_color(screen),
            )
            picture = _picture(result, plot_file) if plot_file else None
            if output_file == "-":
                _to_stdout(text)
            else:
                write_whole(output_file, text.encode())
            if picture is not None and plot_file is not None:
                write_whole(plot_file, picture)
            if form == "csv":  # which has no room for them
                for line in result.details:
                    say(line)
            if result.problem:
                say(result.problem)
            return result.exit_code

        decorated: Any = command
        if plot:
            decorated = click.option(
                "--plot",
                "plot_file",
                metavar="FILE",
                callback=_check_plot,
                help="Also draw a picture, FILE.png or FILE.svg (needs matplotlib).",
            )(decorated)
        decorated = click.option(
            "-o",
            "--output",
            "output_file",
            metavar="FILE",
            default="-",
            show_default="stdout",
            callback=_check_output,
            help="Write to FILE, whole or not at all; - is stdout.",
        )(decorated)
        for shortcut in ("markdown", "csv", "json"):
            decorated = click.option(
                f"--{shortcut}", "form", flag_value=shortcut, help=f"The same as --format {shortcut}."
            )(decorated)
        decorated = click.option(
            "--format",
            "form",
            type=click.Choice(_FORMATS),
            show_default="table",
            help="How to write the result; the last one given counts.",
        )(decorated)
        return cast("Callable[..., int]", decorated)

    return decorate


def _to_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()  # a closed pipe shows here, where it is handled
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.UsageError(f"cannot write to stdout: {error.strerror or error}") from None


def say(message: str) -> None:
    """Write a message for people, to stderr; if nobody can have it, the result does not suffer."""
    with suppress(OSError):
        click.echo(message, err=True)


def progress(items: Sequence[T], label: str, name: Callable[[T], str]) -> Iterator[T]:
    """Yield `items`; meanwhile, if stderr is a terminal, tell which one is at work."""
    if not sys.stderr.isatty():
        yield from items
        return
    width = shutil.get_terminal_size().columns - 1
    try:
        for index, item in enumerate(items, 1):
            line = f"{label} {index}/{len(items)} {name(item)}"[:width]
            sys.stderr.write(f"\r{line:<{width}}")
            sys.stderr.flush()
            yield item
    finally:
        sys.stderr.write(f"\r{'':<{width}}\r")
        sys.stderr.flush()


def write_whole(path: str, data: bytes) -> None:
    """Write `data` to `path`, all of it or nothing: a file beside it takes its place when it is complete.

    A device or a pipe is written to directly.  An existing file keeps its permissions.

    Raises
    ------
    click.UsageError
        If that is impossible; nothing is left behind.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    mode = None
    try:
        with suppress(FileNotFoundError):
            mode = target.stat().st_mode
        if mode is not None and not stat.S_ISREG(mode):
            target.write_bytes(data)
            return
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            with draft.open("xb") as stream:
                stream.write(data)
            if mode is not None:
                draft.chmod(stat.S_IMODE(mode))
            draft.replace(target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise click.UsageError(f"cannot write {path}: {error.strerror or error}") from None


def writable(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a file of an option that cannot be written, as `--output` does."""
    if value is not None:
        _check_place(value)
    return value


def _check_output(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Refuse a file that cannot be written before hours are spent on what should go into it."""
    if value != "-":
        _check_place(value)
    elif sys.stdout is None:
        raise click.BadParameter("stdout is closed: name a file")
    return value


def _check_plot(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    if Path(value).suffix.lower() not in _PLOT_FORMATS:
        raise click.BadParameter(f"expected a name that ends in .png or .svg; got {value!r}")
    _check_place(value)
    if importlib.util.find_spec("matplotlib") is None:
        from refimpl.errors import BackendUnavailableError

        raise BackendUnavailableError("--plot needs matplotlib: pip install 'frugal-lm[plot]'")
    return value


def _check_place(path: str) -> None:
    target = Path(os.path.realpath(path))
    if not path or target.is_dir():
        raise click.BadParameter(f"cannot write {path!r}: it is a directory")
    if not target.parent.is_dir():
        raise click.BadParameter(f"cannot write {path!r}: there is no directory {str(target.parent)!r}")
    regular = not target.exists() or target.is_file()
    if not os.access(target.parent if regular else target, os.W_OK):
        raise click.BadParameter(f"cannot write {path!r}: permission denied")


def _width(screen: Any) -> int | None:
    return shutil.get_terminal_size().columns if screen is not None and screen.isatty() else None


def _color(screen: Any) -> bool:
    """Whether to write colors: NO_COLOR first, then FORCE_COLOR, then whether a terminal reads it."""
    if screen is None or os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (screen.isatty() and os.environ.get("TERM") != "dumb")


def _picture(result: Result, path: str) -> bytes:
    """Return the picture of `result` as the bytes of a file; equal results give equal bytes."""
    if result.draw is None:
        raise click.UsageError("--plot: there is nothing to draw in this result")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "frugal"}):
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        result.draw(figure.add_subplot())
        stream = io.BytesIO()
        form = Path(path).suffix.lower().removeprefix(".")
        figure.savefig(stream, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()
