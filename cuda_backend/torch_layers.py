"""Layers of PyTorch that compute in int8, and their way into a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cuda_backend.context import current_device
from refimpl.errors import DTypeError, OptionError, ShapeError, UnsupportedError

__all__ = ["int8_linear", "merged_int8_linear", "replace_linear"]

HEAD = ("lm_head",)  # what `replace_linear` keeps where there is such a child


def int8_linear(
    layer: Any, *, threshold: float | None = 6.0, compute: Callable[..., Any] | None = None
) -> Any:
    """Return a module that computes what `torch.nn.Linear` `layer` does, by LLM.int8(), for inference.

    Parameters
    ----------
    layer : torch.nn.Linear
        On the GPU, in float16 or bfloat16; it is quantised now and not kept.
    threshold : float or None
        As for `refimpl.quant.llm_int8_linear`.
    compute : callable, optional
        A function of the reference's signature.  Default: `cuda_backend.llm_int8_linear_hopper`.

    Returns
    -------
    torch.nn.Module
        With buffers ``codes`` [out_features, in_features padded to 16] and ``absmax``, and the layer's bias.
        It loads its own state, or that of a `torch.nn.Linear`, whose ``weight`` is quantised then.  Casts of
        the model leave both as they are.

    Raises
    ------
    OptionError
        If `layer` is no `torch.nn.Linear`.
    DTypeError
        If it is on the CPU, or in another format.
    BackendUnavailableError
        If there is no GPU.
    ShapeError, UnsupportedError
        From its forward pass: if x has other features; if a gradient is wanted, or with the reasons of
        `compute`.

    Notes
    -----
    It is faster than float16 for many tokens; which layers are, for how many, stands in docs/performance.md.
    Forward passes may be captured in a CUDA graph once they have run with the same shapes.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    _check("layer", layer, compute)
    module = _int8_linear_class()(layer.in_features, layer.out_features, threshold, compute)
    if layer.bias is not None:
        module.bias = type(layer.bias)(layer.bias.detach(), requires_grad=False)
    module.quantize(layer.weight)
    return module.train(layer.training)


def merged_int8_linear(
    layers: Sequence[Any], *, threshold: float | None = 6.0, compute: Callable[..., Any] | None = None
) -> Any:
    """Return one module for layers that read the same input, such as q, k and v: it returns a tuple.

    Parameters
    ----------
    layers : sequence of torch.nn.Linear
        With one ``in_features``, dtype and device; they are quantised now and not kept.
    threshold, compute
        As for `int8_linear`.

    Returns
    -------
    torch.nn.Module
        As from `int8_linear`, for all outputs side by side; what it returns are views of each layer's.  It
        loads its own state, or that of a `torch.nn.Linear` with all outputs.

    Raises
    ------
    OptionError
        If there are no layers, or they differ in ``in_features``, dtype or device.
    DTypeError, BackendUnavailableError, ShapeError, UnsupportedError
        As `int8_linear`.

    Notes
    -----
    Rows of the input and columns of a weight are quantised each for itself, and outliers belong to the input:
    merging changes no output by more than the order in which outliers are summed.  The input is quantised
    once in place of once a layer, which is much of the time of a layer with few outputs.  The model has to
    call the merged module, and its own layers can go: nothing in it is changed here.  If ``out_features`` are
    multiples of 8, views begin at multiples of 16 bytes, as `llm_int8_linear_hopper` wants its input.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    import torch

    if isinstance(layers, torch.nn.Module):
        raise OptionError(f"layers: expected a sequence of torch.nn.Linear, got one {type(layers).__name__}")
    for place, layer in enumerate(layers):
        _check(f"layers[{place}]", layer, compute)
    kinds = {(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}
    if len(kinds) != 1:
        found = "; ".join(sorted(map(str, kinds))) or "no layers"
        raise OptionError(f"layers: expected one in_features, dtype and device, got {found}")
    sizes = [layer.out_features for layer in layers]
    module = _int8_linear_class()(layers[0].in_features, sum(sizes), threshold, compute, sizes)
    if any(layer.bias is not None for layer in layers):
        module.bias = torch.nn.Parameter(torch.cat([_bias_of(layer) for layer in layers]), False)
    module.quantize(torch.cat([layer.weight.detach() for layer in layers]))
    return module.train(layers[0].training)


def _bias_of(layer: Any) -> Any:
    """Return the bias of a layer; of one without -0.0, which added changes no number, as 0.0 does -0.0."""
    if layer.bias is None:
        return layer.weight.new_full((layer.out_features,), -0.0)
    return layer.bias.detach()


def _check(name: str, layer: Any, compute: Callable[..., Any] | None) -> None:
    """Raise for what is no linear layer, or none that the kernels take."""
    import torch

    if not isinstance(layer, torch.nn.Linear):
        raise OptionError(f"{name}: expected a torch.nn.Linear, got {type(layer).__name__}")
    if compute is not None:
        return
    if not layer.weight.is_cuda:
        current_device()  # which says that there is no GPU
        raise DTypeError(f"{name}: expected a layer on the GPU, got one on {layer.weight.device}")
    if layer.weight.dtype not in (torch.float16, torch.bfloat16):
        raise DTypeError(f"{name}: expected float16 or bfloat16, got {layer.weight.dtype}")


def replace_linear(model: Any, *, keep: Sequence[str] = HEAD, **options: Any) -> int:
    """Put `int8_linear` in the place of every `torch.nn.Linear` of a model but those named in `keep`.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, if nothing is raised.
    keep : sequence of str
        Names of children, at any depth, or whole names as of ``named_modules``, that stay as they are, with
        all that is in them.  Default: ``lm_head``, if there is one.
    **options
        Those of `int8_linear`.

    Returns
    -------
    int
        How many were replaced.

    Raises
    ------
    OptionError
        If `model` is a linear layer itself, or has no child of a name that was given.
    DTypeError, BackendUnavailableError
        As `int8_linear`, with the layer's name.

    Notes
    -----
    A model that is called with few tokens at a time gets slower where its layers are small, and its host
    has more to do: see docs/performance.md, and `cuda_backend.int8_linear_decode` for 1 to 16 tokens.
    """
    import torch

    if isinstance(keep, str):
        raise OptionError(f"keep: expected names, got one string, {keep!r}")
    if isinstance(model, torch.nn.Linear):
        raise OptionError("model: it is a linear layer itself; use int8_linear")
    known = {name for path, _ in model.named_modules() for name in (path, path.rpartition(".")[2])}
    unknown = sorted(set(keep) - known)
    if unknown and keep is not HEAD:
        raise OptionError(f"keep: the model has no child named {', '.join(unknown)}")
    found = list(_linear_children(model, "", keep))
    for path, parent, name in found:
        _check(path, getattr(parent, name), options.get("compute"))
    for _, parent, name in found:  # no layer is held here: each can go as soon as it has been replaced
        setattr(parent, name, int8_linear(getattr(parent, name), **options))
    return len(found)


def _linear_children(module: Any, prefix: str, keep: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Yield whole name, parent and name of each linear layer that is not kept."""
    import torch

    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if name in keep or path in keep:
            continue
        if type(child) is torch.nn.Linear:
            yield path, module, name
        else:
            yield from _linear_children(child, f"{path}.", keep)


@functools.cache
def _int8_linear_class() -> Any:
    import torch

    from cuda_backend import llm_int8_linear_hopper, prepare_weight
    from refimpl.quant import Int8Columns

    class Int8Linear(torch.nn.Module):
        """A linear layer in int8; see `int8_linear`."""

        def __init__(
            self,
            in_features: int,
            out_features: int,
            threshold: float | None,
            compute: Callable[..., Any] | None,
            sizes: list[int] | None = None,
        ) -> None:
            super().__init__()
            self.in_features, self.out_features, self.threshold = in_features, out_features, threshold
            self.sizes = sizes  # outputs of the layers that were merged
            self.compute = compute or llm_int8_linear_hopper
            self.register_buffer("codes", None)
            self.register_buffer("absmax", None)
            self.register_parameter("bias", None)

        def quantize(self, weight: Any) -> None:
            """Take the place of a weight [out_features, in_features] in floating point."""
            prepared = prepare_weight(weight.detach().t())
            codes = prepared.codes.t()  # rows may be longer than they are wide: all of it is kept
            self.codes = codes.as_strided((self.out_features, codes.stride(0)), (codes.stride(0), 1))
            self.absmax = prepared.absmax

        def forward(self, x: Any) -> Any:
            """Return the outputs for x [..., in_features]; of layers that were merged, a tuple."""
            if torch.is_grad_enabled() and x.requires_grad:
                raise UnsupportedError("int8_linear: no gradient; call it under torch.no_grad()")
            if x.shape[-1:] != (self.in_features,):
                raise ShapeError(f"x: expected [..., {self.in_features}], got {list(x.shape)}")
            rows = x.reshape(-1, self.in_features)
            weight = Int8Columns(self.codes[:, : self.in_features].t(), self.absmax)
            out = self.compute(rows, weight, bias=self.bias, threshold=self.threshold)
            out = out.view(*x.shape[:-1], self.out_features)
            return out if self.sizes is None else out.split(self.sizes, dim=-1)

        def extra_repr(self) -> str:
            """Return the sizes, as `torch.nn.Linear` does."""
            sizes = f"in_features={self.in_features}, out_features={self.out_features}"
            merged = "" if self.sizes is None else f", merged={self.sizes}"
            return f"{sizes}, threshold={self.threshold}{merged}"

        def _apply(self, fn: Any, *rest: Any, **named: Any) -> Any:
            """Move, but do not cast: the kernels want absmax in float32, whatever the model computes in."""
            absmax = self.absmax
            move: Any = super()._apply
            move(fn, *rest, **named)
            if absmax is not None and self.absmax.dtype != absmax.dtype:
                self.absmax = absmax.to(self.absmax.device)
            return self

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            weight = state.pop(f"{prefix}weight", None)
            if weight is not None:
                place = weight if self.absmax is None else weight.to(self.absmax.device)
                self.quantize(place)
                state[f"{prefix}codes"], state[f"{prefix}absmax"] = self.codes, self.absmax
            super()._load_from_state_dict(state, prefix, *rest)

    return Int8Linear
