"""Laws of attention with Q Kᵀ in int8: what smoothing leaves alone, and how far codes may lead astray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.attention.int8_attention import DEFAULT_BLOCKS, key_mean
from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, law
from refimpl.testing import Close, require

Attention = Callable[..., Any]


def _out(case: Case, f: Attention) -> FloatArray:
    return widen(np.asarray(case.call(f))).astype(np.float64)


def _arrays(case: Case) -> tuple[FloatArray, FloatArray, FloatArray]:
    q, k, v = (widen(array).astype(np.float64) for array in case.args)
    return q, k, v


def _case(case: Case, *arrays: FloatArray, **options: Any) -> Case:
    """Return a call with other arrays in the dtype of the case."""
    dtype = case.args[0].dtype
    return case.replace(*(round_to(np.asarray(a, np.float64), dtype) for a in arrays), **options)


def _blocks(case: Case) -> tuple[int, int]:
    rows, columns = case.kwargs.get("block_sizes", DEFAULT_BLOCKS)
    return rows, columns


def _steps(x: FloatArray, block: int) -> FloatArray:
    """Return the step of the int8 grid of each token of each head, [B, H, T]."""
    rows = np.abs(x).max(axis=3, initial=0)
    steps = np.maximum.reduceat(rows, np.arange(0, x.shape[1], block), axis=1) / 127 if x.shape[1] else rows
    return np.repeat(steps, block, axis=1)[:, : x.shape[1]].transpose(0, 2, 1)


@law("attention.int8")
def a_vector_common_to_all_keys_changes_nothing(f: Attention, case: Case, close: Close) -> None:
    """Smoothed keys with a vector added, numbers that lose nothing by it, give the same output."""
    q, k, v = _arrays(case)
    if not case.kwargs.get("smooth", True) or k.shape[1] == 0:
        return
    # Integers, of which the mean over a power of two of keys is exact, and a vector far larger than they are.
    rng = np.random.default_rng(0)
    count = 1 << (k.shape[1].bit_length() - 1)
    k = rng.integers(-3, 4, k.shape).astype(np.float64)[:, :count]
    common = rng.integers(-8, 9, (k.shape[0], 1, *k.shape[2:])).astype(np.float64) * 4
    options = {"causal": False}
    plain, moved = (
        _case(case, q, k, v[:, :count], **options),
        _case(case, q, k + common, v[:, :count], **options),
    )
    close.on(plain)(_out(moved, f), _out(plain, f), "a vector added to all keys")


@law("attention.int8")
def error_within_its_bound(f: Attention, case: Case, close: Close) -> None:
    """An output is within ``(exp(2 ε) - 1) Σ p |v|`` of attention, ε bounding the errors of scores."""
    q, k, v = _arrays(case)
    scale = case.kwargs.get("scale")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    smoothed = k - key_mean(k)[:, None] if case.kwargs.get("smooth", True) else k
    rows, columns = _blocks(case)
    keys = np.repeat(smoothed, group, axis=2)
    d_q, d_k = _steps(q, rows)[..., None], _steps(keys, columns)[:, :, None]
    sums_q = np.abs(q).sum(3).transpose(0, 2, 1)[..., None]
    sums_k = np.abs(keys).sum(3).transpose(0, 2, 1)[:, :, None]
    errors = scale * (d_q * sums_k / 2 + d_k * sums_q / 2 + q.shape[3] * d_q * d_k / 4)
    worst = np.max(errors, axis=3, initial=0).transpose(0, 2, 1)[..., None]
    exact = {name: case.kwargs[name] for name in ("causal", "scale") if name in case.kwargs}
    truth = scaled_dot_product_attention(q, k, v, **exact)
    terms = scaled_dot_product_attention(q, k, np.abs(v), **exact)
    with np.errstate(over="ignore"):
        bound = np.expm1(2 * worst * (1 + 1e-5)) * terms + 2 * close.tolerance + 1e-12
    require(
        np.abs(_out(case, f) - truth) <= bound, "an output is further from attention than its codes allow"
    )


@law("attention.int8")
def codes_without_loss_are_attention(f: Attention, case: Case, close: Close) -> None:
    """Integers that reach 127 in every block, keys of mean 0, give exact attention."""
    q, k, v = _arrays(case)
    if not (q.size and k.size and v.size):
        return
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, q.shape).astype(np.float64)
    q[..., 0] = 127.0
    half = rng.integers(-127, 128, (k.shape[0], k.shape[1] // 2, *k.shape[2:])).astype(np.float64)
    half[..., 0] = 127.0
    keys = np.zeros_like(k)
    keys[:, 0 : 2 * half.shape[1] : 2], keys[:, 1 : 2 * half.shape[1] : 2] = half, -half
    exact = _case(case, q, keys, v, scale=2.0**-14)
    options = {"causal": case.kwargs.get("causal", False), "scale": 2.0**-14}
    truth = scaled_dot_product_attention(*_arrays(exact), **options)
    close.on(exact)(_out(exact, f), truth, "codes without loss")


@law("attention.int8")
def equal_values_come_back(f: Attention, case: Case, close: Close) -> None:
    """Values that are the same for all keys are the output of every query that attends to one."""
    q, k, v = _arrays(case)
    if not v.size or case.kwargs.get("causal", False) == "bottom_right":
        return  # there, queries may have no key
    same = _case(case, q, k, np.broadcast_to(v[:, :1], v.shape))
    _, _, v = _arrays(same)
    expected = np.repeat(v[:, :1], q.shape[2] // k.shape[2], axis=2)
    close.on(same)(_out(same, f), np.broadcast_to(expected, (*q.shape[:3], v.shape[3])), "equal values")


@law("attention.int8")
def keys_of_a_block_permute(f: Attention, case: Case, close: Close) -> None:
    """Keys exchanged within their block, with their values, leave the output."""
    q, k, v = _arrays(case)
    block = _blocks(case)[1]
    order = np.arange(k.shape[1])
    for start in range(0, k.shape[1], block):
        order[start : start + block] = order[start : start + block][::-1]
    plain = case.replace(causal=False)
    close.on(plain)(_out(_case(plain, q, k[:, order], v[:, order]), f), _out(plain, f), "keys exchanged")


@law("attention.int8")
def powers_of_two_move_between_operands(f: Attention, case: Case, close: Close) -> None:  # noqa: ARG001
    """Four times the queries and a quarter of the scale have the same codes and the same output."""
    q, k, v = _arrays(case)
    scale = case.kwargs.get("scale")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    first, second = _case(case, q, k, v, scale=scale), _case(case, 4 * q, k, v, scale=scale / 4)
    require(_out(first, f) == _out(second, f), "a power of two does not move from the scale to the queries")
