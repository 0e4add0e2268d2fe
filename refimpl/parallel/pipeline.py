"""Pipeline parallelism: a decoder's layers spread over ranks, micro-batches on their way through them.

Schedules stand in `refimpl.parallel.schedules`, what a rank runs in `refimpl.parallel.pipeline_program`, and
the asynchronous kind, which computes something else, in `refimpl.parallel.pipedream`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import ShapeError
from refimpl.numerics import BoolArray, FloatArray, IntArray, round_to, widen
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.parallel.decoder_stages import decoder_params, decoder_vector, stage_units
from refimpl.parallel.groups import group
from refimpl.parallel.mesh import Axes
from refimpl.parallel.mixture import MixtureConfig, model_shapes
from refimpl.parallel.network import Batch
from refimpl.parallel.passes import Weights
from refimpl.parallel.pipeline_program import run_stages, sum_of_both_ends
from refimpl.parallel.schedules import SCHEDULES, Schedule, planned_steps
from refimpl.registry import Case, Source, technique
from refimpl.transformer.config import DecoderConfig
from refimpl.transformer.embedding import indices
from refimpl.transformer.layers import Gradients
from refimpl.validation import as_array, bind_axes, floating, whole

__all__ = ["PipelineGradients", "add_gradients", "pipeline_parallel", "sample_pipeline", "training_input"]

MAKES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"norm": "layer_norm", "activation": "gelu_tanh", "gated": False, "biases": True,
             "positions": "learned", "max_length": 5},
    "untied": {"tied": False, "num_kv_heads": 1},
    "post": {"order": "post", "norm": "layer_norm", "activation": "relu", "gated": False},
}  # fmt: skip


class PipelineGradients(NamedTuple):
    """Gradients of all parameters, (n,), the mean loss a counted token, and activations held, (p,)."""

    dparameters: FloatArray
    loss: FloatArray
    in_flight: IntArray


def small_decoder(rng: np.random.Generator, make: str, *, layers: int, heads: int = 2) -> Any:
    """Return the configuration of a tiny decoder, and parameters drawn for it, flat.

    Examples
    --------
    >>> small_decoder(np.random.default_rng(0), "llama", layers=1)[1].shape
    (148,)
    """
    sizes = {"vocabulary": 6, "width": 4, "num_heads": heads, "head_width": 2, "hidden": 4}
    kind = MixtureConfig if make == "mixture" else DecoderConfig
    config = kind(layers=layers, **{**sizes, **MAKES.get(make, {})})
    drawn = []
    for name, shape in model_shapes(config).items():
        gain = name.rpartition(".")[2].startswith("gamma")
        drawn.append((1.0 if gain else 0.0) + rng.standard_normal(int(np.prod(shape))) / (3 if gain else 2))
    return config, np.concatenate(drawn)


def sample_pipeline(
    rng: np.random.Generator,
    *,
    ranks: int,
    micro: int,
    layers: int,
    B: int,
    T: int,
    schedule: str,
    make: str,
    recompute: bool,
) -> Case:
    """Return one call of `pipeline_parallel`; some micro-batches have fewer tokens that count, or none."""
    config, parameters = small_decoder(rng, make, layers=layers)
    chunks = 2 if schedule == "interleaved" else 1
    micro = -(-micro // ranks) * ranks if schedule == "interleaved" else micro
    tokens = rng.integers(0, config.vocabulary, (micro, B, T + 1))
    mask = rng.random((micro, B, T)) < rng.random((micro, 1, 1))
    options = {"config": config, "ranks": ranks, "schedule": schedule, "chunks": chunks}
    return Case((parameters, tokens, mask), options | {"recompute": recompute})


@technique(
    "parallel.pipeline",
    entries=(93,),
    kind="function",
    source=Source("Huang et al. 2019", "arXiv:1811.06965", "section 2.2, Figure 2"),
    axes={"ranks": (1, 3), "micro": (1, 4), "layers": (0, 4), "B": (1, 2), "T": (1, 3)},
    options={"schedule": SCHEDULES, "make": tuple(MAKES), "recompute": (False, True)},
    edges=(
        {"ranks": 1, "micro": 1, "layers": 1, "schedule": "1f1b"},
        {"ranks": 4, "micro": 6, "layers": 4, "schedule": "1f1b", "make": "llama", "recompute": True},
        {"ranks": 2, "micro": 4, "layers": 4, "schedule": "interleaved", "make": "gpt2"},
        {"ranks": 3, "micro": 2, "layers": 1, "schedule": "gpipe", "make": "llama"},  # a rank without layers
        {"ranks": 2, "micro": 2, "layers": 1, "B": 0, "schedule": "gpipe", "make": "post"},
        {"ranks": 1, "micro": 2, "layers": 2, "schedule": "interleaved", "make": "untied"},
    ),
    sample=sample_pipeline,
)
def pipeline_parallel(
    parameters: FloatArray,
    tokens: IntArray,
    mask: BoolArray,
    /,
    *,
    config: DecoderConfig,
    ranks: int,
    schedule: Schedule | IntArray = "1f1b",
    chunks: int = 1,
    recompute: bool = False,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> PipelineGradients:
    """Return the gradient of a step of micro-batches, made by ranks that have some of the layers each.

    Parameters
    ----------
    parameters : ndarray of float, shape (n,)
        Of the decoder, in the order of `refimpl.parallel.mixture.model_shapes`.
    tokens : ndarray of int, shape (m, B, T + 1)
        Micro-batches.
    mask : ndarray of bool, shape (m, B, T)
        True: predicting ``tokens[..., t + 1]`` counts in the loss.
    config : DecoderConfig
        The make.
    ranks : int
        p.
    schedule, chunks
        As for `refimpl.parallel.schedules.planned_steps`: a name, or steps of one's own.
    recompute : bool
        Keep the inputs of layers alone, and run them once more on the way back.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    PipelineGradients
        Those of the mean loss over all counted tokens: what one device computes on all micro-batches.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit.
    OptionError
        If a token is outside the vocabulary, a number is out of range, or a named schedule does not fit.
    ScheduleError
        If ranks cannot execute the steps given.

    Notes
    -----
    Each boundary between stages carries the activations of a micro-batch once, and their gradients once.

    **Special cases**

    - A tied table is on the first and on the last rank; its two gradients are all-reduced between them.
    - With more stages than layers, some stages pass on what they get.
    - If no token counts, loss and gradients are 0.

    References
    ----------
    .. [1] Huang et al., 2019, arXiv:1811.06965, section 2.2.
    .. [2] Narayanan et al., 2021, arXiv:2104.04473, section 2.2.

    Examples
    --------
    >>> config = DecoderConfig(vocabulary=3, width=2, num_heads=1, layers=2, hidden=2)
    >>> start = np.zeros(sum(np.prod(shape) for shape in model_shapes(config).values()))
    >>> tokens = np.array([[[0, 1, 2]]] * 4)
    >>> found = pipeline_parallel(start, tokens, tokens[..., 1:] >= 0, config=config, ranks=2)
    >>> float(found.loss.round(4)), found.in_flight  # log 3
    (1.0986, array([2, 1]))
    """
    dtype, params, tokens, mask = training_input(parameters, tokens, mask, config)
    bind_axes({"tokens": (tokens, "m B T+1"), "mask": (mask, "m B T")})
    ranks, chunks = whole("ranks", ranks), whole("chunks", chunks)
    plan = planned_steps(schedule, ranks=ranks, micro_batches=len(tokens), chunks=chunks)
    batches = [Batch(*pair) for pair in zip(tokens, mask, strict=True)]
    stages = ranks * chunks
    counted = max(int(mask.sum()), 1)

    def run(comm: Comm) -> tuple[Gradients, float, int]:
        sums: dict[str, Gradients] = {}
        names = {unit.key: unit.names for s in range(comm.rank, stages, ranks)
                 for unit in stage_units(config, s, stages)}  # fmt: skip

        def weights_of(key: str) -> Weights:
            return {name: params[name] for name in names[key]}

        alone = group(comm, [comm.rank])
        loss, most = run_stages(
            Axes(tensor=alone, pipeline=comm, data=alone),
            config,
            steps=plan[comm.rank],
            stages=stages,
            batches=batches,
            factor=1 / counted,
            weights_of=weights_of,
            take=lambda key, found: add_gradients(sums, key, found),
            recompute=recompute,
        )
        gradients = {name: array for found in sums.values() for name, array in found.items()}
        if config.tied and ranks > 1 and comm.rank in (0, ranks - 1):
            gradients["embedding"] = sum_of_both_ends(comm, gradients["embedding"])
        return gradients, loss, most

    results = launch(ranks, run, traffic=traffic)
    found = {name: array for gradients, _, _ in results for name, array in gradients.items()}
    return PipelineGradients(
        round_to(decoder_vector(config, found), dtype),
        np.array(sum(loss for _, loss, _ in results) / counted),
        np.array([most for _, _, most in results]),
    )


def add_gradients(sums: dict[str, Gradients], key: str, found: Gradients) -> None:
    """Add a unit's gradients to those of the micro-batches before."""
    before = sums.setdefault(key, {})
    for name, gradient in found.items():
        before[name] = before[name] + gradient if name in before else gradient


def training_input(
    parameters: FloatArray, tokens: IntArray, mask: BoolArray, config: DecoderConfig
) -> tuple[np.dtype[Any], dict[str, FloatArray], IntArray, BoolArray]:
    """Check what a decoder is trained on; return the dtype, widened parameters by name, tokens and mask.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        If shapes or dtypes do not fit, or a token is outside the vocabulary.
    """
    (start,) = floating(parameters=parameters)
    params = decoder_params(config, widen(start))
    tokens = indices("tokens", tokens, config.vocabulary)
    mask = as_array("mask", mask).astype(bool, copy=False)
    if tokens.ndim != mask.ndim or tokens.shape[:-1] != mask.shape[:-1]:
        raise ShapeError(f"mask: expected shape {(*tokens.shape[:-1], 'T')}, got {mask.shape}")
    if tokens.shape[-1] != mask.shape[-1] + 1:
        raise ShapeError(f"mask: expected {tokens.shape[-1] - 1} predictions, got {mask.shape[-1]}")
    return start.dtype, params, tokens, mask
