"""``frugal env``: what is installed here, and which backends that makes usable."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import click

from cli.output import output_options
from cli.result import Column, Result

__all__ = ["command", "why_not"]

PACKAGES = (
    "frugal-lm",
    "numpy",
    "scipy",
    "numba",
    "numba-cuda",
    "ml_dtypes",
    "torch",
    "matplotlib",
    "mpi4py",
    "safetensors",
    "click",
    "rich",
)
BACKENDS = ("numpy", "cudasim", "cuda", "mpi")


def why_not(backend: str) -> str | None:
    """Return why `backend` cannot run here, or None if it can.

    >>> why_not("numpy") is None
    True
    """
    if backend == "numpy":
        return None
    if backend == "mpi":
        if importlib.util.find_spec("mpi4py") is None:
            return "mpi4py is not installed: pip install 'frugal-lm[mpi]'"
        return None
    try:
        from cuda_backend import availability
    except ImportError as error:
        return f"cuda_backend does not import: {error}"
    return availability(backend)


def _package(name: str) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"kind": "package", "name": name, "value": version, "detail": "" if version else "not installed"}


def _backend(name: str) -> dict[str, Any]:
    # One process has either the card or the simulator; `frugal verify --backend cudasim` turns the latter on.
    simulator = name == "cudasim" and importlib.util.find_spec("numba") is not None
    reason = None if simulator else why_not(name)
    return {"kind": "backend", "name": name, "value": reason is None, "detail": reason or ""}


@click.command(epilog="Example: frugal env --json", short_help="Versions and usable backends.")
@output_options()
def command() -> Result:
    """Show versions, the platform, and which backends work here or why they do not."""
    system = {
        "python": (platform.python_version(), platform.python_implementation()),
        "system": (platform.platform(), ""),
        "machine": (platform.machine(), ""),
    }
    rows = [
        {"kind": "system", "name": name, "value": value, "detail": detail}
        for name, (value, detail) in system.items()
    ]
    rows += [_package(name) for name in PACKAGES]
    rows += [_backend(name) for name in BACKENDS]
    return Result(rows, (Column("kind"), Column("name"), Column("value"), Column("detail")))
