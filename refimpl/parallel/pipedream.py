"""PipeDream: a pipeline that never flushes, and so trains with weights of different ages.

Each micro-batch is a step of SGD of its own, and goes back through the weights it went forward through
(weight stashing).  Rank r of p sends it forward before the updates of the p - 1 - r micro-batches ahead of
it are in.  It is the counterexample to `refimpl.parallel.pipeline`, whose gradient is that of one device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import BoolArray, FloatArray, IntArray, round_to
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.parallel.decoder_stages import decoder_vector, stage_units
from refimpl.parallel.groups import group
from refimpl.parallel.mesh import Axes
from refimpl.parallel.network import Batch
from refimpl.parallel.passes import Weights
from refimpl.parallel.pipeline import sample_pipeline, training_input
from refimpl.parallel.pipeline_program import GoBack, execute
from refimpl.parallel.schedules import Step, pipeline_schedule, steps_of
from refimpl.registry import Case, Source, technique
from refimpl.transformer.config import DecoderConfig
from refimpl.validation import bind_axes, positive, whole

__all__ = ["StaleTraining", "pipedream"]


def stashed(weights: Weights) -> Weights:
    """Return the weights of this moment, which later updates do not change."""
    return dict(weights)


class StaleTraining(NamedTuple):
    """Parameters after all micro-batches, (n,), and how many updates each had seen on each rank, (p, m)."""

    parameters: FloatArray
    versions: IntArray


def sample_stale(rng: np.random.Generator, *, ranks: int, micro: int, layers: int, B: int, T: int) -> Case:
    """Return one call of `pipedream`, on a decoder whose table is not tied."""
    case = sample_pipeline(
        rng,
        ranks=ranks,
        micro=micro,
        layers=layers,
        B=B,
        T=T,
        schedule="1f1b",
        make="untied",
        recompute=False,
    )
    return case.without("schedule", "chunks", "recompute").replace(lr=0.05)


@technique(
    "parallel.pipeline.pipedream",
    entries=(93,),
    kind="function",
    source=Source("Narayanan et al. 2019", "doi:10.1145/3341301.3359646", "section 3.3, weight stashing"),
    axes={"ranks": (1, 4), "micro": (1, 5), "layers": (1, 3), "B": (1, 2), "T": (1, 3)},
    edges=({"ranks": 1, "micro": 3}, {"ranks": 4, "micro": 1}, {"ranks": 3, "micro": 5, "layers": 1}),
    sample=sample_stale,
)
def pipedream(
    parameters: FloatArray,
    tokens: IntArray,
    mask: BoolArray,
    /,
    *,
    config: DecoderConfig,
    ranks: int,
    lr: float,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> StaleTraining:
    """Return a decoder after one step of SGD a micro-batch, in a 1F1B pipeline that is never flushed.

    Parameters
    ----------
    parameters : ndarray of float, shape (n,)
        Initial ones, in the order of `refimpl.parallel.mixture.model_shapes`.
    tokens : ndarray of int, shape (m, B, T + 1)
        Micro-batches.
    mask : ndarray of bool, shape (m, B, T)
        True: predicting ``tokens[..., t + 1]`` counts in the loss.
    config : DecoderConfig
        The make; the table must not be tied, for the two ends would have it at different ages.
    ranks : int
        p.
    lr : float
        Of SGD, on the mean loss of the tokens that count in a micro-batch.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    StaleTraining
        With one rank those of SGD; with more, not.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit.
    OptionError
        If the table is tied, a token is outside the vocabulary, or a number is out of range.

    Notes
    -----
    ``w(t+1) = w(t) - lr ∇f(w_0(t-p+1), ..., w_{p-1}(t))`` for the weights w_r of rank r, those before the
    first update standing for all earlier ones.

    References
    ----------
    .. [1] Narayanan et al., 2019, "PipeDream", doi:10.1145/3341301.3359646, section 3.3.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> case = sample_stale(rng, ranks=3, micro=5, layers=3, B=1, T=2)
    >>> pipedream(*case.args, **case.kwargs).versions
    array([[0, 0, 0, 1, 2],
           [0, 0, 1, 2, 3],
           [0, 1, 2, 3, 4]])
    """
    dtype, params, tokens, mask = training_input(parameters, tokens, mask, config)
    bind_axes({"tokens": (tokens, "m B T+1"), "mask": (mask, "m B T")})
    if config.tied:
        raise OptionError("config: expected an untied table; the two ends would have it at different ages")
    rate = positive("lr", lr)
    plan = pipeline_schedule(schedule="1f1b", ranks=whole("ranks", ranks), micro_batches=len(tokens))

    def run(comm: Comm) -> tuple[Weights, list[int]]:
        units = stage_units(config, comm.rank, ranks)
        own = {name: params[name] for unit in units for name in unit.names}
        alone = group(comm, [comm.rank])
        axes = Axes(tensor=alone, pipeline=comm, data=alone)
        versions, updates = [0] * len(tokens), 0

        def forward(step: Step, x: FloatArray | None) -> tuple[FloatArray, GoBack]:
            batch, stash = Batch(tokens[step.micro], mask[step.micro]), stashed(own)
            versions[step.micro] = updates
            y, backs = np.zeros(0) if x is None else x, []
            for unit in units:
                y, back = unit.part_of(axes, batch)({name: stash[name] for name in unit.names}, y)
                backs.append((unit, back))

            def go_back(dy: FloatArray | None) -> FloatArray:
                nonlocal updates
                factor = 1 / max(int(batch.mask.sum()), 1)
                gradient = np.where(batch.mask, y.dtype.type(factor), 0) if dy is None else dy
                for unit, back in reversed(backs):
                    gradient, found = back({name: stash[name] for name in unit.names}, gradient)
                    own.update({name: own[name] - rate * array for name, array in found.items()})
                updates += 1
                return gradient

            return y, go_back

        execute(comm, steps_of(plan[comm.rank]), ranks, forward)
        return own, versions

    results = launch(ranks, run, traffic=traffic)
    trained = {name: array for own, _ in results for name, array in own.items()}
    return StaleTraining(
        round_to(decoder_vector(config, trained), dtype),
        np.array([versions for _, versions in results], np.int64),
    )
