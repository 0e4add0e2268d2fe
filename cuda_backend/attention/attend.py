"""Attention of tensors with any option of the reference: the kernels that run a call best, and its gradients.

There is one option more, `window`: a causal query sees so many keys, its own place the last.  On the host the
references run, for tests.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention import mods
from refimpl.errors import SlowPathWarning, UnsupportedError

__all__ = [
    "as_functions",
    "decodes",
    "fastest",
    "forward",
    "forward_on_host",
    "gradients",
    "gradients_on_host",
]

LONG = 256  # keys from which a single query is worth parts

_given = functools.cache(mods.given)  # the same function each time: what is known of it is known by it


@functools.lru_cache(maxsize=16)
def _causal_window(size: int) -> mods.Mask:
    return mods.both(mods.causal, mods.sliding(size - 1))


@functools.lru_cache(maxsize=16)
def _softcap(cap: float) -> tuple[mods.Score, mods.Score]:
    return mods.softcap(cap), mods.softcap_vjp(cap)


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
    said = set(options) <= {"scale", "causal", "window", "attn_mask", "softcap"} and causal in (
        None,
        "top_left",
    )
    if not said or not {"attn_mask", "softcap", "window"} & set(options) or (mask is not None and causal):
        return None
    found: dict[str, Any] = {"scale": options.get("scale")}
    if "window" in options:
        found["mask_mod"] = _causal_window(options["window"])
    elif mask is not None:
        found |= {"mask_mod": _given(mask.shape[0] > 1, mask.shape[1] > 1), "aux": (mask,)}
    elif causal:
        found["mask_mod"] = mods.causal
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
        options = _spelled_out(q, k, options) | {"return_lse": True}
        return fastest(cuda_backend.flash_attention, (q, k, v), options)
    functions.pop("score_mod_vjp", None)
    return fastest(cuda_backend.flexible_attention, (q, k, v), {**functions, "return_lse": True})


def gradients(arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return the gradients of q, k, v and the bias from them, the output, the log-sum-exp and dO."""
    import cuda_backend

    functions = as_functions(options)
    if functions is None:
        options = _spelled_out(arrays[0], arrays[1], options)
        return fastest(cuda_backend.flash_attention_vjp, arrays, options)
    return fastest(cuda_backend.flexible_attention_vjp, arrays, functions)


def _spelled_out(q: Any, k: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose window is a mask of truth values, beside `q`."""
    if "window" not in options:
        return options
    others = {name: value for name, value in options.items() if name not in ("window", "causal")}
    if isinstance(q, np.ndarray):
        mask = np.tri(q.shape[1], k.shape[1], dtype=bool)
        mask &= ~np.tri(q.shape[1], k.shape[1], -options["window"], dtype=bool)
        return others | {"attn_mask": mask}
    mask = q.new_ones((q.shape[1], k.shape[1])).tril().triu(1 - options["window"])
    return others | {"attn_mask": mask.bool()[None, None]}


def fastest(function: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call a function with the Hopper kernels if they are there and take the call, else the portable ones.

    On a Hopper GPU the portable ones are 20 to 50 times slower, so a `SlowPathWarning` says why they run,
    once for each reason; ``warnings.simplefilter("error", SlowPathWarning)`` makes it an error.
    """
    from cuda_backend.attention.forward import chosen_tier

    if chosen_tier("auto", arrays[0]) == "hopper":
        if "tier" not in inspect.signature(function).parameters:
            _warn_slow(f"{function.__name__}: there is no Hopper kernel of it")
            return function(*arrays, **options)
        try:
            return function(*arrays, tier="hopper", **options)
        except UnsupportedError as error:
            _warn_slow(str(error))
    return function(*arrays, **options)


@functools.cache  # but not of a warning that was made an error
def _warn_slow(reason: str) -> None:
    message = f"{reason}; the portable kernels run, which are many times slower"
    warnings.warn(message, SlowPathWarning, stacklevel=3)


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
