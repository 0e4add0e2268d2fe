"""Running a function that somebody else wrote: import it, and keep its prints and errors in their place."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from refimpl.registry import Technique

__all__ = ["accepted_dtypes", "blame", "import_function", "untrusted", "users_functions"]


@contextlib.contextmanager
def untrusted(target: str, option: str | None) -> Iterator[None]:
    """Keep what foreign code prints off stdout, which is for the result, and its errors to one line.

    Parameters
    ----------
    target : str
        Whose code runs.
    option : str or None
        The option that an unexpected exception is blamed on; None: it is a bug of ours and passes through.

    Raises
    ------
    click.UsageError
        In place of what the code raised, or if it tried to end the program.
    """
    from refimpl.errors import FrugalError

    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except SystemExit as stop:
        raise click.UsageError(f"{target} ended the program with exit code {stop.code!r}") from None
    except (FrugalError, MemoryError, click.ClickException):
        raise
    except Exception as error:
        if option is None:
            raise
        raise click.UsageError(f"{option}: {target}: {type(error).__name__}: {error}") from None


def blame(error: BaseException, path: str) -> str | None:
    """Return line and message of an error that code in the file `path` raised; None: it comes from elsewhere.

    One of ours that names a line of the file, as of a function that returns no truth value, is about it too.

    >>> try:
    ...     click.UsageError(message=1 / 0)
    ... except ZeroDivisionError as error:
    ...     blame(error, "mine.py") is None
    True
    """
    from refimpl.errors import FrugalError

    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if not lines:
        named = isinstance(error, FrugalError) and f"{path}, line " in str(error)
        return str(error) if named else None
    message = re.sub(r"^tid=\[.*?\] ctaid=\[.*?\](: )?", "", str(error))  # the simulator's thread
    return f"{path}, line {lines[-1]}: {type(error).__name__}" + (f": {message}" if message else "")


@contextlib.contextmanager
def users_functions(targets: Sequence[str], option: str) -> Iterator[None]:
    """Turn what functions ``FILE:FUNCTION`` raise into a line and exit code 1.

    Raises
    ------
    click.ClickException
        In the place of an error that comes from one of the files, as `blame` says.
    """
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        for path in (target.rpartition(":")[0] for target in targets):
            said = blame(error, path)
            if said is not None:
                raise click.ClickException(f"{option}: {said}") from None
        raise


def import_function(target: str) -> Callable[..., Any]:
    """Return the function ``MODULE:FUNCTION``, looked for in the current directory first.

    Raises
    ------
    click.UsageError
        If it does not import, whatever its module does wrong.

    Examples
    --------
    >>> import_function("math:sqrt")(4.0)
    2.0
    """
    from refimpl.registry import resolve

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with untrusted(target, "--with"):
        return resolve(target)


def accepted_dtypes(technique: Technique, f: Callable[..., Any], seed: int) -> tuple[str, ...]:
    """Return float64 if `f` takes it, else the formats of kernels that it takes, or all if it takes none.

    Taking a format means not raising on the first edge case.
    """
    import numpy as np

    from refimpl.registry import Case
    from refimpl.testing import LOW_PRECISION, draw, dtype_named
    from refimpl.tolerances import cast

    if technique.sample is None:
        return ("float64",)
    edge = technique.edges[0] if technique.edges else None
    case = technique.sample(np.random.default_rng(seed), **draw(technique, seed, edge))

    def takes(name: str) -> bool:
        for options in (case.kwargs, {}):  # it may lack an option of the case, which says nothing of dtypes
            try:
                Case(cast(case, dtype_named(name)).args, options).call(f)
            except Exception:  # kernels say in many ways that they do not take a dtype
                continue
            return True
        return False

    if takes("float64"):
        return ("float64",)
    return tuple(filter(takes, LOW_PRECISION)) or LOW_PRECISION
