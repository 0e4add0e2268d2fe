"""A command that runs on several MPI processes: one of them speaks, and one that fails ends all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["another_speaks", "together"]


def _on_mpi(backend: str) -> bool:
    """Return whether ranks on MPI have run in this process."""
    return backend == "mpi" and "mpi4py" in sys.modules


def another_speaks(backend: str) -> bool:
    """Return whether this is a process of an MPI program, but not the one that speaks for all."""
    if not _on_mpi(backend):
        return False
    from refimpl.parallel.mpi import world

    return bool(world().rank)


@contextmanager
def together(backend: str) -> Iterator[None]:
    """On MPI, end all processes with one message if one fails: the others would wait for it."""
    try:
        yield
    except Exception as error:
        from refimpl.errors import BackendUnavailableError

        if _on_mpi(backend) and not isinstance(error, BackendUnavailableError):
            from refimpl.parallel.mpi import abort, world

            if world().size > 1:
                from cli.main import verdict_of

                code, message = verdict_of(error) or (1, str(error))
                abort(f"Error: {' '.join(message.split())}", code)
        raise
