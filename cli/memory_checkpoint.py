"""``frugal memory checkpoint``: the exact bytes of a checkpoint's tensors, from the headers of its files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from cli.output import output_options
from cli.quantities import bytes_text, count_text
from cli.result import Column, Result

__all__ = ["checkpoint_command"]


@click.command(
    "checkpoint",
    epilog="""\b
Examples:
  frugal memory checkpoint my/model
  frugal memory checkpoint my/model/model-00001-of-00002.safetensors --tensors --csv""",
    short_help="Exact bytes of a checkpoint's tensors.",
)
@click.argument("path", type=click.Path())
@click.option("--tensors", is_flag=True, help="A row for each tensor, not for each format of numbers.")
@output_options()
def checkpoint_command(path: str, tensors: bool) -> Result:
    """Read the headers of PATH, a .safetensors file or a directory with one or with an index and its shards.

    No data are read.  With a config.json beside the files, a line tells if it describes another number of
    parameters than they hold: scales of quantised weights and extra heads are in files only.
    """
    from memsim.formats.checkpoint_header import checkpoint_tensors, checkpoint_weights

    found = checkpoint_weights(path)
    held = {"tensors_bytes": found.totals["B"], "parameters": found.totals["parameters"]}
    if tensors:
        rows: list[dict[str, Any]] = [
            {
                "tensor": name,
                "format": entry.dtype,
                "shape": list(entry.shape),
                "parameters": math.prod(entry.shape),
                "tensor_bytes": entry.stop - entry.start,
            }
            for name, entry in checkpoint_tensors(path).items()
        ]
    else:
        formats = [term.name.removesuffix(" tensors") for term in found.terms if term.unit == "B"]
        rows = [
            {
                "format": name,
                "parameters": found[f"numbers in {name}"],
                "tensor_bytes": found[f"{name} tensors"],
            }
            for name in formats
        ]
    described, note = _described(Path(path), int(held["parameters"]))
    return Result(
        rows,
        (
            *((Column("tensor"), Column("shape")) if tensors else ()),
            Column("format"),
            Column("parameters", right=True, text=count_text),
            Column("tensor_bytes", "bytes", right=True, text=bytes_text),
        ),
        totals=held | described,
        sources=[f"{path}, headers"],
        details=[note] if note else [],
    )


def _described(path: Path, held: int) -> tuple[dict[str, Any], str]:
    """Return how many parameters the directory's config.json describes, and whether that is what is held."""
    if not (path / "config.json").is_file():
        return {}, ""
    from memsim.formats.huggingface import read_model
    from memsim.parameters import parameters

    count = int(parameters(model=read_model(path)).total)
    note = f"config.json describes {count} parameters, the files hold {held}" if count != held else ""
    return {"described_parameters": count}, note
