"""What the commands of this folder need: said in a line where it is missing, as ``frugal`` says it."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["need_arguments", "need_gpu"]

USAGE, BACKEND_MISSING = 2, 3


def need_arguments(*forms: str) -> list[str]:
    """Return the words of the command line; exit with 2 and a line if they are none of `forms`.

    A form is words with spaces between, as in ``run FILE``; one in capitals stands for any but an option.
    """
    given = sys.argv[1:]
    for form in forms:
        words = form.split()
        if len(words) == len(given) and all(
            not found.startswith("-") if word.isupper() else found == word
            for word, found in zip(words, given, strict=True)
        ):
            return given
    sys.stderr.write(f"Error: expected {' or '.join(forms)}; got {' '.join(given) or 'no argument'}\n")
    sys.exit(USAGE)


def need_gpu(*packages: str) -> None:
    """Exit with 3 and a line where PyTorch, one of `packages`, or a GPU is missing."""
    from cuda_backend import availability
    from cuda_backend.torch_ops import missing

    lacking = [name for name in ("torch", *packages) if find_spec(name) is None]
    reason = f"pip install {' '.join(lacking)}" if lacking else missing() or availability("cuda")
    if reason:
        sys.stderr.write(f"Error: this command needs a GPU and PyTorch on it: {reason}\n")
        sys.exit(BACKEND_MISSING)
