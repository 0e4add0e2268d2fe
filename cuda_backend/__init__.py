"""The techniques of refimpl as Numba-CUDA kernels, under the references' names and arguments.

Importing this package imports neither numba nor a CUDA driver: it tells the registry where the kernels are,
and loads a function when it is first asked for.

>>> import cuda_backend
>>> [name for name in sorted(cuda_backend.__all__) if "flash" in name]
['flash_attention', 'flash_attention_hopper', 'flash_attention_vjp', 'flash_attention_vjp_deterministic',
 'flash_attention_vjp_hopper']
>>> [name for name in sorted(cuda_backend.__all__) if "llm" in name]
['llm_int8_linear', 'llm_int8_linear_fused', 'llm_int8_linear_hopper']
"""

from __future__ import annotations

from typing import Any

from refimpl.registry import Backend, add_implementation, resolve

__all__ = [
    "availability",
    "block_mask",
    "dequantize_product",
    "flash_attention",
    "flash_attention_hopper",
    "flash_attention_vjp",
    "flash_attention_vjp_deterministic",
    "flash_attention_vjp_hopper",
    "flexible_attention",
    "flexible_attention_vjp",
    "int8_attention",
    "int8_attention_hopper",
    "int8_linear_decode",
    "int8_matmul",
    "int8_matmul_hopper",
    "int8_weight_linear",
    "int8_weight_linear_vjp",
    "llm_int8_linear",
    "llm_int8_linear_fused",
    "llm_int8_linear_hopper",
    "nf4_linear",
    "nf4_linear_decode",
    "nf4_linear_vjp",
    "outlier_columns",
    "paged_attention",
    "prepare_int8_groups",
    "prepare_nf4",
    "prepare_weight",
    "qlora_linear",
    "qlora_linear_vjp",
    "quantize_columns",
    "quantize_rows",
    "quantize_rows_hopper",
    "scaled_dot_product_attention",
    "scaled_int8_matmul",
    "split_kv_attention",
    "supports",
    "varlen_attention",
    "varlen_attention_vjp",
]

_FORWARD, _BACKWARD = "cuda_backend.attention.forward", "cuda_backend.attention.backward"
_HOPPER_BACKWARD = "cuda_backend.attention.call_backward_hopper"
_INT8, _WEIGHT_ONLY = "cuda_backend.int8", "cuda_backend.weight_only"
_HOME = {
    "flash_attention": f"{_FORWARD}:flash_attention",
    "flash_attention_hopper": "cuda_backend.attention.call_hopper:flash_attention_hopper",
    "paged_attention": "cuda_backend.attention.decode:paged_attention",
    "split_kv_attention": "cuda_backend.attention.decode:split_kv_attention",
    "block_mask": "cuda_backend.attention.tile_states:block_mask",
    "flexible_attention": "cuda_backend.attention.flexible:flexible_attention",
    "flexible_attention_vjp": "cuda_backend.attention.flexible:flexible_attention_vjp",
    "varlen_attention": "cuda_backend.attention.varlen:varlen_attention",
    "varlen_attention_vjp": "cuda_backend.attention.varlen:varlen_attention_vjp",
    "flash_attention_vjp": f"{_BACKWARD}:flash_attention_vjp",
    "flash_attention_vjp_deterministic": f"{_HOPPER_BACKWARD}:flash_attention_vjp_deterministic",
    "flash_attention_vjp_hopper": f"{_HOPPER_BACKWARD}:flash_attention_vjp_hopper",
    "scaled_dot_product_attention": f"{_FORWARD}:scaled_dot_product_attention",
    "supports": f"{_FORWARD}:supports",
    "int8_attention_hopper": "cuda_backend.attention.int8_call_hopper:int8_attention_hopper",
    "int8_attention": "cuda_backend.attention.int8_call:int8_attention",
    "dequantize_product": f"{_INT8}.gemm:dequantize_product",
    "int8_matmul": f"{_INT8}.gemm:int8_matmul",
    "llm_int8_linear": f"{_INT8}.linear:llm_int8_linear",
    "llm_int8_linear_fused": f"{_INT8}.linear:llm_int8_linear_fused",
    "outlier_columns": f"{_INT8}.quantize:outlier_columns",
    "quantize_columns": f"{_INT8}.quantize:quantize_columns",
    "quantize_rows": f"{_INT8}.quantize:quantize_rows",
    "int8_matmul_hopper": f"{_INT8}.call_hopper:int8_matmul_hopper",
    "quantize_rows_hopper": f"{_INT8}.call_hopper:quantize_rows_hopper",
    "scaled_int8_matmul": f"{_INT8}.call_hopper:scaled_int8_matmul",
    "llm_int8_linear_hopper": f"{_INT8}.linear_hopper:llm_int8_linear_hopper",
    "prepare_weight": f"{_INT8}.linear_hopper:prepare_weight",
    "int8_linear_decode": f"{_WEIGHT_ONLY}.call:int8_linear_decode",
    "nf4_linear_decode": f"{_WEIGHT_ONLY}.call:nf4_linear_decode",
    "prepare_int8_groups": f"{_WEIGHT_ONLY}.prepared:prepare_int8_groups",
    "prepare_nf4": f"{_WEIGHT_ONLY}.prepared:prepare_nf4",
    "int8_weight_linear": f"{_WEIGHT_ONLY}.linear:int8_weight_linear",
    "int8_weight_linear_vjp": f"{_WEIGHT_ONLY}.linear:int8_weight_linear_vjp",
    "nf4_linear": f"{_WEIGHT_ONLY}.linear:nf4_linear",
    "nf4_linear_vjp": f"{_WEIGHT_ONLY}.linear:nf4_linear_vjp",
    "qlora_linear": f"{_WEIGHT_ONLY}.qlora:qlora_linear",
    "qlora_linear_vjp": f"{_WEIGHT_ONLY}.qlora:qlora_linear_vjp",
}

_ANYWHERE: tuple[Backend, ...] = ("cuda", "cudasim")
# Techniques, the functions of their kernels, and which GPUs these are made for.
for _technique, _function, _tier in (
    ("attention.dense", "scaled_dot_product_attention", "portable"),
    ("attention.flash", "flash_attention", "portable"),
    ("attention.flash", "flash_attention_hopper", "hopper"),
    ("attention.flash_backward", "flash_attention_vjp", "portable"),
    ("attention.flash_backward", "flash_attention_vjp_hopper", "hopper"),
    ("attention.flash_backward", "flash_attention_vjp_deterministic", "hopper deterministic"),
    ("attention.int8", "int8_attention", "portable"),
    ("attention.int8", "int8_attention_hopper", "hopper"),
    ("quant.int8_matmul", "int8_matmul", "portable"),
    ("quant.int8_matmul", "int8_matmul_hopper", "hopper"),
    ("quant.llm_int8", "llm_int8_linear", "portable"),
    ("quant.llm_int8_fused", "llm_int8_linear_fused", "portable"),
    ("quant.llm_int8_fused", "llm_int8_linear_hopper", "hopper"),
    ("quant.qlora", "qlora_linear", "portable"),
    ("quant.weight_only_int8", "int8_weight_linear", "portable"),
    ("quant.weight_only_int8", "int8_linear_decode", "ampere"),
    ("quant.weight_only_nf4", "nf4_linear", "portable"),
    ("quant.weight_only_nf4", "nf4_linear_decode", "ampere"),
):
    _backend = _ANYWHERE if _tier == "portable" else ("cuda",)
    add_implementation(_technique, _HOME[_function], backend=_backend, tier=_tier)
# Functions that have kernels of two tiers, and are told which.
for _technique, _function, _fast in (
    ("attention.flexible", "flexible_attention", "hopper"),
    ("attention.flexible_backward", "flexible_attention_vjp", "hopper"),
    ("attention.varlen", "varlen_attention", "hopper"),
    ("attention.varlen_backward", "varlen_attention_vjp", "hopper"),
    ("attention.split_kv", "split_kv_attention", "ampere"),
    ("attention.paged", "paged_attention", "ampere"),
):
    for _tier in ("portable", _fast):
        _backend = _ANYWHERE if _tier == "portable" else ("cuda",)
        _told = {"tier": _tier}
        add_implementation(_technique, _HOME[_function], backend=_backend, tier=_tier, options=_told)
add_implementation(
    "attention.flexible_backward",
    _HOME["flexible_attention_vjp"],
    backend="cuda",
    tier="hopper deterministic",
    options={"tier": "hopper", "deterministic": True},
)


def availability(backend: str) -> str | None:
    """Return why `backend` cannot run in this process, or None if it can.

    Parameters
    ----------
    backend : {"cuda", "cudasim"}
        A GPU, or Numba's simulator.

    Returns
    -------
    str or None
        The reason in words.

    Examples
    --------
    >>> availability("tpu")
    "unknown backend 'tpu'; this package has cuda and cudasim"
    """
    if backend not in ("cuda", "cudasim"):
        return f"unknown backend {backend!r}; this package has cuda and cudasim"
    try:
        from cuda_backend import _numba
    except ImportError as error:
        return f"numba-cuda does not import: {error}"
    return _numba.missing(backend)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        found = globals()[name] = resolve(_HOME[name])  # the next access does not come here
        return found
    raise AttributeError(f"module 'cuda_backend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
