"""The modules of PyTorch behind `torch_layers`: layers in int8, alone or computed together.

A layer that is computed together with others keeps its own codes, scales and bias, which are views of memory
that all share.  So its state is that of a layer alone, and whatever moves, copies or loads layers one by one
may do so: where they no longer lie side by side they are laid so again by the next call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from cuda_backend.launch import torch_stream
from refimpl.errors import FrugalError, ShapeError, UnsupportedError
from refimpl.quant import Int8Columns

__all__ = ["classes"]


@functools.cache
def classes() -> Any:
    """Return a namespace of the classes, which are made when PyTorch is first needed.

    Examples
    --------
    >>> try:
    ...     assert classes().Int8Linear.__name__ == "Int8Linear"
    ... except ImportError:
    ...     pass
    """
    import torch

    import cuda_backend

    class Int8Linear(torch.nn.Module):
        """A linear layer in int8; see `cuda_backend.torch_layers.int8_linear`."""

        __qualname__ = "Int8Linear"  # pickle asks this file for it, which has `__getattr__`
        codes: Any
        absmax: Any
        bias: Any
        no_bias: Any

        def __init__(
            self,
            in_features: int,
            out_features: int,
            threshold: float | None,
            compute: Callable[..., Any] | None,
        ) -> None:
            super().__init__()
            self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
            self.compute = compute or cuda_backend.llm_int8_linear_hopper
            self.register_buffer("codes", None)
            self.register_buffer("absmax", None)
            self.register_parameter("bias", None)
            self.register_buffer("no_bias", None, persistent=False)  # -0.0, beside layers with a bias
            self.rest: tuple[Any, ...] = ()  # layers to compute with this one: a tuple, so no children
            self.ahead: tuple[Any, Any, Any] | None = None  # input, its state, output that was left here
            self.joined: tuple[Any, Any, Any] | None = None  # addresses, weight and bias of it and the rest

        def quantized(self, weight: Any) -> tuple[Any, Any]:
            """Return codes and absmax of a weight [out_features, in_features] in floating point."""
            if weight.is_meta:
                N, room = self.out_features, -(-self.in_features // 16) * 16
                return weight.new_empty((N, room), dtype=torch.int8), weight.new_empty(N, dtype=torch.float32)
            prepared = cuda_backend.prepare_weight(weight.detach().t())
            codes = prepared.codes.t()  # rows may be longer than they are wide: all of it is kept
            whole = codes.as_strided((self.out_features, codes.stride(0)), (codes.stride(0), 1))
            return whole, prepared.absmax

        def lead(self, rest: Sequence[Any]) -> None:
            """From now on compute other layers too, and leave their outputs with them."""
            self.rest = tuple(rest)
            operands([self, *rest])

        def forward(self, x: Any) -> Any:
            """Return the outputs for x [..., in_features]."""
            _check_input(self, x)
            ahead, self.ahead = self.ahead, None
            state = None if x.is_inference() else (x._version, torch_stream(x))
            if ahead is not None and ahead[0] is x and ahead[1] == state:
                return ahead[2]
            if not self.rest or state is None:
                return outputs([self], x)[0]
            own, *others = outputs([self, *self.rest], x)
            for layer, out in zip(self.rest, others, strict=True):
                layer.ahead = x, state, out
            return own

        def extra_repr(self) -> str:
            """Return the sizes, as `torch.nn.Linear` does."""
            sizes = f"in_features={self.in_features}, out_features={self.out_features}"
            return f"{sizes}, threshold={self.threshold}"

        def _apply(self, fn: Any, *rest: Any, **named: Any) -> Any:
            """Move, but do not cast: the kernels want absmax in float32, whatever the model computes in."""
            absmax, self.ahead, self.joined = self.absmax, None, None
            move: Any = super()._apply
            move(fn, *rest, **named)
            if absmax is not None and self.absmax.dtype != absmax.dtype:
                self.absmax = absmax.to(self.absmax.device)
            return self

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            """Load codes, or a weight that is quantised now; say what is wrong with it as PyTorch does."""
            self.ahead = self.joined = None
            weight, errors = state.pop(f"{prefix}weight", None), rest[-1]
            stored = {f"{prefix}{name}": getattr(self, name) for name in ("codes", "absmax")}
            expected = [self.out_features, self.in_features]
            if weight is None:
                found = {name: state[name].to(own.dtype) for name, own in stored.items() if name in state}
            elif list(weight.shape) != expected:
                errors.append(f"size mismatch for {prefix}weight: {list(weight.shape)}, expected {expected}.")
                found = stored
            else:
                place = weight if self.absmax.is_meta else weight.to(self.absmax.device)
                try:
                    found = dict(zip(stored, self.quantized(place), strict=True))
                except FrugalError as error:
                    errors.append(f"While quantising {prefix}weight: {error}")
                    found = stored
            state.update(found)
            super()._load_from_state_dict(state, prefix, *rest)

    class MergedInt8Linear(torch.nn.ModuleList):
        """Layers of one input; see `cuda_backend.torch_layers.merged_int8_linear`."""

        __qualname__ = "MergedInt8Linear"

        def __init__(self, layers: Sequence[Any]) -> None:
            super().__init__(layers)
            operands(layers)

        def forward(self, x: Any) -> Any:
            """Return a tuple of the outputs of each layer for x [..., in_features]."""
            layers = list(self)
            _check_input(layers[0], x)
            return outputs(layers, x)

    return SimpleNamespace(Int8Linear=Int8Linear, MergedInt8Linear=MergedInt8Linear)


def __getattr__(name: str) -> Any:
    if name in ("Int8Linear", "MergedInt8Linear"):
        return getattr(classes(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check_input(layer: Any, x: Any) -> None:
    import torch

    if torch.is_grad_enabled() and x.requires_grad:
        raise UnsupportedError("int8_linear: no gradient; call it under torch.no_grad()")
    if x.shape[-1:] != (layer.in_features,):
        raise ShapeError(f"x: expected [..., {layer.in_features}], got {list(x.shape)}")


def outputs(layers: Sequence[Any], x: Any) -> tuple[Any, ...]:
    """Return what each layer gives for the same x, in one call of the kernels."""
    first = layers[0]
    weight, bias = operands(layers)
    rows = x.reshape(-1, first.in_features)
    out = first.compute(rows, weight, bias=bias, threshold=first.threshold)
    sizes = [layer.out_features for layer in layers]
    found: tuple[Any, ...] = out.view(*x.shape[:-1], sum(sizes)).split(sizes, dim=-1)
    return found


def operands(layers: Sequence[Any]) -> tuple[Any, Any]:
    """Return weight and bias of layers as one; what did not lie side by side does so afterwards."""
    first = layers[0]
    if first.joined is None or first.joined[0] != _places(layers):
        codes, absmax, bias = _side_by_side(layers)
        first.joined = _places(layers), Int8Columns(codes[:, : first.in_features].t(), absmax), bias
    _, weight, bias = first.joined
    return weight, bias


def _places(layers: Sequence[Any]) -> list[int]:
    """Return the addresses of what layers hold; memory that `joined` holds has no other owner's address."""
    found: list[int] = []
    for layer in layers:
        stored, shift = layer._buffers, layer._parameters["bias"]  # a third of the time of attributes
        shift = stored["no_bias"] if shift is None else shift
        found += [
            stored["codes"].data_ptr(),
            stored["absmax"].data_ptr(),
            0 if shift is None else shift.data_ptr(),
        ]
    return found


def _side_by_side(layers: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return codes, absmax and bias of layers as one: as they lie, or after they were laid side by side.

    A layer without a bias has -0.0 beside one that has a bias: added it changes no number, as 0.0 does -0.0.
    """
    given = [(each.codes, each.absmax, each.no_bias if each.bias is None else each.bias) for each in layers]
    codes, absmax, bias = map(_as_one, zip(*given, strict=True))
    plain = all(layer.bias is None for layer in layers)
    if codes is None or absmax is None or (bias is None and not plain):
        codes, absmax, bias = _laid(layers)
    return codes, absmax, None if plain else bias


def _as_one(parts: Sequence[Any]) -> Any:
    """Return tensors that lie one behind the other in one memory as one tensor, others as None."""
    if any(part is None or not part.is_contiguous() for part in parts):
        return None
    first = parts[0]
    end = start = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype:
            return None
        end += part.nbytes
    memory = first.untyped_storage()  # two memories may touch
    if start == end or memory.data_ptr() + memory.nbytes() < end:
        return None
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _laid(layers: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Lay what layers hold side by side; return it, and let each have its part as a view."""
    import torch

    sizes: list[int] = [layer.out_features for layer in layers]
    bias: Any = None
    with torch.inference_mode(False), torch.no_grad():  # what is made here can be loaded into anywhere
        codes: Any = torch.cat([layer.codes for layer in layers])
        absmax: Any = torch.cat([layer.absmax for layer in layers])
        like = next((layer.bias for layer in layers if layer.bias is not None), None)
        if like is not None:
            bias = torch.cat([like.new_full((n,), -0.0) if each.bias is None else each.bias.detach()
                              for each, n in zip(layers, sizes, strict=True)])  # fmt: skip
        views = [whole.split(sizes) for whole in (codes, absmax, bias) if whole is not None]
        for layer, part, scales, *shift in zip(layers, *views, strict=True):
            layer.codes, layer.absmax = part, scales
            if layer.bias is not None:
                layer.bias = torch.nn.Parameter(shift[0], requires_grad=False)
            elif shift:
                layer.no_bias = shift[0]
    return codes, absmax, bias
