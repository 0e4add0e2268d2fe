"""Forms of attention that ``frugal bench flexible`` times: masks and scores, ready-made or from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import click
import numpy as np

from refimpl.attention import mods
from refimpl.attention.bigbird_plan import bigbird_block_mask, bigbird_plan
from refimpl.numerics import Array

__all__ = ["DEFAULT_SHAPES", "FORMS", "Form", "form_of", "users_form"]

BLOCK = 64  # tokens of a block of BigBird


class Form(NamedTuple):
    """Functions of one call, and the arrays that they read.

    Attributes
    ----------
    name
        As the rows of the result say it.
    options
        `mask_mod`, `score_mod` and `score_mod_vjp`, as they are there.
    aux
        Arrays on the host.
    """

    name: str
    options: Mapping[str, Callable[..., Any]]
    aux: tuple[Array, ...] = ()


def _causal(_H: int, _N: int) -> dict[str, Any]:
    return {"mask_mod": mods.causal}


def _sliding(_H: int, N: int) -> dict[str, Any]:
    return {"mask_mod": mods.both(mods.causal, mods.sliding(min(1024, max(1, N // 4))))}


def _dilated(_H: int, N: int) -> dict[str, Any]:
    return {"mask_mod": mods.dilated(min(256, max(1, N // 16)), 4)}


def _global(_H: int, N: int) -> dict[str, Any]:
    return {"mask_mod": mods.either(mods.sliding(min(256, max(1, N // 8))), mods.global_tokens(16))}


def _bigbird(H: int, N: int) -> dict[str, Any]:
    block = BLOCK if N >= 8 * BLOCK else 2
    plan = bigbird_plan(-(-N // block), heads=H, random_blocks=3, rng=0)
    layout = bigbird_block_mask(-(-N // block), plan, window_blocks=3, global_blocks=(0, -1))
    return {"mask_mod": mods.bigbird(block), "aux": (layout,)}


def _groups(H: int, N: int) -> dict[str, Any]:
    return {"mask_mod": mods.shifted_groups(2 * max(1, N // 8), H, 8 * -(-N // 8))}


def _documents(_H: int, N: int) -> dict[str, Any]:
    """Eight documents of uneven lengths, of few tokens fewer.

    They are causal inside, which the places in the whole batch say too.
    """
    starts = np.arange(1, N)
    ends = np.sort(np.random.default_rng(0).choice(starts, min(7, len(starts)), replace=False))
    numbers = np.searchsorted(ends, np.arange(N), "right").astype(np.int32)

    def mask(_b: Any, _h: Any, i: Any, j: Any, aux: Any) -> Any:
        return (j <= i) & (aux[0][i] == aux[0][j])

    return {"mask_mod": mask, "aux": (numbers,)}


def _prefix(_H: int, N: int) -> dict[str, Any]:
    return {"mask_mod": mods.prefix_lm(N // 4)}


def _alibi(H: int, _N: int) -> dict[str, Any]:
    slopes = (2.0 ** (-8.0 * np.arange(1, H + 1) / H)).astype(np.float32)
    return {
        "mask_mod": mods.causal,
        "score_mod": mods.alibi(),
        "score_mod_vjp": mods.alibi_vjp,
        "aux": (slopes,),
    }


def _softcap(_H: int, _N: int) -> dict[str, Any]:
    return {"mask_mod": mods.causal, "score_mod": mods.softcap(50.0), "score_mod_vjp": mods.softcap_vjp(50.0)}


# Each makes options for H heads and N tokens.
FORMS: Mapping[str, Callable[[int, int], dict[str, Any]]] = MappingProxyType(
    {
        "causal": _causal,
        "sliding": _sliding,
        "dilated": _dilated,
        "global": _global,
        "bigbird": _bigbird,
        "groups": _groups,
        "documents": _documents,
        "prefix-lm": _prefix,
        "alibi": _alibi,
        "softcap": _softcap,
    }
)
DEFAULT_SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(FORMS, (4, 16, 4096, 64)),
        "sliding": (1, 16, 32768, 128),
        "bigbird": (1, 16, 16384, 64),
        "documents": (1, 16, 16384, 128),
    }
)


def form_of(name: str, H: int, N: int) -> Form:
    """Return one of `FORMS` for H heads and N tokens.

    >>> form_of("alibi", 2, 16).aux[0].tolist()
    [0.0625, 0.00390625]
    """
    options = FORMS[name](H, N)
    return Form(name, options, options.pop("aux", ()))


def users_form(target: str) -> Form:
    """Return the form of ``FILE:FUNCTION``, a mask or, if its first argument is `score`, a score.

    The gradient of a score is the function with ``_vjp`` behind its name.

    Raises
    ------
    click.UsageError
        If the file does not import, or has no such function, or it reads arrays, of which there are none.
    """
    import inspect
    import runpy

    from cli.foreign import untrusted

    path, _, name = target.rpartition(":")
    if not path:
        raise click.UsageError(f"--mod is FILE:FUNCTION, got {target!r}")
    with untrusted(target, "--mod"):
        scope = runpy.run_path(path)
    function = scope.get(name)
    if not callable(function):
        raise click.UsageError(f"--mod: {path} has no function {name!r}")
    parameters = list(inspect.signature(function).parameters)
    is_score = parameters[:1] == ["score"]
    if len(parameters) != 4 + is_score:
        wanted = (
            f"{name}(b, h, i, j) of a mask, {name}(score, b, h, i, j) of a score, its first argument so named"
        )
        raise click.UsageError(f"--mod: expected {wanted}, got {name}({', '.join(parameters)})")
    if not is_score:
        return Form(name, {"mask_mod": function})
    gradient = scope.get(f"{name}_vjp")
    if gradient is None:
        return Form(name, {"score_mod": function})
    return Form(name, {"score_mod": function, "score_mod_vjp": gradient})
