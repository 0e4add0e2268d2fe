"""``frugal memory``: what training keeps on a device, with ZeRO or without it, formula by formula."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from cli.memory_checkpoint import checkpoint_command
from cli.memory_inference import inference_command
from cli.output import output_options
from cli.parameters import COUNT, COUNT_FROM_0, COUNTS, HARDWARE, MODEL, ListOf
from cli.quantities import bytes_text, count_text
from cli.result import Column, Result, Row

if TYPE_CHECKING:
    from memsim.estimate import Estimate

__all__ = ["command"]

Stage = Literal[0, 1, 2, 3]


def _explained(estimates: Sequence[Estimate], titles: Sequence[str]) -> list[str]:
    """Return the formulas with the numbers in them, under a title for each estimate."""
    lines: list[str] = []
    for title, estimate in zip(titles, estimates, strict=True):
        lines += ["", title, *(f"  {line}" for line in estimate.explain())]
        if estimate.leaves_out:
            lines.append(f"  leaves out: {estimate.leaves_out}")
    return lines


def _sources(estimates: Sequence[Estimate]) -> list[str]:
    return list(dict.fromkeys(term.source for estimate in estimates for term in estimate.terms))


@click.group(
    "memory",
    epilog="""\b
Examples:
  frugal memory zero --params 7.5B --dp 64
  frugal memory inference --model llama-2-70b --hardware h200 --weights bf16,int8,nf4""",
    short_help="Memory of training and of serving.",
)
def command() -> None:
    """Estimate the memory of training: model states, ZeRO's shares of them, activations; and of inference."""


command.add_command(inference_command)
command.add_command(checkpoint_command)


@command.command(
    "zero",
    epilog="""\b
Examples:
  frugal memory zero --params 7.5B --dp 1,4,16,64,256,1024
  frugal memory zero --params 7.5B --dp 64 --stage 2 --explain
  frugal memory zero --params 1557611200 --dp 48 --padded --micro 8
  frugal memory zero --params 7.5B,128B,1T --dp 64 --convention deepspeed --stage 2,3 --json""",
    short_help="Model states a rank under ZeRO.",
)
@click.option("--params", type=COUNTS, required=True, help="Parameters of the model.")
@click.option("--dp", type=COUNTS, default="1", show_default=True, help="Data-parallel degree.")
@click.option(
    "--stage",
    "stages",
    type=ListOf(click.Choice(("0", "1", "2", "3"))),
    help="ZeRO stage; 0 is plain data parallelism.  [default: all that the convention has]",
)
@click.option(
    "--convention",
    type=click.Choice(("paper", "deepspeed")),
    default="paper",
    show_default=True,
    help="paper: 16 bytes a parameter; deepspeed: its estimators' 18, with fp32 gradients.",
)
@click.option("--padded", is_flag=True, help="Pad the parameters to a multiple of --dp: whole bytes.")
@click.option("--micro", type=COUNT, default=1, show_default=True, help="Micro-batches a step.")
@click.option("--explain", is_flag=True, help="Print every formula, with the numbers in it.")
@output_options(plot=True)
def zero(
    params: tuple[int, ...],
    dp: tuple[int, ...],
    stages: tuple[str, ...] | None,
    convention: str,
    padded: bool,
    micro: int,
    explain: bool,
) -> Result:
    """Give the bytes of model states on each rank, and the elements that it sends in a step.

    Without --padded, the parameters are divided as if they needed no padding.  GB is 1e9 bytes.  What ranks
    really hold and send: frugal parallel train.
    """
    from memsim.communication import partitioned_communication, zero_communication
    from memsim.zero import partitioned_memory, zero_memory

    if padded and convention != "paper":
        raise click.UsageError("--padded goes with the convention of the paper")
    chosen = stages or (("0", "1", "2", "3") if convention == "paper" else ("2", "3"))
    rows: list[dict[str, Any]] = []
    estimates: list[Estimate] = []
    for parameters, ranks, text in itertools.product(params, dp, chosen):
        stage = cast("Stage", int(text))
        one: dict[str, Any] = {"ranks": ranks, "stage": stage}
        if padded:
            states = partitioned_memory(units=[parameters], **one)
            sent = partitioned_communication(units=[parameters], micro_batches=micro, itemsize=1, **one)
        else:
            states = zero_memory(parameters=parameters, convention=cast("Any", convention), **one)
            sent = zero_communication(parameters=parameters, micro_batches=micro, convention="ring", **one)
        estimates.append(states)
        rows.append(
            {
                "params": parameters,
                "dp": ranks,
                "stage": stage,
                "convention": convention,
                "padded": padded,
                "micro_batches": micro,
                "memory_bytes": states.total,
                "terms_bytes": {term.name: term.value for term in states.terms},
                "sent_elements": sent.total,
            }
        )
    titles = [f"{row['params']} parameters, dp {row['dp']}, stage {row['stage']}" for row in rows]
    return Result(
        rows,
        (
            Column("params", right=True, text=count_text),
            Column("dp", right=True),
            Column("stage", right=True),
            Column("memory_bytes", "memory a rank", right=True, text=bytes_text),
            Column("sent_elements", "sent a rank and step (elements)", right=True, text=count_text),
        ),
        sources=_sources(estimates),
        details=_explained(estimates, titles) if explain else [],
        draw=lambda axes: _draw(axes, rows),
    )


def _draw(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the memory of a rank against the number of ranks, a line for each model and stage."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"{count_text(row['params'])} parameters, stage {row['stage']}", []).append(row)
    for label, points in lines.items():
        points = sorted(points, key=lambda row: row["dp"])
        memory = [float(point["memory_bytes"]) for point in points]
        axes.plot([point["dp"] for point in points], memory, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="data-parallel degree", ylabel="model states a rank / bytes")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()


@command.command(
    "training",
    epilog="""\b
Examples:
  frugal memory training --params 7B
  frugal memory training --params 1.5B --hidden 1600 --layers 48 --sequence 1024 --batch 32 --heads 25
  frugal memory training --model llama-2-7b --gpus 8 --stage 1 --sequence 4096 --micro-batches 8 \\
      --hardware a100-80gb --explain
  frugal memory training --config my/config.json --deepspeed ds.json --gpus 16 --plot step.png""",
    short_help="Model states and activations of training.",
)
@click.option("--params", type=COUNT, help="Parameters of a model without description.")
@click.option("--model", type=MODEL, help="Name of a model that memsim describes.")
@click.option("--config", type=click.Path(), help="config.json of a model, or the directory with it.")
@click.option("--pad-vocabulary", type=COUNT, help="Round its vocabulary up to a multiple.  [default: 1]")
@click.option("--deepspeed", type=click.Path(), help="DeepSpeed's JSON; other options take precedence.")
@click.option("--hardware", type=HARDWARE, help="Whose memory it should fit into.")
@click.option("--hidden", type=COUNT, help="With --params: width h of the model.")
@click.option("--layers", type=COUNT, help="With --params: layers L.")
@click.option("--heads", type=COUNT, help="With --params: heads a; needed for Korthikanti's count only.")
@click.option(
    "--model-parallel", type=COUNT, help="With --params: ranks that divide ZeRO-R's checkpoints (P_a)."
)
@click.option(
    "--buffer",
    type=COUNT,
    help="With --params: elements of ZeRO-R's constant buffer (C_B).  [default: all parameters]",
)
@click.option("--sequence", type=COUNT, help="Tokens s of a sequence; K is 1000.  [default: 2048]")
@click.option("--batch", type=COUNT, help="Sequences b of a micro-batch.  [default: 1]")
@click.option("--micro-batches", type=COUNT, help="Micro-batches a rank and step.  [default: 1]")
@click.option("--gpus", type=COUNT, help="All ranks.  [default: 1]")
@click.option("--tensor", type=COUNT, help="Ranks that divide matrices.  [default: 1]")
@click.option("--pipeline", type=COUNT, help="Stages.  [default: 1]")
@click.option("--interleave", type=COUNT, help="Chunks of layers a stage.  [default: 1]")
@click.option("--expert", type=COUNT, help="Ranks that divide experts.  [default: 1]")
@click.option(
    "--sequence-parallel/--no-sequence-parallel", default=None, help="Divide norms along the sequence."
)
@click.option("--stage", type=click.IntRange(0, 3), help="ZeRO stage.  [default: 0]")
@click.option("--offload", type=click.Choice(("none", "optimizer", "all")), help="What the host keeps.")
@click.option(
    "--convention",
    type=click.Choice(("zero", "deepspeed", "megatron", "fp32", "bf16", "adam8bit", "sgd")),
    help="Bytes of states a parameter.  [default: zero]",
)
@click.option("--recompute", type=click.Choice(("none", "selective", "full")), help="What is made again.")
@click.option(
    "--checkpoints",
    type=click.Choice(("replicated", "partitioned", "offloaded")),
    help="Where full recomputation keeps what it starts from (ZeRO-R).",
)
@click.option("--attention", type=click.Choice(("flash", "standard")), help="[default: flash]")
@click.option("--dropout/--no-dropout", default=None, help="Keep dropout's masks.")
@click.option("--fused-gate/--no-fused-gate", default=None, help="A gated product in one kernel.")
@click.option("--fused-norm/--no-fused-norm", default=None, help="RMSNorm in one kernel.  [default: fused]")
@click.option(
    "--adam", type=click.Choice(("fused", "foreach")), help="foreach: PyTorch's default, with a copy."
)
@click.option("--bucket", type=COUNT_FROM_0, help="Elements of the buffer of gradients.  [default: 0]")
@click.option("--adapter-rank", type=COUNT, help="Train LoRA adapters of this rank in place of the model.")
@click.option(
    "--adapter-targets",
    type=click.Choice(("queries and values", "attention", "all")),
    default="all",
    show_default=True,
    help="Matrices with an adapter.",
)
@click.option(
    "--base",
    type=click.Choice(("16bit", "int8", "nf4")),
    default="16bit",
    show_default=True,
    help="Matrices of the frozen model under adapters; nf4 is QLoRA's.",
)
@click.option("--explain", is_flag=True, help="Print every formula, and how other estimators disagree.")
@output_options(plot=True)
def training(
    params: int | None,
    model: str | None,
    config: str | None,
    pad_vocabulary: int | None,
    deepspeed: str | None,
    hardware: str | None,
    adapter_rank: int | None,
    adapter_targets: str,
    base: str,
    explain: bool,
    **options: Any,
) -> Result:
    """Give the memory of training: of a number of parameters by each source, or of a model, tensor by tensor.

    With --model or --config: what a rank takes in a step at its peak, as PyTorch allocates it; --explain adds
    how other estimators count the same run, what they printed, and the reason for each gap.
    """
    from cli.training_memory import described_model, run_result, run_that

    if sum(given is not None for given in (params, model, config)) != 1:
        raise click.UsageError("expected one of --params, --model and --config")
    shape = {name: options.pop(name) for name in ("hidden", "layers", "heads", "model_parallel", "buffer")}
    if params is None:
        given = [f"--{name.replace('_', '-')}" for name, value in shape.items() if value is not None]
        if given:
            raise click.UsageError(f"{', '.join(given)}: a model with a description has its own")
        adapter = (
            None if adapter_rank is None else {"rank": adapter_rank, "targets": adapter_targets, "base": base}
        )
        return run_result(
            described_model(model, config, pad_vocabulary or 1),
            run_that(options, deepspeed),
            hardware=hardware,
            adapter=adapter,
            explain=explain,
        )
    both = {
        **options,
        "pad_vocabulary": pad_vocabulary,
        "deepspeed": deepspeed,
        "hardware": hardware,
        "adapter_rank": adapter_rank,
    }
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in both.items()
        if value is not None and name not in ("sequence", "batch")
    ]
    if given:
        raise click.UsageError(
            f"{', '.join(given)}: expected a model with a description, --model or --config"
        )
    return _by_source(params, {**shape, "sequence": options["sequence"], "batch": options["batch"]}, explain)


def _by_source(params: int, sizes: dict[str, int | None], explain: bool) -> Result:
    """Return states and activations of a number of parameters, a row for each source's term."""
    from memsim import training_memory as models
    from memsim.zero_r import zero_r

    heads, model_parallel, buffer = (sizes[name] for name in ("heads", "model_parallel", "buffer"))
    states = models.training_memory(parameters=params)
    activations: dict[str, Estimate] = {}
    shape = {name: sizes[name] for name in ("hidden", "layers", "sequence", "batch")}
    missing = [f"--{name}" for name, value in shape.items() if value is None]
    if buffer is not None and model_parallel is None:
        raise click.UsageError("--buffer is ZeRO-R's, which needs --model-parallel too")
    if len(missing) < len(shape) or heads is not None or model_parallel is not None:
        if missing:
            raise click.UsageError(f"activations need {', '.join(missing)} too")
        known = cast("dict[str, Any]", shape)
        activations["zero_activations"] = models.zero_activations(**known)
        activations["checkpoints"] = models.checkpoint_activations(**known)
        if heads is not None:
            activations["korthikanti_activations"] = models.block_activations(**known, heads=heads)
        if model_parallel is not None:
            activations["zero_r"] = zero_r(
                **known, parameters=params, buffer=buffer or params, model_parallel=model_parallel
            )
    estimates = [states, *activations.values()]
    rows = [
        {"part": estimate.name, "term": term.name, "memory_bytes": term.value, "formula": term.formula}
        for estimate in estimates
        for term in estimate.terms
    ]
    return Result(
        rows,
        (
            Column("part"),
            Column("term"),
            Column("formula"),
            Column("memory_bytes", "memory", right=True, text=bytes_text),
        ),
        totals={
            "states_bytes": states.total,
            **{f"states_and_{name}_bytes": states.total + e.total for name, e in activations.items()},
        },
        sources=_sources(estimates),
        details=_explained(estimates, [e.name for e in estimates]) if explain else [],
    )
