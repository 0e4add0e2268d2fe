"""Oracles of state space models: scalar loops, SciPy's signal processing, transformers' Mamba."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import scipy.signal

from refimpl.registry import oracle
from tests.oracles import library


def _softplus(s: float) -> float:
    return max(s, 0.0) + math.log1p(math.exp(-abs(s)))


def _sigmoid(s: float) -> float:
    return 1 / (1 + math.exp(-s)) if s > 0 else math.exp(s) / (1 + math.exp(s))


def _step(delta: float, d: int, options: dict[str, Any]) -> float:
    bias = options.get("delta_bias")
    moved = delta if bias is None else delta + float(bias[d])
    return _softplus(moved) if options.get("delta_softplus") else moved


def _gated(y: float, b: int, t: int, d: int, u: Any, options: dict[str, Any]) -> float:
    if options.get("D") is not None:
        y += float(options["D"][d]) * float(u[b, t, d])
    if options.get("z") is not None:
        z = float(options["z"][b, t, d])
        y *= z * _sigmoid(z)
    return y


def _initial(u: Any, A: Any, options: dict[str, Any]) -> Any:
    state = options.get("initial_state")
    return np.zeros((u.shape[0], *A.shape)) if state is None else np.array(state)


@oracle("ssm.selective_scan")
def scalar_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """The recurrence one number at a time."""
    out = np.zeros(u.shape)
    for b, d in np.ndindex(u.shape[0], u.shape[2]):
        h = [float(x) for x in _initial(u, A, options)[b, d]]
        for t in range(u.shape[1]):
            step = _step(float(delta[b, t, d]), d, options)
            for n, rate in enumerate(map(float, A[d])):
                gain = step
                if options["discretization"] == "zoh" and rate * step:
                    gain = math.expm1(rate * step) / rate
                h[n] = math.exp(rate * step) * h[n] + gain * float(B[b, t, n]) * float(u[b, t, d])
            y = math.fsum(float(c) * x for c, x in zip(C[b, t], h, strict=True))
            out[b, t, d] = _gated(y, b, t, d, u, options)
    return out


@oracle("ssm.selective_scan")
def scipy_zero_order_hold(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """SciPy discretises the system anew at every token, by a matrix exponential, with its zero-order hold."""
    if options["discretization"] != "zoh" or u.size > 60:
        raise NotImplementedError
    out = np.zeros(u.shape)
    for b, d in np.ndindex(u.shape[0], u.shape[2]):
        h = _initial(u, A, options)[b, d][:, None]
        for t in range(u.shape[1]):
            continuous = np.diag(A[d]), B[b, t][:, None], C[b, t][None], np.zeros((1, 1))
            step = _step(float(delta[b, t, d]), d, options)
            decay, gain, read, *_ = scipy.signal.cont2discrete(continuous, step, method="zoh")
            h = decay @ h + gain * u[b, t, d]
            out[b, t, d] = _gated((read @ h).item(), b, t, d, u, options)
    return out


@oracle("ssm.selective_scan")
def scipy_filters(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """A constant system is N recursive filters of first order side by side: `scipy.signal.lfilter`."""
    if any(np.any(x != x[:, :1]) for x in (delta, B, C)) or u.shape[1] < 2:
        raise NotImplementedError
    out = np.zeros(u.shape)
    for b, d in np.ndindex(u.shape[0], u.shape[2]):
        step, total = _step(float(delta[b, 0, d]), d, options), np.zeros(u.shape[1])
        for n, rate in enumerate(map(float, A[d])):
            decay, gain = math.exp(rate * step), step
            if options["discretization"] == "zoh" and rate * step:
                gain = math.expm1(rate * step) / rate
            memory = [decay * _initial(u, A, options)[b, d, n]]
            filtered, _ = scipy.signal.lfilter([gain * B[b, 0, n]], [1.0, -decay], u[b, :, d], zi=memory)
            total += C[b, 0, n] * filtered
        out[b, :, d] = [_gated(float(y), b, t, d, u, options) for t, y in enumerate(total)]
    return out


def _torch_in_float64() -> Any:
    """Let transformers compute in float64 where it converts to float32."""
    torch = library("torch")
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


@oracle("ssm.selective_scan")
def transformers_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, **options: Any) -> Any:
    """The path without kernels of transformers' Mamba (5.24), and from a given state its step function."""
    if options["discretization"] != "euler" or 0 in u.shape:
        raise NotImplementedError
    torch, library_ = library("torch"), library("transformers.models.mamba.modeling_mamba")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in
               {"u": u, "delta": delta, "A": A, "B": B, "C": C, **options}.items()
               if isinstance(x, np.ndarray)}  # fmt: skip
    softplus, bias = options["delta_softplus"], tensors.get("delta_bias")
    D, z = tensors.get("D"), tensors.get("z")
    with _torch_in_float64():
        if "initial_state" not in tensors:
            u, delta, B, C = (tensors[name].transpose(1, 2) for name in ("u", "delta", "B", "C"))
            return library_.mamba_selective_scan(
                u, delta, tensors["A"], B, C, D=D, z=None if z is None else z.transpose(1, 2),
                delta_bias=bias, delta_softplus=softplus,
            ).transpose(1, 2).numpy()  # fmt: skip
        state = tensors["initial_state"].clone()
        found = [
            library_.mamba_selective_state_update(
                state, tensors["u"][:, t], tensors["delta"][:, t], tensors["A"], tensors["B"][:, t],
                tensors["C"][:, t], D=D, dt_bias=bias, dt_softplus=softplus, z=None if z is None else z[:, t],
            )
            for t in range(u.shape[1])
        ]  # fmt: skip
        return torch.stack(found, dim=1).numpy()


def _silu(x: float) -> float:
    return x * _sigmoid(x)


def _product(row: list[float], w: Any, bias: Any = None) -> list[float]:
    columns = range(w.shape[1])
    sums = [math.fsum(x * float(w[i, j]) for i, x in enumerate(row)) for j in columns]
    return sums if bias is None else [s + float(bias[j]) for j, s in zip(columns, sums, strict=True)]


@oracle("ssm.mamba_block")
def scalar_block(x: Any, **given: Any) -> Any:
    """The block one token and one number at a time."""
    (Din, k), N, R = given["w_conv"].shape, given["A_log"].shape[1], given["w_dt"].shape[0]
    out = np.zeros(x.shape)
    for b in range(x.shape[0]):
        past = [[0.0] * Din] * (k - 1) if "conv_state" not in given else given["conv_state"][b].tolist()
        h = np.zeros((Din, N)) if "scan_state" not in given else np.array(given["scan_state"][b])
        for t in range(x.shape[1]):
            projected = _product([float(v) for v in x[b, t]], given["w_in"], given.get("b_in"))
            window = [*past, projected[:Din]]
            past = window[1:]
            taps, bias = given["w_conv"].tolist(), given.get("b_conv", np.zeros(Din)).tolist()
            sums = [math.fsum(taps[d][j] * window[j][d] for j in range(k)) + bias[d] for d in range(Din)]
            u = [_silu(s) for s in sums]
            made = _product(u, given["w_x"])
            steps = [_softplus(s) for s in _product(made[:R], given["w_dt"], given["b_dt"])]
            y = []
            for d in range(Din):
                for n in range(N):
                    rate = -math.exp(float(given["A_log"][d, n]))
                    gain = steps[d]
                    if given["discretization"] == "zoh":
                        gain = math.expm1(rate * steps[d]) / rate
                    h[d, n] = math.exp(rate * steps[d]) * h[d, n] + gain * made[R + n] * u[d]
                read = math.fsum(made[R + N + n] * h[d, n] for n in range(N)) + float(given["D"][d]) * u[d]
                y.append(read * _silu(projected[Din + d]))
            out[b, t] = _product(y, given["w_out"], given.get("b_out"))
    return out


@oracle("ssm.mamba_block")
def transformers_mixer(x: Any, **given: Any) -> Any:
    """transformers' MambaMixer (5.24) with the same weights, computing in float64."""
    if given["discretization"] != "euler" or "conv_state" in given or 0 in x.shape:
        raise NotImplementedError
    torch, mamba = library("torch"), library("transformers.models.mamba.modeling_mamba")
    (Din, k), N, R = given["w_conv"].shape, given["A_log"].shape[1], given["w_dt"].shape[0]
    config = library("transformers").MambaConfig(
        hidden_size=x.shape[2], intermediate_size=Din, state_size=N, time_step_rank=R, conv_kernel=k,
        num_hidden_layers=1, vocab_size=2, use_bias="b_in" in given, use_conv_bias="b_conv" in given,
    )  # fmt: skip
    config.intermediate_size = Din  # it is expand x hidden_size otherwise
    mixer = mamba.MambaMixer(config, layer_idx=0).double().eval()
    places = {
        "w_in": "in_proj.weight", "b_in": "in_proj.bias", "w_conv": "conv1d.weight", "b_conv": "conv1d.bias",
        "w_x": "x_proj.weight", "w_dt": "dt_proj.weight", "b_dt": "dt_proj.bias", "A_log": "A_log", "D": "D",
        "w_out": "out_proj.weight", "b_out": "out_proj.bias",
    }  # fmt: skip
    weights = {}
    for name, place in places.items():
        if name in given:
            array = given[name].T if name in ("w_in", "w_x", "w_dt", "w_out") else given[name]
            array = array[:, None] if name == "w_conv" else array
            weights[place] = torch.from_numpy(np.ascontiguousarray(array))
    mixer.load_state_dict(weights, strict=True)
    with torch.no_grad(), _torch_in_float64():
        return mixer(torch.from_numpy(np.ascontiguousarray(x))).numpy()
