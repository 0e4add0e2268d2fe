"""A model's directory as Hugging Face lays it out: ``config.json``, ``model.safetensors``, a tokenizer.

The one door to the optional package tokenizers.  Weights are read by `refimpl.safetensors_format`; pickles
(``pytorch_model.bin``) are refused, because reading one runs what is in it.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     save(f"{folder}/mine", {"w": np.ones(2, np.float32)}, config={"model_type": "bert"})
...     read_config(f"{folder}/mine"), load_tensors(f"{folder}/mine")
({'model_type': 'bert'}, {'w': array([1., 1.], dtype=float32)})
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import BackendUnavailableError
from refimpl.numerics import Array, BoolArray, IntArray
from refimpl.safetensors_format import (
    CheckpointError,
    Entry,
    opened,
    parse_json,
    read_header,
    read_tensors,
    write_tensors,
    write_whole,
)
from refimpl.validation import whole

__all__ = [
    "CheckpointError",
    "Encoded",
    "encode",
    "load_tensors",
    "load_tokenizer",
    "read_config",
    "read_headers",
    "read_object",
    "save",
]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Far above any real file of the kind: the largest tokenizers have some 30 MB.
LARGEST_CONFIG, LARGEST_INDEX, LARGEST_TOKENIZER = 10**6, 10**8, 2 * 10**8


class Encoded(NamedTuple):
    """Token ids [B, T], padded on the right, and which of them are tokens of the text."""

    ids: IntArray
    mask: BoolArray


def read_config(directory: str | os.PathLike[str], /) -> dict[str, Any]:
    """Return ``config.json``.

    Raises
    ------
    CheckpointError
        If there is none, or it is no JSON object.
    """
    return read_object(Path(directory) / "config.json")


def read_object(path: str | os.PathLike[str], /, *, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Return the JSON object that a file of at most `largest` bytes holds.

    Raises
    ------
    CheckpointError
        If there is no such file, it is larger, or it holds no JSON object.
    """
    file = Path(path)
    value = parse_json(str(file), _text(file, largest))
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def load_tensors(directory: str | os.PathLike[str], /) -> dict[str, Array]:
    """Return all tensors of a directory, from ``model.safetensors`` or the shards that its index names.

    Parameters
    ----------
    directory : path
        As ``save_pretrained`` writes it.

    Returns
    -------
    dict of str to ndarray
        In the dtype of the file; bfloat16 exactly as float32.

    Raises
    ------
    CheckpointError
        If there are no weights, only pickled ones, or a file is not what it should be; if the index and the
        shards disagree on where a tensor is, or the index points out of the directory.
    """
    return {name: x for file in _weights(Path(directory)) for name, x in read_tensors(file).items()}


def read_headers(directory: str | os.PathLike[str], /) -> dict[str, Entry]:
    """Return what the headers of a directory's files say of each tensor, and read no data.

    Raises
    ------
    CheckpointError
        As `load_tensors`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/mine", {"w": np.ones(2, np.float32)}, config={})
    ...     {name: entry.shape for name, entry in read_headers(f"{folder}/mine").items()}
    {'w': (2,)}
    """
    return {name: entry for file in _weights(Path(directory)) for name, entry in read_header(file).items()}


def load_tokenizer(directory: str | os.PathLike[str], /) -> Any:
    """Return the tokenizer of a directory: a `tokenizers.Tokenizer`, without truncation and padding.

    Parameters
    ----------
    directory : path
        With ``tokenizer.json``, or with a WordPiece ``vocab.txt`` (BERT's older form).

    Raises
    ------
    BackendUnavailableError
        If the package tokenizers is not installed.
    CheckpointError
        If there is no tokenizer, or its file is damaged.
    """
    try:
        import tokenizers
    except ImportError:
        raise BackendUnavailableError(
            "a tokenizer needs the package tokenizers: pip install 'frugal-lm[models]'"
        ) from None
    folder = Path(directory)
    file = folder / "tokenizer.json"
    try:
        if file.exists():
            text = _text(file, LARGEST_TOKENIZER)
            parse_json(str(file), text)  # what the Rust parser would let through, or die of
            tokenizer = tokenizers.Tokenizer.from_str(text.decode())
        elif (folder / "vocab.txt").exists():
            lines = _text(folder / "vocab.txt", LARGEST_TOKENIZER).decode().splitlines()
            settings = folder / "tokenizer_config.json"
            lower = not settings.exists() or bool(
                read_object(settings).get("do_lower_case", True)
            )
            tokenizer = tokenizers.BertWordPieceTokenizer(
                {token: index for index, token in enumerate(lines)}, lowercase=lower
            )
        else:
            raise CheckpointError(f"{folder}: there is no tokenizer.json and no vocab.txt")
    except CheckpointError:
        raise
    except BaseException as error:  # a panic in the Rust library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], /, *, length: int = 512, padding_id: int = 0) -> Encoded:
    """Return the token ids of `texts`, with the special tokens of the model, padded to the longest.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        As from `load_tokenizer`.
    texts : sequence of str
        One a row.
    length : int
        Longer texts are cut to so many tokens, the special ones among them.
    padding_id : int
        What stands behind a text that is shorter than the longest.

    Returns
    -------
    Encoded

    Raises
    ------
    OptionError
        If `length` is below 1.
    """
    tokenizer.enable_truncation(whole("length", length))
    found = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    tokenizer.no_truncation()
    longest = max(map(len, found), default=0)
    ids = np.full((len(found), longest), padding_id, np.int64)
    mask = np.arange(longest) < np.array([len(row) for row in found], np.int64)[:, None]
    ids[mask] = np.concatenate([np.array(row, np.int64) for row in found]) if found else []
    return Encoded(ids, mask)


def save(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Array],
    /,
    *,
    config: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a directory with ``config.json`` and ``model.safetensors``, whole or not at all.

    Parameters
    ----------
    directory : path
        A new directory, or an empty one; its parent exists.
    tensors : mapping of str to ndarray
        As for `write_tensors`.
    config : mapping
        What JSON can hold.
    files : mapping of str to bytes, optional
        Further files by name, such as a tokenizer.

    Raises
    ------
    CheckpointError
        If something stands there already, a name is no plain file name, or it cannot be written.
    DTypeError
        If a tensor has a dtype that the format has not.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: something stands there already; give the name of a new directory")
    for name in files or {}:
        _plain_name(str(target), name)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.mkdir()
        write_tensors(draft / WEIGHTS, tensors, metadata={"format": "np"})
        write_whole(draft / "config.json", [f"{json.dumps(dict(config), indent=2)}\n".encode()])
        for name, data in (files or {}).items():
            write_whole(draft / name, [data])
        if target.exists():
            target.rmdir()
        draft.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            shutil.rmtree(draft)


def _weights(folder: Path) -> list[Path]:
    """Return the files with weights: one, or all shards, each of which holds exactly what the index says."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a directory with config.json and {WEIGHTS}")
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            raise CheckpointError(f"{folder}: has pickled weights only; reading a pickle runs what is in it")
        raise CheckpointError(f"{folder}: there is no {WEIGHTS} and no {INDEX}")
    index = read_object(folder / INDEX, largest=LARGEST_INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(
            f"{folder / INDEX}: expected an object weight_map of tensor names and file names"
        )
    shards = list(dict.fromkeys(places.values()))
    for shard in shards:
        _plain_name(str(folder / INDEX), shard)
        held = set(read_header(folder / shard))
        claimed = {name for name, place in places.items() if place == shard}
        if held != claimed:
            odd = sorted(held ^ claimed)[0]
            raise CheckpointError(
                f"{folder / INDEX}: it and {shard} disagree on whether {odd!r} is in that file"
            )
    return [folder / shard for shard in shards]


def _plain_name(where: str, name: str) -> None:
    if not name or name != Path(name).name or name in (".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{where}: expected plain file names, got {name!r}")


def _text(file: Path, largest: int) -> bytes:
    with opened(file) as (stream, size):
        if size > largest:
            raise CheckpointError(f"{file}: expected at most {largest} bytes, it has {size}")
        return stream.read(largest)

