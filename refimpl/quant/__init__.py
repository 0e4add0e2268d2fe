"""Quantisation: uniform grids, their error, exact integer products, and linear layers in int8."""

from refimpl.quant.absmax import (
    Int8Columns,
    Int8Rows,
    dequantize_columns,
    outlier_columns,
    quantize_columns,
    quantize_rows,
)
from refimpl.quant.epilogue import dequantize_product
from refimpl.quant.error import QuantizationError, error, uniform_mse, uniform_sqnr
from refimpl.quant.grid import Quantized, dequantize, quantize, quantize_vjp
from refimpl.quant.integer_matmul import MAX_INNER, int8_matmul, integer_matmul
from refimpl.quant.llm_int8 import Int8Linear, llm_int8_linear, llm_int8_linear_fused
from refimpl.quant.llm_int8_backward import Int8LinearGradients, llm_int8_linear_vjp
from refimpl.quant.twos_complement import twos_complement
from refimpl.quant.uniform import uniform

__all__ = [
    "MAX_INNER",
    "Int8Columns",
    "Int8Linear",
    "Int8LinearGradients",
    "Int8Rows",
    "QuantizationError",
    "Quantized",
    "dequantize",
    "dequantize_columns",
    "dequantize_product",
    "error",
    "int8_matmul",
    "integer_matmul",
    "llm_int8_linear",
    "llm_int8_linear_fused",
    "llm_int8_linear_vjp",
    "outlier_columns",
    "quantize",
    "quantize_columns",
    "quantize_rows",
    "quantize_vjp",
    "twos_complement",
    "uniform",
    "uniform_mse",
    "uniform_sqnr",
]
