"""Layers of PyTorch whose weight alone is quantised, NF4 or int8 in groups: for 1 to 16 tokens.

Quantised where the layer is, to what the definitions store, bit for bit, and kept in the order in which the
decoding kernels read it.  Prompts take it widened, a slice at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from cuda_backend.torch_modules import check_linear, classes, rows_of
from refimpl.errors import OptionError, UnsupportedError
from refimpl.quant import Int8Groups, NF4Weight
from refimpl.quant.double_quantization import double, dynamic_map
from refimpl.quant.nf4 import LEVELS

__all__ = ["Form", "check_weight_only", "weight_only_linear"]

Form = Literal["int8", "nf4"]
STORED = {"int8": ("codes", "scale"), "nf4": ("codes", "absmax_codes", "scale", "offset")}
GROUP, BLOCK, INNER = 128, 64, 256  # weights of a scale, weights of an absmax, absmax of a scale
TILE, CHUNK, SLICE = 16, 128, 1 << 24  # rows and bytes a row of what a warp reads; weights widened at a time
FEW = {"int8": 256, "nf4": 512}  # tokens that take calls of 16: as many as take as long as widening


def weight_only_linear(layer: Any, *, weight: Form = "nf4", compute: Callable[..., Any] | None = None) -> Any:
    """Return a module that computes what `torch.nn.Linear` `layer` does, its weight stored in 4 or 8 bits.

    Parameters
    ----------
    layer : torch.nn.Linear
        On the GPU, in float16 or bfloat16; it is quantised now and not kept.
    weight : {"nf4", "int8"}
        NF4 in blocks of 64 with double quantisation, or int8 in groups of 128, along ``in_features``.
    compute : callable, optional
        For up to 16 tokens a call.  Default: `cuda_backend.nf4_linear_decode` or
        `cuda_backend.int8_linear_decode`.

    Returns
    -------
    torch.nn.Module
        With the parts of `cuda_backend.prepare_nf4` or `cuda_backend.prepare_int8_groups` as buffers, and the
        layer's bias.  It loads its own state, or that of a `torch.nn.Linear`, whose ``weight`` is quantised
        then.  Casts leave the weight as it is.

    Raises
    ------
    OptionError
        If `layer` is no `torch.nn.Linear`, its weight is not finite, or `weight` is neither.
    DTypeError
        If it is not on the GPU, or in another format, or its bias is not where and what its weight is.
    UnsupportedError
        If ``in_features`` are no multiple of 256 (NF4) or 128 (int8).  From the forward pass: if a gradient
        is wanted or x is in another format, or with the reasons of `compute`.
    BackendUnavailableError
        If there is no GPU.

    Notes
    -----
    How much faster than float16 it is for 1 to 16 tokens stands in docs/performance.md.  With more it is
    slower: up to 256 (int8) or 512 (NF4) take several calls, and for prompts the weight is widened to the
    format of x, and rounded to it, before `torch.nn.functional.linear` multiplies.
    `cuda_backend.torch_ops.int8_linear` is for many tokens.  Forward passes may be captured in a CUDA graph
    once they have run with the same shapes.

    References
    ----------
    .. [1] Yao et al., 2022, arXiv:2206.01861, section 4.1.
    .. [2] Dettmers et al., 2023, arXiv:2305.14314, eq. 5 and 6.
    """
    check_weight_only("layer", layer, weight, compute)
    return _class()(layer.in_features, layer.out_features, weight, compute).replace(layer)


def check_weight_only(name: str, layer: Any, weight: Form, compute: Callable[..., Any] | None) -> None:
    """Raise for what `weight_only_linear` refuses."""
    if weight not in STORED:
        raise OptionError(f"weight: expected 'nf4' or 'int8', got {weight!r}")
    check_linear(name, layer, compute, meta=False)
    deep = 2 * CHUNK if weight == "nf4" else CHUNK
    if layer.in_features % deep or not layer.in_features:
        raise UnsupportedError(
            f"{name}: in_features is {layer.in_features}; the kernel for {weight} takes multiples of {deep}"
        )


@functools.cache
def _class() -> Any:
    import torch

    import cuda_backend
    from cuda_backend.weight_only.prepared import PreparedInt8, PreparedNF4
    from cuda_backend.weight_only.variant import MOST_TOKENS

    class WeightOnlyLinear(classes().QuantizedLinear):  # type: ignore[misc]
        """A linear layer with its weight in 4 or 8 bits; see `weight_only_linear`."""

        __qualname__ = "WeightOnlyLinear"

        def __init__(self, K: int, N: int, weight: Form, compute: Callable[..., Any] | None) -> None:
            super().__init__(K, N, STORED[weight])
            default = cuda_backend.nf4_linear_decode if weight == "nf4" else cuda_backend.int8_linear_decode
            self.form, self.compute = weight, compute or default

        def forget(self) -> None:
            """Wait for the buffers before the next call."""
            self.settled: Any = None

        def quantized(self, weight: Any) -> Any:
            """Return what the kernel reads of a weight [out_features, in_features]."""
            if self.form == "int8":
                packed = cuda_backend.prepare_int8_groups(groups_of(weight), group_size=GROUP)
                return packed.codes.view(torch.uint8), packed.scale.view(torch.float32)
            packed = cuda_backend.prepare_nf4(nf4_of(weight))
            return packed.codes.view(torch.uint8), packed.absmax_codes, packed.scale, packed.offset

        def prepared(self) -> Any:
            """Return the stored weight, which is in memory: the kernels do not wait for what writes it."""
            parts: list[Any] = [self._buffers[name] for name in self.stored]
            state = [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts]
            if self.settled != state:
                if parts[0].is_cuda:
                    torch.cuda.synchronize(parts[0].device)
                self.settled = state
            shape: Any = (self.in_features, self.out_features)
            if self.form == "int8":
                return PreparedInt8(parts[0], parts[1], shape, GROUP)
            codes, absmax_codes, scale, offset = parts
            return PreparedNF4(codes, absmax_codes, scale, offset, shape, INNER)

        def forward(self, x: Any) -> Any:
            """Return the outputs for x [..., in_features]."""
            self.check_input(x)
            if x.dtype not in (torch.float16, torch.bfloat16):  # whatever the number of tokens
                raise UnsupportedError(f"WeightOnlyLinear: expected float16 or bfloat16, got {x.dtype}")
            rows = rows_of(x)
            if len(rows) <= FEW[self.form]:
                weight = self.prepared()
                parts = [self.compute(part, weight, bias=self.bias) for part in rows.split(MOST_TOKENS)]
                out = parts[0] if len(parts) == 1 else torch.cat(parts)
            else:
                out = torch.nn.functional.linear(rows, self.weight_in(x.dtype), self.bias)
            return out.view(*x.shape[:-1], self.out_features)

        def weight_in(self, dtype: Any) -> Any:
            """Return the weight [out_features, in_features] in floating point, rounded once."""
            N, K = self.out_features, self.in_features
            out, step = self.codes.new_empty((N, K), dtype=dtype), max(TILE, SLICE // K // TILE * TILE)
            for start in range(0, N, step):
                end = min(N, start + step)
                codes, scale = (_int8 if self.form == "int8" else _nf4)(self, start, end)
                torch.mul(codes, scale[..., None], out=out[start:end].view(codes.shape))
            return out

        def extra_repr(self) -> str:
            """Return the sizes and how the weight is stored."""
            return f"{super().extra_repr()}, weight={self.form}"

    return WeightOnlyLinear


def __getattr__(name: str) -> Any:
    if name == "WeightOnlyLinear":
        return _class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _coded(weight: Any, size: int, limit: int, code: Callable[[Any], Any]) -> Any:
    """Return the codes [N, K] of a weight, and the absmax of blocks along K, some rows at a time."""
    import torch

    parts = []
    for rows in weight.split(max(1, SLICE // weight.shape[1])):
        wide = rows.float().reshape(len(rows), -1, size)
        absmax = wide.abs().amax(-1)
        if not absmax.isfinite().all():
            raise OptionError("weight: expected finite numbers, got NaN or infinity")
        factor = absmax.new_tensor(limit) / absmax
        scaled = wide * factor.where(factor.isfinite(), 0)[..., None]
        parts.append((code(scaled).view(rows.shape), absmax))
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def groups_of(weight: Any) -> Int8Groups:
    """Return what `refimpl.quant.quantize_groups` stores of a weight given as [N, K], on its device."""
    codes, absmax = _coded(weight, GROUP, 127, lambda scaled: scaled.round_().char())
    # By a number PyTorch divides on a GPU as it multiplies by 1 / 127.
    return Int8Groups(codes.t(), (absmax / absmax.new_tensor(127)).t())


def nf4_of(weight: Any) -> NF4Weight:
    """Return what `refimpl.quant.nf4_quantize` stores of a weight given as [N, K], on its device."""
    import torch

    levels, _, _ = _tables(weight.device)
    middle = (levels[:-1] + levels[1:]) / 2
    codes, absmax = _coded(weight, BLOCK, 1, lambda scaled: torch.bucketize(scaled, middle).byte())
    pairs = codes.view(-1, 2)
    nested = double(absmax.flatten().cpu().numpy(), block_size=INNER)
    absmax_codes, scale, offset = [torch.from_numpy(part).to(weight.device) for part in nested]
    stored: list[Any] = [pairs[:, 0] << 4 | pairs[:, 1], absmax_codes, scale, offset]
    return NF4Weight._make([*stored, tuple(weight.shape), (BLOCK, INNER), True])


def _rows(codes: Any, start: int, end: int, row_bytes: int, *unit: int) -> Any:
    """Return packed codes as bytes of rows: the inverse of the orders of `cuda_backend.weight_only.pack`."""
    tiles = codes.view(-1, row_bytes // CHUNK, 2, 2, 8, 4, *unit)[start // TILE : -(-end // TILE)]
    return tiles.permute(0, 3, 4, 1, 2, 6, 5, 7).reshape(-1, row_bytes)[: end - start]


def _columns(parts: Any, start: int, end: int, features: int, count: int) -> Any:
    """Return what is stored for each tile, some columns at a time, as [rows, columns]."""
    tiles = parts.view(-1, features // count, TILE, count)[start // TILE : -(-end // TILE)]
    return tiles.transpose(1, 2).reshape(-1, features)[: end - start]


def _int8(layer: Any, start: int, end: int) -> tuple[Any, Any]:
    """Return codes and scales of groups of rows, whose product `refimpl.quant.dequantize_groups` is."""
    import torch

    codes = _rows(layer.codes, start, end, layer.in_features, 4, 4)
    signed = (codes ^ 0x80).view(torch.int8)
    return signed.view(end - start, -1, GROUP), _columns(
        layer.scale, start, end, layer.in_features // GROUP, 1
    )


def _nf4(layer: Any, start: int, end: int) -> tuple[Any, Any]:
    """Return levels and absmax of blocks of rows, whose product `refimpl.quant.qlora_dequantize` is."""
    import torch

    K, (_, pairs, scales) = layer.in_features, _tables(layer.codes.device)
    levels = torch.nn.functional.embedding(_rows(layer.codes, start, end, K // 2, 8, 2).int(), pairs)
    inner = _columns(layer.absmax_codes, start, end, K // BLOCK, 4).int()
    place = torch.arange(start * inner.shape[1], end * inner.shape[1], device=inner.device) // INNER
    absmax = scales[inner] * layer.scale[place].view_as(inner) + layer.offset
    return levels.view(end - start, -1, BLOCK), absmax


@functools.cache
def _tables(device: Any) -> tuple[Any, Any, Any]:
    """Return the levels of NF4, the two of each byte of codes, and those of absmax codes; they stay there."""
    import torch

    levels, scales = (torch.tensor(each.tolist(), device=device) for each in (LEVELS, dynamic_map()))
    return levels, torch.cartesian_prod(levels, levels), scales
