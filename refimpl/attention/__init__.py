"""Attention: the dense definition, its tiled and online rewrites, sparse, linear and low-rank attention."""

from refimpl.attention.bigbird import bigbird_attention, bigbird_attention_vjp
from refimpl.attention.bigbird_blocked import bigbird_attention_blocked, bigbird_attention_blocked_vjp
from refimpl.attention.bigbird_mixing import diameter, rapid_mixing, rapid_mixing_sparse, spectral_gap
from refimpl.attention.bigbird_plan import bigbird_plan
from refimpl.attention.block_mask import BlockMask, block_mask
from refimpl.attention.block_sparse import block_sparse_flash, block_sparse_flash_vjp
from refimpl.attention.convolution_step import ConvolutionStep, convolution_step
from refimpl.attention.decode import paged_attention, split_kv_attention
from refimpl.attention.decomposition import head_decomposition, head_terms
from refimpl.attention.dense import (
    AttentionGradients,
    AttentionOutput,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.attention.dilated_window import (
    dilated_window_attention,
    dilated_window_attention_banded,
    dilated_window_attention_banded_vjp,
    dilated_window_attention_vjp,
)
from refimpl.attention.flash import block_sizes_for, flash_attention, flash_attention_steps
from refimpl.attention.flash_backward import flash_attention_vjp
from refimpl.attention.flexible import flexible_attention, flexible_attention_vjp
from refimpl.attention.flexible_backward import flexible_attention_backward
from refimpl.attention.global_tokens import (
    global_tokens_attention,
    global_tokens_attention_blocked,
    global_tokens_attention_blocked_vjp,
    global_tokens_attention_vjp,
)
from refimpl.attention.int8_attention import (
    Int8Blocks,
    int8_attention,
    key_mean,
    quantize_token_blocks,
)
from refimpl.attention.lightweight_convolution import (
    dynamic_convolution,
    dynamic_convolution_vjp,
    lightweight_convolution,
    lightweight_convolution_vjp,
)
from refimpl.attention.linear import LinearState, linear_attention, linear_attention_step
from refimpl.attention.linear_chunked import (
    linear_attention_chunked,
    linear_attention_parallel,
    linear_attention_vjp,
)
from refimpl.attention.longformer import (
    longformer_attention,
    longformer_attention_blocked,
    longformer_attention_vjp,
)
from refimpl.attention.low_rank import low_rank_attention, low_rank_attention_vjp
from refimpl.attention.lsra import long_short_range_attention, long_short_range_attention_vjp
from refimpl.attention.multi_head import multi_head_attention, multi_head_attention_vjp
from refimpl.attention.online_softmax import online_softmax, online_softmax_vjp, softmax
from refimpl.attention.shifted_groups import (
    shifted_groups_attention,
    shifted_groups_attention_grouped,
    shifted_groups_attention_grouped_vjp,
    shifted_groups_attention_vjp,
)
from refimpl.attention.sliding_window import (
    sliding_window_attention,
    sliding_window_attention_vjp,
    window_radius,
)
from refimpl.attention.sliding_window_banded import (
    sliding_window_attention_banded,
    sliding_window_attention_banded_vjp,
)
from refimpl.attention.standard import standard_attention, standard_attention_vjp
from refimpl.attention.varlen import varlen_attention, varlen_attention_vjp
from refimpl.attention.varlen_backward import varlen_attention_backward
from refimpl.attention.varlen_masked import varlen_attention_masked, varlen_attention_masked_vjp

__all__ = [
    "AttentionGradients",
    "AttentionOutput",
    "BlockMask",
    "ConvolutionStep",
    "Int8Blocks",
    "LinearState",
    "bigbird_attention",
    "bigbird_attention_blocked",
    "bigbird_attention_blocked_vjp",
    "bigbird_attention_vjp",
    "bigbird_plan",
    "block_mask",
    "block_sizes_for",
    "block_sparse_flash",
    "block_sparse_flash_vjp",
    "convolution_step",
    "diameter",
    "dilated_window_attention",
    "dilated_window_attention_banded",
    "dilated_window_attention_banded_vjp",
    "dilated_window_attention_vjp",
    "dynamic_convolution",
    "dynamic_convolution_vjp",
    "flash_attention",
    "flash_attention_steps",
    "flash_attention_vjp",
    "flexible_attention",
    "flexible_attention_backward",
    "flexible_attention_vjp",
    "global_tokens_attention",
    "global_tokens_attention_blocked",
    "global_tokens_attention_blocked_vjp",
    "global_tokens_attention_vjp",
    "head_decomposition",
    "head_terms",
    "int8_attention",
    "key_mean",
    "lightweight_convolution",
    "lightweight_convolution_vjp",
    "linear_attention",
    "linear_attention_chunked",
    "linear_attention_parallel",
    "linear_attention_step",
    "linear_attention_vjp",
    "long_short_range_attention",
    "long_short_range_attention_vjp",
    "longformer_attention",
    "longformer_attention_blocked",
    "longformer_attention_vjp",
    "low_rank_attention",
    "low_rank_attention_vjp",
    "multi_head_attention",
    "multi_head_attention_vjp",
    "online_softmax",
    "online_softmax_vjp",
    "paged_attention",
    "quantize_token_blocks",
    "rapid_mixing",
    "rapid_mixing_sparse",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_vjp",
    "shifted_groups_attention",
    "shifted_groups_attention_grouped",
    "shifted_groups_attention_grouped_vjp",
    "shifted_groups_attention_vjp",
    "sliding_window_attention",
    "sliding_window_attention_banded",
    "sliding_window_attention_banded_vjp",
    "sliding_window_attention_vjp",
    "softmax",
    "spectral_gap",
    "split_kv_attention",
    "standard_attention",
    "standard_attention_vjp",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_masked",
    "varlen_attention_masked_vjp",
    "varlen_attention_vjp",
    "window_radius",
]
