"""What a rank of a pipeline runs: its steps of a schedule, each between a receive and a send."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from refimpl.numerics import Array, FloatArray
from refimpl.parallel.collectives import ring_all_reduce
from refimpl.parallel.comm import Comm
from refimpl.parallel.decoder_stages import stage_units
from refimpl.parallel.groups import group
from refimpl.parallel.mesh import Axes
from refimpl.parallel.network import Batch
from refimpl.parallel.passes import Back, Weights
from refimpl.parallel.schedules import Step
from refimpl.transformer.config import DecoderConfig
from refimpl.transformer.layers import Gradients

__all__ = ["execute", "run_stages", "sum_of_both_ends"]

GoBack = Callable[[FloatArray | None], FloatArray]


def execute(
    comm: Comm,
    steps: Sequence[Step],
    stages: int,
    forward: Callable[[Step, FloatArray | None], tuple[FloatArray, GoBack]],
) -> int:
    """Run one rank's steps; return how many activations it held at most.

    Parameters
    ----------
    comm : Comm
        This rank of the pipeline: stage s is on rank s mod p.
    steps : sequence of Step
        What it runs, in order.
    stages : int
        Of the whole model.
    forward : callable
        ``forward(step, x)`` returns a stage's output and what goes back from it: a function of the gradient
        of the output, which is None for the last stage.  Of the first stage x is None.

    Returns
    -------
    int
        The most that went forward and not yet back.
    """
    held: dict[tuple[int, int], GoBack] = {}
    here: dict[int, Array] = {}  # results for another stage of this very rank
    most = 0
    for step in steps:
        onward = -1 if step.backward else 1
        before, after = step.stage - onward, step.stage + onward
        given: Array | None = None
        if 0 <= before < stages:
            tag = _tag(step, step.stage, stages)
            source = before % comm.size
            given = here.pop(tag) if source == comm.rank else comm.recv(source, tag)
        if step.backward:
            result = held.pop((step.stage, step.micro))(given)
        else:
            result, held[step.stage, step.micro] = forward(step, given)
            most = max(most, len(held))
        if 0 <= after < stages:
            tag = _tag(step, after, stages)
            dest = after % comm.size
            if dest == comm.rank:
                here[tag] = result
            else:
                with comm.phase("activation gradients" if step.backward else "activations"):
                    comm.send(dest, result, tag)
    return most


def _tag(step: Step, stage: int, stages: int) -> int:
    """Return the tag of what goes to `stage`: ranks may take messages in another order than they came."""
    return 2 * (step.micro * stages + stage) + step.backward


def run_stages(
    axes: Axes,
    config: DecoderConfig,
    *,
    steps: Sequence[Step],
    stages: int,
    batches: Sequence[Batch],
    factor: float,
    weights_of: Callable[[str], Weights],
    take: Callable[[str, Gradients], None],
    recompute: bool = False,
    sequence_parallel: bool = False,
) -> tuple[float, int]:
    """Run micro-batches through this rank's stages of a decoder, forward and backward.

    Parameters
    ----------
    axes : Axes
        This rank's groups: those that share the depth, those that share each layer, those that share experts.
    config : DecoderConfig
        The make.
    steps, stages
        As for `execute`.
    batches : sequence of Batch
        The micro-batches.
    factor : float
        Multiplies the gradient at the loss.
    weights_of : callable
        ``weights_of(key)`` returns this rank's weights of a unit; asked on the way forward and on the way
        back, so that whoever shards them can gather them then and drop them after.
    take : callable
        ``take(key, gradients)`` is given a unit's gradients of a micro-batch as soon as they are known.
    recompute, sequence_parallel : bool
        As for `refimpl.parallel.decoder_stages.stage_units`.

    Returns
    -------
    tuple of float and int
        The loss summed over counted tokens, on the rank of the last stage, elsewhere 0; and the most
        activations held.
    """
    options = {"recompute": recompute, "sequence_parallel": sequence_parallel}
    own = range(axes.pipeline.rank, stages, axes.pipeline.size)
    units = {stage: stage_units(config, stage, stages, **options) for stage in own}
    loss = 0.0

    def forward(step: Step, x: FloatArray | None) -> tuple[FloatArray, GoBack]:
        nonlocal loss
        batch = batches[step.micro]
        backs: list[tuple[str, Back]] = []
        y = np.zeros(0) if x is None else x
        for unit in units[step.stage]:
            y, back = unit.part_of(axes, batch)(weights_of(unit.key), y)
            backs.append((unit.key, back))
        if step.stage == stages - 1:
            loss += float(np.sum(np.where(batch.mask, y, 0)))

        def go_back(dy: FloatArray | None) -> FloatArray:
            gradient = np.where(batch.mask, y.dtype.type(factor), 0) if dy is None else dy
            for key, back in reversed(backs):
                gradient, found = back(weights_of(key), gradient)
                take(key, found)
            return gradient

        return y, go_back

    most = execute(axes.pipeline, steps, stages, forward)
    return loss, most


def sum_of_both_ends(pipe: Comm, gradient: FloatArray) -> FloatArray:
    """Return the gradient of a tied table, of which first and last rank have one each, summed on both."""
    with pipe.phase("tied embedding"):
        return ring_all_reduce(group(pipe, [0, pipe.size - 1]), gradient)
