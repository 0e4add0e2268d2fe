"""Tensor, pipeline and data parallelism with ZeRO together: a decoder trained on a mesh of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import BoolArray, FloatArray, IntArray, round_to
from refimpl.parallel.adam import AdamW
from refimpl.parallel.comm import Comm, Launch, Traffic, run_ranks
from refimpl.parallel.data import overflow_skips
from refimpl.parallel.decoder_stages import decoder_vector
from refimpl.parallel.mesh import Mesh, Place
from refimpl.parallel.mesh_program import MeshPlan, TrainedRank, rank_units, train_rank
from refimpl.parallel.pipeline import small_decoder, training_input
from refimpl.parallel.schedules import SCHEDULES, Schedule
from refimpl.parallel.tensor_layers import joined_weights
from refimpl.registry import Case, Source, technique
from refimpl.transformer.config import DecoderConfig
from refimpl.validation import bind_axes, whole

__all__ = ["MeshTraining", "mesh_training"]


class MeshTraining(NamedTuple):
    """What is left after training.

    Attributes
    ----------
    parameters : ndarray of float, shape (n,)
        Put together from what the ranks have.
    losses : ndarray of float, shape (steps,)
        Mean loss a counted token.
    held_bytes : ndarray of int, shape (R,)
        The most bytes of model states that each rank held.
    in_flight : ndarray of int, shape (R,)
        The most activations that each rank held.
    spread : ndarray of float, shape ()
        The largest difference between copies of one parameter on several ranks.
    """

    parameters: FloatArray
    losses: FloatArray
    held_bytes: IntArray
    in_flight: IntArray
    spread: FloatArray


def sample_mesh(
    rng: np.random.Generator,
    *,
    tensor: int,
    pipeline: int,
    data: int,
    steps: int,
    micro: int,
    B: int,
    tokens: int,
    make: str,
    schedule: str,
    stage: int,
    split: str,
    extra: str,
) -> Case:
    """Return one call of `mesh_training`; some data-parallel ranks have fewer tokens that count, or none."""
    config, parameters = small_decoder(rng, make, layers=2, heads=2)
    interleaves = schedule == "interleaved"
    micro = micro * pipeline if interleaves else micro
    T = tokens * (tensor if split == "sequence" else 1)
    words = rng.integers(0, config.vocabulary, (steps, micro, data, B, T + 1))
    mask = rng.random((steps, micro, data, B, T)) < rng.random((1, 1, data, 1, 1))
    # A large eps, because Adam turns the rounding error of a gradient that should be 0 into a step.
    options: dict[str, Any] = {"optimizer": AdamW(lr=0.05, eps=1e-3, weight_decay=0.1)}
    options |= {"config": config, "mesh": Mesh(tensor, pipeline, data), "stage": stage}
    options |= {"schedule": schedule, "chunks": 2 if interleaves else 1}
    options |= {"sequence_parallel": split == "sequence", "recompute": extra == "recompute"}
    if extra == "clip":
        options["max_norm"] = 0.1
    return Case((parameters, words, mask), options)


_EDGE: dict[str, Any] = {"steps": 1, "micro": 2, "B": 1, "tokens": 2, "extra": "none"}


@technique(
    "parallel.mesh",
    entries=(93, 94, 100),
    kind="function",
    source=Source("Narayanan et al. 2021", "arXiv:2104.04473", "section 2, PTD-P; with ZeRO along the data"),
    axes={
        "tensor": (1, 2),
        "pipeline": (1, 2),
        "data": (1, 2),
        "steps": (1, 2),
        "micro": (1, 2),
        "B": (1, 2),
        "tokens": (1, 2),
    },
    options={
        "make": ("llama", "gpt2", "post", "mixture"),
        "schedule": SCHEDULES,
        "stage": (1, 2, 3),
        "split": ("tensor", "sequence"),
        "extra": ("none", "clip", "recompute"),
    },
    edges=(
        {**_EDGE, "tensor": 1, "pipeline": 1, "data": 1, "schedule": "1f1b"},
        {**_EDGE, "tensor": 2, "pipeline": 2, "data": 2, "make": "llama", "schedule": "1f1b", "stage": 3},
        {**_EDGE, "tensor": 1, "pipeline": 2, "data": 3, "make": "gpt2", "schedule": "interleaved"},
        {**_EDGE, "tensor": 2, "pipeline": 1, "data": 2, "extra": "clip", "split": "sequence"},
        {**_EDGE, "tensor": 1, "pipeline": 3, "data": 1, "B": 0, "schedule": "gpipe"},
        {**_EDGE, "tensor": 1, "pipeline": 4, "data": 2, "extra": "clip"},  # a rank without layers
        {**_EDGE, "tensor": 2, "pipeline": 1, "data": 2, "extra": "clip", "make": "mixture", "stage": 2},
        {**_EDGE, "tensor": 1, "pipeline": 2, "data": 4, "make": "mixture", "split": "tensor", "stage": 3},
    ),
    sample=sample_mesh,
)
def mesh_training(
    parameters: FloatArray,
    tokens: IntArray,
    mask: BoolArray,
    /,
    *,
    config: DecoderConfig,
    mesh: Mesh,
    stage: int = 1,
    schedule: Schedule | IntArray = "1f1b",
    chunks: int = 1,
    recompute: bool = False,
    sequence_parallel: bool = False,
    optimizer: AdamW | None = None,
    max_norm: float | None = None,
    traffic: Traffic | None = None,
    launch: Launch = run_ranks,
) -> MeshTraining:
    """Return a decoder after training with AdamW on ranks that divide layers, depth, batch and states.

    Parameters
    ----------
    parameters : ndarray of float, shape (n,)
        Initial ones, in the order of `refimpl.parallel.mixture.model_shapes`.
    tokens : ndarray of int, shape (steps, m, D, B, T + 1)
        For each step and micro-batch what each of D data-parallel ranks trains on.
    mask : ndarray of bool, shape (steps, m, D, B, T)
        True: predicting ``tokens[..., t + 1]`` counts in the loss.
    config : DecoderConfig or MixtureConfig
        The make; heads, hidden units and vocabulary divide by the tensor-parallel ranks, and the experts of
        a mixture by the data-parallel ranks, over which they are spread.
    mesh : Mesh
        Ranks along each dimension.
    stage : {1, 2, 3}
        Of ZeRO along the data dimension: optimizer states, gradients too, parameters too are divided.  An
        expert's are not: one rank along the data has it.
    schedule, chunks
        As for `refimpl.parallel.schedules.planned_steps`.
    recompute : bool
        Keep the inputs of layers alone, and run them once more on the way back.
    sequence_parallel : bool
        Split the tokens along the tensor dimension, outside of the sublayers.
    optimizer : AdamW, optional
        Settings.
    max_norm : float, optional
        Clip the gradient of a step to this norm, in which each parameter counts once.
    traffic : Traffic, optional
        Counts what the ranks send.
    launch : callable
        Starts the ranks.  Default: one thread each.

    Returns
    -------
    MeshTraining
        Parameters and losses are those of one device, but for the order of sums.

    Raises
    ------
    ShapeError, DTypeError
        If the arrays do not fit, or something does not divide.
    OptionError
        If there is no such stage or schedule, or a number is out of range.
    ScheduleError
        If ranks cannot execute the steps given.

    References
    ----------
    .. [1] Narayanan et al., 2021, arXiv:2104.04473, section 2.
    .. [2] Rajbhandari et al., 2020, arXiv:1910.02054, sections 1 ("ZeRO and MP") and 5.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> config, start = small_decoder(rng, "llama", layers=2)
    >>> tokens, mask = rng.integers(0, 6, (2, 2, 2, 1, 4)), np.ones((2, 2, 2, 1, 3), bool)
    >>> train = dict(config=config, optimizer=AdamW(lr=0.1))
    >>> eight = mesh_training(start, tokens, mask, mesh=Mesh(2, 2, 2), stage=3, **train)
    >>> one = (array.reshape(2, 4, 1, 1, -1) for array in (tokens, mask))
    >>> alone = mesh_training(start, *one, mesh=Mesh(), **train)
    >>> bool(np.allclose(eight.parameters, alone.parameters, rtol=0, atol=1e-12)), float(eight.spread)
    (True, 0.0)
    """
    dtype, params, tokens, mask = training_input(parameters, tokens, mask, config)
    sizes = bind_axes({"tokens": (tokens, "steps m D B T+1"), "mask": (mask, "steps m D B T")})
    mesh = Mesh(*mesh)
    if sizes["D"] != mesh.data:
        raise ShapeError(f"tokens: expected {mesh.data} data-parallel ranks, got shape {tokens.shape}")
    if sequence_parallel and mask.shape[-1] % mesh.tensor:
        raise ShapeError(f"mask: axis T must divide into {mesh.tensor} ranks; got shape {mask.shape}")
    if sizes["m"] < 1:
        raise OptionError(f"tokens: axis m must be at least 1; got shape {tokens.shape}")
    plan = MeshPlan(
        config=config,
        mesh=mesh,
        stage=stage,
        schedule=schedule,
        chunks=whole("chunks", chunks),
        recompute=recompute,
        sequence_parallel=sequence_parallel,
        optimizer=optimizer or AdamW(),
        max_norm=max_norm,
    )

    def run(comm: Comm) -> TrainedRank:
        with overflow_skips():
            return train_rank(comm, plan, params, tokens, mask)

    results = launch(mesh.size, run, traffic=traffic)
    trained, spread = _put_together(plan, results)
    last = results[mesh.rank(Place(0, mesh.pipeline - 1, 0))]
    return MeshTraining(
        round_to(decoder_vector(config, trained), dtype),
        np.array(last.losses, np.float64),
        np.array([rank.held_bytes for rank in results]),
        np.array([rank.in_flight for rank in results]),
        np.array(spread),
    )


def _put_together(plan: MeshPlan, ranks: Sequence[TrainedRank]) -> tuple[dict[str, FloatArray], float]:
    """Return whole parameters by name, and how far copies of the same parameter are from each other."""
    mesh, spread = plan.mesh, 0.0
    parts: list[dict[str, FloatArray]] = [{} for _ in range(mesh.tensor)]
    for tensor in range(mesh.tensor):
        for pipeline in range(mesh.pipeline):
            places = [Place(tensor, pipeline, data) for data in range(mesh.data)]
            held = [ranks[mesh.rank(place)].parameters for place in places]
            dense, experts = rank_units(plan, places[0])
            for number, unit in enumerate(dense):
                chunks = [shares[0][number] for shares in held]
                copies = [np.concatenate(chunks)[: unit.size]] if plan.stage == 3 else chunks
                for copy in copies:
                    for name, array in unit.weights(copy).items():
                        known = parts[tensor].setdefault(name, array)
                        spread = max(spread, _difference(known, array))
            for number, unit in enumerate(experts):
                own = [unit.weights(shares[1][number]) for shares in held]
                parts[tensor] |= {name: np.concatenate([part[name] for part in own]) for name in unit.shapes}
    joined = joined_weights(parts)
    for part in parts[1:]:
        for name, array in part.items():
            if array.shape == joined[name].shape:
                spread = max(spread, _difference(joined[name], array))
    return joined, spread


def _difference(a: FloatArray, b: FloatArray) -> float:
    return float(np.max(np.abs(a - b), initial=0.0))
