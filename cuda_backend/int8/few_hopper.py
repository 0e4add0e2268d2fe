"""A whole layer for few rows in one kernel on Hopper, settled but for addresses."""

from __future__ import annotations

from cuda_backend.arrays import View
from cuda_backend.int8.descriptors_hopper import encoder
from cuda_backend.int8.launches_hopper import Launch, function_of
from cuda_backend.int8.memory_hopper import Arena, Shared, padded
from cuda_backend.int8.product_hopper import MISALIGNED, Pack, next_number, to_pack
from cuda_backend.int8.rows_hopper import in_vectors, sixteen_bit_limit
from cuda_backend.int8.variant_hopper import STEP, Few, choose_few, one_kernel_wins
from refimpl.errors import UnsupportedError
from refimpl.quant.absmax import Convention

__all__ = ["FewLayer", "few_layer"]

NO_LIMIT = 1 << 15  # above all magnitudes of 16 bits: nothing is an outlier


class FewLayer:
    """The layer of x [M, K] and a weight with codes [N, K].

    Parameters
    ----------
    x, codes : View
        How they lie; their addresses come with each call.
    variant : Few
        As `choose_few` says.
    limit : int
        Least bits of a magnitude that is an outlier.
    scratch : Arena
        Where memory is reserved.
    device : int
        Ordinal of the current GPU.
    """

    def __init__(self, x: View, codes: View, variant: Few, limit: int, scratch: Arena, device: int) -> None:
        (M, K), N = x.shape, codes.shape[0]
        self._number = next_number()
        self._x_row, (self._w_column, self._w_feature) = x.strides[0], codes.strides
        self._pack = Pack(codes, scratch, device) if to_pack(codes) else None
        pitch = padded(K) if self._pack or N == 1 else codes.strides[0]
        self._encoders = [encoder(N, K, pitch, variant.features, STEP)]
        steps = -(-K // STEP)
        self._launch = Launch(
            function_of("layer_few", variant, device), 9,
            [-(-steps // variant.blocks), steps, M, N, K, limit],
            blocks=-(-N // variant.features) * variant.blocks, cluster=variant.blocks,
            threads=variant.threads, shared_bytes=variant.shared_bytes,
        )  # fmt: skip

    def run(
        self, shared: Shared, stream: int, scratch: int, x: int, codes: int, absmax: int, bias: int, out: int
    ) -> None:
        """Queue it; `scratch` is where the memory of the stream begins.  Nothing waits."""
        if self._pack is None and codes % 16:
            raise UnsupportedError(f"codes: {MISALIGNED}")
        packed = self._pack.run(stream, codes, scratch) if self._pack else codes
        maps = shared.descriptors.place(self._number, (packed,), self._encoders)
        met = codes, self._w_feature, self._w_column
        self._launch(stream, maps, x, self._x_row, out, absmax, bias, *met)


def few_layer(
    x: View,
    codes: View,
    threshold: float | None,
    convention: Convention,
    *,
    scratch: Arena,
    device: int,
    processors: int,
) -> FewLayer | None:
    """Return the layer if one kernel is faster: few rows that lie well, outliers but the paper's."""
    (M, K), N = x.shape, codes.shape[0]
    if not in_vectors(x) or (threshold is not None and convention == "paper"):
        return None
    if not one_kernel_wins(M, N, K):
        return None
    variant = choose_few(x.dtype, M, N, K, processors)
    if variant is None:
        return None
    limit = NO_LIMIT if threshold is None else sixteen_bit_limit(x.dtype, threshold, convention)
    return FewLayer(x, codes, variant, limit, scratch, device)
