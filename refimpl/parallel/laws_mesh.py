"""Laws of training on a mesh of ranks: one device's parameters, each rank's share, copies that agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import FloatArray
from refimpl.parallel.laws_pipeline import on_one_device
from refimpl.parallel.mesh import Mesh
from refimpl.parallel.mixed_precision import LossScale, initial_state, optimizer_step
from refimpl.parallel.mixture import MixtureConfig, model_shapes
from refimpl.parallel.tensor_layers import SPLIT
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Function = Callable[..., Any]
MESH = "parallel.mesh"


def trained_on_one_device(case: Case) -> tuple[FloatArray, list[float]]:
    """Return parameters and losses of plain AdamW on one device, all micro-batches of a step together."""
    parameters, tokens, mask = case.args
    state = initial_state(parameters, LossScale(1.0))
    losses = []
    for words, counts in zip(tokens, mask, strict=True):
        m, D = words.shape[:2]
        whole = (array.reshape(m * D, *array.shape[2:]) for array in (words, counts))
        gradient, loss = on_one_device(case.replace(state.master, *whole))
        options = {"optimizer": case.kwargs["optimizer"], "max_norm": case.kwargs.get("max_norm")}
        state = optimizer_step(state, gradient, **options)
        losses.append(loss)
    return state.master, losses


@law(MESH)
def a_mesh_trains_as_one_device(f: Function, case: Case, close: Close) -> None:
    """Whatever the ranks divide, parameters and losses are those of plain AdamW on one device."""
    if isinstance(case.kwargs["config"], MixtureConfig):
        return  # `along_each_dimension_alone`, and an oracle, know mixtures
    parameters, losses = trained_on_one_device(case)
    found = case.call(f)
    close(found[0], parameters, "parameters of one device", of="parameters", factor=8.0)
    close(found[1], np.array(losses), "losses of one device", of="losses", factor=8.0)


@law(MESH)
def copies_stay_identical(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """What several ranks have, norms, tied tables, replicas, stays equal bit for bit."""
    spread = float(case.call(f)[4])
    require(spread == 0, f"copies differ by {spread}")


@law(MESH)
def a_rank_holds_its_share(f: Function, case: Case, close: Close) -> None:  # noqa: ARG001
    """It holds its experts, and of its other layers ceil(1/D), unit by unit, of what the stage divides."""
    parameters, tokens, _ = case.args
    config, mesh, stage = (case.kwargs[name] for name in ("config", "mesh", "stage"))
    expected = []
    for rank in range(mesh.size):
        sizes, experts = _unit_sizes(case, mesh.place(rank).pipeline)
        shard = sum(-(-size // mesh.data) for size in sizes)
        low = parameters.dtype.itemsize
        gradients = (shard if stage >= 2 else sum(sizes)) if len(tokens) else 0
        held = (shard if stage == 3 else sum(sizes)) + gradients
        of_experts = (1 + (len(tokens) > 0)) * low + 3 * max(low, 4)
        expected.append(low * held + 3 * max(low, 4) * shard + of_experts * experts)
    found = list(case.call(f)[2])
    require(found == expected, f"bytes held: expected {expected}, got {found}; {config}")


def _unit_sizes(case: Case, pipeline: int) -> tuple[list[int], int]:
    """Return the sizes of a rank's units, and of its experts, counted from names and shapes alone."""
    config, mesh, chunks = (case.kwargs[name] for name in ("config", "mesh", "chunks"))
    stages = mesh.pipeline * chunks
    per, more = divmod(config.layers, stages)
    owner = [stage for stage in range(stages) for _ in range(per + (stage < more))]
    sizes: dict[str, int] = {}
    experts = 0
    for name, shape in model_shapes(config).items():
        prefix, _, last = name.rpartition(".")
        if prefix:
            homes = [owner[int(prefix.rpartition(".")[2])]]
        elif name == "embedding":
            homes = [0, stages - 1] if config.tied else [0]
        else:
            homes = [0] if name == "positions" else [stages - 1]
        if any(stage % mesh.pipeline == pipeline for stage in homes):
            size = int(np.prod(shape)) // (mesh.tensor if last in SPLIT else 1)
            if last.startswith("experts"):
                experts += size // mesh.data
                continue
            key = prefix or ("gamma" if name == "beta" else name)
            sizes[key] = sizes.get(key, 0) + size
    return list(sizes.values()), experts


@law(MESH)
def along_each_dimension_alone(f: Function, case: Case, close: Close) -> None:
    """Ranks along one dimension give what ranks along all give, if the data are dealt alike."""
    p, tokens, mask = case.args
    steps, m, D, B = tokens.shape[:4]
    expected = case.call(f)[0]
    plain = case.replace(schedule="gpipe", chunks=1, sequence_parallel=False, recompute=False)
    alone = plain.replace(mesh=Mesh(1, 1, D))
    close(alone.call(f)[0], expected, "data parallelism alone", of="parameters", factor=8.0)
    together = (array.reshape(steps, 1, 1, m * D * B, array.shape[-1]) for array in (tokens, mask))
    one = plain.replace(p, *together, mesh=Mesh())
    close(one.call(f)[0], expected, "one rank", of="parameters", factor=8.0)
