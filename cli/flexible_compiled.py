"""Whether a mask or a score of the user's compiles for a GPU: asked in a process without the simulator."""

from __future__ import annotations

import os
import subprocess
import sys

from refimpl.errors import UnsupportedError

__all__ = ["compiler_says"]

WRONG, MISSING = 4, 3  # an interpreter that fails for another reason ends with 1


def compiler_says(target: str) -> str | None:
    """Return what a compiler for GPUs has against ``FILE:FUNCTION``, which the simulator would run.

    Raises
    ------
    UnsupportedError
        If there is no such compiler here.
    """
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    run = subprocess.run(
        [sys.executable, "-P", "-m", __name__, target],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == 0:
        return None
    lines = run.stderr.strip().splitlines() or [""]
    if run.returncode == WRONG:
        return lines[-1]
    hint = "pip install 'frugal-lm[cuda13]'"
    raise UnsupportedError(f"not compiled for a GPU ({hint}): {lines[-1]}")


def _compile(target: str) -> int:
    from cli.flexible_forms import users_form
    from cuda_backend.attention.user_aot import compile_mods
    from cuda_backend.attention.user_device import Mods
    from refimpl.attention.user_functions import Mod, as_mod
    from refimpl.errors import BackendUnavailableError, FrugalError

    options = users_form(target).options

    def mod(name: str, *leading: str) -> Mod | None:
        return as_mod(name, options[name], leading) if name in options else None

    try:
        compile_mods(
            Mods(mod("mask_mod"), mod("score_mod", "score"), mod("score_mod_vjp", "gradient", "score"))
        )
    except FrugalError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return MISSING if isinstance(error, BackendUnavailableError) else WRONG
    return 0


if __name__ == "__main__":
    sys.exit(_compile(sys.argv[1]))
