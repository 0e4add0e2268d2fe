"""``frugal io``: what an operation moves between HBM and the chip, exactly, and how long that takes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cli import attention_traffic, linear_traffic
from cli.output import output_options
from cli.parameters import COUNTS, COUNTS_FROM_0, DTYPES, HARDWARE, PRECISIONS, SIZES, ListOf
from cli.result import Result

if TYPE_CHECKING:
    from memsim.hardware import Hardware

__all__ = ["command"]

# What each operation takes besides the options of all.
_OWN = {
    "attention": ("n", "d", "heads", "batch", "sram_bytes", "direction", "accumulator"),
    "linear": ("tokens", "in_features", "out_features", "outliers"),
}
_ALGORITHMS = {"attention": attention_traffic.ALGORITHMS, "linear": linear_traffic.ALGORITHMS}


@click.command(
    epilog="""\b
Examples:
  frugal io --n 1024 --d 64 --heads 16 --batch 64 --hardware a100-40gb
  frugal io --n 1024 --d 64 --sram-bytes 48KiB,96KiB,192KiB --algorithm flash1 --plot io.svg
  frugal io --n 1K --d 64 --algorithm flash1 --explain
  frugal io --op linear --tokens 1,4096 --algorithm fp16,int8 --hardware h200""",
    short_help="HBM traffic of attention and of linear layers.",
)
@click.option(
    "--op", type=click.Choice(tuple(_OWN)), default="attention", show_default=True, help="What is counted."
)
@click.option("--n", type=COUNTS, default="1024", show_default=True, help="Sequence length; K is 1000.")
@click.option("--d", type=COUNTS, default="64", show_default=True, help="Width of a head.")
@click.option("--heads", type=COUNTS, default="16", show_default=True, help="Query heads.")
@click.option("--batch", type=COUNTS, default="1", show_default=True, help="Sequences.")
@click.option(
    "--tokens", type=COUNTS, default="4096", show_default=True, help="Rows of a linear layer's input."
)
@click.option("--in-features", type=COUNTS, default="4096", show_default=True, help="Its columns.")
@click.option("--out-features", type=COUNTS, default="4096", show_default=True, help="Columns of the output.")
@click.option(
    "--outliers",
    type=COUNTS_FROM_0,
    help="Input columns that int8 leaves in floating point; 0: looked for and not found.  "
    "[default: not looked for]",
)
@click.option(
    "--dtype",
    type=DTYPES,
    default="float16",
    show_default=True,
    help="Format of Q, K, V and O, or of a layer's input and output.",
)
@click.option(
    "--sram-bytes",
    type=SIZES,
    help="On-chip memory that sets the block sizes.  [default: that of the hardware, else 192KiB]",
)
@click.option(
    "--algorithm",
    type=ListOf(click.Choice([name for names in _ALGORITHMS.values() for name in names])),
    help="Of attention, standard: Algorithms 0 and 3; flash1: 1 and 4 of FlashAttention; flash2: of "
    "FlashAttention-2, a formula that no reference counts.  Of linear, fp16: one product in --dtype; int8: "
    "LLM.int8() with the int32 product and the outliers in steps of their own, as released; int8_fused: one "
    "product that writes once.  [default: all]",
)
@click.option(
    "--pass",
    "direction",
    type=click.Choice(tuple(attention_traffic.DIRECTIONS)),
    default="both",
    show_default=True,
    help="Which pass of attention.",
)
@click.option(
    "--accumulator",
    type=click.Choice(("input", "float32", "float64")),
    default="input",
    show_default=True,
    help="Format of O and dQ between tiles: that of Q, as in the paper, or wider, as in the first kernels.",
)
@click.option("--hardware", type=HARDWARE, help="Also give times on this card.")
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options(plot=True)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    op: str,
    dtype: tuple[str, ...],
    algorithm: tuple[str, ...] | None,
    hardware: str | None,
    explain: bool,
    **own: Any,
) -> Result:
    """Count the bytes that an operation moves between HBM and the chip, exactly as its algorithm is printed.

    Options take lists; every combination gives a row.  Caches are not modelled, and a causal mask skips
    nothing, so counters on a GPU stay below.  Times are lower bounds: bytes at full bandwidth, and matrix
    products at peak.
    """
    chosen = _chosen(ctx, op, algorithm)
    card = None
    if hardware is not None:
        from memsim.hardware import hardware as find_hardware

        card = find_hardware(hardware)
    if op == "linear":
        return _linear(chosen, dtype, card, explain, **own)
    return _attention(chosen, dtype, card, explain, **own)


def _chosen(ctx: click.Context, op: str, algorithm: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the algorithms to count; refuse what belongs to another operation."""
    for name, options in _OWN.items():
        for option in options if name != op else ():
            if ctx.get_parameter_source(option) is ParameterSource.COMMANDLINE:
                flag = next(parameter.opts[0] for parameter in ctx.command.params if parameter.name == option)
                raise click.UsageError(f"{flag} belongs to --op {name}, not to --op {op}.")
    for name in algorithm or ():
        if name not in _ALGORITHMS[op]:
            raise click.UsageError(
                f"--algorithm {name} is not one of --op {op}: {', '.join(_ALGORITHMS[op])}."
            )
    return algorithm or _ALGORITHMS[op]


def _attention(
    algorithm: tuple[str, ...],
    dtype: tuple[str, ...],
    card: Hardware | None,
    explain: bool,
    *,
    n: tuple[int, ...],
    d: tuple[int, ...],
    heads: tuple[int, ...],
    batch: tuple[int, ...],
    sram_bytes: tuple[int, ...] | None,
    direction: str,
    accumulator: str,
    **_: Any,
) -> Result:
    sizes = sram_bytes or (card.sram_per_sm.value if card else attention_traffic.DEFAULT_SRAM,)
    wide = {"input": 0, "float32": 4, "float64": 8}[accumulator]
    return attention_traffic.attention_result(
        (
            attention_traffic.Attention(*combination, direction, wide or PRECISIONS[combination[4]][0])
            for combination in itertools.product(n, d, heads, batch, dtype, sizes, algorithm)
        ),
        card,
        explain,
    )


def _linear(
    algorithm: tuple[str, ...],
    dtype: tuple[str, ...],
    card: Hardware | None,
    explain: bool,
    *,
    tokens: tuple[int, ...],
    in_features: tuple[int, ...],
    out_features: tuple[int, ...],
    outliers: tuple[int, ...] | None,
    **_: Any,
) -> Result:
    combinations = itertools.product(tokens, in_features, out_features, outliers or (None,), dtype, algorithm)
    return linear_traffic.linear_result(
        (linear_traffic.Linear(*combination) for combination in combinations), card, explain
    )
