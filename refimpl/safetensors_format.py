"""The safetensors format, read with suspicion and written whole or not at all.

A file is the length of a header (8 bytes, little endian), the header (JSON: for each tensor its dtype, shape
and the bytes it takes), and the data.  Nothing in it is executed.  Everything that the header claims is held
to the size of the file before anything is allocated for it, and each lie is one clear error.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from refimpl.errors import DTypeError, FrugalError
from refimpl.numerics import Array, is_bfloat16
from refimpl.validation import as_array

__all__ = [
    "CheckpointError",
    "Entry",
    "opened",
    "parse_json",
    "read_header",
    "read_tensors",
    "write_tensors",
    "write_whole",
]

# Of the reference implementation, https://github.com/huggingface/safetensors, safetensors/src/tensor.rs.
LARGEST_HEADER = 100_000_000
MOST_AXES = 32  # of NumPy 1; NumPy 2 has 64
# In the order in which the reference implementation lays out tensors, so that each is aligned.
DTYPES = {
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4",
    "BF16": "<u2", "F16": "<f2", "U16": "<u2", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_NAMES = {np.dtype(code).newbyteorder("="): name for name, code in DTYPES.items() if name != "BF16"}


class CheckpointError(FrugalError, ValueError):
    """A file of a checkpoint is damaged, lies about itself, or is not what it should be."""


class Entry(NamedTuple):
    """What the header says of one tensor: dtype as the format names it, shape, and place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_tensors(path: str | os.PathLike[str], /, *, names: Iterable[str] | None = None) -> dict[str, Array]:
    """Return the tensors of a safetensors file.

    Parameters
    ----------
    path : path
        The file.
    names : iterable of str, optional
        Only these.  Default: all, in the order of the file.

    Returns
    -------
    dict of str to ndarray
        In the dtype of the file; bfloat16, which NumPy does not know, exactly as float32.

    Raises
    ------
    CheckpointError
        If the file is cut off, longer than its header says, or otherwise not what it claims to be; if it has
        a dtype that NumPy has no like of; if it lacks one of `names`.

    References
    ----------
    .. [1] https://github.com/huggingface/safetensors, README, "Format".

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/a.safetensors", {"w": np.eye(2, dtype=np.float16)})
    ...     read_tensors(f"{folder}/a.safetensors")
    {'w': array([[1., 0.],
           [0., 1.]], dtype=float16)}
    """
    with opened(path) as (file, size):
        entries = _header(path, file, size)
        chosen = entries if names is None else {name: _known(path, entries, name) for name in names}
        return {name: _tensor(path, file, name, entry) for name, entry in chosen.items()}


def read_header(path: str | os.PathLike[str], /) -> dict[str, Entry]:
    """Return what the header says of each tensor, checked against the file, and read no data.

    Raises
    ------
    CheckpointError
        As `read_tensors`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_tensors(f"{folder}/a.safetensors", {"w": np.zeros((2, 3), np.float16)})
    ...     read_header(f"{folder}/a.safetensors")
    {'w': Entry(dtype='F16', shape=(2, 3), start=72, stop=84)}
    """
    with opened(path) as (file, size):
        return _header(path, file, size)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array],
    /,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` as a safetensors file, all of it or nothing; equal tensors give equal bytes.

    Parameters
    ----------
    path : path
        A file there is replaced when the new one is complete.
    tensors : mapping of str to ndarray
        Any layout and byte order; float64, float32, float16, bfloat16, integers, booleans.
    metadata : mapping of str to str, optional
        Kept in the header.

    Raises
    ------
    DTypeError
        If a tensor has a dtype that the format does not.
    CheckpointError
        If the file cannot be written.

    Notes
    -----
    The bytes are those that the reference implementation writes.

    Examples
    --------
    >>> write_tensors("unwritten", {"w": np.zeros(2, complex)})
    Traceback (most recent call last):
    refimpl.errors.DTypeError: w: safetensors holds floats, integers and booleans, got complex128
    """
    stored = {name: _storable(name, value) for name, value in tensors.items()}
    rank = {dtype: index for index, dtype in enumerate(DTYPES)}
    order = sorted(stored, key=lambda name: (rank[stored[name][0]], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        dtype, array = stored[name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [place, place + array.nbytes],
        }
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, [len(text).to_bytes(8, "little"), text, *(stored[name][1].tobytes() for name in order)])


def write_whole(path: str | os.PathLike[str], parts: Iterable[bytes]) -> None:
    """Write `parts` to `path`, all or nothing: a file beside it takes its place when it is complete."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with draft.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            draft.unlink()


def parse_json(where: str, text: bytes) -> Any:
    """Return the value of a JSON text, refusing what JSON parsers let through.

    Raises
    ------
    CheckpointError
        If it is no UTF-8 or no JSON, holds a key twice, NaN, or brackets nested beyond all reason.

    Examples
    --------
    >>> parse_json("config.json", b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    refimpl.safetensors_format.CheckpointError: config.json: key 'a' stands twice in one object
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: key {twice!r} stands twice in one object")
        return found

    def refuse(word: str) -> Any:
        raise CheckpointError(f"{where}: expected JSON, which has no {word}")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: expected UTF-8, byte {error.start} is not") from None
    except RecursionError:
        raise CheckpointError(f"{where}: its JSON is nested too deeply") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: expected JSON: {error}") from None


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, and tell its size; a pipe or a device might never end.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path}: expected a regular file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def _header(path: object, file: BinaryIO, size: int) -> dict[str, Entry]:
    """Return the entries in the order of their data, which must fill the rest of the file without a gap."""
    if size < 8:
        raise CheckpointError(f"{path}: cut off: {size} bytes, and the length of the header alone takes 8")
    length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise CheckpointError(
            f"{path}: its header claims {length} bytes; at most {LARGEST_HEADER} are allowed"
        )
    if length > size - 8:
        raise CheckpointError(f"{path}: cut off: its header claims {length} bytes, {size - 8} are there")
    header = parse_json(f"{path}: header", file.read(length))
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header: expected an object, got {_kind(header)}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__ must be an object of strings")
    start = 8 + length
    entries = {name: _entry(f"{path}: {name}", item, start, size) for name, item in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    reached, before = start, "the header"
    for name, entry in entries.items():
        if entry.start != reached:
            what = "overlap" if entry.start < reached else "leave a gap between them"
            raise CheckpointError(f"{path}: {before} and {name} {what}, at bytes {reached} and {entry.start}")
        reached, before = entry.stop, name
    if reached != size:
        raise CheckpointError(f"{path}: {size - reached} bytes after the last tensor belong to none")
    return entries


def _entry(where: str, item: Any, start: int, size: int) -> Entry:
    """Return one entry of the header with its place in the file, if dtype, shape and place agree."""
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: expected a dtype of {', '.join(DTYPES)}; got {_kind(dtype)}")
    if not _counts(shape) or len(shape) > MOST_AXES:
        raise CheckpointError(f"{where}: shape: expected at most {MOST_AXES} whole numbers from 0 on")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets: expected two whole numbers, the first not the larger")
    wanted, given = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize, offsets[1] - offsets[0]
    if wanted != given:
        raise CheckpointError(
            f"{where}: {dtype} of shape {_short(shape)} takes {wanted} bytes, its offsets span {given}"
        )
    if start + offsets[1] > size:
        raise CheckpointError(f"{where}: cut off: it ends at byte {start + offsets[1]} of a file of {size}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _tensor(path: object, file: BinaryIO, name: str, entry: Entry) -> Array:
    code = np.dtype(DTYPES[entry.dtype])
    flat: Array = np.zeros((entry.stop - entry.start) // code.itemsize, code)
    file.seek(entry.start)
    if file.readinto(flat.view(np.uint8)) != flat.nbytes:  # type: ignore[attr-defined]
        raise CheckpointError(f"{path}: {name}: the file became shorter while it was read")
    if entry.dtype == "BOOL" and (flat.view(np.uint8) > 1).any():
        raise CheckpointError(f"{path}: {name}: a boolean is byte 0 or 1, and there are others")
    if entry.dtype == "BF16":
        flat = (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return flat.astype(flat.dtype.newbyteorder("="), copy=False).reshape(entry.shape)


def _storable(name: str, value: Any) -> tuple[str, Array]:
    array = as_array(name, value)
    if is_bfloat16(array.dtype):
        return "BF16", np.ascontiguousarray(array).view(np.uint16).reshape(array.shape)
    dtype = _NAMES.get(array.dtype.newbyteorder("="))
    if dtype is None:
        raise DTypeError(f"{name}: safetensors holds floats, integers and booleans, got {array.dtype}")
    return dtype, array.astype(DTYPES[dtype], order="C", copy=False)


def _known(path: object, entries: Mapping[str, Entry], name: str) -> Entry:
    try:
        return entries[name]
    except KeyError:
        raise CheckpointError(f"{path}: there is no tensor {name!r}") from None


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) < 20 else type(value).__name__


def _short(shape: list[int]) -> str:
    return str(shape) if len(str(shape)) < 80 else f"with {len(shape)} axes"
