"""Compression of parameters: factors of low rank in place of a matrix."""

from refimpl.compress.factorization import Factors, break_even_rank, truncated_svd

__all__ = ["Factors", "break_even_rank", "truncated_svd"]
