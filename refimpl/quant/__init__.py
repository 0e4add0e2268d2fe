"""Quantisation: uniform grids, codebooks and NF4, their error, integer products, layers in int8 and NF4."""

from refimpl.quant.absmax import (
    Int8Columns,
    Int8Rows,
    dequantize_columns,
    outlier_columns,
    quantize_columns,
    quantize_rows,
)
from refimpl.quant.codebook import (
    Codebook,
    codebook,
    codebook_dequantize,
    codebook_dequantize_vjp,
    linear_centroids,
)
from refimpl.quant.double_quantization import DoubleQuantized, double, double_dequantize, dynamic_map
from refimpl.quant.epilogue import dequantize_product
from refimpl.quant.error import QuantizationError, error, uniform_mse, uniform_sqnr
from refimpl.quant.gptq import GPTQ, gptq, gptq_blocked
from refimpl.quant.grid import Quantized, dequantize, quantize, quantize_vjp
from refimpl.quant.integer_matmul import MAX_INNER, int8_matmul, integer_matmul
from refimpl.quant.llm_int8 import Int8Linear, llm_int8_linear, llm_int8_linear_fused
from refimpl.quant.llm_int8_backward import Int8LinearGradients, llm_int8_linear_vjp
from refimpl.quant.nf4 import NF4, nf4, nf4_dequantize, normal_float_levels
from refimpl.quant.nf4_linear import nf4_linear, nf4_linear_vjp, nf4_quantize
from refimpl.quant.optimal_codebook import optimal_codebook
from refimpl.quant.qlora import (
    NF4Weight,
    qlora_dequantize,
    qlora_linear,
    qlora_linear_vjp,
    qlora_quantize,
)
from refimpl.quant.qmoe import QMoE, qmoe, qmoe_decode
from refimpl.quant.ternary import Ternary, ternary
from refimpl.quant.twos_complement import twos_complement
from refimpl.quant.uniform import uniform
from refimpl.quant.weight_only import (
    Int8Groups,
    WeightOnlyGradients,
    dequantize_groups,
    int8_weight_linear,
    int8_weight_linear_vjp,
    quantize_groups,
)

__all__ = [
    "GPTQ",
    "MAX_INNER",
    "NF4",
    "Codebook",
    "DoubleQuantized",
    "Int8Columns",
    "Int8Groups",
    "Int8Linear",
    "Int8LinearGradients",
    "Int8Rows",
    "NF4Weight",
    "QMoE",
    "QuantizationError",
    "Quantized",
    "Ternary",
    "WeightOnlyGradients",
    "codebook",
    "codebook_dequantize",
    "codebook_dequantize_vjp",
    "dequantize",
    "dequantize_columns",
    "dequantize_groups",
    "dequantize_product",
    "double",
    "double_dequantize",
    "dynamic_map",
    "error",
    "gptq",
    "gptq_blocked",
    "int8_matmul",
    "int8_weight_linear",
    "int8_weight_linear_vjp",
    "integer_matmul",
    "linear_centroids",
    "llm_int8_linear",
    "llm_int8_linear_fused",
    "llm_int8_linear_vjp",
    "nf4",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_linear_vjp",
    "nf4_quantize",
    "normal_float_levels",
    "optimal_codebook",
    "outlier_columns",
    "qlora_dequantize",
    "qlora_linear",
    "qlora_linear_vjp",
    "qlora_quantize",
    "qmoe",
    "qmoe_decode",
    "quantize",
    "quantize_columns",
    "quantize_groups",
    "quantize_rows",
    "quantize_vjp",
    "ternary",
    "twos_complement",
    "uniform",
    "uniform_mse",
    "uniform_sqnr",
]
