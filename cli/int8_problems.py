"""``frugal bench int8``: the int8 product, alone and with scales, LLM.int8(), and rows quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.problems import Arrays, Draw, Problem, ToHost, kernel, sampled

if TYPE_CHECKING:
    from cli.projections import Layer
    from cuda_backend.torch_rivals import Rival

__all__ = ["int8_problems"]

SAMPLED_ROWS, SAMPLED_COLUMNS = 16, 256
THRESHOLD, OUTLIERS_A_THOUSAND = 6.0, 1


def int8_problems(
    shape: Sequence[int], dtype: str = "float16", layer_of_model: Layer | None = None
) -> list[Problem]:
    """Return what can be timed at a shape (M, K, N), with activations and outputs of `dtype`.

    One column of a thousand, and at least one, holds outliers.

    >>> [problem.work for problem in int8_problems((2, 3, 5))]
    [60, 60, 60, 6]
    """
    M, K, N = shape
    outliers = max(1, K * OUTLIERS_A_THOUSAND // 1000)

    def codes(draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
        arrays = draw((M, K), "int8", 2 * seed), draw((N, K), "int8", 2 * seed + 1).T
        return arrays, arrays

    def scaled_codes(draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
        scales = tuple(draw((size, 1), "float32", 7 + seed)[:, 0] for size in (M, N))
        arrays = *codes(draw, seed)[0], *scales
        return arrays, arrays

    def layer(draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
        from cuda_backend import quantize_columns

        # Outliers stand in every row, so that any rows have the same columns set aside.
        x = draw((M, K), dtype, 2 * seed, outliers=outliers)
        weight = draw((N, K), dtype, 2 * seed + 1).T
        stored = quantize_columns(weight)
        return (x, stored), (x, weight, stored)

    def rows(draw: Draw, seed: int) -> tuple[Arrays, Arrays]:
        arrays = (draw((M, K), dtype, 2 * seed),)
        return arrays, arrays

    product = Problem(
        operation="int8 product",
        shape=(M, K, N),
        dtype="int8",
        causal=None,
        technique="quant.int8_matmul",
        axes={},
        work=2 * M * K * N,
        compulsory_bytes=M * K + K * N + 4 * M * N,
        precision="int8",
        options={},
        operands=codes,
        check=_check_product,
        rival_names=("torch._int_mm",),
        rivals=lambda: _rivals("int8_product_rivals"),
        layer=layer_of_model,
    )
    scaled = replace(
        product,
        operation="int8 product, scaled",
        dtype=dtype,
        compulsory_bytes=M * K + K * N + 4 * (M + N) + 2 * M * N,
        operands=scaled_codes,
        check=partial(_check_scaled, dtype),
        rival_names=("torch._int_mm", "torch._int_mm, dequantised", "torch matmul"),
        rivals=lambda: _rivals("scaled_product_rivals", dtype),
        functions=partial(_scaled_functions, dtype),
    )
    linear = replace(
        product,
        operation="LLM.int8() linear",
        dtype=dtype,
        technique="quant.llm_int8_fused",
        axes={"K": 16},
        compulsory_bytes=2 * M * K + K * N + 4 * N + 2 * M * N,
        options={"threshold": THRESHOLD},
        operands=layer,
        check=partial(_check_linear, dtype),
        rival_names=("torch matmul", "LLM.int8() of PyTorch"),
        rivals=_layer_rivals,
    )
    quantised = replace(
        product,
        operation="rows quantised",
        shape=(M, K),
        dtype=dtype,
        work=M * K,
        compulsory_bytes=3 * M * K + 4 * M,
        operands=rows,
        check=partial(_check_rows, dtype),
        rival_names=("torch copy",),
        rivals=lambda: _rivals("copy_rivals"),
        functions=_row_functions,
    )
    return [product, scaled, linear, quantised]


def _rivals(name: str, *arguments: Any) -> Mapping[str, Rival]:
    from cuda_backend import torch_rivals

    found: Mapping[str, Rival] = getattr(torch_rivals, name)(*arguments)
    return found


def _layer_rivals() -> Mapping[str, Rival]:
    """Return rivals of a layer, whose operands are x, the weight, and its codes."""
    plain, recipe = _rivals("linear_rivals"), _rivals("llm_int8_rivals", THRESHOLD)
    found = {name: each._replace(prepare=lambda x, weight, _: (x, weight)) for name, each in plain.items()}
    return found | {
        name: each._replace(prepare=lambda x, _, stored: (x, stored.codes, stored.absmax))
        for name, each in recipe.items()
    }


def _scaled_functions(dtype: str, backend: str) -> Mapping[str, Callable[..., Any]]:
    import cuda_backend
    from refimpl.testing import dtype_named

    def portable(a: Any, b: Any, a_absmax: Any, b_absmax: Any) -> Any:
        product = cuda_backend.int8_matmul(a, b)
        return cuda_backend.dequantize_product(product, a_absmax, b_absmax, dtype=dtype_named(dtype))

    def hopper(a: Any, b: Any, a_absmax: Any, b_absmax: Any) -> Any:
        return cuda_backend.scaled_int8_matmul(a, b, a_absmax=a_absmax, b_absmax=b_absmax, dtype=dtype)

    found = {"frugal portable": portable}
    return found if backend == "cudasim" else {**found, "frugal hopper": hopper}


def _row_functions(backend: str) -> Mapping[str, Callable[..., Any]]:
    found = {"frugal portable": kernel("quantize_rows")}
    return found if backend == "cudasim" else {**found, "frugal hopper": kernel("quantize_rows_hopper")}


def _check_product(operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold sampled cells to the product in float64, which is exact: sums stay below 2**53."""
    rows, columns, truth = _sampled_product(operands, to_host)
    wrong = int(np.sum(truth != to_host(output, "int32")[np.ix_(rows, columns)]))
    return f"{wrong} of {truth.size} sampled cells differ" if wrong else None


def _sampled_product(operands: Arrays, to_host: ToHost) -> tuple[Any, Any, Any]:
    a, b = (to_host(x, "int8") for x in operands[:2])
    rows, columns = sampled(a.shape[0], SAMPLED_ROWS), sampled(b.shape[1], SAMPLED_COLUMNS)
    return rows, columns, a[rows].astype(np.float64) @ b[:, columns].astype(np.float64)


def _check_scaled(dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold sampled cells to the reference's epilogue, bit for bit."""
    from refimpl.quant import dequantize_product
    from refimpl.testing import dtype_named

    rows, columns, product = _sampled_product(operands, to_host)
    a_absmax, b_absmax = (to_host(x, "float32") for x in operands[2:])
    truth = dequantize_product(
        product.astype(np.int32), a_absmax[rows], b_absmax[columns], dtype=dtype_named(dtype)
    )
    wrong = int(np.sum(truth != to_host(output, dtype)[np.ix_(rows, columns)]))
    return f"{wrong} of {truth.size} sampled cells differ" if wrong else None


def _check_linear(dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold sampled cells to the reference, which is given the codes of the weight."""
    from refimpl.numerics import widen
    from refimpl.quant import Int8Columns, llm_int8_linear_fused
    from refimpl.tolerances import Limit, mismatch

    x, stored = to_host(operands[0], dtype), operands[1]
    codes, absmax = to_host(stored.codes, "int8"), to_host(stored.absmax, "float32")
    rows, columns = sampled(x.shape[0], SAMPLED_ROWS), sampled(codes.shape[1], SAMPLED_COLUMNS)
    weight = Int8Columns(codes[:, columns], absmax[columns])
    found = np.asarray(llm_int8_linear_fused(x[rows], weight, threshold=THRESHOLD))
    truth = widen(found).astype(np.float64)
    # Both round to `dtype`, after float32 sums of a few outliers in different orders.
    bits = 10 if dtype == "float16" else 7
    limit = np.abs(truth) * 2.0**-bits + np.abs(truth).max() * 2.0**-14
    return mismatch(to_host(output, dtype)[np.ix_(rows, columns)], truth, Limit(limit))


def _check_rows(dtype: str, operands: Arrays, output: Any, to_host: ToHost) -> str | None:
    """Hold sampled rows to the reference, bit for bit."""
    from refimpl.quant import quantize_rows

    x = to_host(operands[0], dtype)
    rows = sampled(x.shape[0], SAMPLED_ROWS)
    truth = quantize_rows(x[rows])
    wrong = int(np.sum(truth.codes != to_host(output.codes, "int8")[rows]))
    wrong += int(np.sum(truth.absmax != to_host(output.absmax, "float32")[rows]))
    return f"{wrong} codes or absmax of sampled rows differ" if wrong else None
