"""A call of a selective scan, checked, and the formulas that every form of the scan shares."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict

import numpy as np

from refimpl.memory import Memory
from refimpl.numerics import FloatArray, wide_dtype
from refimpl.ssm.discretization import Discretization, discretize, step_size
from refimpl.ssm.recurrence import Step
from refimpl.transformer.activations import activate
from refimpl.validation import bind_axes, flag, floating

__all__ = ["ScanInput", "ScanOptions", "System", "Tokens", "outputs", "scan_input", "steps"]


class ScanOptions(TypedDict, total=False):
    """Options of `selective_scan`, without those that say what to return and to count."""

    D: FloatArray | None
    z: FloatArray | None
    delta_bias: FloatArray | None
    delta_softplus: bool
    discretization: Discretization
    initial_state: FloatArray | None


class Tokens(NamedTuple):
    """What differs from token to token: u, delta and z (B, T, Din), B and C (B, T, N)."""

    u: FloatArray
    delta: FloatArray
    B: FloatArray
    C: FloatArray
    z: FloatArray | None


class System(NamedTuple):
    """What all tokens share: A (Din, N), D and the bias (Din,), and how a step is made of them."""

    A: FloatArray
    D: FloatArray | None
    delta_bias: FloatArray | None
    delta_softplus: bool
    discretization: Discretization


class ScanInput(NamedTuple):
    """A checked call: its arrays in HBM, the state before the first token, and the formats."""

    tokens: Tokens
    system: System
    state: FloatArray | None
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    wide: np.dtype[Any]

    def new_state(self) -> FloatArray:
        """Return a state of zeros, (B, Din, N), in the wide dtype."""
        B, _, Din, N = self.shape
        return np.zeros((B, Din, N), self.wide)

    def load_state(self, hbm: Memory) -> FloatArray:
        """Return the state before the first token, on chip: loaded if one was given, else zeros."""
        if self.state is None:
            return hbm.compute("h", self.new_state())
        return hbm.load("h", self.state).astype(self.wide)

    def load(self, hbm: Memory, rows: slice, *names: str) -> tuple[FloatArray, ...]:
        """Load the named arrays of some tokens, in the wide dtype."""
        return tuple(
            hbm.load(name, getattr(self.tokens, name)[:, rows]).astype(self.wide, copy=False)
            for name in names
        )

    def load_gate(self, hbm: Memory, rows: slice) -> FloatArray | None:
        """Load the gate of some tokens, if there is one."""
        return None if self.tokens.z is None else self.load(hbm, rows, "z")[0]

    def load_system(self, hbm: Memory) -> System:
        """Load what all tokens share."""

        def load(name: str, array: FloatArray) -> FloatArray:
            return hbm.load(name, array).astype(self.wide)

        A, D, bias = self.system[:3]
        return self.system._replace(
            A=load("A", A),
            D=None if D is None else load("D", D),
            delta_bias=None if bias is None else load("bias", bias),
        )


def scan_input(
    u: FloatArray,
    delta: FloatArray,
    A: FloatArray,
    B: FloatArray,
    C: FloatArray,
    /,
    *,
    D: FloatArray | None = None,
    z: FloatArray | None = None,
    delta_bias: FloatArray | None = None,
    delta_softplus: bool = False,
    discretization: Discretization = "euler",
    initial_state: FloatArray | None = None,
) -> ScanInput:
    """Check a call of `selective_scan` and return it.

    Raises
    ------
    ShapeError
        If arrays do not fit together.
    DTypeError
        If one is not real.
    OptionError
        If the discretization is unknown.
    """
    axes = {
        "u": (u, "B T Din"), "delta": (delta, "B T Din"), "A": (A, "Din N"), "B": (B, "B T N"),
        "C": (C, "B T N"), "D": (D, "Din"), "z": (z, "B T Din"), "delta_bias": (delta_bias, "Din"),
        "initial_state": (initial_state, "B Din N"),
    }  # fmt: skip
    needed = ("u", "delta", "A", "B", "C")
    names = [name for name, (array, _) in axes.items() if array is not None or name in needed]
    state_dtype = None if initial_state is None else np.asarray(initial_state).dtype
    # A state is in the wide dtype, which must not widen the rest.
    plain = [name for name in names if name != "initial_state"]
    found = dict(zip(plain, floating(**{name: axes[name][0] for name in plain}), strict=True))
    if state_dtype is not None:
        (found["initial_state"],) = floating(initial_state=initial_state)
    size = bind_axes({name: (found[name], axes[name][1]) for name in names})
    dtype = found["u"].dtype
    discretize(np.zeros(0), np.zeros(0), discretization)  # refuses an unknown one even if there is no token
    return ScanInput(
        Tokens(found["u"], found["delta"], found["B"], found["C"], found.get("z")),
        System(
            found["A"],
            found.get("D"),
            found.get("delta_bias"),
            flag("delta_softplus", delta_softplus),
            discretization,
        ),
        found.get("initial_state"),
        (size["B"], size["T"], size["Din"], size["N"]),
        dtype,
        wide_dtype(dtype),
    )


def steps(hbm: Memory, system: System, u: FloatArray, delta: FloatArray, B: FloatArray) -> Step:
    """Return the steps of some tokens, ``Ā`` and ``B̄ u``, each of shape (B, T, Din, N)."""
    size = step_size(delta, system.delta_bias, system.delta_softplus)
    exponent = hbm.contract("btd,dn->btdn", size, system.A)
    decay, gain = discretize(exponent, size[..., None], system.discretization)
    return Step(decay, gain * hbm.contract("btd,btn->btdn", u, B))


def outputs(
    hbm: Memory, system: System, states: FloatArray, u: FloatArray, C: FloatArray, z: FloatArray | None
) -> FloatArray:
    """Return ``(C h + D u) silu(z)`` of some tokens and the states after them: the gate comes last."""
    y = hbm.contract("btdn,btn->btd", states, C)
    if system.D is not None:
        y = y + system.D * u
    return y if z is None else y * activate("silu", z)
