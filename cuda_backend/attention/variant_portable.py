"""The shapes a portable kernel is compiled for: tiles, threads, shared memory, what it must handle."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from cuda_backend.attention.user_device import Mods
from refimpl.attention.flash import block_sizes_for
from refimpl.errors import CapacityError, OptionError

__all__ = ["LARGEST_BLOCK", "LARGEST_WIDTH", "Features", "Variant", "choose"]

LARGEST_WIDTH = 256  # of a head: a thread keeps its share of the output in registers
LARGEST_BLOCK = 128
DEFAULT_BLOCK, SIMULATED_BLOCK = 64, 8
WIDE = 128  # heads wider than this get twice the threads for the same registers


class Features(NamedTuple):
    """What a call asks for beside plain attention; the kernel holds no code for the rest.

    Attributes
    ----------
    causal
        "", "top_left" or "bottom_right".
    mask, alibi, softcap, lse
        Whether there is a boolean mask, ALiBi, a softcap, a log-sum-exp to return.
    bias, q_lengths, k_lengths
        Storage formats of these arrays, or "".
    dropout
        "", "philox" or "mask".
    mods
        Functions of the user's, compiled in; with a mask come the states of tiles.
    """

    causal: str = ""
    mask: bool = False
    bias: str = ""
    alibi: bool = False
    softcap: bool = False
    q_lengths: str = ""
    k_lengths: str = ""
    dropout: str = ""
    lse: bool = False
    mods: Mods = Mods()


class Variant(NamedTuple):
    """One compiled kernel.

    Threads stand in a grid of `rows` x `columns`.  Thread (y, x) owns the scores of queries y, y + rows, ...
    with keys x, x + columns, ... of a tile, and the output of the same queries at every `columns`-th channel.

    Attributes
    ----------
    kind
        Format of Q, K, V and O.
    D, Dv
        Widths of a head.
    Br, Bc
        Queries and keys of a tile.
    rows, columns
        Threads, powers of two.
    features
        What the kernel handles.
    """

    kind: str
    D: int
    Dv: int
    Br: int
    Bc: int
    rows: int
    columns: int
    features: Features

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows * self.columns

    @property
    def own_rows(self) -> int:
        """Queries of a thread."""
        return -(-self.Br // self.rows)

    @property
    def own_keys(self) -> int:
        """Keys of a thread."""
        return -(-self.Bc // self.columns)

    @property
    def own_channels(self) -> int:
        """Output channels of a thread."""
        return max(1, -(-self.Dv // self.columns))

    @property
    def qk_stride(self) -> int:
        """Floats from a row of Q or K to the next: odd, so that a column lies in different banks."""
        return self.D | 1

    @property
    def v_stride(self) -> int:
        """Floats from a row of V to the next."""
        return self.own_channels * self.columns

    @property
    def p_stride(self) -> int:
        """Floats from a row of P to the next, odd as well."""
        return (self.own_keys * self.columns) | 1

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where K (later V), P and the row maxima start behind Q, and where they end, in floats.

        At the end the output takes the place of all but the maxima.
        """
        queries, keys = self.own_rows * self.rows, self.own_keys * self.columns
        kv = queries * self.qk_stride
        p = kv + keys * max(self.qk_stride, self.v_stride)
        maxima = max(p + queries * self.p_stride, queries * self.v_stride)
        return kv, p, maxima, maxima + queries * self.columns

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return 4 * self.floats

    @property
    def floats(self) -> int:
        """Dynamic shared memory in floats."""
        return self.offsets[-1]


AnyVariant = TypeVar("AnyVariant", bound=Variant)


def choose(
    kind: str,
    D: int,
    Dv: int,
    features: Features,
    *,
    block_sizes: tuple[int, int] | None,
    sram: int | None,
    capacity: int | None,
    form: type[AnyVariant] = Variant,  # type: ignore[assignment]
) -> AnyVariant:
    """Return the variant for a call.

    Parameters
    ----------
    kind, D, Dv, features
        See `Variant`.
    block_sizes : tuple of int or None
        (Br, Bc), taken as they are.
    sram : int or None
        Floats that all tiles together may fill: (Br, Bc) are those of Algorithm 1, halved until they do.
    capacity : int or None
        Floats of shared memory that a block may use on the device; None in the simulator, which has no limit
        and for which tiles are small.
    form : type
        `Variant`, or the form of it whose layout of shared memory counts.

    Raises
    ------
    OptionError
        If both `block_sizes` and `sram` are given, or a block size is not in [1, 128].
    CapacityError
        If tiles of `block_sizes` exceed the device's shared memory, or a single query and key exceed `sram`.

    Notes
    -----
    Algorithm 1 splits M in four: Q, K, V and O.  Here O is in registers and V takes K's place, but P and the
    row maxima need room, so the sizes of the paper may not fit and are then halved.
    """
    if block_sizes is not None and sram is not None:
        raise OptionError("block_sizes and sram: both say how large a tile is; give one")
    if block_sizes is not None:
        variant = _variant(form, kind, D, Dv, features, *_checked(block_sizes), small=capacity is None)
        if capacity is not None and variant.floats > capacity:
            raise CapacityError(
                f"block_sizes: tiles of {block_sizes} fill {variant.floats} floats at D={D}, Dv={Dv}; "
                f"the device has {capacity}"
            )
        return variant
    largest = SIMULATED_BLOCK if capacity is None else DEFAULT_BLOCK
    room = min(limit for limit in (sram, capacity, 2**31) if limit is not None)
    Br, Bc = largest, largest
    if sram is not None:
        Br, Bc = (min(size, largest) for size in block_sizes_for(sram, D))
    while True:
        variant = _variant(form, kind, D, Dv, features, Br, Bc, small=capacity is None)
        if variant.floats <= room:
            return variant
        if Br == Bc == 1:
            raise CapacityError(
                f"sram: one query and one key fill {variant.floats} floats at D={D}, Dv={Dv}; got {room}"
            )
        Br, Bc = (Br, -(-Bc // 2)) if Bc >= Br else (-(-Br // 2), Bc)


def _checked(block_sizes: tuple[int, int]) -> tuple[int, int]:
    Br, Bc = block_sizes
    if not (1 <= Br <= LARGEST_BLOCK and 1 <= Bc <= LARGEST_BLOCK):
        raise OptionError(f"block_sizes: expected (Br, Bc) in [1, {LARGEST_BLOCK}], got {block_sizes}")
    return Br, Bc


def _variant(
    form: type[AnyVariant], kind: str, D: int, Dv: int, features: Features, Br: int, Bc: int, *, small: bool
) -> AnyVariant:
    """Return the variant with these tiles; `small` means few threads, each of which is a Python thread."""
    rows, columns = (4, 2) if small else (16, 16) if max(D, Dv) > WIDE or max(Br, Bc) > 64 else (16, 8)
    return form(kind, D, Dv, Br, Bc, min(rows, _power_of_two(Br)), min(columns, _power_of_two(Bc)), features)


def _power_of_two(n: int) -> int:
    """Return the largest power of two that is at most `n`."""
    return 1 << (n.bit_length() - 1)
