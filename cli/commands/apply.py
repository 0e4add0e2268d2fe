"""``frugal apply``: run techniques on a real encoder, and say what they saved and what they cost."""

from __future__ import annotations

from pathlib import Path

import click

from cli.output import output_options
from cli.parameters import APPLICABLE
from cli.result import Result
from cli.sentences import SENTENCES

__all__ = ["command"]

LARGEST = 10**6  # bytes of a file of sentences: each is run 26 times


@click.command(
    epilog="""\b
Examples:
  frugal apply nf4 --model path/to/all-MiniLM-L6-v2
  frugal apply 2:4 --model path/to/all-MiniLM-L6-v2 --sentences mine.txt --json
  frugal apply neurons --model path/to/all-MiniLM-L6-v2 --save smaller
  frugal apply --all --model path/to/all-MiniLM-L6-v2 --plot apply.png""",
    short_help="A technique on a real model.",
)
@click.argument("name", required=False, type=APPLICABLE)
@click.option("--all", "all_", is_flag=True, help="Every technique that can be applied, instead of one NAME.")
@click.option(
    "--model",
    "model",
    type=click.Path(exists=True, file_okay=False),
    required=True,
    help="Directory of a BERT: config.json, model.safetensors and its tokenizer.",
)
@click.option(
    "--sentences",
    type=click.Path(exists=True, dir_okay=False),
    show_default="twenty of ours",
    help="File of sentences, one a line, at least two.",
)
@click.option(
    "--save",
    "save_to",
    metavar="DIR",
    help="Also write the model that came out of it: a new directory that loads like the old one.",
)
@output_options(plot=True)
def command(name: str | None, all_: bool, model: str, sentences: str | None, save_to: str | None) -> Result:
    """Apply a technique to the blocks of an encoder: bytes and operations saved, and at what cost.

    The cost is how far the model moves on sentences: the cosine of each embedding before and after, the
    relative error of the states after each layer, and Spearman's correlation of the similarities of all
    pairs.  The first, third, fifth sentence and so on are judged; the others calibrate the techniques that
    look at data, so none is judged on what it has seen.  Nothing is trained.

    Bytes are those that are stored: codes, scales, masks, offsets.  --save writes weights dequantised, in
    the checkpoint's own number format, and refuses where no checkpoint can hold the result.

    NAME is a technique of `frugal list`, or short: int8, llm_int8, nf4, codebook, gptq, magnitude, 2:4,
    heads, neurons, svd, sharing, window, lora.
    """
    if all_ == (name is not None):
        raise click.UsageError("expected either a NAME or --all")
    if all_ and save_to is not None:
        raise click.UsageError("--save takes the result of one NAME, not of --all")
    from cli.applied import techniques
    from cli.applied.report import apply_all

    chosen = techniques.APPLICABLE if name is None else (techniques.find(name),)
    return apply_all(chosen, model, SENTENCES if sentences is None else _read(sentences), save_to)


def _read(file: str) -> tuple[str, ...]:
    """Return the lines of a file that are not blank."""
    path = Path(file)
    if path.stat().st_size > LARGEST:
        raise click.BadParameter(f"{file}: expected at most {LARGEST} bytes", param_hint="--sentences")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{file}: expected UTF-8: {error}", param_hint="--sentences") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if len(found) < 2:
        raise click.BadParameter(
            f"{file}: expected at least two sentences, one a line, got {len(found)}", param_hint="--sentences"
        )
    return found
