"""``frugal redundancy``: how few directions the weights of a model need, beside what chance would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import click

from cli.output import output_options
from cli.parameters import COUNTS_FROM_0
from cli.result import Column, Result, Row, View

if TYPE_CHECKING:
    from refimpl.numerics import FloatArray
    from refimpl.transformer.redundancy import Method, Pairing

__all__ = ["command"]

SHARES = (50, 90, 99)
KINDS = {"q": "Q, K", "k": "Q, K", "v": "V, O", "o": "V, O", "in": "FFN in", "out": "FFN out"}
MIXED = "two kinds"
COLORS = {
    MIXED: "tab:gray",
    "Q, K": "tab:blue",
    "V, O": "tab:orange",
    "FFN in": "tab:green",
    "FFN out": "tab:red",
}


class Curve(NamedTuple):
    """The curve of one block or of a pair, and that of a random matrix of its shape."""

    layer: int
    blocks: tuple[str, ...]
    shape: tuple[int, int]
    found: FloatArray
    random: FloatArray


@click.command(
    epilog="""\b
Examples:
  frugal redundancy --model path/to/all-MiniLM-L6-v2
  frugal redundancy --model path/to/all-MiniLM-L6-v2 --plot redundancy.png
  frugal redundancy --model path/to/bert --layers 0,11 --method svd --pairing rows --json""",
    short_help="Redundancy of a model's weights.",
)
@click.option(
    "--model",
    "model",
    type=click.Path(exists=True, file_okay=False),
    required=True,
    help="Directory of a BERT: config.json and model.safetensors.",
)
@click.option(
    "--layers", type=COUNTS_FROM_0, show_default="all", help="Layers to look at, the first being 0."
)
@click.option(
    "--method",
    type=click.Choice(("pca", "svd")),
    default="pca",
    show_default=True,
    help="Whether the mean of its rows is taken off each column (pca) or not (svd).",
)
@click.option(
    "--pairing",
    type=click.Choice(("columns", "rows")),
    default="columns",
    show_default=True,
    help="Whether the blocks of a pair stand side by side or one above the other.",
)
@output_options(plot=True)
def command(model: str, layers: tuple[int, ...] | None, method: str, pairing: str) -> Result:
    """Give the number of principal components that hold 50, 90 and 99 % of the variance of weight blocks.

    Each layer is cut into square blocks, Q, K, V, O and those of the feed-forward matrices; each block is
    also paired with the next one.  Beside each count stands that of a random matrix of the same shape, by
    Marchenko and Pastur's law: fewer than that is redundancy, as many is chance.
    """
    from refimpl.transformer.redundancy import rank_for

    curves = list(_curves(model, layers, cast("Method", method), cast("Pairing", pairing)))
    rows = [
        {
            "layer": curve.layer,
            "blocks": list(curve.blocks),
            "rows": curve.shape[0],
            "columns": curve.shape[1],
            "components": len(curve.found) - 1,
            **{f"rank_{share}": rank_for(curve.found, share / 100) for share in SHARES},
            **{f"random_rank_{share}": rank_for(curve.random, share / 100) for share in SHARES},
        }
        for curve in curves
    ]
    columns = (
        Column("layer", right=True),
        Column("blocks", text=" + ".join),
        *(
            Column(f"{before}rank_{share}", f"{title} {share} %", right=True)
            for share in SHARES
            for before, title in (("", "for"), ("random_", "random"))
        ),
    )
    single = [row for row, curve in zip(rows, curves, strict=True) if len(curve.blocks) == 1]
    pairs = [row for row, curve in zip(rows, curves, strict=True) if len(curve.blocks) == 2]
    return Result(
        rows,
        columns,
        totals={"single_blocks": len(single), "pairs": len(pairs)},
        views=[
            View(f"{len(single)} single blocks: components that hold 50, 90, 99 %", columns, single),
            View(f"{len(pairs)} pairs, each block with the next, along {pairing}", columns, pairs),
        ],
        sources=[
            "Ren et al. 2022, arXiv:2205.10036, Figure 1",
            "Marchenko & Pastur 1967, doi:10.1070/SM1967v001n04ABEH001994",
        ],
        details=[
            f"{name}: on average {_mean_text(part)}"
            for name, part in (("single blocks", single), ("pairs", pairs))
            if part
        ],
        draw=lambda axes: _draw(axes, curves),
    )


def _curves(model: str, layers: tuple[int, ...] | None, method: Method, pairing: Pairing) -> Iterator[Curve]:
    """Yield the curves of the single blocks of each layer, and then those of its pairs."""
    from refimpl.checkpoint import load_tensors, read_config
    from refimpl.transformer.bert import bert_config, bert_params
    from refimpl.transformer.redundancy import explained_variance, layer_blocks, random_matrix_curve

    config = bert_config(read_config(model))
    chosen = range(config.layers) if layers is None else layers
    if max(chosen, default=0) >= config.layers:
        raise click.BadParameter(
            f"the model has layers 0 to {config.layers - 1}, got {max(chosen)}", param_hint="--layers"
        )
    params = bert_params(load_tensors(model), config)
    D = config.width
    pair = (D, 2 * D) if pairing == "columns" else (2 * D, D)
    by_chance = {shape: random_matrix_curve(*shape) for shape in ((D, D), pair)}
    for layer in chosen:
        names = ("w_q", "w_k", "w_v", "w_o", "w_1", "w_2")
        blocks = layer_blocks({name: params[f"layers.{layer}.{name}"] for name in names})
        for name, block in blocks.items():
            found = explained_variance(block, method=method)
            yield Curve(layer, (name,), (D, D), found, by_chance[D, D])
        for two in pairwise(blocks):
            found = explained_variance(blocks[two[0]], blocks[two[1]], method=method, pairing=pairing)
            yield Curve(layer, two, pair, found, by_chance[pair])


def _mean_text(rows: Sequence[Row]) -> str:
    """Return the means over rows in words."""

    def mean(key: str) -> float:
        return float(sum(row[key] for row in rows)) / len(rows)

    return ", ".join(
        f"{mean(f'rank_{share}'):.0f} components for {share} % (random {mean(f'random_rank_{share}'):.0f})"
        for share in SHARES
    )


def _kind(blocks: tuple[str, ...]) -> str:
    """Return what sort of blocks a curve is of."""
    kinds = {KINDS[name.partition("_")[0]] for name in blocks}
    return kinds.pop() if len(kinds) == 1 else MIXED


def _draw(axes: Any, curves: Sequence[Curve]) -> None:
    """Draw the lecture's Figure 1: single blocks on the left, pairs on the right, chance in black."""
    figure = axes.figure
    axes.remove()
    panels = figure.subplots(1, 2, sharey=True)
    for panel, count, title in zip(panels, (1, 2), ("single blocks", "pairs of blocks"), strict=True):
        for kind, color in COLORS.items():
            shown = [c.found for c in curves if len(c.blocks) == count and _kind(c.blocks) == kind]
            for index, curve in enumerate(shown):
                label = "" if index else kind
                panel.plot(curve, color=color, linewidth=0.7, alpha=0.5, label=label)
        chance = next((c.random for c in curves if len(c.blocks) == count), [0.0, 1.0])
        panel.plot(chance, color="black", linewidth=1.6, linestyle="--", label="random matrix")
        panel.set(title=title, xlabel="principal components", xlim=(0, len(chance) - 1), ylim=(0, 1.01))
        panel.grid(visible=True, alpha=0.3)
        for line in panel.legend(loc="lower right", fontsize="small").get_lines():
            line.set(alpha=1.0, linewidth=1.6)
    panels[0].set_ylabel("explained variance")
