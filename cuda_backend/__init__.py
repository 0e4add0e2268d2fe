"""The techniques of refimpl as Numba-CUDA kernels, under the references' names and arguments.

Importing this package imports neither numba nor a CUDA driver: it tells the registry where the kernels are,
and loads a function when it is first asked for.

>>> import cuda_backend
>>> sorted(cuda_backend.__all__)
['availability', 'flash_attention', 'scaled_dot_product_attention', 'supports']
"""

from __future__ import annotations

from typing import Any

from refimpl.registry import add_implementation, resolve

__all__ = ["availability", "flash_attention", "scaled_dot_product_attention", "supports"]

_HOME = {name: f"cuda_backend.attention.forward:{name}" for name in __all__ if name != "availability"}

for _technique, _function in (
    ("attention.flash", "flash_attention"),
    ("attention.dense", "scaled_dot_product_attention"),
):
    add_implementation(_technique, _HOME[_function], backend=("cuda", "cudasim"), tier="portable")


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
        return resolve(_HOME[name])
    raise AttributeError(f"module 'cuda_backend' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
