"""What ``frugal bench`` measures, by name: axes of shapes, usual shapes, and the problems that they make."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from cli.backward_problem import attention_backward_problem
from cli.decode_problems import decode_problems
from cli.flexible_forms import DEFAULT_SHAPES as FORM_SHAPES
from cli.flexible_forms import FORMS, Form
from cli.flexible_problems import flexible_problem
from cli.int8_attention_problems import int8_attention_problem
from cli.int8_problems import int8_problems
from cli.problems import Problem, attention_problem
from cli.projections import Layer
from cli.weight_only_problems import weight_only_problems

__all__ = ["AXES", "DEFAULT_SHAPES", "DIRECTIONS", "GROUPED", "Wanted", "problems_of", "specimens"]

AXES = {
    "attention": ("B", "H", "N", "D"),
    "int8": ("M", "K", "N"),
    "weight-only": ("M", "K", "N"),
    "int8-attention": ("B", "H", "N", "D"),
    "flexible": ("B", "H", "N", "D"),
    "decode": ("B", "H", "Hkv", "Tk", "D"),
}
GROUPED = ("attention", "int8-attention", "flexible")  # Hkv may stand behind H
DEFAULT_SHAPES: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = {
    ("attention", "cuda"): (
        *((64, 16, 1024, 64), (8, 16, 4096, 64), (4, 16, 4096, 128), (1, 16, 16384, 128), (4, 16, 4096, 256)),
        (4, 32, 8, 4096, 128),
        *((1, 32, N, D) for D in (64, 128) for N in (512, 1024, 2048)),
    ),
    ("attention", "cudasim"): ((1, 2, 24, 8),),
    ("int8", "cuda"): ((16, 4096, 4096), (256, 4096, 4096), (4096, 4096, 4096), (8192, 8192, 8192)),
    ("int8", "cudasim"): ((16, 32, 16),),
    ("weight-only", "cuda"): tuple(
        (M, K, N) for K, N in ((8192, 28672), (28672, 8192), (16384, 16384)) for M in (1, 4, 16)
    ),
    ("weight-only", "cudasim"): ((1, 256, 16),),
    ("int8-attention", "cuda"): ((1, 16, 8192, 128), (1, 16, 16384, 128), (4, 16, 8192, 128)),
    ("int8-attention", "cudasim"): ((1, 1, 12, 8),),
    ("flexible", "cudasim"): ((1, 2, 24, 8),),
    ("decode", "cuda"): ((1, 32, 8, 131072, 128), (8, 32, 8, 32768, 128), (64, 32, 8, 4096, 128)),
    ("decode", "cudasim"): ((2, 4, 2, 24, 8),),
}
DIRECTIONS = {
    "fwd": (attention_problem,),
    "bwd": (attention_backward_problem,),
    "both": (attention_problem, attention_backward_problem),
}
PASSES = {"fwd": (False,), "bwd": (True,), "both": (False, True)}


class Wanted(NamedTuple):
    """Options of the command that say what is measured; None or empty: the usual."""

    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] | None = None
    causal: bool | None = None
    direction: str | None = None
    forms: tuple[str, ...] = ()
    own_forms: tuple[Form, ...] = ()
    splits: int | None = None
    layers: tuple[Layer, ...] = ()


def problems_of(what: str, backend: str, wanted: Wanted) -> list[Problem]:
    """Return what is to be timed, for each format, shape and variant."""
    kinds, direction = wanted.dtypes or ("float16",), wanted.direction or "fwd"
    if what == "flexible":
        return [problem for kind in kinds for problem in _flexible(backend, kind, direction, wanted)]
    shapes = wanted.shapes or (() if wanted.layers else DEFAULT_SHAPES[what, backend])
    pairs = list(itertools.product(kinds, shapes))
    if what == "decode":
        return [p for kind, shape in pairs for p in decode_problems(shape, kind, wanted.splits)]
    if what == "weight-only":
        return [problem for kind, shape in pairs for problem in weight_only_problems(shape, kind)]
    if what == "int8":
        sized = [*((shape, None) for shape in shapes), *((layer.shape, layer) for layer in wanted.layers)]
        return [p for kind in kinds for shape, layer in sized for p in int8_problems(shape, kind, layer)]
    masks = (False, True) if wanted.causal is None else (wanted.causal,)
    return [
        problem(shape, kind, mask)
        for kind, shape in pairs
        for mask in masks
        for problem in ((int8_attention_problem,) if what == "int8-attention" else DIRECTIONS[direction])
    ]


def specimens(what: str, wanted: Wanted) -> list[Problem]:
    """Return the same at small shapes, cheap to make on any machine: functions have the same names at all."""
    return problems_of(what, "cudasim", wanted._replace(shapes=(), layers=()))


def _flexible(backend: str, kind: str, direction: str, wanted: Wanted) -> list[Problem]:
    """Return each form at its own shape, or at the shapes asked for; all forms if none is named."""
    names = wanted.forms or (() if wanted.own_forms else tuple(FORMS))

    def shapes(name: str) -> tuple[tuple[int, ...], ...]:
        if wanted.shapes or backend == "cudasim":
            return wanted.shapes or DEFAULT_SHAPES["flexible", backend]
        return (FORM_SHAPES.get(name, FORM_SHAPES["causal"]),)

    every: list[Form | str] = [*names, *wanted.own_forms]
    return [
        flexible_problem(form, shape, kind, backward=backward)
        for form in every
        for shape in shapes(form if isinstance(form, str) else form.name)
        for backward in PASSES[direction]
    ]
