"""Laws of the selective scan: what must hold for every implementation, whatever it is written in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.errors import LawViolation
from refimpl.numerics import Array, FloatArray, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close
from refimpl.transformer.activations import activate

Scan = Callable[..., Any]
SCAN = "ssm.selective_scan"
PER_TOKEN = ("z",)  # options with an axis of tokens


def _out(case: Case, f: Scan) -> Array:
    return widen(np.asarray(case.call(f)))


def _state(case: Case, f: Scan) -> Array:
    return np.asarray(case.replace(return_state=True).call(f)[1])


def _tokens(case: Case, rows: slice) -> Case:
    """Return the case with some of its tokens only."""
    u, delta, A, B, C = case.args
    gate = {name: case.kwargs[name][:, rows] for name in PER_TOKEN if name in case.kwargs}
    return case.replace(u[:, rows], delta[:, rows], A, B[:, rows], C[:, rows], **gate)


def _plain(case: Case) -> Case:
    """Return the case with nothing added to the state or behind it."""
    return case.without("D", "z", "initial_state")


def _sized(case: Case, size: float) -> Case:
    """Return the case with every step of one size."""
    u, delta, *others = case.args
    steps = np.full(delta.shape, size, delta.dtype)
    return case.without("delta_bias").replace(u, steps, *others, delta_softplus=False)


def _empty(case: Case) -> bool:
    return 0 in case.args[0].shape


@law(SCAN)
def tokens_ignore_the_future(f: Scan, case: Case, close: Close) -> None:
    """What comes after a token does not change its output."""
    u, delta, A, B, C = case.args
    half = u.shape[1] // 2
    later = np.arange(u.shape[1])[None, :, None] >= half
    other = [
        round_to(np.where(later, widen(x) + np.float32(1.0), widen(x)), x.dtype) for x in (u, delta, B, C)
    ]
    changed = case.replace(other[0], other[1], A, other[2], other[3])
    close(_out(changed, f)[:, :half], _out(case, f)[:, :half], f"tokens from {half} on changed")


@law(SCAN)
def inputs_add(f: Scan, case: Case, close: Close) -> None:
    """At fixed steps, inputs and reads, the output is linear in u."""
    case = _plain(case)
    u, *others = case.args
    shift = round_to(np.float32(0.5) * widen(u)[:, ::-1], u.dtype)
    both = case.replace(round_to(widen(u) + widen(shift), u.dtype), *others)
    parts = _out(case, f) + _out(case.replace(shift, *others), f)
    close.on(both)(_out(both, f), parts, "u and half of u reversed, together and apart")


@law(SCAN)
def the_state_is_all_that_is_carried(f: Scan, case: Case, close: Close) -> None:
    """Two parts of a sequence, the state handed over, give what the whole gives."""
    cut = (case.args[0].shape[1] + 1) // 3
    first = _tokens(case, slice(0, cut)).replace(return_state=True).call(f)
    rest = _tokens(case, slice(cut, None)).replace(initial_state=first[1], return_state=True).call(f)
    whole = case.replace(return_state=True).call(f)
    parts = np.concatenate([widen(np.asarray(first[0])), widen(np.asarray(rest[0]))], axis=1)
    close(parts, widen(np.asarray(whole[0])), f"cut after token {cut}")
    if not _empty(case):
        _states_agree(np.asarray(rest[1]), np.asarray(whole[1]), case.args[0], close)


def _states_agree(found: Array, expected: Array, u: Array, close: Close) -> None:
    """Raise unless two states agree: as outputs do that read each of their entries once."""
    size = float(np.max(np.abs(expected), initial=0.0)) + float(np.max(np.abs(u), initial=0.0))
    limit = 1e3 * float(np.finfo(found.dtype).eps) * size * (u.shape[1] + 1) + close.tolerance
    if found.shape != expected.shape or not np.all(np.abs(found - expected) <= limit):
        raise LawViolation(f"states differ by {np.max(np.abs(found - expected))}, allowed {limit}")


@law(SCAN)
def the_state_is_what_a_step_of_0_reads(f: Scan, case: Case, close: Close) -> None:
    """A step of size 0 keeps the state, and reads it with C."""
    if _empty(case):
        return
    state = _state(case, f)
    last = _sized(_plain(_tokens(case, slice(-1, None))), 0.0).replace(initial_state=state)
    kept = last.replace(return_state=True).call(f)
    C = widen(last.args[4]).astype(state.dtype)
    close.on(last)(widen(np.asarray(kept[0]))[:, 0], np.einsum("bdn,bn->bd", state, C[:, 0]), "C h")
    if not np.array_equal(np.asarray(kept[1]), state):
        raise LawViolation("a step of size 0 changed the state")


@law(SCAN)
def a_long_step_forgets(f: Scan, case: Case, close: Close) -> None:
    """With negative rates a very long step leaves nothing of the state before it."""
    if _empty(case):
        return
    u, delta, A, B, C = case.args
    A = np.minimum(A, -np.asarray(0.0625, A.dtype))
    steps = np.full_like(delta, 0.5)
    steps[:, 0] = 2.0**14
    long = case.without("delta_bias", "D").replace(u, steps, A, B, C, delta_softplus=False)
    other = np.full((u.shape[0], u.shape[2], A.shape[1]), 3.0)
    found = _out(long.replace(initial_state=other), f)
    close.on(long)(found, _out(long.without("initial_state"), f), "a state of 3 before a step of 2^14")


@law(SCAN)
def a_constant_system_is_a_convolution(f: Scan, case: Case, close: Close) -> None:
    """With the same step, B and C at every token, the output is a convolution with ``C Ā^j B̄``."""
    if _empty(case):
        return
    u, delta, A, B, C = case.args
    T = u.shape[1]
    constant = [np.repeat(x[:, :1], T, axis=1) for x in (B, C)]
    size = 0.375
    invariant = _sized(_plain(case).replace(u, delta, A, *constant), size)
    rate, b, c = (widen(x).astype(np.float64) for x in (A, B[:, 0], C[:, 0]))
    gain = np.full(rate.shape, size)
    if case.kwargs.get("discretization") == "zoh":
        moving = rate != 0
        gain[moving] = np.expm1(size * rate[moving]) / rate[moving]
    powers = np.exp(size * rate * np.arange(T)[:, None, None])
    kernel = np.einsum("bn,jdn,dn,bn->bjd", c, powers, gain, b)
    wide = widen(u).astype(np.float64)
    expected = np.stack(
        [np.einsum("bjd,bjd->bd", kernel[:, : t + 1], wide[:, t::-1]) for t in range(T)], axis=1
    )
    close.on(invariant)(_out(invariant, f).astype(np.float64), expected, "the convolution", factor=2.0)


@law(SCAN)
def a_held_input_keeps_the_state_in_range(f: Scan, case: Case, close: Close) -> None:  # noqa: ARG001
    """Under zero-order hold, with negative rates, no state exceeds the largest ``|B u / A|``."""
    if _empty(case):
        return
    case = _plain(case).replace(discretization="zoh")
    u, delta, A, B, _ = case.args
    if np.any(widen(A) >= 0) or (not case.kwargs.get("delta_softplus") and np.any(widen(delta) < 0)):
        return
    state = _state(case, f)
    inputs = np.abs(np.einsum("btd,btn->btdn", widen(u), widen(B)) / widen(A)).max(axis=1)
    roundings = 1 + 64 * (u.shape[1] + 1) * float(np.finfo(state.dtype).eps)
    if not np.all(np.abs(state) <= roundings * inputs):
        raise LawViolation(f"a state exceeds the largest |B u / A| by {np.max(np.abs(state) - inputs)}")


@law(SCAN)
def one_unit_state_is_a_gated_network(f: Scan, case: Case, close: Close) -> None:
    """With A = -1, B = C = 1 and N = 1: ``h = (1 - g) h + g u``, g = sigmoid; softplus for Euler's g u."""
    if _empty(case):
        return
    u, delta, A, B, _ = case.args
    one = np.ones_like(B[..., :1])
    options = {name: case.kwargs[name] for name in ("delta_bias", "discretization") if name in case.kwargs}
    unit = Case((u, delta, -np.ones_like(A[:, :1]), one, one), {**options, "delta_softplus": True})
    s = widen(delta).astype(np.float64) + np.asarray(options.get("delta_bias", 0.0), np.float64)
    gate, soft = np.exp(-np.logaddexp(-s, 0.0)), np.logaddexp(s, 0.0)
    factor = gate if options.get("discretization") == "zoh" else soft
    h = np.zeros((u.shape[0], u.shape[2]))
    expected = np.empty(u.shape)
    for t in range(u.shape[1]):
        h = np.exp(-soft[:, t]) * h + factor[:, t] * widen(u).astype(np.float64)[:, t]
        expected[:, t] = h
    close.on(unit)(_out(unit, f).astype(np.float64), expected, "the gated network of Theorem 1")


@law(SCAN)
def the_bias_comes_before_softplus(f: Scan, case: Case, close: Close) -> None:
    """A bias gives what steps give to which it was added."""
    u, delta, *others = case.args
    bias = np.linspace(-1.0, 0.5, delta.shape[2]).astype(delta.dtype)
    biased = case.replace(delta_softplus=True, delta_bias=bias)
    added = biased.without("delta_bias").replace(
        u, round_to(widen(delta) + widen(bias), delta.dtype), *others
    )
    close.on(biased)(_out(biased, f), _out(added, f), "a bias, or added to delta")


@law(SCAN)
def skip_then_gate(f: Scan, case: Case, close: Close) -> None:
    """D adds ``D u`` to the output, and the gate multiplies that sum by silu(z)."""
    u, *_ = case.args
    skip = np.linspace(-2.0, 1.0, u.shape[2]).astype(u.dtype)
    gate = round_to(widen(u) + np.float32(0.5), u.dtype)
    bare, both = case.without("D", "z"), case.replace(D=skip, z=gate)
    expected = (_out(bare, f) + widen(skip) * widen(u)) * activate("silu", widen(gate))
    close.on(both)(_out(both, f), expected, "skip and gate")


@law(SCAN)
def channels_are_independent(f: Scan, case: Case, close: Close) -> None:
    """A channel alone gives what it gives among others; the order of its N states does not matter."""
    u, delta, A, B, C = case.args
    one = slice(u.shape[2] - 1, None)
    order = np.arange(A.shape[1])[::-1]
    options: dict[str, FloatArray] = {
        name: case.kwargs[name][..., one] for name in ("D", "z", "delta_bias") if name in case.kwargs
    }
    if "initial_state" in case.kwargs:
        options["initial_state"] = case.kwargs["initial_state"][:, one, order]
    alone = case.replace(u[..., one], delta[..., one], A[one, order], B[..., order], C[..., order], **options)
    close(_out(alone, f), _out(case, f)[..., one], "one channel, its states reversed")
