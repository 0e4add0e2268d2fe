"""The selective scan in its forms: what stands in the paper, states, chunks, counts, formats, errors."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.signal
from hypothesis import given
from hypothesis import strategies as st

from memsim.prices.ssm import associative_scan as associative_scan_traffic
from memsim.prices.ssm import scan
from memsim.prices.ssm_schedules import scan_moves
from memsim.ssm import scan_traffic
from refimpl.errors import DTypeError, OptionError, ShapeError
from refimpl.memory import Memory
from refimpl.registry import Case
from refimpl.ssm import (
    Step,
    associative_scan,
    combine,
    selective_scan,
    selective_scan_associative,
    selective_scan_chunked,
    selective_scan_chunked_vjp,
    selective_scan_step,
    selective_scan_vjp,
)
from refimpl.ssm.discretization import Discretized, discretize, discretize_vjp
from refimpl.ssm.samples import sample_scan

SHAPE: dict[str, Any] = {"B": 2, "T": 11, "Din": 3, "N": 4}
FORMS = (selective_scan, selective_scan_associative, selective_scan_chunked)


def case(seed: int = 0, **changes: Any) -> Case:
    return sample_scan(np.random.default_rng(seed), **{**SHAPE, "extra": "all", **changes})


def test_theorem_1() -> None:
    """The state of A = -1, B = 1 is that of a gated network: ``h = (1 - g) h + g x``, g = σ(Linear(x))."""
    rng = np.random.default_rng(1)
    x, raw, one = rng.standard_normal((1, 9, 1)), rng.standard_normal((1, 9, 1)), np.ones((1, 9, 1))
    found = selective_scan(x, raw, -one[0, :1], one, one, delta_softplus=True, discretization="zoh")
    h = 0.0
    for t in range(9):
        g = 1 / (1 + np.exp(-raw[0, t, 0]))
        h = (1 - g) * h + g * x[0, t, 0]
        assert found[0, t, 0] == pytest.approx(h, rel=1e-13)
    released = selective_scan(x, raw, -one[0, :1], one, one, delta_softplus=True)
    assert np.max(np.abs(released - found)) > 0.1, "the theorem holds for the zero-order hold only"


def test_zero_order_hold_is_that_of_scipy() -> None:
    rates, sizes = np.array([-3.0, -0.5, 0.0, 0.25]), np.array([1e-9, 0.01, 1.0, 20.0])
    for rate in rates:
        for size in sizes:
            system = [np.array([[value]]) for value in (rate, 1.0, 1.0, 0.0)]
            decay, gain, *_ = scipy.signal.cont2discrete(system, size, method="zoh")
            ours = discretize(np.array([rate * size]), np.array([size]), "zoh")
            np.testing.assert_allclose(ours.decay, decay[0], rtol=1e-13)
            np.testing.assert_allclose(ours.gain, gain[0], rtol=1e-13)


def test_both_discretizations_agree_for_small_steps() -> None:
    x = np.array([-1e-3, -1e-6, -1e-9])
    gap = discretize(x, -x, "euler").gain / discretize(x, -x, "zoh").gain - 1
    np.testing.assert_allclose(gap, -x / 2, rtol=1e-3, atol=1e-15)


@pytest.mark.parametrize("x", [0.0, 1e-12, -1e-4, 0.3, -0.4999, 0.4999, -0.5001, 0.5001, -2.0, 3.0, -1e3])
def test_the_slope_of_the_gain(x: float) -> None:
    """Against the integral ``φ'(x) = ∫ s exp(s x) ds`` over [0, 1], by Gauss and Legendre's rule."""
    found, _ = discretize_vjp(np.array([x]), np.ones(1), "zoh", Discretized(np.zeros(1), np.ones(1)))
    if x < -100:
        assert found == pytest.approx(1 / x**2, rel=1e-12)
        return
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s = (nodes + 1) / 2
    assert found == pytest.approx(np.sum(weights / 2 * s * np.exp(s * x)), rel=1e-13)


numbers = st.floats(-2, 2).map(lambda value: round(value, 3))
maps = st.builds(Step, numbers, numbers)


@given(a=maps, b=maps, c=maps, h=numbers)
def test_steps_compose(a: Step, b: Step, c: Step, h: float) -> None:
    def run(step: Any, h: float) -> float:
        return float(step.decay * h + step.drive)

    assert run(combine(a, b), h) == pytest.approx(run(b, run(a, h)), abs=1e-12)
    left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    assert left == pytest.approx(right, abs=1e-12)
    one = Step(np.array(1.0), np.array(0.0))
    assert combine(one, a) == combine(a, one) == a


@pytest.mark.parametrize("T", [0, 1, 2, 3, 7, 8, 64])
def test_scan_of_integers_is_exact(T: int) -> None:
    rng = np.random.default_rng(T)
    decay, drive = rng.integers(-1, 2, (2, 1, T)).astype(np.float64)
    h, expected = 0.0, []
    for t in range(T):
        h = decay[0, t] * h + drive[0, t]
        expected.append(h)
    np.testing.assert_array_equal(associative_scan(Step(decay, drive)).ravel(), expected)


@pytest.mark.parametrize("method", ["euler", "zoh"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 11, 100])
def test_any_chunks_give_the_same(chunk_size: int, method: str) -> None:
    call = case(discretization=method).replace(return_state=True)
    found, expected = (
        call.replace(chunk_size=chunk_size).call(selective_scan_chunked),
        call.call(selective_scan),
    )
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-13)


def test_steps_are_the_whole_and_leave_their_state_alone() -> None:
    call = case()
    u, delta, A, B, C = call.args
    options = {name: call.kwargs[name] for name in ("D", "delta_bias", "delta_softplus", "discretization")}
    whole = call.replace(return_state=True).call(selective_scan)
    state = call.kwargs["initial_state"]
    for t in range(u.shape[1]):
        before = state.copy()
        found = selective_scan_step(
            u[:, t], delta[:, t], A, B[:, t], C[:, t], state, z=call.kwargs["z"][:, t], **options
        )
        np.testing.assert_array_equal(state, before)
        np.testing.assert_allclose(found.out, whole.out[:, t], rtol=1e-12, atol=1e-13)
        state = found.state
    np.testing.assert_allclose(state, whole.state, rtol=1e-12, atol=1e-13)


def test_gradients_of_parts_chain_through_the_state() -> None:
    call = case(seed=3, discretization="zoh")
    u, delta, A, B, C = call.args
    dout = np.random.default_rng(4).standard_normal(u.shape)
    whole = call.replace(u, delta, A, B, C, dout).call(selective_scan_vjp)

    def part(rows: slice, state: Any, dstate: Any) -> Any:
        options = {**call.kwargs, "z": call.kwargs["z"][:, rows], "initial_state": state}
        arrays = u[:, rows], delta[:, rows], A, B[:, rows], C[:, rows]
        return selective_scan_vjp(*arrays, dout[:, rows], dstate=dstate, **options)

    first, last = slice(0, 4), slice(4, None)
    middle = Case(
        (u[:, first], delta[:, first], A, B[:, first], C[:, first]),
        {**call.kwargs, "z": call.kwargs["z"][:, first], "return_state": True},
    ).call(selective_scan)
    second = part(last, middle.state, None)
    front = part(first, call.kwargs["initial_state"], second.dinitial_state)
    for name in ("dA", "dD", "ddelta_bias"):
        parts = getattr(front, name) + getattr(second, name)
        np.testing.assert_allclose(parts, getattr(whole, name), rtol=1e-10, err_msg=name)
    for name in ("du", "ddelta", "dB", "dC", "dz"):
        parts = np.concatenate([getattr(front, name), getattr(second, name)], axis=1)
        np.testing.assert_allclose(parts, getattr(whole, name), rtol=1e-10, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(front.dinitial_state, whole.dinitial_state, rtol=1e-10, atol=1e-13)


def test_the_gradient_passes_a_state_by_where_there_is_no_token() -> None:
    call = case(T=0)
    dstate = np.ones((2, 3, 4))
    found = selective_scan_vjp(*call.args, np.zeros((2, 0, 3)), dstate=dstate, **call.kwargs)
    np.testing.assert_array_equal(found.dinitial_state, dstate)
    assert not found.dA.any()


def test_chunks_move_what_the_loop_moves_and_hold_a_chunk() -> None:
    call = case(T=32)
    loop, chunks = Memory(), Memory()
    call.replace(memory=loop, return_state=True).call(selective_scan)
    call.replace(memory=chunks, return_state=True, chunk_size=8).call(selective_scan_chunked)
    assert chunks.totals() == loop.totals() == scan(call.replace(return_state=True))
    state, shared, token = 2 * 3 * 4, 3 * 4 + 3 + 3, 2 * (3 * 3 + 2 * 4)
    assert loop.peak == state + shared + token
    assert chunks.peak == state + shared + 8 * (token + state)


def test_a_scan_in_hbm_moves_every_step_six_times() -> None:
    call = case(T=16).replace(return_state=True)
    counted = Memory()
    call.replace(memory=counted).call(selective_scan_associative)
    assert counted.totals() == associative_scan_traffic(call)
    once = sum(move.elements.count("D*N") for move in scan_moves("materialized") if "T" in move.elements)
    assert once == 6
    fused, whole = (scan_traffic(T=4096, D=1024, algorithm=name).total for name in ("fused", "materialized"))
    assert whole / fused > 16 * 6 * 4 / (4 * 2) * 0.9  # six states of four bytes for four channels of two


@pytest.mark.parametrize("form", FORMS)
def test_low_precision_is_summed_in_float32(form: Any) -> None:
    u, delta, A, B, C = (x.astype(np.float16) for x in case(T=40, extra="none").args)
    out, state = form(u, delta, A, B, C, delta_softplus=True, return_state=True)
    assert (out.dtype, state.dtype) == (np.float16, np.float32)
    wide = [x.astype(np.float32) for x in (u, delta, A, B, C)]
    expected = form(*wide, delta_softplus=True)
    np.testing.assert_array_equal(out, expected.astype(np.float16))


def test_a_wide_state_does_not_widen_the_output() -> None:
    u, delta, A, B, C = (x.astype(np.float16) for x in case(extra="none").args)
    first = selective_scan(u, delta, A, B, C, delta_softplus=True, return_state=True)
    again = selective_scan(u, delta, A, B, C, delta_softplus=True, initial_state=first.state)
    assert again.dtype == np.float16


def test_a_long_sequence_in_chunks() -> None:
    """65,536 tokens: states neither overflow nor vanish, and the end agrees with a scan of the end alone."""
    rng = np.random.default_rng(0)
    T, tail = 65_536, 512
    u, delta = rng.standard_normal((2, 1, T, 2)).astype(np.float32)
    B, C = rng.standard_normal((2, 1, T, 4)).astype(np.float32)
    A = -np.linspace(0.5, 4.0, 8, dtype=np.float32).reshape(2, 4)
    found = selective_scan_chunked(u, delta, A, B, C, delta_softplus=True)
    assert np.isfinite(found).all()
    last = [x[:, -tail:].astype(np.float64) for x in (u, delta, B, C)]
    expected = selective_scan(last[0], last[1], A.astype(np.float64), last[2], last[3], delta_softplus=True)
    np.testing.assert_allclose(found[:, -tail // 2 :], expected[:, -tail // 2 :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z": np.zeros((2, 10, 3))}, ShapeError, "z: axis T must equal that of u; got 10, expected 11"),
        ({"D": np.zeros(4)}, ShapeError, "D: axis Din must equal that of u; got 4, expected 3"),
        ({"initial_state": np.zeros((2, 3, 5))}, ShapeError, "initial_state: axis N must equal that of A"),
        ({"delta_bias": np.zeros((1, 3))}, ShapeError, "delta_bias: expected 1 axes"),
        ({"discretization": "bilinear"}, OptionError, "discretization: expected one of"),
        ({"D": np.zeros(3, complex)}, DTypeError, "D: expected float64"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_errors(form: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        case().replace(**changes).call(form)


def test_chunks_need_a_size() -> None:
    with pytest.raises(OptionError, match="chunk_size: expected at least 1, got 0"):
        case().replace(chunk_size=0).call(selective_scan_chunked)


@pytest.mark.parametrize("extra", ["none", "all"])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("T", [0, 11])
def test_gradients_in_chunks(T: int, chunk_size: int, extra: str) -> None:
    call = case(T=T, extra=extra, discretization="zoh")
    dout = np.random.default_rng(1).standard_normal(call.args[0].shape)
    dstate = np.random.default_rng(2).standard_normal((2, 3, 4))
    call = call.replace(*call.args, dout, dstate=dstate)
    found = call.replace(chunk_size=chunk_size).call(selective_scan_chunked_vjp)
    for name, expected in call.call(selective_scan_vjp)._asdict().items():
        if expected is None:
            assert getattr(found, name) is None
        else:
            np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_gradients_in_chunks_hold_a_chunk() -> None:
    rng = np.random.default_rng(0)
    u, delta, dout = rng.standard_normal((3, 1, 4096, 4))
    B, C = rng.standard_normal((2, 1, 4096, 8))
    arrays = u, delta, -np.ones((4, 8)), B, C, dout
    peaks = []
    for function in (selective_scan_vjp, selective_scan_chunked_vjp):
        tracemalloc.start()
        function(*arrays, delta_softplus=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 0.25 * peaks[0]
