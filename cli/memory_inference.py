"""``frugal memory inference``: what serving a model holds, how many sequences fit, how long tokens take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options
from cli.parameters import BYTES, COUNT, COUNTS, HARDWARE, MODEL, ListOf, Number
from cli.quantities import bytes_text, time_text
from cli.result import Column, Result, Row

if TYPE_CHECKING:
    from memsim.inference import Inference, Serving

__all__ = ["inference_command"]

SHARE = Number(0.0, 1.0, min_open=True)
PRECISION = "bf16"
INPUTS = ("model", "weights", "cache", "tensor", "batch", "prompt")


@click.command(
    "inference",
    epilog="""\b
Examples:
  frugal memory inference --model llama-2-7b --hardware a100-80gb --prompt 1024,4096 --batch 1,16
  frugal memory inference --model llama-2-70b --tp 8 --weights bf16,nf4 --generated 512 --explain
  frugal memory inference --model llama-2-70b --tp 8 --draft llama-2-7b --alpha 0.8 --gamma 4""",
    short_help="Weights, cache, batch limit, time of serving.",
)
@click.option("--model", "models", type=ListOf(MODEL), default=(), help="Models that memsim describes.")
@click.option(
    "--config",
    "configs",
    type=click.Path(),
    multiple=True,
    help="config.json of a model, or the directory with it; may be repeated.",
)
@click.option(
    "--hardware", type=HARDWARE, default="a100-80gb", show_default=True, help="On which accelerator."
)
@click.option("--tp", type=COUNTS, default="1", show_default=True, help="Tensor-parallel ranks.")
@click.option("--batch", type=COUNTS, default="1", show_default=True, help="Sequences at a time.")
@click.option("--prompt", type=COUNTS, default="1024", show_default=True, help="Tokens of a prompt.")
@click.option("--generated", type=COUNT, default=256, show_default=True, help="Tokens of an answer.")
@click.option(
    "--weights", default="bf16", show_default=True, help="Formats of weights: bf16,int8,nf4,q4_k,..."
)
@click.option("--cache", default="bf16", show_default=True, help="Formats of the cache: bf16,fp8,...")
@click.option(
    "--precision",
    default=PRECISION,
    show_default=True,
    help="Whose peak rate products reach, whatever weights are held in.",
)
@click.option("--capacity", type=BYTES, help="Memory that may be filled.  [default: all of an accelerator's]")
@click.option("--latency", type=Number(0.0, 1.0), default=0.0, help="Seconds a message.")
@click.option("--compute", type=SHARE, default=1.0, help="Share of the peak rate that products reach.")
@click.option("--memory", type=SHARE, default=1.0, help="Share of the memory bandwidth reached.")
@click.option("--network", type=SHARE, default=1.0, help="Share of the links' bandwidth reached.")
@click.option("--draft", type=MODEL, help="A smaller model that drafts, served alike.")
@click.option("--alpha", type=Number(0.0, 1.0), default=0.8, help="Its acceptance rate.")
@click.option("--gamma", type=click.IntRange(0), default=4, help="Tokens that it drafts a pass.")
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options(plot=True)
def inference_command(
    models: tuple[str, ...],
    configs: tuple[str, ...],
    hardware: str,
    tp: tuple[int, ...],
    batch: tuple[int, ...],
    prompt: tuple[int, ...],
    generated: int,
    weights: str,
    cache: str,
    precision: str,
    capacity: int | None,
    latency: float,
    compute: float,
    memory: float,
    network: float,
    draft: str | None,
    alpha: float,
    gamma: int,
    explain: bool,
) -> Result:
    """Give the memory of a rank, the batch limit, time to the first token and of a step of decoding.

    Times are lower bounds as long as every efficiency is 1; those of a batch that does not fit are what it
    would take.  With --draft, also what speculative decoding gains on this hardware at this batch, and memory
    and limit of both models together.
    """
    from memsim.formats.huggingface import read_model
    from memsim.inference import Serving, inference, served_speculation

    described: list[Any] = [*models, *map(read_model, configs)]
    if not described:
        raise click.UsageError("expected --model or --config")
    rows: list[dict[str, Any]] = []
    found: list[Inference] = []
    names = [text.strip() for text in weights.split(",")], [text.strip() for text in cache.split(",")]
    for model, held, kept, ranks, many, tokens in itertools.product(described, *names, tp, batch, prompt):
        one = Serving(
            model, hardware, ranks, many, tokens, generated, held, kept, precision, 1, capacity,
            latency, compute, memory, network,
        )  # fmt: skip
        served = inference(one)
        found.append(served)
        row = _row(one, served)
        if draft:
            beside = inference(replace(one, model=draft))
            gain = served_speculation(one, draft, alpha=alpha, gamma=gamma)
            row |= _beside(one, served, beside) | {"speedup": float(gain.total)}
        rows.append(row)
    details: list[str] = []
    for row, served in zip(rows, found, strict=True) if explain else ():
        details += ["", ", ".join(f"{key} {row[key]}" for key in INPUTS)]
        details += [f"  {item.explain()}" for item in served.quantities.values()]
    return Result(
        rows,
        _columns(rows),
        sources=list(dict.fromkeys(item.source for one in found for item in one.quantities.values())),
        details=details,
        draw=lambda axes: _draw(axes, rows),
    )


def _row(one: Serving, served: Inference) -> dict[str, Any]:
    def of(name: str) -> float:
        return float(served.value(name))

    return {
        "model": one.model if isinstance(one.model, str) else one.model.name,
        "weights": one.weights, "cache": one.cache, "precision": one.precision, "tensor": one.tensor,
        "batch": one.batch, "prompt": one.prompt, "generated": one.generated,
        "token_bytes": of("token"), "weights_bytes": of("weights"), "cache_bytes": of("cache"),
        "memory_bytes": of("memory"), "batch_limit": max(0, int(served.value("limit"))),
        "fits": served.value("limit") >= one.batch,
        "prefill_s": of("prefill"), "decode_s": of("decode"), "answer_s": of("answer"),
        "tokens_per_s": of("rate"), "decode_bound": served.bound["weights_step"],
    }  # fmt: skip


def _beside(one: Serving, served: Inference, draft: Inference) -> dict[str, Any]:
    """Return the memory of a target and its draft on one rank, which work in turns, and what fits then."""
    held = {name: served.value(name) + draft.value(name) for name in ("weights", "cache")}
    working = max(served.value("working"), draft.value("working"))
    left = served.value("capacity_left") - draft.value("weights") - (working - served.value("working"))
    limit = left * one.batch / held["cache"]
    return {
        "draft_weights_bytes": float(draft.value("weights")),
        "draft_cache_bytes": float(draft.value("cache")),
        "memory_bytes": float(sum(held.values()) + working),
        "batch_limit": max(0, int(limit)),
        "fits": limit >= one.batch,
    }


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns; of the inputs, the model and what differs between rows."""
    shown = [key for key in INPUTS if key == "model" or len({row[key] for row in rows}) > 1]
    return [
        *(Column(key, right=key in ("tensor", "batch", "prompt")) for key in shown),
        *([] if rows[0]["precision"] == PRECISION else [Column("precision", "products in")]),
        Column("token_bytes", "cache a token", right=True, text=bytes_text),
        Column("weights_bytes", "weights", right=True, text=bytes_text),
        Column("cache_bytes", "cache", right=True, text=bytes_text),
        Column("memory_bytes", "memory a rank", right=True, text=bytes_text),
        Column("batch_limit", "batch at most", right=True),
        *([] if all(row["fits"] for row in rows) else [Column("fits")]),
        Column("prefill_s", "first token", right=True, text=time_text),
        Column("decode_s", "each further", right=True, text=time_text),
        Column("tokens_per_s", "tokens/s", right=True, text=lambda value: f"{value:.4g}"),
        Column("decode_bound", "decoding is bound by"),
        *(
            [Column("speedup", "drafts gain", right=True, text=lambda v: f"{v:.2f}x")]
            if "speedup" in rows[0]
            else []
        ),
    ]


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    """Draw tokens a second of all sequences against the time of one token, a line for each set-up."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        name = ", ".join(str(row[key]) for key in INPUTS if key != "batch")
        lines.setdefault(name, []).append(row)
    for label, points in lines.items():
        points = sorted(points, key=lambda row: row["batch"])
        axes.plot(
            [p["decode_s"] for p in points], [p["tokens_per_s"] for p in points], marker="o", label=label
        )
    axes.set(
        xscale="log", yscale="log", xlabel="time of a token / s", ylabel="tokens a second, all sequences"
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
