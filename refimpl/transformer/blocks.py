"""Encoder and decoder blocks: attention and feed-forward, each with a residual and a normalisation."""

from __future__ import annotations

from typing import Any, Unpack

from refimpl.errors import ShapeError
from refimpl.numerics import BoolArray, FloatArray, round_to, widen
from refimpl.registry import Source, technique
from refimpl.transformer.activations import Activation
from refimpl.transformer.block_layers import checked_decoder, checked_encoder
from refimpl.transformer.block_samples import (
    AXES,
    DECODER_EDGES,
    DECODER_OPTIONS,
    ENCODER_EDGES,
    ENCODER_OPTIONS,
    sample_decoder,
    sample_encoder,
)
from refimpl.transformer.block_weights import BlockGradients, BlockInput, BlockOptions, block_gradients
from refimpl.transformer.layers import Layer, Norm, Order
from refimpl.transformer.rotary import Rope
from refimpl.validation import floating

__all__ = ["decoder", "decoder_vjp", "encoder", "encoder_vjp"]


@technique(
    "transformer.encoder",
    entries=(15,),
    kind="function",
    source=Source("Vaswani et al. 2017", "arXiv:1706.03762", "section 3.1, encoder"),
    axes=AXES,
    options=ENCODER_OPTIONS,
    edges=ENCODER_EDGES,
    sample=sample_encoder,
    vjp="refimpl.transformer.blocks:encoder_vjp",
)
def encoder(
    x: FloatArray,
    /,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    order: Order = "post",
    norm: Norm = "layer_norm",
    eps: float = 1e-5,
    activation: Activation = "relu",
    rope: Rope | None = None,
    **weights_and_options: Unpack[BlockOptions],
) -> FloatArray:
    """Return an encoder block: self-attention, then a feed-forward layer, each with residual and norm.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    num_heads, num_kv_heads : int
        Hq, and Hkv where heads are grouped.
    order : {"post", "pre"}
        ``"post"``: ``norm(x + sublayer(x))``, as printed, in the original and in BERT.  ``"pre"``:
        ``x + sublayer(norm(x))``, in GPT-2 and LLaMA, which normalise once more after the last block.
    norm : {"layer_norm", "rms_norm"}
        Kind of normalisation.
    eps : float
        Of the normalisations; 1e-12 in BERT.
    activation : str
        Of the feed-forward layer, as for `ffn`.
    rope : Rope, optional
        Rotary positions of queries and keys.
    **weights_and_options
        Weights by name (`BlockOptions`), and options of `scaled_dot_product_attention`: padding goes to
        ``attn_mask`` or ``k_lengths``.

    Returns
    -------
    ndarray of float, shape (B, T, M)
        In the common dtype.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    OptionError
        If a weight is missing, or has no place, or an option is out of range.
    DTypeError
        If an array is not real.

    Notes
    -----
    Without positions a permutation of the tokens permutes the output.  bfloat16 is widened on entry and
    rounded on return only.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, section 3.1.
    .. [2] Xiong et al., 2020, arXiv:2002.04745, table 1 (post and pre).

    Examples
    --------
    >>> import numpy as np
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> encoder(np.array([[[3.0, 1.0]]]), num_heads=1, **weights).round(3)
    array([[[ 1., -1.]]])
    """
    given = dict(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        order=order,
        norm=norm,
        eps=eps,
        activation=activation,
        rope=rope,
        **weights_and_options,
    )
    layer, block = checked_encoder(x, given)
    return round_to(layer.forward(block.x), block.dtype)


def encoder_vjp(x: FloatArray, dy: FloatArray, /, **options: Any) -> BlockGradients:
    """Return the gradients of ``sum(dy * encoder(x, **options))``.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    dy : ndarray of float, shape (B, T, M)
        Gradient of the output.
    **options
        Those of the forward call, weights among them.

    Returns
    -------
    BlockGradients
        That of each weight under its name with a d before it.

    Examples
    --------
    >>> import numpy as np
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> encoder_vjp(np.ones((1, 1, 2)), np.ones((1, 1, 2)), num_heads=1, **weights).dbeta_2
    array([1., 1.])
    """
    layer, block = checked_encoder(x, options)
    return _gradients(layer, block, dy)


@technique(
    "transformer.decoder",
    entries=(15,),
    kind="function",
    source=Source("Vaswani et al. 2017", "arXiv:1706.03762", "section 3.1, decoder"),
    axes=AXES,
    options=DECODER_OPTIONS,
    edges=DECODER_EDGES,
    sample=sample_decoder,
    vjp="refimpl.transformer.blocks:decoder_vjp",
)
def decoder(
    x: FloatArray,
    /,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    order: Order = "post",
    norm: Norm = "layer_norm",
    eps: float = 1e-5,
    activation: Activation = "relu",
    rope: Rope | None = None,
    context: FloatArray | None = None,
    context_mask: BoolArray | None = None,
    **weights_and_options: Unpack[BlockOptions],
) -> FloatArray:
    """Return a decoder block: causal self-attention, attention over a context if there is one, feed-forward.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    num_heads, num_kv_heads, order, norm, eps, activation, rope
        As for `encoder`.
    context : ndarray of float, shape (B, Tc, Mc), optional
        The encoder's output, from which the second attention takes keys and values.  Without it the block is
        that of a decoder-only model, and has no such sublayer.
    context_mask : ndarray of bool, broadcastable to (B, Hq, T, Tc), optional
        True where the context may be attended to: the padding of the encoder.  It is not causal.
    **weights_and_options
        Weights by name (`BlockOptions`), and options of the self-attention, which is causal.

    Returns
    -------
    ndarray of float, shape (B, T, M)
        In the common dtype.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    OptionError
        If a weight is missing, or has no place, or an option is out of range.
    DTypeError
        If an array is not real.

    Notes
    -----
    **Special cases**

    - A token that may attend to none of the context gets 0 (and the bias ``cross_b_o``) from it.

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, section 3.1.

    Examples
    --------
    The second token changes nothing for the first:

    >>> import numpy as np
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> x = np.array([[[3.0, 1.0], [0.0, 5.0]]])
    >>> decoder(x, num_heads=1, **weights)[:, :1].round(3)
    array([[[ 1., -1.]]])
    """
    given = dict(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        order=order,
        norm=norm,
        eps=eps,
        activation=activation,
        rope=rope,
        context=context,
        context_mask=context_mask,
        **weights_and_options,
    )
    layer, block = checked_decoder(x, given)
    return round_to(layer.forward(block.x), block.dtype)


def decoder_vjp(x: FloatArray, dy: FloatArray, /, **options: Any) -> BlockGradients:
    """Return the gradients of ``sum(dy * decoder(x, **options))``.

    Parameters
    ----------
    x, dy, **options
        As for `encoder_vjp`.

    Returns
    -------
    BlockGradients
        With ``dcontext`` where there is a context.

    Examples
    --------
    >>> import numpy as np
    >>> eye, one = np.eye(2), np.ones(2)
    >>> weights = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye)
    >>> weights |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> decoder_vjp(np.ones((1, 1, 2)), np.ones((1, 1, 2)), num_heads=1, **weights).dbeta_2
    array([1., 1.])
    """
    layer, block = checked_decoder(x, options)
    return _gradients(layer, block, dy)


def _gradients(layer: Layer, block: BlockInput, dy: FloatArray) -> BlockGradients:
    (dy,) = floating(dy=dy)
    if dy.shape != block.x.shape:
        raise ShapeError(f"dy: expected the shape of x, {block.x.shape}, got {dy.shape}")
    dx, found = layer.vjp(block.x, widen(dy).astype(block.x.dtype, copy=False))
    return block_gradients(dx, found, block.dtype)
