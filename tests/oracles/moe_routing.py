"""Oracles of layers whose experts have a capacity: one token after another, and transformers' Switch."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np

from refimpl.registry import oracle
from tests.oracles import library
from tests.oracles.moe import best, expert, logits_of, softmax

LAYER = ("activation", "w_gate")


def places(tokens: int, experts: int, options: dict[str, Any], choices: int = 1) -> int:
    """How many tokens of a group an expert takes, in exact fractions."""
    if options.get("capacity") is not None:
        return int(options["capacity"])
    least = options.get("min_capacity", 4)
    share = Fraction(tokens * choices) * Fraction(options["capacity_factor"]) / experts
    rounding = options["rounding"]
    if rounding == "mesh_tf":
        return max(min(tokens, math.floor(share)), least)
    if rounding == "flaxformer":
        low = math.floor(share)
        rest = share - low
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1)
        return max(low + up, least)
    whole = math.ceil(share)
    return whole + (-whole) % least


def groups_of(x: Any, options: dict[str, Any]) -> list[range]:
    count = options.get("groups", 1)
    size = len(x) // count
    return [range(g * size, (g + 1) * size) for g in range(count)]


def _experts(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in LAYER if name in options}


@oracle("moe.switch")
def one_token_after_another(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    """Serve tokens in order until an expert is full."""
    y = np.zeros(x.shape)
    E = w_router.shape[1]
    for group in groups_of(x, options):
        room = Counter({e: places(len(group), E, options) for e in range(E)})
        for t in group:
            row = x[t].tolist()
            if options.get("jitter"):
                eps = options["jitter"]
                row = [v * (1 - eps + 2 * eps * u) for v, u in zip(row, options["uniforms"][t], strict=True)]
            z = logits_of(row, w_router)
            (e,) = best(z, 1)
            if room[e] > 0:
                room[e] -= 1
                y[t] = softmax(z)[e] * expert(x[t], e, w_in, w_out, **_experts(options))
    return y


@oracle("moe.switch")
def transformers_switch(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    """The sparse layer of transformers' Switch, its router in float64."""
    if options.get("jitter") or "w_gate" in options or options.get("capacity") is None or not x.size:
        raise NotImplementedError
    torch, transformers = library("torch"), library("transformers")
    module = library("transformers.models.switch_transformers.modeling_switch_transformers")
    E, D, F = w_in.shape
    config = transformers.SwitchTransformersConfig(
        d_model=D,
        d_ff=F,
        num_experts=E,
        expert_capacity=options["capacity"],
        router_bias=False,
        dropout_rate=0.0,
        dense_act_fn=options["activation"],
    )
    layer = module.SwitchTransformersSparseMLP(config).double().eval()
    layer.router.dtype = torch.float64  # the configuration has no name for it
    with torch.no_grad():
        layer.router.classifier.weight.copy_(torch.from_numpy(w_router.T.copy()))
        for e in range(E):
            layer.experts[f"expert_{e}"].wi.weight.copy_(torch.from_numpy(w_in[e].T.copy()))
            layer.experts[f"expert_{e}"].wo.weight.copy_(torch.from_numpy(w_out[e].T.copy()))
        rows = torch.from_numpy(x.reshape(options.get("groups", 1), -1, D))
        return layer(rows).numpy().reshape(x.shape)


def _two(row: Any, w_router: Any) -> tuple[int, int, float, float]:
    """The two best experts, and their gates divided by their sum."""
    z = logits_of(row, w_router)
    first, second = best(z, 2)
    g = softmax(z)
    total = g[first] + g[second]
    return first, second, g[first] / total, g[second] / total


@oracle("moe.gshard")
def algorithm_1(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    """Algorithm 1 line by line: c counts the choices of an expert, G holds the weights."""
    E = w_router.shape[1]
    G = np.zeros((len(x), E))
    for group in groups_of(x, options):
        C = places(len(group), E, options)
        c = [0] * E
        for s in group:
            e1, _, g1, _ = _two(x[s], w_router)
            if c[e1] < C:
                G[s, e1] = g1
            c[e1] = c[e1] + 1
        for s in group:
            _, e2, _, g2 = _two(x[s], w_router)
            rnd = options["uniforms"][s] if "uniforms" in options else 0.0
            if c[e2] < C and 2 * g2 > rnd:
                G[s, e2] = g2
            c[e2] = c[e2] + 1
    return _weighted(G, x, w_in, w_out, options)


@oracle("moe.gshard.as_coded")
def masks_of_the_code(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    """Queues: who is sent stands in line, all first choices before the second ones, the head is served."""
    E = w_router.shape[1]
    G = np.zeros((len(x), E))
    policy, threshold = options.get("second_policy", "all"), options.get("threshold", 0.2)
    for group in groups_of(x, options):
        lines: dict[int, list[tuple[int, float]]] = {e: [] for e in range(E)}
        for s in group:
            e1, _, g1, _ = _two(x[s], w_router)
            lines[e1].append((s, g1))
        # A first choice that found no room stands in nobody's way: capacity is all that counts.
        for s in group:
            _, e2, _, g2 = _two(x[s], w_router)
            sent = {
                "all": True,
                "random": options["uniforms"][s] < g2 / threshold if "uniforms" in options else True,
                "threshold": g2 > threshold,
            }[policy]
            if sent:
                lines[e2].append((s, g2))
        for e, line in lines.items():
            for s, gate in line[: places(len(group), E, options)]:
                G[s, e] = gate
    return _weighted(G, x, w_in, w_out, options)


@oracle("moe.batch_priority")
def sorted_by_gate(x: Any, w_router: Any, w_in: Any, w_out: Any, **options: Any) -> Any:
    """Sort the tokens of a group by their largest gate, and serve choice after choice in this order."""
    E, k = w_router.shape[1], options.get("k", 1)
    G = np.zeros((len(x), E))
    options = {"rounding": "vmoe", **options}
    for group in groups_of(x, options):
        z = {s: logits_of(x[s], w_router) for s in group}
        p = {s: softmax(z[s]) for s in group}
        line = sorted(group, key=lambda s: -max(p[s]))
        room = Counter({e: places(len(group), E, options, k) for e in range(E)})
        for choice in range(k):
            for s in line:
                e = best(z[s], k)[choice]
                if room[e] > 0:
                    room[e] -= 1
                    G[s, e] = p[s][e]
    return _weighted(G, x, w_in, w_out, options)


def _weighted(G: Any, x: Any, w_in: Any, w_out: Any, options: dict[str, Any]) -> Any:
    y = np.zeros(x.shape)
    for t, e in zip(*np.nonzero(G), strict=True):
        y[t] += G[t, e] * expert(x[t], e, w_in, w_out, **_experts(options))
    return y


@oracle("moe.dispatch")
def place_by_place(
    x: Any, combine: Any, w_in: Any, w_out: Any, *, dispatch_mask: Any = None, **options: Any
) -> Any:
    """Ask every place for its token, and add what its expert says to the token's output."""
    taken = combine != 0 if dispatch_mask is None else dispatch_mask
    y = np.zeros(x.shape)
    for g, s, e, c in np.ndindex(combine.shape):
        if taken[g, s, e, c]:
            y[g, s] += combine[g, s, e, c] * expert(x[g, s], e, w_in, w_out, **options)
    return y
