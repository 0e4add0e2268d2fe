"""The run that a DeepSpeed configuration asks for, as far as memory depends on it.

>>> run = run_of_config({"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}, gpus=8)
>>> run.stage, run.batch, run.bucket
(2, 4, 500000000)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from memsim.formats.settings import Settings, shown
from memsim.memory.model_states import Offload
from memsim.memory.run import Run
from refimpl.checkpoint import read_object
from refimpl.errors import OptionError

__all__ = ["read_run", "run_of_config"]

_BUCKET = 500_000_000  # elements; DeepSpeed, runtime/zero/config.py, reduce_bucket_size
_DEVICES = ("none", "cpu", "nvme")


def read_run(path: str | os.PathLike[str], *, gpus: int = 1, **chosen: Any) -> Run:
    """Return the run that a file asks for.

    Parameters
    ----------
    path : path
        A DeepSpeed configuration, JSON.
    gpus, **chosen
        As in `run_of_config`.

    Returns
    -------
    Run

    Raises
    ------
    CheckpointError
        If there is no such file, or it holds no JSON object.
    OptionError
        As in `run_of_config`.
    """
    return run_of_config(read_object(path), gpus=gpus, where=str(path), **chosen)


def run_of_config(
    config: Mapping[str, Any], *, gpus: int = 1, where: str = "DeepSpeed configuration", **chosen: Any
) -> Run:
    """Return the run that the values of a DeepSpeed configuration ask for.

    Parameters
    ----------
    config : mapping
        The parsed file.
    gpus : int
        Ranks; a configuration does not say how many.
    where : str
        What errors call the file.
    **chosen
        What else the `Run` should have, such as ``sequence``; it takes precedence over the file.

    Returns
    -------
    Run
        Stage, offloading, micro-batch, accumulation, bucket, partitioned checkpoints, and the convention of
        states: DeepSpeed's with a 16-bit format, fp32's without.

    Raises
    ------
    OptionError
        If a value has the wrong type or is out of range, or the three sizes of batches contradict each other.

    Notes
    -----
    A value of ``"auto"``, which another program fills in, is as good as none.

    References
    ----------
    .. [1] DeepSpeed, "DeepSpeed Configuration JSON", batch size, ZeRO and activation checkpointing.
    """
    settings = Settings(where, _without_auto(config))
    ranks = gpus // (chosen.get("tensor", 1) * chosen.get("pipeline", 1)) or 1
    batch, micro_batches = _batches(settings, ranks)
    zero = settings.section("zero_optimization")
    stage = zero.whole("stage", default=0, least=0, most=3)
    found = {
        "stage": stage,
        "offload": _offload(zero, stage),
        "convention": "deepspeed" if _half_precision(settings) else "fp32",
        "batch": batch,
        "micro_batches": micro_batches,
        "bucket": zero.whole("reduce_bucket_size", default=_BUCKET) if stage else 0,
        "checkpoints": _checkpoints(settings.section("activation_checkpointing")),
    }
    return Run(**{"gpus": gpus, **found, **chosen})


def _without_auto(value: Any) -> Any:
    """Return `value` without what is to be filled in by another program, sections included."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(one) for key, one in value.items() if one != "auto"}


def _batches(settings: Settings, ranks: int) -> tuple[int, int]:
    """Return micro-batch and micro-batches a step: two of three sizes give the third, one the rest."""
    micro = settings.whole("train_micro_batch_size_per_gpu", default=0)
    steps = settings.whole("gradient_accumulation_steps", default=0)
    whole = settings.whole("train_batch_size", default=0)
    if whole and not (micro and steps):
        if whole % (ranks * (micro or 1) * (steps or 1)):
            raise OptionError(
                f"{settings.where}: train_batch_size: expected a multiple of {ranks} ranks times the sizes "
                f"given beside it; got {whole}"
            )
        rest = whole // (ranks * (micro or 1) * (steps or 1))
        return (micro or rest), (steps or (rest if micro else 1))
    micro, steps = micro or 1, steps or 1
    if whole and whole != micro * steps * ranks:
        raise OptionError(
            f"{settings.where}: train_batch_size: expected micro-batch x accumulation x ranks, "
            f"{micro} x {steps} x {ranks}; got {whole}"
        )
    return micro, steps


def _offload(zero: Settings, stage: int) -> Offload:
    """Return what the host keeps: NVMe is a host's too.  Older files say it in one word."""
    devices: dict[str, str] = {}
    for what in ("optimizer", "param"):
        section = zero.section(f"offload_{what}")
        devices[what] = section.choice("device", _DEVICES, default="none") if section.values else "none"
    if zero.flag("cpu_offload", default=False):
        devices["optimizer"] = "cpu"
    if devices["param"] != "none":
        if stage != 3:
            raise OptionError(f"{zero.where}: offload_param: expected stage 3; got stage {stage}")
        return "all"
    if devices["optimizer"] != "none" and not stage:
        raise OptionError(f"{zero.where}: offload_optimizer: expected stage 1, 2 or 3; got stage 0")
    return "optimizer" if devices["optimizer"] != "none" else "none"


def _checkpoints(section: Settings) -> str:
    """Return who keeps the checkpoints: DeepSpeed offloads only what it has partitioned."""
    partitioned = section.flag("partition_activations", default=False)
    offloaded = section.flag("cpu_checkpointing", default=False)
    return "offloaded" if partitioned and offloaded else "partitioned" if partitioned else "replicated"


def _half_precision(settings: Settings) -> bool:
    on: dict[str, Any] = {}
    for name in ("fp16", "bf16", "bfloat16"):
        enabled = settings.section(name).get("enabled")
        if enabled is not None and not isinstance(enabled, bool):
            raise OptionError(
                f"{settings.where}: {name}: enabled: expected true or false; got {shown(enabled)}"
            )
        on[name] = bool(enabled)
    if on["fp16"] and (on["bf16"] or on["bfloat16"]):
        raise OptionError(f"{settings.where}: expected one of fp16 and bf16; both are enabled")
    return any(on.values())
