"""What each rank of a mesh sends under each label, exactly: counted by `parallel.mesh`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from memsim.moe_communication import moe_all_to_all
from memsim.prices.pipeline import boundary_phases
from memsim.prices.tensor import (
    Phases,
    block_phases,
    named,
    phases_total,
    replicated_sizes,
    ring,
    vocabulary_phases,
)
from refimpl.parallel.comm import Sent
from refimpl.parallel.mesh import Mesh, Place
from refimpl.parallel.mixture import EXPERTS, MixtureConfig, model_shapes
from refimpl.registry import Case, prices
from refimpl.transformer.config import DecoderConfig

__all__ = ["mesh_phases", "rank_sizes"]

_COLUMNS_OR_ROWS = {
    "w_q", "w_k", "w_v", "b_q", "b_k", "b_v", "w_o", "w_1", "b_1", "w_2", "w_gate", "w_up", "w_down",
    "embedding", "head", "experts_in", "experts_gate", "experts_out",
}  # fmt: skip


def rank_sizes(config: DecoderConfig, mesh: Mesh, chunks: int, pipeline: int) -> dict[str, list[int]]:
    """Return for each unit of a rank its size, and how many stages use it: a tied table on one rank has two.

    Experts of a layer are units by themselves, with "experts" behind the layer's key.

    >>> config = DecoderConfig(vocabulary=4, width=2, num_heads=2, layers=1, hidden=2)
    >>> rank_sizes(config, Mesh(tensor=2), chunks=1, pipeline=0)["embedding"]
    [4, 2]
    """
    stages = mesh.pipeline * chunks
    per, more = divmod(config.layers, stages)
    owner = [stage for stage in range(stages) for _ in range(per + (stage < more))]
    found: dict[str, list[int]] = {}
    for name, shape in model_shapes(config).items():
        prefix, _, last = name.rpartition(".")
        homes = [stages - 1]
        if prefix:
            homes = [owner[int(prefix.rpartition(".")[2])]]
        elif name == "embedding":
            homes = [0, stages - 1] if config.tied else [0]
        elif name == "positions":
            homes = [0]
        uses = sum(stage % mesh.pipeline == pipeline for stage in homes)
        if uses:
            size = math.prod(shape) // (mesh.tensor if last in _COLUMNS_OR_ROWS else 1)
            key = prefix or ("gamma" if name == "beta" else name)
            if last in EXPERTS:
                key, size = f"{prefix} experts", size // mesh.data
            found[key] = [found.get(key, [0])[0] + size, uses]
    return found


def mesh_phases(case: Case) -> list[Phases]:
    """Return for each rank what it sends under each label in ``mesh_training(...)``."""
    steps = case.args[1].shape[0]
    mesh = Mesh(*case.kwargs["mesh"])
    found = []
    for rank in range(mesh.size):
        one = phases_total(_parts_of_a_step(case, mesh, mesh.place(rank)))
        found.append(
            {label: Sent(steps * sent.messages, steps * sent.bytes) for label, sent in one.items() if steps}
        )
    return found


def _parts_of_a_step(case: Case, mesh: Mesh, place: Place) -> Iterator[tuple[str, Sent]]:
    parameters, tokens, _ = (np.asarray(array) for array in case.args)
    _, micro, _, B, length = tokens.shape
    options: dict[str, Any] = {"chunks": 1, "stage": 1, "sequence_parallel": False, **case.kwargs}
    config: DecoderConfig = options["config"]
    size = max(parameters.dtype.itemsize, 4)
    for ranks, times in ((mesh.data, 2), (mesh.size, 1)):  # tokens and loss; the gradient's norm
        yield "statistics", ring("all_reduce", elements=1, itemsize=8, ranks=ranks, times=times)
    split = mesh.tensor if options["sequence_parallel"] else 1
    yield from boundary_phases(
        rank=place.pipeline,
        ranks=mesh.pipeline,
        chunks=options["chunks"],
        micro_batches=micro,
        size=B * (length - 1) * config.width * size // split,
    ).items()
    for label, sent in _tensor_parts(options, mesh, place, tokens=B * (length - 1), itemsize=size):
        yield label, Sent(micro * sent.messages, micro * sent.bytes)
    sizes = rank_sizes(config, mesh, options["chunks"], place.pipeline)
    stage = options["stage"]
    for key, (elements, uses) in sizes.items():
        if key.endswith("experts"):
            continue  # no other rank has them
        one: dict[str, Any] = {"elements": elements, "itemsize": size, "ranks": mesh.data}
        scatters, gathers = micro * uses if stage > 1 else 1, 2 * micro * uses if stage == 3 else 1
        yield "gradients", ring("reduce_scatter", times=scatters, **one)
        yield "parameters", ring("all_gather", times=gathers, **one)
    if config.tied and mesh.pipeline > 1 and place.pipeline in (0, mesh.pipeline - 1):
        chunk = -(-sizes["embedding"][0] // mesh.data)
        yield "tied embedding", ring("all_reduce", elements=chunk, itemsize=size, ranks=2)


def _tensor_parts(
    options: dict[str, Any], mesh: Mesh, place: Place, *, tokens: int, itemsize: int
) -> Iterator[tuple[str, Sent]]:
    """Yield what a rank sends to those that share its layers, for one micro-batch."""
    config, sequence = options["config"], options["sequence_parallel"]
    names = model_shapes(config)
    keys = rank_sizes(config, mesh, options["chunks"], place.pipeline)
    for key in keys:
        if key.endswith("experts"):
            yield from _exchange(config, mesh, tokens, itemsize, recompute=bool(options.get("recompute")))
        elif key.startswith("layers."):
            own = [name.rpartition(".")[2] for name in names if name.startswith(f"{key}.")]
            yield from block_phases(
                tokens=tokens,
                width=config.width,
                itemsize=itemsize,
                ranks=mesh.tensor,
                passes=3 if options.get("recompute") else 2,
                replicated=replicated_sizes(own, config.width),
                sequence_parallel=sequence,
                backward=True,
            ).items()
    both: dict[str, Any] = {"itemsize": itemsize, "ranks": mesh.tensor}
    ends = (place.pipeline == 0) + (place.pipeline == mesh.pipeline - 1)  # embedding; head
    if sequence:
        for operation in ("all_gather", "reduce_scatter"):
            label = f"tensor {operation.replace('_', '-')}"
            yield label, ring(operation, elements=tokens * config.width, times=ends, **both)
        for key in ("gamma", "positions"):
            if key in keys:
                yield "sequence gradients", ring("all_reduce", elements=keys[key][0], **both)
    else:
        yield "tensor all-reduce", ring("all_reduce", elements=tokens * config.width, times=ends, **both)
    if place.pipeline == mesh.pipeline - 1:
        yield from vocabulary_phases(tokens=tokens, **both).items()


def _exchange(
    config: MixtureConfig, mesh: Mesh, tokens: int, itemsize: int, *, recompute: bool
) -> Iterator[tuple[str, Sent]]:
    """Yield what a rank sends for one mixture: all-to-alls of buffers with a place for each of its tokens."""
    if mesh.data > 1 and tokens:
        sent = moe_all_to_all(
            experts=config.experts,
            capacity=tokens,
            width=config.width,
            ranks=mesh.data,
            itemsize=itemsize,
            direction="both",
        )
        for way, times, gradients in (("forward", 1 + recompute, ""), ("backward", 1, " gradients")):
            for name in ("dispatch", "combine"):
                one = Sent(mesh.data - 1, int(sent[f"{way}, {name}"]))
                yield name + gradients, Sent(times * one.messages, times * one.bytes)
    elif mesh.data > 1:  # buffers without places travel too
        for name, times in (("dispatch", 1 + recompute), ("combine", 1 + recompute)):
            yield name, Sent(times * (mesh.data - 1), 0)
            yield f"{name} gradients", Sent(mesh.data - 1, 0)
    size = config.width * config.experts
    yield "router gradient", ring("all_reduce", elements=size, itemsize=itemsize, ranks=mesh.tensor)


def _mesh(case: Case) -> dict[str, int]:
    return named(mesh_phases(case))


prices("parallel.mesh", counts="comm")(_mesh)
