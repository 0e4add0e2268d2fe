"""The ``frugal`` command: finds the subcommand, and turns every expected error into a line and an exit code.

Exit codes: 0 fine, 1 a check failed, 2 usage, 3 a needed backend is missing, 130 interrupted, 141 the reader
of a pipe went away.  A subcommand's module is imported when it is needed, and imports what is slow when it
runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any, cast

import click

__all__ = ["frugal", "main", "verdict_of"]

# In the order in which `frugal --help` lists them; the name is that of the module in `cli.commands`.
COMMANDS = (
    "reproduce",
    "list",
    "show",
    "errata",
    "verify",
    "bench",
    "io",
    "memory",
    "moe",
    "comm",
    "parallel",
    "plan",
    "timeline",
    "roofline",
    "validate",
    "calibrate",
    "speculate",
    "redundancy",
    "apply",
    "env",
)

CHECK_FAILED, USAGE, BACKEND_MISSING, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141


class _ClosedPipe(Exception):  # noqa: N818 (it is no error)
    """Nobody reads our output any more; click would exit with 1, which means that a check failed."""


@contextlib.contextmanager
def _closed_pipe_noticed() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _ClosedPipe from None


class _Frugal(click.Group):
    """A group that loads its commands lazily and never shows a traceback for an error that was expected."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        return cast("click.Command", importlib.import_module(f"cli.commands.{cmd_name}").command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from refimpl.errors import UnknownNameError

            raise UnknownNameError("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the command line, which prints ``--help`` too."""
        with _closed_pipe_noticed():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        with _closed_pipe_noticed():
            return super().invoke(ctx)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command and exit; what a subcommand returns is the exit code."""
        extra["standalone_mode"] = False
        extra.setdefault("prog_name", "frugal")
        try:
            _prepare_streams()
            code = super().main(*args, **extra)
        except click.Abort:
            code = INTERRUPTED
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = USAGE
        except _ClosedPipe:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
            code = BROKEN_PIPE
        except Exception as error:
            verdict = verdict_of(error)
            if verdict is None:
                raise  # a bug of ours: the traceback is what we want to see
            code, message = verdict
            with contextlib.suppress(OSError):  # the exit code says it, too
                click.echo(f"Error: {' '.join(message.split())}", err=True)
        sys.exit(code)


def verdict_of(error: Exception) -> tuple[int, str] | None:
    """Return exit code and message of an expected error, or None."""
    from refimpl.errors import BackendUnavailableError, DeadlockError, FrugalError, LawViolation

    match error:
        case click.UsageError(ctx=click.Context() as context):
            return USAGE, f"{error.format_message().rstrip('.')}; try '{context.command_path} --help'"
        case click.ClickException():
            return error.exit_code, error.format_message()
        case BackendUnavailableError() | ImportError():
            return BACKEND_MISSING, str(error)
        case LawViolation() | DeadlockError():  # ranks that stall are no mistake of the command line
            return CHECK_FAILED, str(error)
        case FrugalError():
            return USAGE, str(error)
        case MemoryError():
            return USAGE, "not enough memory for sizes as large as these"
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError":  # PyTorch's
            return USAGE, "not enough memory on the GPU for sizes as large as these"
        case OSError():
            where = f"{error.filename}: " if error.filename is not None else ""
            return USAGE, f"{where}{error.strerror or error}"
    return None


def _prepare_streams() -> None:
    """Make sure that no symbol of a formula fails to print: UTF-8 into pipes, escapes on a poor terminal.

    Without stderr, messages go nowhere; without stdout, `cli.output` asks for a file.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            if stream.isatty():
                reconfigure(errors="backslashreplace")
            else:
                reconfigure(encoding="utf-8", errors="backslashreplace")


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from refimpl import __version__

        click.echo(f"frugal {__version__}")
        ctx.exit()


@click.group(
    cls=_Frugal,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""\b
Examples:
  frugal reproduce                                    every published number beside ours
  frugal verify attention.flash --with my.module:f    hold your own function to the definition
  frugal io --n 1024,4096 --d 64 --hardware h200      the HBM traffic of attention

\b
Exit codes: 0 fine, 1 a check failed, 2 usage, 3 a needed backend is missing.
Completion: eval "$(_FRUGAL_COMPLETE=bash_source frugal)"; zsh_source and fish_source likewise.""",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def frugal() -> None:
    """Techniques that make large language models cheaper: defined, run fast, and priced."""


def main() -> None:
    """Run ``frugal``; the console script."""
    # Completion looks for the name of the installed script, also under `python -m cli.main`.
    frugal(complete_var="_FRUGAL_COMPLETE" if "_FRUGAL_COMPLETE" in os.environ else None)


if __name__ == "__main__":
    main()
