"""Layers of PyTorch that compute in int8, and their way into a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from refimpl.errors import OptionError, UnsupportedError

__all__ = ["int8_linear", "merged_int8_linear", "replace_linear"]


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
        It loads its own state, or that of a `torch.nn.Linear`, whose ``weight`` is quantised then.

    Raises
    ------
    UnsupportedError
        From its forward pass, if a gradient is wanted, or with the reasons of `compute`.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
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
    UnsupportedError
        As `int8_linear`.

    Notes
    -----
    Rows of the input and columns of a weight are quantised each for itself, and outliers belong to the input:
    merging changes no output by more than the order in which outliers are summed.  The input is quantised
    once in place of once a layer, which is much of the time of a layer with few outputs.

    References
    ----------
    .. [1] Dettmers et al., 2022, arXiv:2208.07339, section 3.
    """
    import torch

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


def replace_linear(model: Any, *, keep: tuple[str, ...] = ("lm_head",), **options: Any) -> int:
    """Put `int8_linear` in the place of every `torch.nn.Linear` of a model but those named in `keep`.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    keep : tuple of str
        Names of children, at any depth, that stay as they are, with all that is in them.
    **options
        Those of `int8_linear`.

    Returns
    -------
    int
        How many were replaced.
    """
    import torch

    replaced = 0
    for name, child in model.named_children():
        if name in keep:
            continue
        if type(child) is torch.nn.Linear:
            setattr(model, name, int8_linear(child, **options))
            replaced += 1
        else:
            replaced += replace_linear(child, keep=keep, **options)
    return replaced


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
            rows = x.reshape(-1, self.in_features)
            weight = Int8Columns(self.codes[:, : self.in_features].t(), self.absmax)
            out = self.compute(rows, weight, bias=self.bias, threshold=self.threshold)
            out = out.view(*x.shape[:-1], self.out_features)
            return out if self.sizes is None else out.split(self.sizes, dim=-1)

        def extra_repr(self) -> str:
            """Return the sizes, as `torch.nn.Linear` does."""
            sizes = f"in_features={self.in_features}, out_features={self.out_features}"
            return f"{sizes}, threshold={self.threshold}"

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            weight = state.pop(f"{prefix}weight", None)
            if weight is not None:
                place = weight if self.absmax is None else weight.to(self.absmax.device)
                self.quantize(place)
                state[f"{prefix}codes"], state[f"{prefix}absmax"] = self.codes, self.absmax
            super()._load_from_state_dict(state, prefix, *rest)

    return Int8Linear
