"""``frugal apply``: load, apply, measure, save; the rows of the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli.applied.measure import compare
from cli.applied.model import Checkpoint, Cost, Model, load, texts_of
from cli.applied.picture import draw
from cli.applied.techniques import Applicable
from cli.output import progress
from cli.quantities import bytes_text, flop_text
from cli.result import Column, Result, View
from refimpl.checkpoint import CheckpointError, save
from refimpl.errors import OptionError, UnsupportedError
from refimpl.transformer.bert import bert_tensors

__all__ = ["apply_all", "refuse_to_save"]

# What `save` takes along, where it is there.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "added_tokens.json",
)  # fmt: skip


def apply_all(
    chosen: Sequence[Applicable], directory: str, sentences: Sequence[str], save_to: str | None = None
) -> Result:
    """Return what each technique saves and costs on a checkpoint.

    Parameters
    ----------
    chosen : sequence of Applicable
        Techniques.
    directory : str
        A BERT with its tokenizer.
    sentences : sequence of str
        At least two: the first, third, ... are judged, the others are for calibration.
    save_to : str, optional
        Where to write the model that the one technique made.

    Raises
    ------
    OptionError
        If there are fewer than two sentences.
    CheckpointError, UnsupportedError, BackendUnavailableError
        As `load`; and if the result cannot be saved.
    """
    if len(sentences) < 2:
        raise OptionError(
            f"sentences: expected at least 2, one to judge and one to calibrate on, got {len(sentences)}"
        )
    if save_to is not None:
        refuse_to_save(chosen[0], save_to)
    checkpoint = load(directory)
    texts = texts_of(checkpoint, sentences)
    judged, calibration = texts[::2], texts[1::2]
    lengths = [len(ids) for ids in judged]
    rows = []
    for one in progress(list(chosen), "apply", lambda one: one.name):
        before, after = one.apply(checkpoint.model, calibration)
        moved = compare(before, after, judged)
        rows.append(_row(one, before, after, lengths, moved._asdict()))
        if save_to is not None:
            _save(checkpoint, after, save_to)
    whole = checkpoint.model.cost(lengths)
    totals = {
        "layers": len(checkpoint.model.layers),
        "dtype": next(iter(checkpoint.model.tables.values())).dtype.name,
        "judged_sentences": len(judged), "judged_tokens": sum(lengths),
        "calibration_sentences": len(calibration), "calibration_tokens": sum(map(len, calibration)),
        "model_parameters": whole.parameters, "model_bytes": whole.nbytes, "model_flops": whole.flops,
        "table_bytes": whole.nbytes - checkpoint.model.block_cost(lengths).nbytes,
    }  # fmt: skip
    return Result(
        rows,
        SAVED + COST,
        totals=totals,
        views=[
            View("what it saves in the blocks, after and share of before", SAVED, rows),
            View("what it costs", COST, rows),
        ],
        details=[*_details(totals, rows), *([f"written: {save_to}"] if save_to else [])],
        draw=lambda axes: draw(axes, rows),
    )


def _row(
    one: Applicable, before: Model, after: Model, lengths: Sequence[int], moved: dict[str, Any]
) -> dict[str, Any]:
    old, new = before.block_cost(lengths), after.block_cost(lengths)
    counted = {
        f"{name}_{side}": value
        for side, cost in (("before", old), ("after", new))
        for name, value in zip(("parameters", "bytes", "flops"), cost, strict=True)
    }
    return {
        "technique": one.name, "with": list(one.with_), "setting": one.setting, **counted,
        "parameters_share": _share(old, new, 0), "bytes_share": _share(old, new, 1),
        "flops_share": _share(old, new, 2),
        "model_bytes_before": before.cost(lengths).nbytes, "model_bytes_after": after.cost(lengths).nbytes,
        "cosine_mean": moved["cosine_mean"], "cosine_least": moved["cosine_least"],
        "relative_error_by_layer": moved["errors"],
        "relative_error_last": moved["errors"][-1] if moved["errors"] else None,
        "rank_correlation": moved["rank_correlation"],
        "calibrated": one.calibrated, "needs": one.needs, "saveable": not one.unsaveable,
    }  # fmt: skip


def _share(old: Cost, new: Cost, place: int) -> float:
    return new[place] / old[place] if old[place] else 1.0


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _millions(value: int) -> str:
    return f"{value / 1e6:.2f} M"


def _decimals(value: float | None) -> str:
    """Return a cosine or a correlation; what is not 1 does not look like it."""
    if value is None:
        return ""
    text = f"{value:.4f}"
    return text if text != "1.0000" or value == 1 else "> 0.9999"


def _errors(values: Sequence[float]) -> str:
    return "  ".join(f"{value:.2g}" for value in values)


SAVED = (
    Column("technique"),
    Column("setting"),
    Column("bytes_after", "bytes", right=True, text=bytes_text),
    Column("bytes_share", "of before", right=True, text=_percent),
    Column("parameters_after", "parameters", right=True, text=_millions),
    Column("parameters_share", "of before", right=True, text=_percent),
    Column("flops_after", "operations", right=True, text=flop_text),
    Column("flops_share", "of before", right=True, text=_percent),
)
COST = (
    Column("technique"),
    Column("cosine_mean", "mean cosine", right=True, text=_decimals),
    Column("cosine_least", "least cosine", right=True, text=_decimals),
    Column("rank_correlation", "rank correlation", right=True, text=_decimals),
    Column("relative_error_by_layer", "relative error after each layer", text=_errors),
)


def _details(totals: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what the tables do not say: of what the shares are, what was judged, what a saving takes."""
    blocks, tables = totals["model_bytes"] - totals["table_bytes"], totals["table_bytes"]
    lines = [
        f"the model: {totals['layers']} blocks, {bytes_text(blocks)} in {totals['dtype']}, and tables of "
        f"{bytes_text(tables)}, "
        f"which no technique here touches; {flop_text(totals['model_flops'])} on the judged sentences",
        f"judged: sentences 1, 3, 5, ..., {totals['judged_sentences']} of {totals['judged_tokens']} tokens; "
        f"for calibration: the others, {totals['calibration_tokens']} tokens",
    ]
    calibrated = [row["technique"] for row in rows if row["calibrated"]]
    if calibrated:
        lines.append(f"calibrated: {', '.join(calibrated)}")
    for needed in dict.fromkeys(row["needs"] for row in rows if row["needs"]):
        names = ", ".join(row["technique"] for row in rows if row["needs"] == needed)
        lines.append(f"operations are those on weights that are not 0; to save them takes {needed}: {names}")
    return lines


# Saving


def refuse_to_save(one: Applicable, save_to: str) -> None:
    """Refuse what `_save` could not write, before anything is computed.

    Raises
    ------
    UnsupportedError
        If no checkpoint can hold the result.
    CheckpointError
        If something stands there already, or there is no directory to put it into.
    """
    if one.unsaveable:
        raise UnsupportedError(f"--save: {one.name} has no checkpoint: {one.unsaveable}")
    target = Path(save_to)
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"--save: {save_to} exists already; give the name of a new directory")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"--save: there is no directory {target.absolute().parent}")


def _save(checkpoint: Checkpoint, model: Model, save_to: str) -> None:
    """Write the model as its blocks compute it, weights dequantised, tokenizer and all."""
    params = dict(model.tables)
    for index, layer in enumerate(model.layers):
        params |= {f"layers.{index}.{name}": array for name, array in layer.stored_weights().items()}
    hidden = {params[name].shape[1] for name in params if name.endswith(".w_1")}
    config = dict(checkpoint.config)
    if hidden:
        (config["intermediate_size"],) = hidden
    files = {
        name: (Path(checkpoint.directory) / name).read_bytes()
        for name in TOKENIZER_FILES
        if (Path(checkpoint.directory) / name).is_file()
    }
    save(save_to, bert_tensors(params, checkpoint.tensors, model.config), config=config, files=files)
