"""Outputs and gradients of flexible attention held to the definition, at sampled rows and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cli.flexible_forms import Form
from cli.problems import SAMPLED_HEADS, SAMPLED_ROWS, Arrays, ToHost, sampled
from refimpl.attention.user_functions import Mod, as_mod, modified_scores, where_allowed
from refimpl.numerics import Array, in_float64, round_to, ulp

__all__ = ["check_backward", "check_forward"]

GRADIENT_FACTOR = 3  # times the error of products in the format of the call, as for all gradients


class _Functions(NamedTuple):
    mask: Mod | None
    score: Mod | None
    vjp: Mod | None


def _functions(form: Form) -> _Functions:
    def mod(name: str, *leading: str) -> Mod | None:
        return as_mod(name, form.options[name], leading) if name in form.options else None

    return _Functions(mod("mask_mod"), mod("score_mod", "score"), mod("score_mod_vjp", "gradient", "score"))


def check_forward(form: Form, dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold sampled rows of sampled heads to the reference in float64, as `refimpl.tolerances` does."""
    from refimpl import registry
    from refimpl.registry import Case
    from refimpl.testing import dtype_named
    from refimpl.tolerances import baseline_limits, mismatch

    (q, k, v), found = (to_host(x, dtype) for x in operands[:3]), to_host(output, dtype)
    B, N, H, _ = found.shape
    rows, functions = sampled(N, SAMPLED_ROWS), _functions(form)
    for batch, head in _heads(B, H):
        options: dict[str, Any] = {}
        if functions.mask is not None:
            options["mask_mod"] = _mask_at(functions.mask, (batch, head), rows, form.aux)
        if functions.score is not None:
            options["score_mod"] = _score_at(functions.score, (batch, head), rows, form.aux)
        queries = slice(batch, batch + 1), slice(None), slice(head, head + 1)
        kv_head = head // (H // k.shape[2])
        keys = queries[0], queries[1], slice(kv_head, kv_head + 1)
        case = Case((q[queries][:, rows], k[keys], v[keys]), options)
        truth, _, limits, invalid = baseline_limits(
            registry.get("attention.flexible"), case, dtype_named(dtype)
        )
        if invalid:
            return f"the sampled rows say nothing: {invalid}"
        where = f"batch {batch}, head {head}"
        problem = mismatch(found[queries][:, rows], truth["output"], limits["output"], name=where)
        if problem:
            return problem
    return None


def _heads(B: int, H: int) -> list[tuple[int, int]]:
    return [(int(index) // H, int(index) % H) for index in sampled(B * H, SAMPLED_HEADS)]


def _mask_at(mod: Mod, place: tuple[int, int], rows: Array, aux: Arrays) -> Any:
    """Return the mask of one head, its queries the given rows."""
    return lambda _b, _h, i, j: mod.call((), (*place, rows[i], j), aux)


def _score_at(mod: Mod, place: tuple[int, int], rows: Array, aux: Arrays) -> Any:
    return lambda score, _b, _h, i, j: mod.call((score,), (*place, rows[i], j), aux)


def check_backward(form: Form, dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold dQ of sampled queries, and dK and dV of sampled keys, to the definition in float64.

    Given the log-sum-exp, dQ of a query needs that query and all keys, dK of a key that key and all queries.
    """
    from refimpl.testing import dtype_named
    from refimpl.tolerances import Limit, mismatch

    q, k, v, out, lse, do = (to_host(x, dtype if x.ndim == 4 else "float32") for x in operands[:6])
    kind, functions = dtype_named(dtype), _functions(form)
    (B, N, H, _), kv_heads = q.shape, k.shape[2]
    group, every, some = H // kv_heads, np.arange(N), sampled(N, SAMPLED_ROWS)
    for batch, kv_head in _heads(B, kv_heads):
        members = range(kv_head * group, (kv_head + 1) * group)
        head = _KeyHead(functions, form.aux, (q, out, do), (k, v), lse, batch, members, kv_head)
        for rows, columns, names in ((some, every, ("dq",)), (every, some, ("dk", "dv"))):
            exact, rounded = (head.gradients(rows, columns, low) for low in (None, kind))
            for name in names:
                index = ("dq", "dk", "dv").index(name)
                truth, baseline = exact[index], rounded[index]
                size = np.abs(truth).max(initial=0.0)
                error = np.abs(in_float64(round_to(baseline, kind)) - truth).max(initial=0.0)
                limit = Limit(np.asarray(GRADIENT_FACTOR * error + ulp(size, kind)))
                where = f"{name} of batch {batch}, key head {kv_head}"
                gradient = to_host(getattr(output, name), dtype)[batch]
                ours = gradient[some, members[0]] if name == "dq" else gradient[some, kv_head]
                problem = mismatch(ours, truth, limit, name=where)
                if problem:
                    return problem
    return None


class _KeyHead(NamedTuple):
    """A key head of one sequence and the query heads that share it."""

    functions: _Functions
    aux: Arrays
    queries: Arrays
    keys: Arrays
    lse: Array
    batch: int
    members: range
    kv_head: int

    def gradients(self, rows: Array, columns: Array, kind: Any) -> tuple[Array, Array, Array]:
        """Return dQ of the first query head, and dK and dV of all of them together."""
        found = [
            _gradients(
                self.functions,
                [in_float64(x[self.batch, rows, h]) for x in self.queries],
                [in_float64(x[self.batch, columns, self.kv_head]) for x in self.keys],
                in_float64(self.lse[self.batch, h, rows]),
                ((self.batch, h), rows, columns, self.aux),
                kind,
            )
            for h in self.members
        ]
        dk, dv = (np.sum([x[index] for x in found], axis=0) for index in (1, 2))
        return found[0][0], dk, dv


def _gradients(
    functions: _Functions,
    rows: list[Array],
    columns: list[Array],
    lse: Array,
    at: tuple[tuple[int, int], Array, Array, Arrays],
    kind: Any,
) -> tuple[Array, Array, Array]:
    """Return what some queries and keys give each other, in float64; P and dS rounded to `kind`, if any."""
    (q, out, do), (k, v) = rows, columns
    (b, h), i, j, aux = at
    indices = tuple(map(np.asarray, (b, h, i[:, None], j)))
    scale = q.shape[1] ** -0.5
    before = score = scale * (q @ k.T)
    if functions.score is not None:
        score = modified_scores(functions.score, (before,), indices, aux)
    allowed = np.isfinite(lse)[:, None]
    if functions.mask is not None:
        allowed = allowed & where_allowed(functions.mask, indices, aux)
    base = np.where(np.isfinite(lse), lse, 0.0)[:, None]
    p = np.where(allowed, np.exp(np.where(allowed, score - base, -np.inf)), 0.0)
    ds = p * (do @ v.T - (do * out).sum(1, keepdims=True))
    if functions.vjp is not None:
        ds = np.where(p > 0, modified_scores(functions.vjp, (ds, before), indices, aux), 0.0)
    product = scale * ds
    if kind is not None:
        p, product = (in_float64(round_to(x, kind)) for x in (p, product))
    return product @ k, product.T @ q, p.T @ do
