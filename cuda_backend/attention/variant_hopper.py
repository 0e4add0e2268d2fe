"""The shapes a Hopper forward kernel is compiled for: tile sizes, stages, registers, shared memory."""

from __future__ import annotations

from typing import NamedTuple

SHARED_LIMIT = 232_448  # bytes a block may use on sm_90 (227 KiB)
SUBTILE = 64  # columns of 16 bits in one 128-byte swizzled row


class Places(NamedTuple):
    """Where in shared memory things lie, in bytes: tiles, barriers by stage, numbers of tiles."""

    q_tiles: int
    k_tiles: int
    v_tiles: int
    q_full: int
    q_empty: int
    k_full: int
    k_empty: int
    v_full: int
    v_empty: int
    tile_slot: int


class Variant(NamedTuple):
    """One compiled kernel.

    Attributes
    ----------
    kind
        ``"f16"`` or ``"bf16"``.
    d_qk, d_v
        Head dimensions after padding to a multiple of 64.
    causal
        Whether masks by position are compiled in.
    consumers
        Warpgroups that compute, 64 query rows each.
    block_n
        Keys of one tile.
    stages
        Tiles of K, and of V, in flight.
    q_stages
        Tiles of Q: with two, the next one arrives while this one is in use.
    dropout
        Whether dropout is compiled in: `forward_dropout_hopper` has the kernel.
    """

    kind: str
    d_qk: int
    d_v: int
    causal: bool
    consumers: int
    block_n: int
    stages: int
    q_stages: int
    dropout: bool = False

    @property
    def block_m(self) -> int:
        """Query rows of one tile."""
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block: one producer warpgroup and the consumers."""
        return 128 * (self.consumers + 1)

    @property
    def producer_registers(self) -> int:
        """Registers a producer thread keeps."""
        return 40 if self.consumers == 2 else 32

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread gets: the 64 K of a multiprocessor, less the producer's."""
        return 232 if self.consumers == 2 else 160

    @property
    def q_bytes(self) -> int:
        """Bytes of a Q tile."""
        return 2 * self.block_m * self.d_qk

    @property
    def k_bytes(self) -> int:
        """Bytes of a K tile."""
        return 2 * self.block_n * self.d_qk

    @property
    def v_bytes(self) -> int:
        """Bytes of a V tile."""
        return 2 * self.block_n * self.d_v

    @property
    def places(self) -> Places:
        """Tiles, then barriers of eight bytes each, then the tiles' numbers."""
        k_tiles = self.q_stages * self.q_bytes
        v_tiles = k_tiles + self.stages * self.k_bytes
        at = v_tiles + self.stages * self.v_bytes
        k_full = at + 16 * self.q_stages
        rest = [k_full + 8 * self.stages * index for index in range(5)]
        return Places(0, k_tiles, v_tiles, at, at + 8 * self.q_stages, *rest)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: slack for alignment, then `places`."""
        return 1024 + self.places.q_full + 256


def choose(
    kind: str,
    d_qk: int,
    d_v: int,
    causal: bool,
    *,
    rows: int = 1 << 20,
    heads: int = 1,
    processors: int = 132,
) -> Variant:
    """Return the variant for a problem.

    Parameters
    ----------
    kind : str
        ``"f16"`` or ``"bf16"``.
    d_qk, d_v : int
        Head dimensions, at most 256.
    causal : bool
        Whether there is a causal mask.
    rows, heads : int
        Query rows of a head, and heads of all batches: few tiles should still fill the GPU.
    processors : int
        Streaming multiprocessors.

    Notes
    -----
    With heads of 64, a tile of 192 rows takes 1.25 times as long as one of 128 (measured on an H200: 520
    against 430 TFLOP/s at 4096 tokens), so it wins unless it leaves too many processors without a tile.

    Examples
    --------
    >>> choose("f16", 128, 128, True).block_m, choose("f16", 64, 64, True).block_m
    (128, 192)
    >>> choose("f16", 64, 64, False, rows=512, heads=32).block_m
    128
    """
    d_qk, d_v = -(-d_qk // SUBTILE) * SUBTILE, -(-d_v // SUBTILE) * SUBTILE
    widest = max(d_qk, d_v)
    if widest <= 64:
        waves = {block_m: -(-(heads * -(-rows // block_m)) // processors) for block_m in (128, 192)}
        consumers = 3 if 1.25 * waves[192] <= waves[128] else 2
        return Variant(kind, d_qk, d_v, causal, consumers, block_n=128, stages=4, q_stages=2)
    if widest <= 128:
        return Variant(kind, d_qk, d_v, causal, consumers=2, block_n=128, stages=2, q_stages=2)
    if d_v <= 128 and d_qk <= 192:
        return Variant(kind, d_qk, d_v, causal, consumers=2, block_n=128, stages=2, q_stages=1)
    return Variant(kind, d_qk, d_v, causal, consumers=2, block_n=80, stages=2, q_stages=1)


def choose_dropout(kind: str, d_qk: int, d_v: int, causal: bool) -> Variant:
    """Return the variant for a problem with dropout: smaller tiles, since Philox needs registers, too.

    Parameters
    ----------
    kind, d_qk, d_v, causal
        As of `choose`.

    Examples
    --------
    >>> choose_dropout("f16", 64, 64, True)[4:6], choose_dropout("f16", 256, 256, True)[4:6]
    ((2, 96), (2, 80))
    """
    chosen = choose(kind, d_qk, d_v, causal)
    return chosen._replace(consumers=2, block_n=min(96, chosen.block_n), dropout=True)
