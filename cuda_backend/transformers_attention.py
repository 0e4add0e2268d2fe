"""Our attention in models of transformers: ``attn_implementation="frugal_attention"``.

Tensors are asked for their own methods, so PyTorch is not named here; transformers is, to be told our name.
What it asks for becomes options of `scaled_dot_product_attention`; `cuda_backend.torch_ops` runs it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from refimpl.errors import BackendUnavailableError, DTypeError, ShapeError, UnsupportedError

__all__ = ["NAME", "frugal_attention", "options_of", "register"]

NAME = "frugal_attention"
UNKNOWN = (
    "s_aux",
    "head_mask",
)  # what some models pass and nothing here computes: left out it would be wrong


def register() -> str:
    """Make the name known to transformers, with boolean masks as for SDPA; return it.

    Returns
    -------
    str
        "frugal_attention", for ``attn_implementation=``.

    Raises
    ------
    BackendUnavailableError
        If transformers is not installed, or too old for attentions of others (before 4.53).

    Examples
    --------
    >>> try:
    ...     assert register() == NAME
    ... except BackendUnavailableError:
    ...     pass
    """
    try:
        attentions: Any = importlib.import_module("transformers").AttentionInterface
        masks: Any = importlib.import_module("transformers.masking_utils")
        attentions.register(NAME, frugal_attention)
        masks.AttentionMaskInterface.register(NAME, functools.partial(_mask, masks.sdpa_mask))
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(f"transformers takes no attention of ours: {error}") from None
    return NAME


def _mask(sdpa_mask: Any, **asked: Any) -> Any:
    """Return the mask that SDPA gets, or None where causality, and a window, say it all.

    Without a window transformers knows when that is: no padding, and nothing laid over the mask.  With one it
    is the same if there is more than a query, or no key out of its sight: layers tell their attention the
    window, which is causal there: of models that look both ways the mask says it.  Chunks, as Llama 4 has
    them, are local too, but not told.
    """
    config, window = asked.get("config"), asked.get("local_size")
    told = window is not None and window == getattr(config, "sliding_window", None)
    told = told and not asked.get("allow_is_bidirectional_skip")
    chunks = getattr(config, "attention_chunk_size", None) is not None
    if told and not chunks and (asked["q_length"] > 1 or asked["kv_length"] <= window):
        asked = asked | {"local_size": None}
    return sdpa_mask(**asked)


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
    sliding_window: int | None = None,
    position_bias: Any = None,
    **further: Any,
) -> tuple[Any, None]:
    """Return what an attention of transformers returns: the output [B, Tq, Hq, D], and no weights.

    Parameters
    ----------
    module : torch.nn.Module
        The layer; `is_causal` is read where it is not given.
    query, key, value : torch.Tensor, shapes (B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv)
        Key heads are not repeated for their group.
    attention_mask : torch.Tensor, optional
        Four axes: bool, True where a query may attend, or float and added to the scores; tiles that a mask
        leaves dead are skipped.  Without one several queries are causal, from the first key on, if the layer
        is, and see `sliding_window` keys, if that is given; a single one sees all.
    scaling, softcap, is_causal, sliding_window
        As transformers passes them.
    position_bias : torch.Tensor, optional
        Added to the scores, with a gradient if it wants one.
    dropout : float
        Of the probabilities, drawn from PyTorch's generator of the host.
    **further
        What says nothing here.

    Returns
    -------
    tuple of torch.Tensor and None
        With a gradient.

    Raises
    ------
    ShapeError
        If a mask has other lengths.
    DTypeError
        If it is neither of truth values nor of floats, or the tensors are not of one floating format.
    UnsupportedError
        If attention sinks, a mask of heads or the weights are wanted, a window that is neither causal nor
        in a mask, or by the kernels, with their reasons.

    Notes
    -----
    `cuda_backend.torch_ops.masked_attention` says which kernels run; tensors on the host go to the reference.
    """
    from cuda_backend.torch_ops import drawn_seed, masked_attention

    unknown = [name for name in UNKNOWN if further.get(name) is not None]
    if unknown:
        raise UnsupportedError(f"frugal_attention: no {', '.join(unknown)}")
    if further.get("output_attentions"):
        raise UnsupportedError(
            "frugal_attention: weights are never whole, so output_attentions has none to return; "
            'attn_implementation="eager" returns them'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options = options_of(query, key, attention_mask, position_bias, causal)
    options |= {"scale": scaling, "softcap": softcap}
    if sliding_window is not None and attention_mask is None:
        if options.get("causal"):
            options["window"] = sliding_window
        elif not causal and key.shape[2] >= sliding_window:
            raise UnsupportedError(
                f"frugal_attention: sliding_window={sliding_window} of {key.shape[2]} keys, not causal; "
                "attention_mask says such a window"
            )
    if dropout:
        options |= {"dropout_p": dropout, "seed": drawn_seed()}
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return masked_attention(q, k, v, **options), None


def options_of(query: Any, key: Any, mask: Any, bias: Any, causal: bool) -> dict[str, Any]:
    """Return the mask, bias and causality of a call as options of `scaled_dot_product_attention`.

    Raises
    ------
    ShapeError
        If the mask has not four axes, or other lengths.
    DTypeError
        If it is neither of truth values nor of floats.
    """
    Tq, Tk = query.shape[2], key.shape[2]
    if mask is not None:
        if mask.shape[-1] > Tk:  # of a cache that has more room than it has keys
            mask = mask[..., :Tk]
        if len(mask.shape) != 4 or mask.shape[2] not in (1, Tq) or mask.shape[3] != Tk:
            raise ShapeError(
                f"attention_mask: expected shape (B or 1, Hq or 1, {Tq}, {Tk}), got {tuple(mask.shape)}"
            )
        mask = mask if mask.shape[2] == Tq else mask.expand(-1, -1, Tq, -1)
        if "bool" not in str(mask.dtype):
            if not mask.is_floating_point():
                raise DTypeError(f"attention_mask: expected bool or floating point, got {mask.dtype}")
            return {"bias": mask if bias is None else bias + mask}
        if bias is None:
            return {"attn_mask": mask}
        return {"bias": bias.masked_fill(~mask, float("-inf"))}
    found = {} if bias is None else {"bias": bias}
    return found | {"causal": "top_left"} if causal and Tq > 1 else found
