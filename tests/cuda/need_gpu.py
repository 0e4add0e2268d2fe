"""What the commands of this folder need: said in a line where it is missing, as ``frugal bench`` says it."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["need_gpu"]

BACKEND_MISSING = 3


def need_gpu(*packages: str) -> None:
    """Exit with 3 and a line where PyTorch, one of `packages`, or a GPU is missing."""
    from cuda_backend import availability
    from cuda_backend.torch_ops import missing

    lacking = [name for name in ("torch", *packages) if find_spec(name) is None]
    reason = f"pip install {' '.join(lacking)}" if lacking else missing() or availability("cuda")
    if reason:
        sys.stderr.write(f"Error: this command needs a GPU and PyTorch on it: {reason}\n")
        sys.exit(BACKEND_MISSING)
