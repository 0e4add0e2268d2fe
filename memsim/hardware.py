"""What the machines can do, from data files in which every number names its source.

>>> card = hardware("a100-40gb")
>>> card.hbm_bandwidth.value, card.hbm_bandwidth.unit
(1555000000000, 'B/s')
>>> card.peaks["fp16"].value
312000000000000
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memsim import data_files
from refimpl.errors import UnknownNameError

__all__ = ["Hardware", "Specification", "hardware", "hardware_names"]


@dataclass(frozen=True, slots=True)
class Specification:
    """One number of a datasheet: an exact integer, its unit, and where it is printed."""

    value: int
    unit: str
    source: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator.

    Attributes
    ----------
    name, title : str
        The name it is asked for by, and the maker's.
    hbm, hbm_bandwidth : Specification
        Capacity in bytes, and bytes per second.
    l2, sram_per_sm, shared_memory_per_sm : Specification
        Bytes of the L2 cache, of one multiprocessor's L1 and shared memory together, and of the part of
        it that can be shared memory.
    sms : Specification
        Streaming multiprocessors.
    link, host_link, network : Specification
        Bytes per second in one direction: to the other accelerators of the node together, to the host, and
        to other nodes, the share of one accelerator.
    node_size : Specification
        Accelerators of a typical node.
    peaks, sparse_peaks : mapping of str to Specification
        Peak rates by number format, ``"fp64"``, ``"fp32"``, ``"tf32"``, ``"bf16"``, ``"fp16"``, ...: dense,
        and with the maker's structured sparsity; of matrix units where they take the format, with fp32
        accumulation.
    exponentials : Specification or None
        Base-2 exponentials of single precision a second, if the maker says.
    """

    name: str
    title: str
    hbm: Specification
    hbm_bandwidth: Specification
    l2: Specification
    sram_per_sm: Specification
    shared_memory_per_sm: Specification
    sms: Specification
    link: Specification
    host_link: Specification
    network: Specification
    node_size: Specification
    peaks: Mapping[str, Specification]
    sparse_peaks: Mapping[str, Specification]
    exponentials: Specification | None = None

    def peak(self, precision: str) -> Specification:
        """Return the dense peak rate in `precision`.

        Raises
        ------
        UnknownNameError
            If the maker prints none for `precision`.
        """
        if precision not in self.peaks:
            raise UnknownNameError(f"precision of {self.name}", precision, self.peaks)
        return self.peaks[precision]


def hardware_names() -> list[str]:
    """Return the names that `hardware` knows.

    >>> hardware_names()[:5]
    ['a100-40gb', 'a100-80gb', 'b200', 'h100-pcie', 'h100-sxm']
    """
    return data_files.names("hardware")


def hardware(name: str) -> Hardware:
    """Return the accelerator called `name` (see `hardware_names`), in lower case.

    Raises
    ------
    UnknownNameError
        If there is none; the message offers the nearest names.
    """
    data: dict[str, Any] = dict(data_files.read(name.lower(), "hardware", "hardware"))
    dense, sparse = (
        {precision: Specification(**entry) for precision, entry in data.pop(group, {}).items()}
        for group in ("peaks", "sparse_peaks")
    )
    title = data.pop("title")
    numbers: dict[str, Any] = {key: Specification(**entry) for key, entry in data.items()}
    return Hardware(name.lower(), title, peaks=dense, sparse_peaks=sparse, **numbers)
