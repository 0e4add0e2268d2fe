"""``frugal calibrate``: what this machine's GPU reaches of its peaks, timed and kept in a dated file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.output import output_options, write_whole
from cli.parameters import HARDWARE
from cli.quantities import time_text
from cli.result import Column, Result

if TYPE_CHECKING:
    from memsim.measured.calibration import Calibration

__all__ = ["command", "numbers_text"]

ROWS = (
    Column("kind"),
    Column("sizes"),
    Column("use"),
    Column("seconds", "measured", right=True, text=time_text),
    Column("predicted_s", "predicted", right=True, text=time_text),
    Column("error", right=True, text=lambda value: f"{100 * value:+.1f} %"),
)


@click.command(
    epilog="""\b
Examples:
  frugal calibrate
  frugal calibrate --folder measured --rounds 15
  frugal plan --model gpt2 --gpus 8 --batch 8 --sequence 1024 --calibration calibration-h200.toml

\b
Which problems calibrate is named in memsim/measured/calibration.py; the others are held out.  A kernel
takes arithmetic at a share of its peak (products in whole waves of tiles; attention's products and
exponentials), what it moves when nothing hides that, and a start.""",
    short_help="Times of this GPU, for the cost model.",
)
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), default=Path(), help="Where to write."
)
@click.option("--hardware", type=HARDWARE, help="Which card this is.  [default: found by the GPU's name]")
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Measurements of each.")
@output_options()
def command(folder: Path, hardware: str | None, rounds: int) -> Result:
    """Time copies, products by shape, attention and its gradient, and write calibration-<card>-<date>.toml.

    Shares of the peaks and the start of a kernel follow from the rows marked "calibration"; --calibration
    gives them to plan, timeline and roofline.  The other rows show the error.  It needs PyTorch and a GPU;
    without them the exit code is 3.
    """
    from cuda_backend.torch_ops import missing
    from memsim.hardware import hardware as find_hardware
    from memsim.measured.calibration import KIND, PROBLEMS, calibrated
    from memsim.measured.measured_files import document, file_name, toml_text
    from refimpl.errors import BackendUnavailableError

    if hardware is not None:
        find_hardware(hardware)  # which refuses a name that it does not know
    reason = missing()
    if reason is not None:
        raise BackendUnavailableError(f"calibrate: it times PyTorch's kernels on a GPU, and {reason}")
    folder.mkdir(parents=True, exist_ok=True)  # if that fails, before minutes are spent on what goes into it
    card = hardware or _this_card()
    found = document(KIND, card, "PyTorch, CUDA events", problem=[_timed(one, rounds) for one in PROBLEMS])
    result = calibrated(found)
    path = folder / file_name(found)
    write_whole(str(path), toml_text(found).encode())
    order = ("bytes", "B", "H", "M", "N", "K", "D")
    rows = [{**row, "sizes": [row[name] for name in order if name in row]} for row in result.rows]
    return Result(
        rows,
        ROWS,
        totals={f"{name}_s" if name == "start" else name: value for name, value in result.numbers().items()},
        sources=[f"measured on {card}, {found['date']}"],
        details=[numbers_text(result), f"wrote {path}"],
    )


def numbers_text(found: Calibration) -> str:
    """Return the numbers of a calibration as text."""
    shares = ", ".join(f"{name} {getattr(found, name):.3f}" for name in ("compute", "scores", "memory"))
    return f"shares of the peaks: {shares}; a kernel starts in {time_text(found.start)}"


def _this_card() -> str:
    from cli.commands.bench import recognised
    from cuda_backend.timing import device_name
    from memsim.hardware import hardware_names
    from refimpl.errors import OptionError

    found = recognised(device_name(), hardware_names())
    if found is None:
        raise OptionError(f"{device_name()}: memsim knows no such card; name the nearest with --hardware")
    return found


def _timed(problem: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Return a problem with the seconds of its fastest usual function, inputs out of the cache."""
    from cuda_backend.timing import interleaved
    from cuda_backend.torch_ops import draw
    from cuda_backend.torch_rivals import (
        attention_backward_rivals,
        attention_rivals,
        copy_rivals,
        linear_rivals,
    )

    shapes: list[tuple[int, ...]]
    match problem["kind"]:
        case "copy":  # three quarters of a tensor of 16 bits are copied
            rival, shapes = copy_rivals()["torch copy"], [(problem["bytes"] * 2 // 3,)]
        case "product":
            rival = linear_rivals()["torch matmul"]
            shapes = [(problem["M"], problem["K"]), (problem["K"], problem["N"])]
        case "gradient":  # q, k, v and the gradient of the output
            rival = attention_backward_rivals(causal=True)["torch SDPA default"]
            shapes = [(problem["B"], problem["N"], problem["H"], problem["D"])] * 4
        case _:
            rival = attention_rivals(causal=True)["torch SDPA default"]
            shapes = [(problem["B"], problem["N"], problem["H"], problem["D"])] * 3
    with rival.context():
        operands = [
            rival.prepare(*(draw(shape, "float16", 3 * seed + place) for place, shape in enumerate(shapes)))
            for seed in range(2)
        ]
    calls = {"": lambda index: rival.function(*operands[index % 2])}
    timing = interleaved(calls, contexts={"": rival.context}, rounds=rounds)[""]
    return {**problem, "seconds": timing.device_s}
