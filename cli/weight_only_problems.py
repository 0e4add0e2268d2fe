"""``frugal bench weight-only``: a few tokens times a weight in int8 or NF4, beside the weight in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.problems import Arrays, Draw, Problem, ToHost, kernel, sampled

if TYPE_CHECKING:
    from cuda_backend.torch_rivals import Rival
    from refimpl.numerics import Array

__all__ = ["weight_only_problems"]

GROUP, BLOCK, SCALE_BLOCK = 128, 64, 256
SAMPLED_COLUMNS = 256
COPY = "torch copy of as many bytes"


def weight_only_problems(shape: Sequence[int], dtype: str = "float16") -> list[Problem]:
    """Return what can be timed at a shape (M, K, N), with activations and outputs of `dtype`.

    Stored weights are drawn, not quantised: their time does not depend on what they stand for.

    >>> [problem.compulsory_bytes for problem in weight_only_problems((1, 256, 64))]
    [17536, 9096]
    """
    M, K, N = shape
    blocks = K * N // BLOCK
    around = 2 * M * (K + N)
    sizes = {
        "int8": K * N + 4 * -(-K // GROUP) * N,
        "nf4": K * N // 2 + blocks + 4 * (-(-blocks // SCALE_BLOCK) + 1),
    }
    operands = {"int8": partial(_int8, shape, dtype), "nf4": partial(_nf4, shape, dtype)}
    return [
        Problem(
            operation=f"{name} weight",
            shape=(M, K, N),
            dtype=dtype,
            causal=None,
            technique=f"quant.weight_only_{name}",
            axes={},
            work=2 * M * K * N,
            compulsory_bytes=sizes[name] + around,
            precision="float16",
            options={},
            operands=operands[name],
            check=partial(_check, dtype),
            rival_names=("torch matmul", COPY),
            rivals=partial(_rivals, sizes[name] + around),
            functions=partial(_functions, name),
        )
        for name in sizes
    ]


def _int8(shape: Sequence[int], dtype: str, draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
    from cuda_backend import prepare_int8_groups
    from refimpl.quant import Int8Groups

    M, K, N = shape
    x, weight = draw((M, K), dtype, 3 * seed), draw((N, K), dtype, 3 * seed + 1).T
    codes, scale = draw((N, K), "int8", 3 * seed + 2).T, draw((-(-K // GROUP), N), "float32", 5 + seed)
    stored = Int8Groups(codes, scale)
    return (x, stored, prepare_int8_groups(stored)), (x, weight)


def _nf4(shape: Sequence[int], dtype: str, draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
    from cuda_backend import prepare_nf4
    from refimpl.quant import NF4Weight

    M, K, N = shape
    blocks = K * N // BLOCK
    x, weight = draw((M, K), dtype, 3 * seed), draw((N, K), dtype, 3 * seed + 1).T
    stored = NF4Weight(
        draw((K * N // 2,), "uint8", 3 * seed + 2),
        draw((blocks,), "uint8", 7 + seed),
        draw((-(-blocks // SCALE_BLOCK),), "float32", 8 + seed),
        draw((1,), "float32", 9 + seed),
        (N, K),
        (BLOCK, SCALE_BLOCK),
        turned=True,
    )
    return (x, stored, prepare_nf4(stored)), (x, weight)


def _functions(name: str, backend: str) -> Mapping[str, Callable[..., Any]]:
    decode = kernel(f"{name}_linear_decode")
    portable = kernel("int8_weight_linear" if name == "int8" else "nf4_linear")
    found: dict[str, Callable[..., Any]] = {"frugal decode": lambda x, _, prepared: decode(x, prepared)}
    if backend == "cudasim":
        found["frugal portable"] = lambda x, stored, _: portable(x, stored)
    return found


def _rivals(count: int) -> Mapping[str, Rival]:
    from cuda_backend.torch_rivals import byte_copy_rival, linear_rivals

    return {**linear_rivals(), COPY: byte_copy_rival(count)}


def _values(stored: Any, columns: Array, to_host: ToHost) -> Array:
    """Return some columns of a stored weight, dequantised by the definition in float64."""
    from refimpl.quant import Int8Groups, dequantize_groups, double_dequantize, nf4_dequantize

    if isinstance(stored, Int8Groups):
        codes, scale = to_host(stored.codes, "int8")[:, columns], to_host(stored.scale, "float32")
        return np.asarray(dequantize_groups(Int8Groups(codes, scale[:, columns].astype(np.float64))))
    N, K = stored.shape
    absmax = double_dequantize(
        to_host(stored.absmax_codes, "uint8"),
        to_host(stored.scale, "float32").astype(np.float64),
        to_host(stored.offset, "float32").astype(np.float64),
    ).reshape(N, K // BLOCK)[columns]
    codes = to_host(stored.codes, "uint8").reshape(N, K // 2)[columns]
    values = nf4_dequantize(codes.reshape(-1), absmax.reshape(-1), shape=(len(columns), K))
    return np.asarray(values).T


def _check(dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold sampled columns to twice the error of the definition in `dtype`, and an ulp."""
    from refimpl.numerics import round_to, ulp, widen
    from refimpl.testing import dtype_named
    from refimpl.tolerances import Limit, mismatch

    x, stored = widen(to_host(operands[0], dtype)).astype(np.float64), operands[1]
    N = output.shape[1]
    columns = sampled(N, SAMPLED_COLUMNS)
    values, kind = _values(stored, columns, to_host), dtype_named(dtype)
    truth = x @ values
    rounded = widen(round_to(values, kind)).astype(np.float64)
    error = np.abs(widen(round_to(x @ rounded, kind)).astype(np.float64) - truth).max(initial=0.0)
    limit = 2 * error + ulp(np.abs(truth).max(initial=0.0), kind)
    return mismatch(to_host(output, dtype)[:, columns], truth, Limit(np.asarray(limit)))
