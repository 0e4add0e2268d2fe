"""Compiled kernels kept on disk, so that the next process loads what this one compiled.

``FRUGAL_KERNEL_CACHE`` names the folder, or says ``off``.  By default it is ``frugal/kernels`` in the user's
cache: ``XDG_CACHE_HOME``, ``~/.cache`` or, on Windows, ``LOCALAPPDATA``.  Files are small, safe to delete and
never changed: another source, version, GPU or variant is another name.

Numba's own ``cache=True`` does not do for kernels that are built in closures: its key holds the identities of
the device functions in them, which no two processes share, and it looks for changes in one source file only.
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from cuda_backend._numba import cuda
from cuda_backend.capture import relaxed
from cuda_backend.context import checked, driver

__all__ = ["Image", "compiled", "folder", "load"]

VARIABLE = "FRUGAL_KERNEL_CACHE"
OFF = ("off", "0")
MAGIC = b"frugal kernel 1\n"
DIGEST_BYTES = hashlib.sha256().digest_size


class Image(NamedTuple):
    """A kernel in machine code: the name it is found by, and the cubin."""

    entry: str
    cubin: bytes


def compiled(function: Callable[..., Any], signature: Any, *, threads: int, blocks: int = 1) -> Image:
    """Compile a kernel for the current GPU: `blocks` blocks of at most `threads` threads a multiprocessor."""
    dispatcher = cuda.jit(signature, launch_bounds=(threads, blocks))(function)
    (overload,) = dispatcher.overloads.values()
    library = overload._codelibrary
    return Image(library._entry_name, bytes(library.get_cubin().code))


def load(name: str, variant: Sequence[object], device: int, make: Callable[[], Image]) -> Any:
    """Return the CUfunction of a kernel in the current context, from disk if it is there.

    Parameters
    ----------
    name : str
        The kernel's, for the file's name.
    variant : sequence
        Whatever else the code depends on beside the sources of this package; its `repr` counts.
    device : int
        Ordinal of the current GPU.
    make : callable
        Compiles the kernel; called if the folder has no sound copy, or one that the driver refuses.

    Notes
    -----
    What cannot be read is compiled, what cannot be written is not: a full or read-only disk costs time only.
    """
    place = _place(name, variant, device)
    image = None if place is None else _read(place)
    with relaxed():  # Numba loads what it compiles
        if image is not None:
            with suppress(RuntimeError):
                return _function(image)
        image = make()
        if place is not None:
            _write(place, image)
        return _function(image)


def folder() -> Path | None:
    """Return where kernels are kept; None if nothing is.

    Examples
    --------
    >>> place = folder()
    >>> place is None or place.name == "kernels" or "FRUGAL_KERNEL_CACHE" in os.environ
    True
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in OFF:
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "frugal", "kernels")


def _function(image: Image) -> Any:
    module = checked(driver.cuModuleLoadData(image.cubin))
    return checked(driver.cuModuleGetFunction(module, image.entry.encode()))


def _place(name: str, variant: Sequence[object], device: int) -> Path | None:
    root = folder()
    if root is None:
        return None
    text = repr((*_versions(), _capability(device), name, *variant))
    return root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"


@functools.cache
def _versions() -> tuple[object, ...]:
    """Return what has a say in the machine code beside the variant: sources, compilers, driver."""
    sources = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        sources.update(f"{path.relative_to(root).as_posix()}\0".encode())
        sources.update(hashlib.sha256(path.read_bytes()).digest())
    packages = [metadata.version(package) for package in ("numba-cuda", "numba", "llvmlite")]
    driver_version = int(checked(driver.cuDriverGetVersion()))
    return sources.hexdigest(), *packages, driver_version, sys.version_info[:2]


@functools.cache
def _capability(device: int) -> tuple[int, ...]:
    kinds = driver.CUdevice_attribute
    wanted = (
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )
    return tuple(int(checked(driver.cuDeviceGetAttribute(kind, device))) for kind in wanted)


def _read(place: Path) -> Image | None:
    """Return the image in a file; None if there is none, or not all of it."""
    try:
        data = place.read_bytes()
    except OSError:
        return None
    start = len(MAGIC) + DIGEST_BYTES
    digest, content = data[len(MAGIC) : start], data[start:]
    if not data.startswith(MAGIC) or hashlib.sha256(content).digest() != digest:
        return None
    entry, _, cubin = content.partition(b"\n")
    return Image(entry.decode(), cubin)


def _write(place: Path, image: Image) -> None:
    """Write a file whole or not at all; of several processes the last one wins, with the same bytes."""
    content = image.entry.encode() + b"\n" + image.cubin
    draft = place.with_name(f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)
        draft.replace(place)
    except OSError:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
