"""Laws of the backward passes of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.numerics import round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close

Backward = Callable[..., Any]

BACKWARD = ("attention.flash_backward", "attention.standard_backward")


@law(*BACKWARD, "attention.flexible_backward", "attention.varlen_backward")
def gradients_are_linear_in_the_output_gradient(f: Backward, case: Case, close: Close) -> None:
    """Doubling the gradient of the output doubles every gradient."""
    do = case.args[-1]
    doubled = case.replace(*case.args[:-1], round_to(2 * widen(do), do.dtype)).call(f)
    for name, once, twice in zip(("dq", "dk", "dv"), case.call(f), doubled, strict=False):
        close(2 * widen(once), widen(twice), f"{name} with dO doubled", factor=2.0, of=name)


@law(*BACKWARD)
def value_gradients_sum_to_the_output_gradient(f: Backward, case: Case, close: Close) -> None:
    """Without dropout the weights of a row sum to 1, so dV summed over keys is dO summed over live rows."""
    case = _forwarded(case.without("dropout_p", "rng", "dropout_mask"))
    q, k, v = case.args[:3]
    do = widen(case.args[-1]).astype(np.float64)
    alive = np.isfinite(_dense(case, return_lse=True).lse)
    do = do * np.swapaxes(alive, 1, 2)[..., None]
    wanted = do.sum(axis=1).reshape(v.shape[0], k.shape[2], q.shape[2] // k.shape[2], v.shape[3]).sum(axis=2)
    found = widen(case.call(f)[2]).astype(np.float64).sum(axis=1)
    close.on(case)(found, wanted, "dV summed over keys", factor=4.0 * (1 + k.shape[1]), of="dv")


@law(*BACKWARD)
def equal_keys_give_no_query_gradient(f: Backward, case: Case, close: Close) -> None:
    """A row of dS sums to 0, so where every key is the same the queries have no gradient."""
    q, k = case.args[:2]
    if k.shape[1] == 0:
        return
    alike = np.broadcast_to(k[:, :1], k.shape).copy()
    case = _forwarded(case.without("softcap").replace(q, alike, *case.args[2:]))
    found = widen(case.call(f)[0])
    close.on(case)(found, np.zeros_like(found), "dQ where all keys are equal", factor=4.0)


def _dense(case: Case, **options: Any) -> Any:
    """Return the dense forward pass of a call of a backward pass."""
    from refimpl.attention.dense import scaled_dot_product_attention

    forward = Case(case.args[:3], case.kwargs).without("block_sizes", "sram")
    return forward.replace(**options).call(scaled_dot_product_attention)


def _forwarded(case: Case) -> Case:
    """Return the call with the output and log-sum-exp, where it has them, of its own forward pass."""
    if len(case.args) == 4:
        return case
    q, k, v, o, lse, do = case.args
    out = _dense(case, return_lse=True)
    return case.replace(q, k, v, out.out.astype(o.dtype), out.lse.astype(lse.dtype), do)
