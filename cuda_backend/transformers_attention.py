"""Attention for models of Hugging Face's transformers: ``attn_implementation="frugal_attention"``.

Tensors are asked for their own methods, so PyTorch is not named here; transformers is, to be told our name.
"""

from __future__ import annotations

import importlib
from typing import Any

from refimpl.errors import BackendUnavailableError, UnsupportedError

__all__ = ["NAME", "frugal_attention", "register"]

NAME = "frugal_attention"


def register() -> str:
    """Make the name known to transformers, with boolean masks as for SDPA; return it.

    Raises
    ------
    BackendUnavailableError
        If transformers is not installed, or too old for attentions of others (before 4.53).
    """
    try:
        attentions: Any = importlib.import_module("transformers").AttentionInterface
        masks: Any = importlib.import_module("transformers.masking_utils")
        attentions.register(NAME, frugal_attention)
        masks.AttentionMaskInterface.register(NAME, masks.sdpa_mask)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(f"transformers takes no attention of ours: {error}") from None
    return NAME


def frugal_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Return what an attention of transformers returns: the output [B, Tq, Hq, D], and no weights.

    Parameters
    ----------
    module : torch.nn.Module
        The layer; `is_causal` is read where it is not given.
    query, key, value : torch.Tensor, shapes (B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv)
        Key heads are not repeated for their group.
    attention_mask : torch.Tensor, optional
        Bool, True where a query may attend, or float and added to the scores.  Without one, several queries
        are causal if the layer is.
    scaling, softcap, is_causal
        As transformers passes them.
    dropout : float
        0: training is refused.

    Returns
    -------
    tuple of torch.Tensor and None
        On the GPU from the portable kernels, on the host from the reference, for tests.

    Raises
    ------
    UnsupportedError
        If a gradient or dropout is wanted.

    Notes
    -----
    Not yet run on a device.
    """
    if dropout or any(tensor.requires_grad for tensor in (query, key, value)):
        raise UnsupportedError("frugal_attention: no gradient and no dropout; call it under torch.no_grad()")
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap}
    if attention_mask is not None:
        boolean = "bool" in str(attention_mask.dtype)
        options["attn_mask" if boolean else "bias"] = attention_mask[..., : key.shape[2]]
    elif query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        options["causal"] = True
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    if query.is_cuda:
        from cuda_backend import flash_attention

        return flash_attention(*tensors, tier="portable", **options), None
    return _on_host(tensors, options).to(query.dtype), None


def _on_host(tensors: list[Any], options: dict[str, Any]) -> Any:
    """Return the reference's output as a tensor; what NumPy has no format for is float32 meanwhile."""
    from refimpl.attention import scaled_dot_product_attention

    def array(tensor: Any) -> Any:
        tensor = tensor.detach()
        return (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()

    given = {name: array(x) if hasattr(x, "numpy") else x for name, x in options.items()}
    q, k, v = map(array, tensors)
    return tensors[0].new_tensor(scaled_dot_product_attention(q, k, v, **given))
