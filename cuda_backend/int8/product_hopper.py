"""A product of codes on Hopper, settled but for addresses: kernel, tiles, descriptors, what is packed."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from cuda_backend.arrays import View
from cuda_backend.context import current_device
from cuda_backend.int8 import pack_hopper
from cuda_backend.int8.descriptors_hopper import encoder
from cuda_backend.int8.launches_hopper import Launch, function_of
from cuda_backend.int8.memory_hopper import Arena, Shared, padded
from cuda_backend.int8.variant_hopper import CHUNK, STEP, TAKEN_CHUNK, Narrow, Wide, choose
from refimpl.errors import UnsupportedError

__all__ = [
    "MISALIGNED", "NOTHING", "SIDE_BY_SIDE", "After", "Pack", "Product", "copied", "next_number",
    "side_by_side", "to_pack",
]  # fmt: skip

MISALIGNED = "an array does not start at a multiple of 16 bytes"
SIDE_BY_SIDE = 1024  # outliers that go through tensor cores; what is beyond is added number by number

_numbers = itertools.count()


class After(NamedTuple):
    """Addresses of what follows a product; 0 for what does not.

    Attributes
    ----------
    a_absmax, b_absmax, bias
        Scales of the rows of A and of B, and the bias of the latter.
    number, indices, marks
        How many columns were set aside, and which; their marks, which the product clears.
    x_aside, w_aside
        Their numbers in x and in the weight, side by side.
    x, x_row, x_feature
        x itself, and its strides in bytes.
    w, w_feature, w_column
        What outliers meet, by feature and by output.
    codes, codes_row
        Codes of x, and bytes from a row to the next.
    counters
        Of what has been set aside, where the product does that.
    """

    a_absmax: int = 0
    b_absmax: int = 0
    bias: int = 0
    number: int = 0
    indices: int = 0
    marks: int = 0
    x_aside: int = 0
    w_aside: int = 0
    x: int = 0
    x_row: int = 0
    x_feature: int = 0
    w: int = 0
    w_feature: int = 0
    w_column: int = 0
    codes: int = 0
    codes_row: int = 0
    counters: int = 0


NOTHING = After()


def next_number() -> int:
    """Return a number that names the descriptors of one product."""
    return next(_numbers)


def side_by_side(K: int) -> int:
    """Return how many outliers of K features find room beside each other: whole chunks.

    >>> side_by_side(100), side_by_side(100_000)
    (128, 1024)
    """
    return min(padded(K, TAKEN_CHUNK), SIDE_BY_SIDE)


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
    scratch : Arena
        Where memory is reserved.
    device, processors : int
        Ordinal of the current GPU, and its multiprocessors.
    early : bool
        It may start before the kernel ahead of it has ended, if that one did not make codes of the weight.
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
        device: int,
        processors: int,
        early: bool = False,
        variant: Wide | Narrow | None = None,
    ) -> None:
        (M, K), N = a.shape, b.shape[0]
        self._number = next_number()
        self._packs = [Pack(codes, scratch, device) if to_pack(codes) else None for codes in (a, b)]
        pitches = [
            padded(K) if pack else codes.strides[0] for pack, codes in zip(self._packs, (a, b), strict=True)
        ]
        # The stride of an axis of one row is any number; the driver wants a multiple of 16 all the same.
        pitches = [pitch if pitch % 16 == 0 and pitch > 0 else padded(K) for pitch in pitches]
        if variant is None:
            variant = choose(kind, outliers, M, N, K, processors)
        aside, steps = side_by_side(K), -(-K // STEP)
        function = function_of("product", variant, device)
        self.variant = variant
        self._wide = isinstance(variant, Wide)
        early = early and self._packs == [None, None]
        if isinstance(variant, Wide):
            a_rows, b_rows = variant.block_m, variant.block_n
            rows, columns = -(-M // a_rows), -(-N // b_rows)
            room = (3 if variant.beside else 2) * aside
            self._encoders = [
                encoder(M, K, pitches[0], a_rows, STEP),
                encoder(N, K, pitches[1], b_rows, STEP),
                encoder(M, room, room, a_rows, 2 * CHUNK),
                encoder(N, room, room, b_rows, 2 * CHUNK),
            ]
            cluster, blocks = 1, min(rows * columns, processors)
            # A short K has steps of zeros, which the copy engine puts where there are no codes.
            numbers = [rows * columns, rows, columns, max(steps, variant.last), M, N, aside, K]
        else:
            cluster = variant.blocks
            self._encoders = [
                encoder(N, K, pitches[1], variant.features, STEP),
                encoder(M, K, pitches[0], variant.tokens, STEP),
            ]
            tiles = -(-M // variant.tokens)
            blocks = tiles * -(-N // variant.features) * cluster
            numbers = [tiles, -(-steps // cluster), steps, M, N, K]
        self._launch = Launch(
            function, 21 if self._wide else 17, numbers, blocks=blocks, cluster=cluster, early=early,
            threads=variant.threads, shared_bytes=variant.shared_bytes,
        )  # fmt: skip

    def run(self, shared: Shared, stream: int, scratch: int, a: int, b: int, out: int, after: After) -> None:
        """Queue the product of codes at `a` and `b`; `scratch` is where the memory of the stream begins."""
        a_pack, b_pack = self._packs
        if (0 if a_pack else a) % 16 or (0 if b_pack else b) % 16:
            raise UnsupportedError(f"codes: {MISALIGNED}")
        a = a_pack.run(stream, a, scratch) if a_pack else a
        b = b_pack.run(stream, b, scratch) if b_pack else b
        if self._wide:
            # Without outliers their descriptors are never read: any matrix will do.
            matrices: tuple[int, ...] = (a, b, after.x_aside or a, after.w_aside or b)
        else:
            matrices = (b, a)
        maps = shared.descriptors.place(self._number, matrices, self._encoders)
        if self._wide:
            aside = after.x_aside, after.w_aside, after.counters
            self._launch(
                stream, maps, maps + 128, maps + 256, maps + 384, out, *after[:3], after.indices, after.marks,
                *after[8:16], *aside,
            )  # fmt: skip
        else:
            seen = after.indices, after.marks, after.counters, after.codes, after.codes_row
            self._launch(stream, maps, maps + 128, out, *after[:3], *seen, *after[8:14])


class Pack:
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


def to_pack(codes: View) -> bool:
    """Return whether the copy engine cannot read codes [rows, K] where they lie."""
    (rows, K), (by_row, by_k) = codes.shape, codes.strides
    contiguous = by_k == 1 or K <= 1
    return not contiguous or (rows > 1 and (by_row % 16 != 0 or by_row <= 0))
