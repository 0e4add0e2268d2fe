"""Whether functions of the user's compile for a GPU, asked of the compiler where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core.errors import NumbaError

from cuda_backend._numba import types
from cuda_backend.aot import AMPERE, compile_ptx
from cuda_backend.attention.user_device import Mods, blamed, mask_on_device, score_on_device
from refimpl.errors import BackendUnavailableError, FrugalError, OptionError

__all__ = ["compile_mods"]

SIGNATURE = (types.float32[::1], *(types.int32,) * 4)


def compile_mods(mods: Mods) -> None:
    """Compile each function of `mods`, which read no arrays, for a GPU that need not be there.

    Raises
    ------
    OptionError
        If one does not compile; the message names its file and line where the compiler does.
    BackendUnavailableError
        If there is no compiler: in the simulator, or without the CUDA toolkit.
    """
    kernels: list[tuple[str, Callable[..., None]]] = []
    if mods.mask is not None:
        kernels.append(("mask_mod", _asking(mask_on_device(mods.mask), 0)))
    if mods.score is not None:
        kernels.append(("score_mod", _asking(score_on_device(mods.score), 1)))
    if mods.vjp is not None:
        kernels.append(("score_mod_vjp", _asking(score_on_device(mods.vjp, 2), 2)))
    for name, kernel in kernels:
        try:
            with blamed(mods):
                compile_ptx(kernel, SIGNATURE, AMPERE)
        except FrugalError:
            raise
        except NumbaError as error:
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise OptionError(f"{name}: does not compile for the GPU: {first.strip(' :')}") from error
        except Exception as error:  # what a toolkit lacks it says in many ways
            raise BackendUnavailableError(f"{type(error).__name__}: {error}") from error


def _asking(f: Any, leading: int) -> Callable[..., None]:
    """Return a kernel that asks `f` once; the compiler asks for nothing that is not used."""

    def mask(out: Any, b: int, h: int, i: int, j: int) -> None:
        out[0] = f(b, h, i, j, ())

    def score(out: Any, b: int, h: int, i: int, j: int) -> None:
        out[0] = f(out[1], b, h, i, j, ())

    def gradient(out: Any, b: int, h: int, i: int, j: int) -> None:
        out[0] = f(out[2], out[1], b, h, i, j, ())

    return (mask, score, gradient)[leading]
