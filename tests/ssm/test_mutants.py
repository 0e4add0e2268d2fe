"""Scans and blocks that are wrong in one way: the laws of the records must catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from refimpl import registry
from refimpl.registry import Case
from refimpl.ssm import mamba_block, selective_scan, selective_scan_chunked
from refimpl.ssm.samples import sample_scan
from refimpl.ssm.selective_scan import ScanOutput
from refimpl.testing import check

registry.load()

Function = Callable[..., Any]
MUTANTS: dict[str, tuple[str, Function]] = {}
OTHER = {"euler": "zoh", "zoh": "euler"}


def mutant(technique: str) -> Callable[[Function], Function]:
    def register(f: Function) -> Function:
        MUTANTS[f"{technique}-{f.__name__}"] = (technique, f)
        return f

    return register


scan = mutant("ssm.selective_scan")
block = mutant("ssm.mamba_block")


@scan
def discretizations_exchanged(u: Any, *arrays: Any, discretization: str = "euler", **options: Any) -> Any:
    return selective_scan(u, *arrays, discretization=OTHER[discretization], **options)  # type: ignore[arg-type]


@scan
def decay_to_first_order(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """Euler's rule for the decay too, ``Ā = 1 + ΔA``."""
    size = delta + options.pop("delta_bias", 0.0)
    size = np.logaddexp(size, 0.0) if options.pop("delta_softplus", False) else size
    h = options.pop("initial_state", np.zeros((len(u), *A.shape)))
    wants_state = options.pop("return_state", False)
    out = np.empty(u.shape)
    for t in range(u.shape[1]):
        step = size[:, t, :, None]
        h = (1 + step * A) * h + step * u[:, t, :, None] * B[:, t, None]
        out[:, t] = np.einsum("bdn,bn->bd", h, C[:, t]) + options.get("D", 0.0) * u[:, t]
    if options.get("z") is not None:
        out = out * options["z"] / (1 + np.exp(-options["z"]))
    return ScanOutput(out, h) if wants_state else out


@scan
def rates_of_the_other_sign(u: Any, delta: Any, A: Any, *arrays: Any, **options: Any) -> Any:
    return selective_scan(u, delta, -A, *arrays, **options)


@scan
def input_one_token_late(u: Any, *arrays: Any, **options: Any) -> Any:
    return selective_scan(np.concatenate([u[:, 1:], u[:, :1]], axis=1), *arrays, **options)


@scan
def output_before_the_step(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """The state is read before the token enters it."""
    wants_state = options.pop("return_state", False)
    whole = selective_scan(u, delta, A, B, C, return_state=True, **options)
    entering = {**options, "D": None, "z": None, "initial_state": None}
    tokens = [slice(t, t + 1) for t in range(u.shape[1])]
    own = [selective_scan(u[:, t], delta[:, t], A, B[:, t], C[:, t], **entering) for t in tokens]
    gate = options.get("z")
    out = whole.out - np.concatenate(own or [u], axis=1) * (
        1.0 if gate is None else gate / (1 + np.exp(-gate))
    )
    return ScanOutput(out, whole.state) if wants_state else out


@scan
def bias_after_softplus(u: Any, delta: Any, *arrays: Any, **options: Any) -> Any:
    bias = options.pop("delta_bias", 0.0)
    if options.pop("delta_softplus", False):
        delta = np.logaddexp(delta, 0.0)
    return selective_scan(u, delta + bias, *arrays, **options)


@scan
def softplus_forgotten(u: Any, delta: Any, *arrays: Any, **options: Any) -> Any:
    return selective_scan(u, np.abs(delta), *arrays, **{**options, "delta_softplus": False})


@scan
def skip_after_the_gate(u: Any, *arrays: Any, D: Any = None, **options: Any) -> Any:
    found = selective_scan(u, *arrays, **options)
    if D is None:
        return found
    return found._replace(out=found.out + D * u) if isinstance(found, ScanOutput) else found + D * u


@scan
def sigmoid_gate(u: Any, *arrays: Any, z: Any = None, **options: Any) -> Any:
    found = selective_scan(u, *arrays, **options)
    if z is None:
        return found
    gate = 1 / (1 + np.exp(-z))
    return found._replace(out=found.out * gate) if isinstance(found, ScanOutput) else found * gate


@scan
def initial_state_ignored(u: Any, *arrays: Any, initial_state: Any = None, **options: Any) -> Any:
    return selective_scan(u, *arrays, **options)


@scan
def initial_state_not_decayed(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    state = options.pop("initial_state", None)
    found = selective_scan(u, delta, A, B, C, **options)
    if state is None:
        return found
    read = np.einsum("bdn,btn->btd", state, C)
    if options.get("z") is not None:
        read = read * options["z"] / (1 + np.exp(-options["z"]))
    return (
        ScanOutput(found.out + read, found.state + state) if isinstance(found, ScanOutput) else found + read
    )


@scan
def states_lost_between_chunks(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """Chunks of four tokens, each from nothing but for the first."""
    wants_state, z = options.pop("return_state", False), options.pop("z", None)
    state, parts = options.pop("initial_state", None), []
    last = np.zeros((len(u), *A.shape)) if state is None else state
    for start in range(0, u.shape[1], 4):
        rows = slice(start, start + 4)
        gate = None if z is None else z[:, rows]
        out, last = selective_scan_chunked(u[:, rows], delta[:, rows], A, B[:, rows], C[:, rows], z=gate,
                                           initial_state=state if start == 0 else None, return_state=True,
                                           **options)  # fmt: skip
        parts.append(out)
    found = np.concatenate(parts or [u], axis=1)
    return ScanOutput(found, last) if wants_state else found


@scan
def inputs_and_reads_exchanged(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    return selective_scan(u, delta, A, C, B, **options)


@scan
def state_of_the_token_before(u: Any, delta: Any, *arrays: Any, **options: Any) -> Any:
    """The output is right, the state lacks the last token."""
    found = selective_scan(u, delta, *arrays, **options)
    if not isinstance(found, ScanOutput) or u.shape[1] < 2:
        return found
    A, B, C = arrays
    if options.get("z") is not None:
        options["z"] = options["z"][:, :-1]
    before = selective_scan(u[:, :-1], delta[:, :-1], A, B[:, :-1], C[:, :-1], **options)
    return found._replace(state=before.state)


@block
def gate_and_input_exchanged(x: Any, *, w_in: Any, **options: Any) -> Any:
    return mamba_block(x, **options, w_in=np.roll(w_in, w_in.shape[1] // 2, axis=1))


@block
def taps_reversed(x: Any, *, w_conv: Any, **options: Any) -> Any:
    return mamba_block(x, **options, w_conv=w_conv[:, ::-1])


@block
def convolution_sees_the_future(x: Any, **options: Any) -> Any:
    return mamba_block(np.concatenate([x[:, 1:], x[:, :1]], axis=1), **options)


@block
def bias_of_the_convolution_moved(x: Any, *, b_conv: Any = 0.0, **options: Any) -> Any:
    return mamba_block(x, b_conv=np.asarray(b_conv) + 2 * np.ones_like(options["D"]), **options)


@block
def B_and_C_exchanged(x: Any, *, w_x: Any, **options: Any) -> Any:
    N, R = options["A_log"].shape[1], options["w_dt"].shape[0]
    order = [*range(R), *range(R + N, R + 2 * N), *range(R, R + N)]
    return mamba_block(x, **options, w_x=w_x[:, order])


@block
def rates_not_negated(x: Any, *, A_log: Any, **options: Any) -> Any:
    """``A = -A_log``, without the exponential."""
    return mamba_block(x, **options, A_log=np.log(np.abs(A_log) + 1e-9))


@block
def step_without_its_bias(x: Any, *, b_dt: Any, **options: Any) -> Any:
    return mamba_block(x, **options, b_dt=0 * b_dt)


@block
def skip_forgotten(x: Any, *, D: Any, **options: Any) -> Any:
    return mamba_block(x, **options, D=0 * D)


@block
def convolution_state_forgotten(x: Any, *, conv_state: Any = None, **options: Any) -> Any:
    return mamba_block(x, **options)


@block
def scan_state_forgotten(x: Any, *, scan_state: Any = None, **options: Any) -> Any:
    return mamba_block(x, **options)


@block
def convolution_state_of_k_inputs(x: Any, **options: Any) -> Any:
    """As the released code keeps it."""
    found = mamba_block(x, **options)
    if not options.get("return_state"):
        return found
    return found._replace(conv_state=np.pad(found.conv_state, ((0, 0), (1, 0), (0, 0))))


@block
def sequences_mixed(x: Any, **options: Any) -> Any:
    return mamba_block(x + 0.01 * x.mean(axis=0, keepdims=True) if len(x) else x, **options)


def _failures(technique: str, f: Function) -> set[str]:
    failed: set[str] = set()
    for seed in range(0, 40, 4):  # stop at the first that catches it
        failed |= {outcome.check for outcome in check(technique, f, seed=seed, examples=4).failed}
        if failed - {"reference"}:
            break
    return failed


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught_by_laws(name: str) -> None:
    technique, f = MUTANTS[name]
    failed = _failures(technique, f)
    assert failed - {"reference"}, f"{name} survived the laws; failed: {failed}"


@pytest.mark.parametrize("name", [name for name in MUTANTS if name.startswith("ssm.selective_scan")])
def test_mutant_is_caught_by_the_scalar_oracle(name: str) -> None:
    from tests.oracles.ssm import scalar_scan

    _, f = MUTANTS[name]
    if name.endswith(("state_of_the_token_before", "states_lost_between_chunks")):
        shape = {"B": 1, "T": 9, "Din": 2, "N": 2}
    else:
        shape = {"B": 1, "T": 4, "Din": 2, "N": 2}
    gaps = []
    for discretization in ("euler", "zoh"):
        for steps in ("softplus", "plain"):
            case: Case = sample_scan(np.random.default_rng(0), extra="all", steps=steps,
                                     discretization=discretization, **shape)  # fmt: skip
            gaps.append(np.max(np.abs(case.call(f) - case.call(scalar_scan))))
    caught = max(gaps) > 1e-3
    assert caught != name.endswith("state_of_the_token_before"), "that one has the right outputs"


def test_the_lecture_is_caught() -> None:
    (erratum,) = [item for item in registry.ERRATA if item.technique == "ssm.selective_scan"]
    assert erratum.mutant is not None
    assert erratum.breaks in _failures("ssm.selective_scan", erratum.mutant)
