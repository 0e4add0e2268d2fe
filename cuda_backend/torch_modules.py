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

from cuda_backend.context import current_device
from cuda_backend.launch import torch_stream
from refimpl.errors import DTypeError, FrugalError, OptionError, ShapeError, UnsupportedError
from refimpl.quant import Int8Columns

__all__ = ["check_linear", "classes", "rows_of"]


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

    class QuantizedLinear(torch.nn.Module):
        """What layers with a quantised weight have in common: their state, and how they are moved."""

        bias: Any

        def __init__(self, in_features: int, out_features: int, stored: Sequence[str]) -> None:
            super().__init__()
            self.in_features, self.out_features, self.stored = in_features, out_features, tuple(stored)
            for name in stored:
                self.register_buffer(name, None)
            self.register_parameter("bias", None)
            self.forget()

        def quantized(self, weight: Any) -> Sequence[Any]:
            """Return what is stored of a weight [out_features, in_features] in floating point."""
            raise NotImplementedError

        def forget(self) -> None:
            """Drop what was made of the buffers, which are about to change."""

        def replace(self, layer: Any) -> Any:
            """Take the place of a `torch.nn.Linear`; return this module."""
            if layer.bias is not None:
                self.bias = type(layer.bias)(layer.bias.detach(), requires_grad=False)
            for name, value in zip(self.stored, self.quantized(layer.weight.detach()), strict=True):
                setattr(self, name, value)
            return self.train(layer.training)

        def check_input(self, x: Any) -> None:
            """Raise for an input of another size, or one that wants a gradient."""
            if torch.is_grad_enabled() and x.requires_grad:
                raise UnsupportedError(f"{type(self).__name__}: no gradient; call it under torch.no_grad()")
            if x.shape[-1:] != (self.in_features,):
                raise ShapeError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")

        def extra_repr(self) -> str:
            """Return the sizes, as `torch.nn.Linear` does."""
            return f"in_features={self.in_features}, out_features={self.out_features}"

        def _apply(self, fn: Any, *rest: Any, **named: Any) -> Any:
            """Move, but do not cast: the kernels want scales in float32, whatever the model computes in."""
            self.forget()
            before = [(name, getattr(self, name)) for name in self.stored]
            move: Any = super()._apply
            move(fn, *rest, **named)
            for name, value in before:
                if value is not None and getattr(self, name).dtype != value.dtype:
                    setattr(self, name, value.to(getattr(self, name).device))
            return self

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            """Load what is stored, or quantise a weight now; say what is wrong with it as PyTorch does."""
            self.forget()
            weight, errors = state.pop(f"{prefix}weight", None), rest[-1]
            own = {f"{prefix}{name}": getattr(self, name) for name in self.stored}
            expected, device = [self.out_features, self.in_features], own[f"{prefix}codes"].device
            if weight is None:
                given = {name: value for name, value in own.items() if torch.is_tensor(state.get(name))}
                found = {name: state[name].to(value.dtype) for name, value in given.items()}
            elif not torch.is_tensor(weight) or list(weight.shape) != expected:
                size = list(weight.shape) if torch.is_tensor(weight) else type(weight).__name__
                errors.append(f"size mismatch for {prefix}weight: {size}, expected {expected}.")
                found = own
            else:
                weight = weight.detach() if device.type == "meta" else weight.detach().to(device)
                try:
                    found = dict(zip(own, self.quantized(weight), strict=True))
                except FrugalError as error:
                    errors.append(f"While quantising {prefix}weight: {error}")
                    found = own
            state.update(found)
            super()._load_from_state_dict(state, prefix, *rest)

        def __setstate__(self, state: Any) -> None:
            """Fill a copy, whose memory is another."""
            fill: Any = super().__setstate__
            fill(state)
            self.forget()

    class Int8Linear(QuantizedLinear):
        """A linear layer in int8; see `cuda_backend.torch_layers.int8_linear`."""

        __qualname__ = "Int8Linear"  # pickle asks this file for it, which has `__getattr__`
        codes: Any
        absmax: Any
        no_bias: Any

        def __init__(
            self,
            in_features: int,
            out_features: int,
            threshold: float | None,
            compute: Callable[..., Any] | None,
        ) -> None:
            super().__init__(in_features, out_features, ("codes", "absmax"))
            self.threshold, self.compute = threshold, compute or cuda_backend.llm_int8_linear_hopper
            self.register_buffer("no_bias", None, persistent=False)  # -0.0, beside layers with a bias
            self.rest: tuple[Any, ...] = ()  # layers to compute with this one: a tuple, so no children

        def forget(self) -> None:
            """Drop what other layers have left, and what shares memory with the buffers."""
            self.ahead: tuple[Any, Any, Any] | None = None  # input, its state, output that was left here
            self.joined: tuple[Any, Any, Any] | None = None  # addresses, weight and bias of it and the rest

        def quantized(self, weight: Any) -> tuple[Any, Any]:
            """Return codes and absmax of a weight [out_features, in_features] in floating point."""
            if weight.is_meta:
                N, room = self.out_features, -(-self.in_features // 16) * 16
                return weight.new_empty((N, room), dtype=torch.int8), weight.new_empty(N, dtype=torch.float32)
            prepared = cuda_backend.prepare_weight(weight.t())
            codes = prepared.codes.t()  # rows may be longer than they are wide: all of it is kept
            whole = codes.as_strided((self.out_features, codes.stride(0)), (codes.stride(0), 1))
            return whole, prepared.absmax

        def __getstate__(self) -> dict[str, Any]:
            """Return what a copy is filled with: no activations that were left here."""
            return {**self.__dict__, "ahead": None, "joined": None}

        def _replicate_for_data_parallel(self) -> Any:
            """Return a copy for another GPU; it computes itself alone: the rest stays where it is."""
            replicate: Any = super()._replicate_for_data_parallel
            replica = replicate()
            replica.rest = ()
            replica.forget()
            return replica

        def lead(self, rest: Sequence[Any]) -> None:
            """From now on compute other layers too, and leave their outputs with them."""
            self.rest = tuple(rest)
            operands([self, *rest])

        def forward(self, x: Any) -> Any:
            """Return the outputs for x [..., in_features]."""
            self.check_input(x)
            ahead, self.ahead = self.ahead, None
            if ahead is None and not self.rest:  # nothing to find or to leave: most layers
                return outputs([self], x)[0]
            state: tuple[int, int, bool] | None = None
            if not x.is_inference():  # what was left outside of a capture is in no graph
                recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
                state = x._version, torch_stream(x), recorded
            if ahead is not None and ahead[0] is x and ahead[1] == state:
                return ahead[2]
            if not self.rest or state is None:
                return outputs([self], x)[0]
            own, *others = outputs([self, *self.rest], x)
            for layer, out in zip(self.rest, others, strict=True):
                layer.ahead = x, state, out
            return own

        def extra_repr(self) -> str:
            """Return the sizes and the threshold."""
            return f"{super().extra_repr()}, threshold={self.threshold}"

    class MergedInt8Linear(torch.nn.ModuleList):
        """Layers of one input; see `cuda_backend.torch_layers.merged_int8_linear`."""

        __qualname__ = "MergedInt8Linear"

        def __init__(self, layers: Sequence[Any]) -> None:
            super().__init__(layers)
            operands(layers)

        def forward(self, x: Any) -> Any:
            """Return a tuple of the outputs of each layer for x [..., in_features]."""
            layers: list[Any] = list(self)
            layers[0].check_input(x)
            return outputs(layers, x)

    made = QuantizedLinear, Int8Linear, MergedInt8Linear
    return SimpleNamespace(**{each.__name__: each for each in made})


def __getattr__(name: str) -> Any:
    if name in ("Int8Linear", "MergedInt8Linear"):
        return getattr(classes(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def outputs(layers: Sequence[Any], x: Any) -> tuple[Any, ...]:
    """Return what each layer gives for the same x, in one call of the kernels."""
    first = layers[0]
    weight, bias = operands(layers)
    rows = rows_of(x)
    out = first.compute(rows, weight, bias=bias, threshold=first.threshold)
    sizes = [layer.out_features for layer in layers]
    found: tuple[Any, ...] = out.view(*x.shape[:-1], sum(sizes)).split(sizes, dim=-1)
    return found


def rows_of(x: Any) -> Any:
    """Return x as a matrix whose rows are whole, which those of a transposed x are not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


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
        # A third of the time of attributes.  A replica's bias is no parameter, but a replica serves one call.
        stored, shift = layer._buffers, layer._parameters.get("bias")
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

    # A graph would write them when it is replayed, not now.
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError("merged layers have moved: call them once before they are captured")
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


def check_linear(name: str, layer: Any, compute: Callable[..., Any] | None, *, meta: bool = True) -> None:
    """Raise for what is no linear layer, or none that the kernels take."""
    import torch

    if not isinstance(layer, torch.nn.Linear):
        raise OptionError(f"{name}: expected a torch.nn.Linear, got {type(layer).__name__}")
    weight: Any = layer.weight
    bias: Any = layer.bias
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        raise DTypeError(
            f"{name}: expected a bias as the weight is, {weight.dtype} on {weight.device}, "
            f"got {bias.dtype} on {bias.device}"
        )
    if weight.is_meta and not meta:
        raise DTypeError(f"{name}: expected a layer on the GPU, got one on meta")
    if compute is not None:
        return
    if not (weight.is_cuda or weight.is_meta):
        current_device()  # which says that there is no GPU
        raise DTypeError(f"{name}: expected a layer on the GPU, got one on {weight.device}")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise DTypeError(f"{name}: expected float16 or bfloat16, got {weight.dtype}")
