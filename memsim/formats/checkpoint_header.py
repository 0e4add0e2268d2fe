"""What a checkpoint's files hold, from their headers alone: parameters and exact bytes, tensor by tensor.

>>> import tempfile
>>> import numpy as np
>>> from refimpl.checkpoint import save
>>> with tempfile.TemporaryDirectory() as folder:
...     save(f"{folder}/mine", {"w": np.ones((2, 3), np.float16)}, config={})
...     held = checkpoint_weights(f"{folder}/mine")
>>> held.totals
{'B': 12, 'parameters': 6}
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from memsim.estimate import Estimate, estimate, term
from memsim.model import Model
from memsim.parameters import parameters
from refimpl.checkpoint import read_headers
from refimpl.errors import OptionError
from refimpl.safetensors_format import Entry, read_header
from refimpl.validation import whole

__all__ = ["checkpoint_tensors", "checkpoint_weights", "described_weights"]


def checkpoint_tensors(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Return what the headers say of each tensor: dtype, shape and place; no data are read.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file, or a directory with one or with an index and its shards.

    Returns
    -------
    dict of str to Entry

    Raises
    ------
    CheckpointError
        If a file is missing, cut off, or not what it claims to be.
    """
    return read_headers(path) if Path(path).is_dir() else read_header(path)


def checkpoint_weights(path: str | os.PathLike[str]) -> Estimate:
    """Return the parameters and the bytes of a checkpoint, two terms for each format of numbers.

    Parameters
    ----------
    path : path
        As in `checkpoint_tensors`.

    Returns
    -------
    Estimate
        Exact: the bytes of the data, without headers.

    Raises
    ------
    CheckpointError
        As `checkpoint_tensors`.
    OptionError
        If there are no tensors.
    """
    counts: dict[str, tuple[int, int]] = {}
    for entry in checkpoint_tensors(path).values():
        numbers, size = counts.get(entry.dtype, (0, 0))
        counts[entry.dtype] = numbers + math.prod(entry.shape), size + entry.stop - entry.start
    if not counts:
        raise OptionError(f"{path}: there are no tensors")
    terms = []
    for dtype, (numbers, size) in sorted(counts.items()):
        source = f"{path}, header"
        terms.append(
            term(f"{dtype} tensors", "n*e", {"n": numbers, "e": size // max(numbers, 1)}, "B", source)
        )
        terms.append(term(f"numbers in {dtype}", "n", {"n": numbers}, "parameters", source))
    return estimate(f"weights of {path}", terms, leaves_out="headers, files beside the weights")


def described_weights(*, model: str | Model, itemsize: int = 2) -> Estimate:
    """Return the bytes that a checkpoint of a described model holds.

    Parameters
    ----------
    model : str or Model
        A name, or a description.
    itemsize : int
        e, bytes of a number.

    Returns
    -------
    Estimate
        In bytes.

    Examples
    --------
    >>> described_weights(model="mistral-7b").total
    14483464192
    """
    count = parameters(model=model)
    values = {"Ψ": count.total, "e": whole("itemsize", itemsize)}
    weights = term("weights", "e*Ψ", values, "B", count.terms[0].source)
    return estimate(f"checkpoint, {count.name}", [weights], leaves_out="buffers, headers")
