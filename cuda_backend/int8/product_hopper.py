"""A product of codes on Hopper, settled but for addresses: kernel, tiles, descriptors, what is packed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from cuda_backend.arrays import View
from cuda_backend.attention.descriptors import encode_together
from cuda_backend.context import current_device
from cuda_backend.int8 import pack_hopper
from cuda_backend.int8.launches_hopper import Launch, function_of
from cuda_backend.int8.matrices_hopper import ALIGNMENT, Shared, encoder, padded
from cuda_backend.int8.variant_hopper import CHUNK, STEP, Narrow, Wide, blocks_of_narrow, choose
from refimpl.errors import UnsupportedError

__all__ = ["MISALIGNED", "NOTHING", "SIDE_BY_SIDE", "After", "Arena", "Product", "copied", "side_by_side"]

MISALIGNED = "an array does not start at a multiple of 16 bytes"
SIDE_BY_SIDE = 1024  # outliers that go through tensor cores; what is beyond is added number by number

_numbers = itertools.count()


class Arena:
    """Room in the memory of a stream, counted first and given addresses when all of it is known."""

    def __init__(self) -> None:
        self.size = 0

    def reserve(self, size: int) -> int:
        """Return where `size` bytes start, relative to the memory that `size` of the arena asks for."""
        start = self.size
        self.size += padded(size, ALIGNMENT)
        return start


class After(NamedTuple):
    """Addresses of what follows a product; 0 for what does not.

    Attributes
    ----------
    a_absmax, b_absmax, bias
        Scales of the rows of A and of B, and the bias of the latter.
    number, indices
        How many columns were set aside, and which.
    x_aside, w_aside
        Their numbers in x and in the weight, side by side.
    x, x_row, x_feature
        x itself, and its strides in bytes.
    w, w_feature, w_column
        What outliers meet, by feature and by output.
    """

    a_absmax: int = 0
    b_absmax: int = 0
    bias: int = 0
    number: int = 0
    indices: int = 0
    x_aside: int = 0
    w_aside: int = 0
    x: int = 0
    x_row: int = 0
    x_feature: int = 0
    w: int = 0
    w_feature: int = 0
    w_column: int = 0


NOTHING = After()


def side_by_side(K: int) -> int:
    """Return how many outliers of K features find room beside each other: whole chunks.

    >>> side_by_side(100), side_by_side(100_000)
    (128, 1024)
    """
    return min(padded(K, CHUNK), SIDE_BY_SIDE)


class Product:
    """The product of codes A [M, K] and B [N, K], and what follows it.

    Parameters
    ----------
    a, b : View
        How the codes lie; their addresses come with each call.
    kind : str
        Format of the output: ``"int32"``, ``"float16"`` or ``"bfloat16"``.
    outliers : str
        The convention that says what outliers meet.
    scratch, zeros : Arena
        Where memory is reserved, that `shared` will give.
    device, processors : int
        Ordinal of the current GPU, and its multiprocessors.
    variant : Wide or Narrow, optional
        In place of `choose`'s.
    """

    def __init__(
        self,
        a: View,
        b: View,
        kind: str,
        outliers: str,
        *,
        scratch: Arena,
        zeros: Arena,
        device: int,
        processors: int,
        variant: Wide | Narrow | None = None,
    ) -> None:
        (M, K), N = a.shape, b.shape[0]
        self._number = next(_numbers)
        self._packs = [_Pack(codes, scratch, device) if _to_pack(codes) else None for codes in (a, b)]
        pitches = [
            padded(K) if pack else codes.strides[0] for pack, codes in zip(self._packs, (a, b), strict=True)
        ]
        # The stride of an axis of one row is any number; the driver wants a multiple of 16 all the same.
        pitches = [pitch if pitch % 16 == 0 and pitch > 0 else padded(K) for pitch in pitches]
        if variant is None:
            variant = choose(kind, outliers, M, N, processors)
        aside, steps = side_by_side(K), -(-K // STEP)
        function = function_of("product", variant, device)
        sizes = {"threads": variant.threads, "shared_bytes": variant.shared_bytes}
        self.variant = variant
        self._wide = isinstance(variant, Wide)
        if isinstance(variant, Wide):
            rows, columns = -(-M // (variant.block_m * variant.cluster)), -(-N // variant.block_n)
            tiles = rows * columns
            boxes = variant.block_m, variant.block_n // variant.cluster
            encoders = [
                encoder(M, K, pitches[0], boxes[0]), encoder(N, K, pitches[1], boxes[1]),
                encoder(M, 2 * aside, 2 * aside, boxes[0]), encoder(N, 2 * aside, 2 * aside, boxes[1]),
            ]  # fmt: skip
            blocks = variant.cluster * min(tiles, processors // variant.cluster)
            numbers = [tiles, rows, columns, steps, M, N, aside]
            self._launch = Launch(function, 16, numbers, blocks=blocks, cluster=variant.cluster, **sizes)
        else:
            tiles = -(-N // variant.features)
            shares, own_steps = blocks_of_narrow(tiles, steps, processors)
            encoders = 2 * [
                encoder(N, K, pitches[1], variant.features), encoder(M, K, pitches[0], variant.tokens)
            ]  # fmt: skip
            self._sums, self._counters = zeros.reserve(4 * M * N), zeros.reserve(4 * tiles)
            numbers = [tiles, shares, own_steps, steps, M, N, aside]
            self._launch = Launch(function, 18, numbers, blocks=tiles * shares, **sizes)
        self._encode = encode_together(encoders)

    def run(
        self, shared: Shared, stream: int, memory: tuple[int, int], a: int, b: int, out: int, after: After
    ) -> None:
        """Queue the product of codes at `a` and `b`; `memory` is where scratch and zeros begin."""
        scratch, zeros = memory
        if (0 if self._packs[0] else a) % 16 or (0 if self._packs[1] else b) % 16:
            raise UnsupportedError(f"codes: {MISALIGNED}")
        a, b = (
            codes if pack is None else pack.run(stream, codes, scratch)
            for pack, codes in zip(self._packs, (a, b), strict=True)
        )
        if self._wide:
            # Without outliers their descriptors are never read: any matrix will do.
            encoded: Sequence[int] = (a, b, after.x_aside or a, after.w_aside or b)
        else:
            encoded = (b, a, b, a)
        maps = shared.descriptors.address(self._number, tuple(encoded), self._encode)
        if self._wide:
            self._launch(stream, maps, maps + 128, maps + 256, maps + 384, out, *after[:5], *after[7:])
        else:
            self._launch(stream, maps, maps + 128, zeros + self._sums, zeros + self._counters, out, *after)


class _Pack:
    """A copy of codes, to where the copy engine can read them."""

    def __init__(self, codes: View, scratch: Arena, device: int) -> None:
        self._strides, self._target = codes.strides, scratch.reserve(codes.shape[0] * padded(codes.shape[1]))
        self._launch = _pack_launch(codes, device)

    def run(self, stream: int, codes: int, scratch: int) -> int:
        """Queue the copy and return where it will be."""
        target = scratch + self._target
        self._launch(stream, codes, *self._strides, target)
        return target


def _pack_launch(codes: View, device: int) -> Launch:
    rows, K = codes.shape
    words = padded(K) // pack_hopper.WIDTH
    blocks = -(-rows * words // pack_hopper.THREADS)
    function = function_of("pack", pack_hopper.Variant(), device)
    return Launch(function, 4, [rows, K, words], blocks=blocks, threads=pack_hopper.THREADS)


def copied(codes: View, target: int, stream: int) -> None:
    """Queue a copy of codes [rows, K] to memory in which rows begin at multiples of 16 bytes."""
    if 0 not in codes.shape:
        _pack_launch(codes, current_device())(stream, codes.address, *codes.strides, target)


def _to_pack(codes: View) -> bool:
    """Return whether the copy engine cannot read codes [rows, K] where they lie."""
    (rows, K), (by_row, by_k) = codes.shape, codes.strides
    contiguous = by_k == 1 or K <= 1
    return not contiguous or (rows > 1 and (by_row % 16 != 0 or by_row <= 0))
