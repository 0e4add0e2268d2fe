"""``frugal bench``: how fast our kernels are on this GPU, beside others, and how references grow with N."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cli.bench_checks import check_names, check_options, check_shapes, check_simulated, check_simulation
from cli.bench_problems import AXES, DIRECTIONS, Wanted, problems_of, specimens
from cli.bench_result import bench_result, finished, with_times_apart
from cli.commands.env import why_not
from cli.flexible_forms import FORMS, users_form
from cli.foreign import users_functions
from cli.growth_methods import NAMES
from cli.output import output_options, progress, say
from cli.parameters import COUNTS, DTYPES, HARDWARE, ListOf
from cli.projections import NAMES as PROJECTIONS
from cli.projections import layers_of
from cli.result import Result

if TYPE_CHECKING:
    from memsim.hardware import Hardware

__all__ = ["command"]

DEFAULT_TOKENS = (16, 4096)
GROWTH = "growth"
# What belongs to kernels, and what to growth; an option of the other kind is refused.
OWN = {
    "kernels": (
        *("backend", "shapes", "dtypes", "causal", "direction", "tier", "rivals", "chosen", "hardware"),
        *("models", "tokens", "merge", "forms", "mods", "splits"),
    ),
    GROWTH: ("methods", "sizes"),
}
ROUNDS, GROWTH_ROUNDS = 9, 3


class _Shape(click.ParamType):  # type: ignore[type-arg]
    """Sizes with commas between them."""

    name = "B,H,N,D or B,H,Hkv,N,D or M,K,N or B,H,Hkv,Tk,D"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        return COUNTS.convert(value, param, ctx)


@click.command(
    epilog="""\b
Examples:
  frugal bench attention --rivals
  frugal bench attention --tier hopper --dtype fp16,bf16 --rivals --plot attention.svg
  frugal bench attention --shape 4,32,8,4096,128 --causal --rivals
  frugal bench int8 --shape 4096,4096,4096 --rivals --json
  frugal bench int8 --model llama-2-70b --tokens 16,4096 --dtype bf16 --rivals
  frugal bench int8 --model llama-2-70b --merge k,v --merge gate,up --rivals
  frugal bench weight-only --rivals
  frugal bench int8-attention --no-causal
  frugal bench flexible --form sliding --form bigbird --pass both --rivals
  frugal bench flexible --mod mymask.py:window --shape 1,16,8192,128 --rivals
  frugal bench decode --shape 8,32,8,32768,128 --rivals
  frugal bench attention --backend cudasim
  frugal bench growth --plot growth.svg
  frugal bench growth --method full,mamba --n 1024,2048,4096,8192""",
    short_help="Kernels timed on this GPU; growth with N.",
)
@click.argument("what", type=click.Choice((*AXES, GROWTH)))
@click.option(
    "--backend",
    type=click.Choice(("cuda", "cudasim")),
    default="cuda",
    show_default=True,
    help="Where to run.",
)
@click.option(
    "--shape",
    "shapes",
    type=_Shape(),
    multiple=True,
    help="Sizes of a problem; may be repeated.  [default: a few usual ones]",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Of int8, on a GPU: the linear layers of a model's block; may be repeated.",
)
@click.option("--tokens", type=COUNTS, help="Of int8 with --model: rows.  [default: 16,4096]")
@click.option(
    "--merge",
    type=ListOf(click.Choice(PROJECTIONS)),
    multiple=True,
    help="Of int8 with --model: projections as one layer, beside them; may be repeated.",
)
@click.option(
    "--form", "forms", type=click.Choice(tuple(FORMS)), multiple=True, help="Of flexible.  [default: all]"
)
@click.option(
    "--mod", "mods", multiple=True, metavar="FILE:FUNCTION", help="Of flexible: your own mask or score."
)
@click.option(
    "--splits",
    type=click.IntRange(1, 65_535),
    help="Of decode: parts of the cache.  [default: what fills the GPU]",
)
@click.option(
    "--dtype", "dtypes", type=DTYPES, help="Formats, of int8 those of x and output.  [default: float16]"
)
@click.option("--causal/--no-causal", default=None, help="With a causal mask or without.  [default: both]")
@click.option(
    "--pass",
    "direction",
    type=click.Choice(tuple(DIRECTIONS)),
    help="Which pass of attention or flexible.  [default: fwd]",
)
@click.option("--tier", help="Time this tier of ours only, such as portable, ampere, hopper.  [default: all]")
@click.option("--rivals", is_flag=True, help="Time PyTorch's functions in the same process, if installed.")
@click.option("--rival", "chosen", multiple=True, help="Only those with this in their name; may be repeated.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    help=f"Measurements of each.  [default: {ROUNDS}, of growth {GROWTH_ROUNDS}]",
)
@click.option("--hardware", type=HARDWARE, help="Whose ceilings count.  [default: found by the GPU's name]")
@click.option(
    "--method", "methods", type=ListOf(click.Choice(NAMES)), help="What grows.  [default: all of them]"
)
@click.option(
    "--n",
    "sizes",
    type=COUNTS,
    help="Lengths of growth; K is 1000.  [default: 1024 to 16384 for full, 4096 to 65536 for the others]",
)
@output_options(plot=True)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    what: str,
    backend: str,
    shapes: tuple[tuple[int, ...], ...],
    models: tuple[str, ...],
    tokens: tuple[int, ...] | None,
    merge: tuple[tuple[str, ...], ...],
    forms: tuple[str, ...],
    mods: tuple[str, ...],
    splits: int | None,
    dtypes: tuple[str, ...] | None,
    causal: bool | None,
    direction: str | None,
    tier: str | None,
    rivals: bool,
    chosen: tuple[str, ...],
    rounds: int | None,
    hardware: str | None,
    methods: tuple[str, ...] | None,
    sizes: tuple[int, ...] | None,
) -> Result:
    """Time kernels on this GPU: only those that are right, by CUDA events, medians of rounds in turn.

    Each function is first held to its definition, on small cases and on rows of the one that is timed; one
    that fails is not timed, and the exit code is 1.  Bytes are those of inputs and outputs moved once.
    Operations of attention are 4 B H N² D, of its backward pass 10, halved under a causal mask.  The
    simulator can run the same checks on small shapes, and its seconds say nothing about a GPU.

    With --merge, projections that read one input, such as k,v, are timed as one layer as well, which is what
    replace_linear(merge=) and merged_int8_linear of cuda_backend.torch_ops make of them.  Beside its time
    stands the sum of theirs.

    WHAT = weight-only is decoding: a few tokens times a weight in int8 or NF4, stored ahead.  The time of
    int8-attention has the codes in it, and the error against exact attention stands beside it.

    WHAT = flexible is attention with masks and scores written in Python, ready-made or your own; operations
    are those of live tiles of 128 x 128.  WHAT = decode is one query over a long cache, whole and in pages.

    WHAT = growth needs no GPU: it measures time and peak memory of the references against the length N, full
    attention beside sliding window, BigBird, linear attention and Mamba, and fits the power of N over the top
    four sizes.  If one is off theory by more than 0.15 the exit code is 1.
    """
    _refuse_others(ctx, what)
    if what == GROWTH:
        from cli.growth import growth_result

        return growth_result(methods or NAMES, sizes, rounds or GROWTH_ROUNDS)
    wanted = Wanted(shapes, dtypes, causal, direction, forms, splits=splits)
    check_options(what, wanted, models, tokens, merge, mods)
    from cli.contest import labels, result_rows, supply_of
    from memsim.hardware import hardware as find_hardware
    from refimpl import registry
    from refimpl.errors import BackendUnavailableError, UnsupportedError
    from refimpl.testing import dtype_named

    card = None if hardware is None else find_hardware(hardware)
    layers = tuple(each for name in models for each in layers_of(name, tokens or DEFAULT_TOKENS, merge))
    sizes_of_all = (*shapes, *(layer.shape for layer in layers))
    check_shapes(what, sizes_of_all)
    if backend == "cudasim":
        check_simulation(ctx)
        check_simulated(what, sizes_of_all)
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"  # numba reads it once, when it is first imported
    registry.load()
    wanted = wanted._replace(layers=layers, own_forms=tuple(map(users_form, mods)))
    named = chosen or ("",) * rivals
    with users_functions(mods, "--mod"):
        check_names(specimens(what, wanted), backend, tier, chosen)
    reason = why_not(backend)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend}: {reason}")
    for name in dtypes or ():
        try:
            dtype_named(name)
        except UnsupportedError as error:  # a package is missing, and nothing is wrong with the input
            raise BackendUnavailableError(str(error)) from None
    supply = supply_of(backend)
    card = None if backend == "cudasim" else card or _this_card()
    with users_functions(mods, "--mod"):
        problems = problems_of(what, backend, wanted)
    rows: list[dict[str, Any]] = []
    timed: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # of layers: each size once, whosever it is
    for problem in progress(problems, "bench", lambda problem: f"{problem.operation} {problem.shape}"):
        size = problem.operation, tuple(problem.shape), problem.dtype
        if problem.layer is not None and size in timed:
            found = [row | labels(problem.layer) for row in timed[size]]
        else:
            with users_functions(mods, "--mod"):
                found = timed[size] = result_rows(
                    problem, backend, supply, tier=tier, rivals=named, rounds=rounds or ROUNDS, card=card
                )
        found = with_times_apart(found, rows)
        rows += found
        say(finished(found))
    return bench_result(rows, problems, backend, card, tier)


def _refuse_others(ctx: click.Context, what: str) -> None:
    """Refuse options that say nothing about what is measured."""
    kind = GROWTH if what == GROWTH else "kernels"
    for other in set(OWN) - {kind}:
        for option in OWN[other]:
            if ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE:
                flag = next(item.opts[0] for item in ctx.command.params if item.name == option)
                raise click.UsageError(f"{flag} is no option of {what}, but of {other}")


def _this_card() -> Hardware | None:
    """Return the accelerator that the driver names, or None if it is none of the known ones."""
    from cuda_backend.timing import device_name
    from memsim.hardware import hardware as find_hardware
    from memsim.hardware import hardware_names

    found = recognised(device_name(), hardware_names())
    return None if found is None else find_hardware(found)


def recognised(device: str, names: Sequence[str]) -> str | None:
    """Return the one of `names` whose parts are all words of the driver's name of a GPU.

    >>> recognised("NVIDIA A100-SXM4-80GB", ["a100-40gb", "a100-80gb", "h200"])
    'a100-80gb'
    >>> recognised("NVIDIA L40S", ["l4", "l40s"])
    'l40s'
    >>> recognised("NVIDIA H100 80GB HBM3", ["a100-80gb", "h200"]) is None
    True
    """
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    matching = [name for name in names if words.issuperset(name.split("-"))]
    return matching[0] if len(matching) == 1 else None
