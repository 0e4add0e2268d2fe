"""Compression of parameters: factors of low rank, bases that blocks share, one block for all layers."""

from refimpl.compress.factorization import (
    Factors,
    MatrixGradient,
    break_even_rank,
    truncated_svd,
    truncated_svd_vjp,
)
from refimpl.compress.layer_sharing import shared_layers, shared_layers_vjp
from refimpl.compress.tucker import Tucker, tucker, tucker_factors, tucker_parameters

__all__ = [
    "Factors",
    "MatrixGradient",
    "Tucker",
    "break_even_rank",
    "shared_layers",
    "shared_layers_vjp",
    "truncated_svd",
    "truncated_svd_vjp",
    "tucker",
    "tucker_factors",
    "tucker_parameters",
]
