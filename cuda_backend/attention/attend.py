"""Attention of tensors with any option of the reference: the kernels that run a call best, and its gradients.

There is one option more, `window`: a causal query sees so many keys, its own place the last.  On the host the
references run, for tests.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from refimpl.attention import mods
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.validation import whole

__all__ = [
    "as_functions",
    "checked",
    "decodes",
    "forward",
    "forward_on_host",
    "gradients",
    "gradients_on_host",
]

LONG = 256  # keys from which a single query is worth parts


@functools.lru_cache(maxsize=64)  # the same function each time: what is known of a mask is known by it
def _mask(causal: bool, window: int | None, given: tuple[bool, bool] | None) -> mods.Mask | None:
    """Return what causality, a window and an array allow together, by sequence and by head or not."""
    parts: list[mods.Mask] = [mods.causal] if causal else []
    if window is not None:
        parts.append(mods.sliding(window - 1))
    if given is not None:
        parts.append(mods.given(*given))
    return functools.reduce(mods.both, parts) if parts else None


@functools.lru_cache(maxsize=16)
def _softcap(cap: float) -> tuple[mods.Score, mods.Score]:
    return mods.softcap(cap), mods.softcap_vjp(cap)


def checked(q: Any, k: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a call of tensors, its mask with four axes and as long as the scores.

    Raises
    ------
    OptionError
        If a window is smaller than 1, or there is no causal="top_left" that says where it ends.
    DTypeError
        If a mask is not of truth values, or a window no whole number.
    ShapeError
        If a mask does not broadcast to the scores.
    """
    if "window" in options:
        whole("window", options["window"])
        if options.get("causal") != "top_left":
            raise OptionError(
                "window: expected causal='top_left', so that it ends at the query's own place, "
                f"got causal={options.get('causal')!r}; another window goes to attn_mask"
            )
    mask = options.get("attn_mask")
    if mask is None:
        return options
    if str(mask.dtype) != "torch.bool":
        raise DTypeError(
            f"attn_mask: expected bool, True = attend, got {mask.dtype}; additive terms go to bias"
        )
    if len(q.shape) != 4 or len(k.shape) != 4:
        return options  # which is refused as the reference does
    full, given = (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), tuple(mask.shape)
    spread = (1,) * (4 - len(given)) + given
    if len(spread) != 4 or any(size not in (1, most) for size, most in zip(spread, full, strict=True)):
        raise ShapeError(f"attn_mask: expected a shape that broadcasts to {full}, got {given}")
    if given == (*spread[:2], *full[2:]):
        return options  # the tensor itself: what is known of a mask is known by it
    return options | {"attn_mask": mask.reshape(spread).expand(-1, -1, *full[2:])}


def decodes(q: Any, k: Any, options: dict[str, Any]) -> bool:
    """Return whether a call is a decode step: a query that sees all of a long cache, as it is."""
    return q.shape[1] == 1 and k.shape[1] >= LONG and not set(options) - {"scale"}


def as_functions(options: dict[str, Any]) -> dict[str, Any] | None:
    """Return options as those of `flexible_attention`, whose kernels skip what a mask leaves dead.

    None if a call has neither mask, window nor softcap, or something that is no function of one score.

    Examples
    --------
    >>> sorted(as_functions({"causal": "top_left", "softcap": 2.0}))
    ['mask_mod', 'scale', 'score_mod', 'score_mod_vjp']
    >>> as_functions({"causal": "top_left"}), as_functions({"softcap": 2.0, "dropout_p": 0.5})
    (None, None)
    """
    mask, cap, causal = (options.get(name) for name in ("attn_mask", "softcap", "causal"))
    more = {"window", "attn_mask", "softcap"} & set(options)
    if set(options) - {"scale", "causal", *more} or causal not in (None, "top_left") or not more:
        return None
    found: dict[str, Any] = {"scale": options.get("scale")}
    given = None if mask is None else (mask.shape[0] > 1, mask.shape[1] > 1)
    function = _mask(causal is not None, options.get("window"), given)
    if function is not None:
        found["mask_mod"] = function
    if mask is not None:
        found["aux"] = (mask,)
    if cap is not None:
        score, gradient = _softcap(cap)
        found |= {"score_mod": score, "score_mod_vjp": gradient}
    return found


def forward(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    """Return output and log-sum-exp of tensors on the GPU, by the fastest kernels that take the call."""
    import cuda_backend

    functions = as_functions(options)
    if decodes(q, k, options):
        return cuda_backend.split_kv_attention(q, k, v, return_lse=True, **options)
    if functions is None:
        options = _spelled_out(q, k, options)
        return cuda_backend.flash_attention(q, k, v, return_lse=True, tier="auto", **options)
    functions.pop("score_mod_vjp", None)
    return cuda_backend.flexible_attention(q, k, v, return_lse=True, tier="auto", **functions)


def gradients(arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return the gradients of q, k, v and the bias from them, the output, the log-sum-exp and dO."""
    import cuda_backend

    functions = as_functions(options)
    if functions is None:
        options = _spelled_out(arrays[0], arrays[1], options)
        return cuda_backend.flash_attention_vjp(*arrays, tier="auto", **options)
    return cuda_backend.flexible_attention_vjp(*arrays, tier="auto", **functions)


def _spelled_out(q: Any, k: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose window is in the mask of truth values, beside `q`."""
    if "window" not in options:
        return options
    others = {name: value for name, value in options.items() if name not in ("window", "causal")}
    if isinstance(q, np.ndarray):
        seen = np.tri(q.shape[1], k.shape[1], dtype=bool)
        seen &= ~np.tri(q.shape[1], k.shape[1], -options["window"], dtype=bool)
    else:
        seen = q.new_ones((q.shape[1], k.shape[1])).tril().triu(1 - options["window"]).bool()[None, None]
    given = others.get("attn_mask")
    return others | {"attn_mask": seen if given is None else seen & given}


def forward_on_host(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    """Return output and log-sum-exp of arrays."""
    from refimpl import attention as reference

    if decodes(q, k, options):
        return reference.split_kv_attention(q, k, v, splits=2, return_lse=True, **options)
    return reference.scaled_dot_product_attention(q, k, v, return_lse=True, **_spelled_out(q, k, options))


def gradients_on_host(arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return what `gradients` does, for arrays."""
    from refimpl import attention as reference

    q, k, v, _, _, do = arrays
    return reference.scaled_dot_product_attention_vjp(q, k, v, do, **_spelled_out(q, k, options))
