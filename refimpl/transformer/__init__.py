"""The transformer: feed-forward layers, normalisations, positions, blocks, and a decoder that trains.

A function that bears its module's name is imported from there: ``from refimpl.transformer.ffn import ffn``.
"""

from refimpl.transformer.activations import activate, activation_slope, gelu, gelu_vjp
from refimpl.transformer.block_weights import BlockGradients, BlockOptions, weight_names
from refimpl.transformer.blocks import decoder, decoder_vjp, encoder, encoder_vjp
from refimpl.transformer.cached_decoder import decoder_token_by_token
from refimpl.transformer.config import DecoderConfig, decoder_shapes, initial_decoder
from refimpl.transformer.decomposition import ffn_decomposition, ffn_terms
from refimpl.transformer.embedding import embedding_vjp, output_head, output_head_vjp
from refimpl.transformer.ffn import ffn_vjp, gated_ffn, gated_ffn_vjp
from refimpl.transformer.kv_cache import KVCache, LayerCache, cache_bytes, cache_length, truncate
from refimpl.transformer.linear import linear_vjp
from refimpl.transformer.model import decoder_logits, decoder_logits_vjp, decoder_step
from refimpl.transformer.norms import layer_norm, layer_norm_vjp, rms_norm, rms_norm_vjp
from refimpl.transformer.positions import (
    alibi_slopes,
    learned_positions,
    learned_positions_vjp,
    sinusoidal_positions,
)
from refimpl.transformer.redundancy import explained_variance, layer_blocks, random_matrix_curve, rank_for
from refimpl.transformer.rotary import Rope, rotary_vjp

__all__ = [
    "BlockGradients",
    "BlockOptions",
    "DecoderConfig",
    "KVCache",
    "LayerCache",
    "Rope",
    "activate",
    "activation_slope",
    "alibi_slopes",
    "cache_bytes",
    "cache_length",
    "decoder",
    "decoder_logits",
    "decoder_logits_vjp",
    "decoder_shapes",
    "decoder_step",
    "decoder_token_by_token",
    "decoder_vjp",
    "embedding_vjp",
    "encoder",
    "encoder_vjp",
    "explained_variance",
    "ffn_decomposition",
    "ffn_terms",
    "ffn_vjp",
    "gated_ffn",
    "gated_ffn_vjp",
    "gelu",
    "gelu_vjp",
    "initial_decoder",
    "layer_blocks",
    "layer_norm",
    "layer_norm_vjp",
    "learned_positions",
    "learned_positions_vjp",
    "linear_vjp",
    "output_head",
    "output_head_vjp",
    "random_matrix_curve",
    "rank_for",
    "rms_norm",
    "rms_norm_vjp",
    "rotary_vjp",
    "sinusoidal_positions",
    "truncate",
    "weight_names",
]
