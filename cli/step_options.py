"""Options that say what is trained, on what, and how it is divided, for the commands about a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.parameters import COUNT, HARDWARE, MODEL, STACK, AxisValue, Count, Number

if TYPE_CHECKING:
    from memsim.planning.division import Division
    from memsim.planning.training_setting import Setting

__all__ = ["division_of", "division_row", "scores_note", "setting_of", "setting_options"]

Command = TypeVar("Command", bound=Callable[..., Any])
DIVIDED = Count(most=10**12)  # whose divisors are looked for
SHARE = Number(0.0, 1.0, min_open=True)
_OPTIONS = (
    click.option("--model", type=MODEL, help="Name of a model that memsim describes."),
    click.option("--config", type=click.Path(), help="config.json of a model, or the directory with it."),
    click.option("--gpus", type=DIVIDED, required=True, help="How many accelerators."),
    click.option("--hardware", type=HARDWARE, help="Which.  [default: a100-80gb, or that of --calibration]"),
    click.option("--batch", type=DIVIDED, required=True, help="Sequences of a step, on all accelerators."),
    click.option("--sequence", type=COUNT, required=True, help="Tokens of a sequence; K is 1000."),
    click.option(
        "--attention",
        type=click.Choice(("flash", "standard")),
        default="flash",
        show_default=True,
        help="flash: causal half of the scores, none in memory; standard: all of them, in memory.",
    ),
    click.option("--dropout", is_flag=True, help="Keep and read dropout's masks."),
    click.option(
        "--states",
        type=click.Choice(("megatron", "zero")),
        default="megatron",
        show_default=True,
        help="megatron: 18 bytes a parameter, with fp32 gradients; zero: 16.",
    ),
    click.option("--latency", type=Number(0.0, 1.0), default=0.0, help="Seconds a message."),
    click.option(
        "--stack",
        type=STACK,
        help="Efficiencies fitted to measurements of one: see `frugal validate`.  [default: every one is 1]",
    ),
    click.option(
        "--calibration",
        type=click.Path(exists=True, dir_okay=False),
        help="File of `frugal calibrate`: --compute, --scores, --memory of that card, and times of kernels.",
    ),
    click.option("--compute", type=SHARE, help="Share of the peak rate that products reach."),
    click.option("--scores", type=SHARE, help="Share that attention reaches.  [default: --compute]"),
    click.option("--memory", type=SHARE, help="Share of the memory bandwidth reached."),
    click.option("--network", type=SHARE, help="Share of the links' bandwidth reached."),
    click.option(
        "--overlap",
        type=Number(0.0, 1.0),
        help="Share of computation behind which data and context parallelism hide.",
    ),
)


def setting_options(function: Command) -> Command:
    """Give a command the options that `setting_of` reads."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def setting_of(options: Mapping[str, Any]) -> Setting:
    """Return what the options say is trained, on what.

    Raises
    ------
    click.UsageError
        If they name no model, or two, or shares beside a calibration, or one of another card.
    """
    from memsim.formats.huggingface import read_model
    from memsim.planning.training_setting import Setting

    if (options["model"] is None) == (options["config"] is None):
        raise click.UsageError("expected one of --model and --config")
    model = read_model(options["config"]) if options["model"] is None else options["model"]

    names = ("attention", "dropout", "states", "latency")
    card, shares = _card_and_shares(options)
    return Setting(
        model,
        card,
        options["gpus"],
        options["batch"],
        options["sequence"],
        **{name: options[name] for name in names},
        **shares,
    )


def _card_and_shares(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the card, and what it reaches: those of the stack or of a calibration, and what is given."""
    shares = ("compute", "scores", "memory", "network", "overlap")
    given = {name: options[name] for name in shares if options[name] is not None}
    card = options["hardware"] or "a100-80gb"
    if options["stack"] is not None:
        if options["calibration"] is not None:
            raise click.UsageError("--stack and --calibration both say what is reached; expected one")
        from memsim.planning.efficiency import efficiency

        fitted: dict[str, Any] = efficiency(options["stack"])
        if "attention" in fitted:
            fitted["scores"] = fitted.pop("attention")
        return card, {**fitted, **given}
    if options["calibration"] is None:
        return card, given
    from memsim.measured.calibration import read_calibration

    doubled = [f"--{name}" for name in ("compute", "scores", "memory") if name in given]
    if doubled:
        raise click.UsageError(f"--calibration says what {', '.join(doubled)} would")
    found = read_calibration(options["calibration"])
    if options["hardware"] not in (None, found.hardware):
        raise click.UsageError(f"--calibration is of {found.hardware}, --hardware {options['hardware']}")
    return found.hardware, {**found.numbers(), **given}


def division_of(axes: Mapping[str, AxisValue]) -> Division:
    """Return a division from what ``--division tensor=8,recompute=full`` gave.

    Raises
    ------
    UnknownNameError
        If it has no such part.
    OptionError
        If a value is of the wrong kind.
    """
    from memsim.planning.division import Division
    from refimpl.errors import OptionError, UnknownNameError

    known = {name: type(getattr(Division(), name)) for name in Division.__slots__}
    for name, value in axes.items():
        if name not in known:
            raise UnknownNameError("part of a division", name, known)
        if type(value) is not known[name]:
            raise OptionError(f"{name}: expected {known[name].__name__}; got {value!r}")
    return Division(**axes)  # type: ignore[arg-type]


def division_row(division: Division) -> dict[str, Any]:
    """Return the parts of a division by name."""
    return {name: getattr(division, name) for name in division.__slots__}


def scores_note(setting: Setting) -> list[str]:
    """Return why a utilization can exceed 100 %, where it can."""
    if setting.attention != "flash":
        return []
    return ["MFU counts scores in full, as Megatron's formula does; the causal kernel computes half of them"]
