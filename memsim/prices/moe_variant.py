"""The operations of hash, assigned, merged, shared and split experts, from shapes and options.

Each price equals what the reference counts through `refimpl.memory.Memory`.  Layers without a router cost
what a dense layer of one expert's width does, however many experts there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memsim.prices.moe import expert_flops
from refimpl.registry import Case, prices

__all__: list[str] = []


def _gated(case: Case, name: str = "w_gate") -> bool:
    return case.kwargs.get(name) is not None


def _weighted(rows: int, width: int, hidden: int, *, gated: bool) -> int:
    """Return the operations of experts on so many rows, and of the products with their gates."""
    return expert_flops(rows, width, hidden, gated=gated) + 2 * rows * width


@prices("moe.hash", counts="flops")
def hash_layer(case: Case) -> dict[str, int]:
    """Return ``4 T D F``: one expert a token, and no gate."""
    x, w_in, _ = case.args
    return {"flops": expert_flops(len(x), x.shape[1], w_in.shape[2], gated=_gated(case))}


@prices("moe.hash.multi", counts="flops")
def multi_hash(case: Case) -> dict[str, int]:
    """Return ``4 T D F``: a layer put together costs what a whole one does."""
    x, w_in, _ = case.args
    return {"flops": expert_flops(len(x), x.shape[1], w_in.shape[0] * w_in.shape[3], gated=False)}


def _expert_choice(case: Case) -> dict[str, int]:
    """Return ``2 T D E + E C (4 D F + 2 D)``."""
    x, w_router, w_in, _ = case.args
    rows = w_router.shape[1] * case.kwargs["capacity"]
    experts = _weighted(rows, x.shape[1], w_in.shape[2], gated=_gated(case))
    return {"flops": 2 * x.size * w_router.shape[1] + experts}


prices("moe.expert_choice", counts="flops")(_expert_choice)
prices("moe.expert_choice.mesh_tf", counts="flops")(_expert_choice)


@prices("moe.base_layer", counts="flops")
def base_layer(case: Case) -> dict[str, int]:
    """Return ``2 T D E + T (4 D F + 2 D)``; the assignment is not made of products."""
    x, w_router, w_in, _ = case.args
    experts = _weighted(len(x), x.shape[1], w_in.shape[2], gated=_gated(case))
    return {"flops": 2 * x.size * w_router.shape[1] + experts}


def _attention_router(x: Any, w_q: Any) -> int:
    T, E = len(x), w_q.shape[1]
    return int(6 * x.size * E + 4 * T * E * E)


@prices("moe.attention_router", counts="flops")
def attention_router(case: Case) -> dict[str, int]:
    """Return ``6 T D E + 4 T E²``, against ``2 T D E`` of a plain router."""
    return {"flops": _attention_router(*case.args[:2])}


@prices("moe.attention_router.layer", counts="flops")
def attention_routed(case: Case) -> dict[str, int]:
    """Return the router's and ``T k (4 D F + 2 D)``."""
    x, w_q, *_, w_in, _ = case.args
    rows = len(x) * case.kwargs["k"]
    experts = _weighted(rows, x.shape[1], w_in.shape[2], gated=_gated(case))
    return {"flops": _attention_router(x, w_q) + experts}


@prices("moe.soft_merging", counts="flops")
def soft_merging(case: Case) -> dict[str, int]:
    """Return ``2 B D E + 4 B E D F + 4 B T D F``: route, merge, run once."""
    x, w_router, w_in, _ = case.args
    B, T, D = x.shape
    E, F, gated = w_router.shape[1], w_in.shape[2], _gated(case)
    merge, run = (expert_flops(rows, D, F, gated=gated) for rows in (B * E, B * T))
    return {"flops": 2 * B * D * E + merge + run}


@prices("moe.fine_grained", counts="flops")
def fine_grained(case: Case) -> dict[str, int]:
    """Return ``2 T D m N + T k (4 D F + 2 D m)``: experts cost the same, the router m times as much."""
    x, w_router, w_in, _ = case.args
    m, k = case.kwargs["segments"], case.kwargs["k"]
    experts = _weighted(len(x) * m * k, x.shape[1], w_in.shape[2] // m, gated=_gated(case))
    return {"flops": 2 * x.size * w_router.shape[1] + experts}


@prices("moe.shared_experts", counts="flops")
def shared_experts(case: Case) -> dict[str, int]:
    """Return ``2 T D R + T k (4 D F + 2 D) + T S (4 D F' + 2 D)``, and ``2 T D S`` with a shared router."""
    x, w_router, w_in, _, shared_in, _ = case.args
    (T, D), S = x.shape, len(shared_in)
    routed = _weighted(T * case.kwargs["k"], D, w_in.shape[2], gated=_gated(case))
    shared = _weighted(T * S, D, shared_in.shape[2], gated=_gated(case, "shared_gate"))
    router = w_router.shape[1] + (S if _gated(case, "shared_router") else 0)
    return {"flops": 2 * T * D * router + routed + shared}


def _residual(x: Any, w_1: Any, w_router: Any, w_in: Any) -> int:
    T, D = x.shape
    dense, expert = (_weighted(T, D, hidden, gated=False) for hidden in (w_1.shape[1], w_in.shape[2]))
    return int(2 * T * D * w_router.shape[1]) + dense + expert


@prices("moe.residual", counts="flops")
def residual(case: Case) -> dict[str, int]:
    """Return ``2 T D E + T (4 D F + 4 D F' + 4 D)``."""
    x, w_1, _, w_router, w_in, _ = case.args
    return {"flops": _residual(x, w_1, w_router, w_in)}


@prices("moe.residual.pyramid", counts="flops")
def pyramid(case: Case) -> dict[str, int]:
    """Return the sum over the layers: a layer with more experts costs a wider router and nothing else."""
    (x,) = case.args
    layers = case.kwargs["layers"]
    return {"flops": sum(_residual(x, layer.w_1, layer.w_router, layer.w_in) for layer in layers)}


@prices("moe.split_ffn", counts="flops")
def split_ffn(case: Case) -> dict[str, int]:
    """Return ``(4 D F / E + 2 D) n`` for n gates that are not 0: all of them when none are given."""
    x, w_1, _ = case.args
    E, gates = case.kwargs["num_experts"], case.kwargs.get("gates")
    rows = len(x) * E if gates is None else int(np.count_nonzero(gates))
    return {"flops": _weighted(rows, x.shape[1], w_1.shape[1] // E, gated=_gated(case))}
