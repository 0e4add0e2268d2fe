"""How layers are put together: one after the other, and with a residual around them, forward and backward.

A `Layer` is a function of one array together with its vector-Jacobian product, so a block, or a whole model,
is `chain` and `residual` of its parts, and the product of the whole is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

from refimpl.attention.multi_head import multi_head_attention, multi_head_attention_vjp
from refimpl.attention.scores import AttentionOptions
from refimpl.errors import OptionError
from refimpl.numerics import BoolArray, FloatArray
from refimpl.transformer.activations import Activation
from refimpl.transformer.ffn import ffn, ffn_vjp, gated_ffn, gated_ffn_vjp
from refimpl.transformer.kv_cache import LayerCache
from refimpl.transformer.norms import layer_norm, layer_norm_vjp, rms_norm, rms_norm_vjp
from refimpl.transformer.rotary import Rope
from refimpl.transformer.self_attention import Weights, self_attention, self_attention_vjp

__all__ = [
    "Gradients",
    "Layer",
    "Norm",
    "Order",
    "chain",
    "cross_attention_layer",
    "feed_forward_layer",
    "norm_layer",
    "residual",
    "self_attention_layer",
]

Gradients: TypeAlias = dict[str, FloatArray]
Order: TypeAlias = Literal["post", "pre"]
Norm: TypeAlias = Literal["layer_norm", "rms_norm"]


class Layer(NamedTuple):
    """``forward(x)``, and ``vjp(x, dy)``: the gradients of x, and of everything else by name."""

    forward: Callable[[FloatArray], FloatArray]
    vjp: Callable[[FloatArray, FloatArray], tuple[FloatArray, Gradients]]


def chain(*layers: Layer) -> Layer:
    """Return layers one after the other; a name that occurs in several has their gradients added.

    Examples
    --------
    >>> import numpy as np
    >>> double = Layer(lambda x: 2 * x, lambda x, dy: (2 * dy, {}))
    >>> chain(double, double).vjp(np.ones(1), np.ones(1))[0]
    array([4.])
    """

    def forward(x: FloatArray) -> FloatArray:
        for layer in layers:
            x = layer.forward(x)
        return x

    def vjp(x: FloatArray, dy: FloatArray) -> tuple[FloatArray, Gradients]:
        inputs = [x]
        for layer in layers[:-1]:
            inputs.append(layer.forward(inputs[-1]))
        total: Gradients = {}
        for layer, seen in zip(reversed(layers), reversed(inputs), strict=True):
            dy, found = layer.vjp(seen, dy)
            for name, gradient in found.items():
                total[name] = total[name] + gradient if name in total else gradient
        return dy, total

    return Layer(forward, vjp)


def residual(sublayer: Layer, norm: Layer, order: Order) -> Layer:
    """Return ``norm(x + sublayer(x))`` for "post", and ``x + sublayer(norm(x))`` for "pre".

    Raises
    ------
    OptionError
        If the order is none of the two.

    Examples
    --------
    >>> import numpy as np
    >>> zero = Layer(lambda x: 0 * x, lambda x, dy: (0 * dy, {}))
    >>> half = Layer(lambda x: x / 2, lambda x, dy: (dy / 2, {}))
    >>> [float(residual(zero, half, order).forward(np.ones(1))[0]) for order in ("post", "pre")]
    [0.5, 1.0]
    """
    if order == "post":
        return chain(_skip(sublayer), norm)
    if order == "pre":
        return _skip(chain(norm, sublayer))
    raise OptionError(f'order: expected "post" or "pre", got {order!r}')


def _skip(layer: Layer) -> Layer:
    def vjp(x: FloatArray, dy: FloatArray) -> tuple[FloatArray, Gradients]:
        dx, found = layer.vjp(x, dy)
        return dy + dx, found

    return Layer(lambda x: x + layer.forward(x), vjp)


def norm_layer(weights: Weights, gain: str, shift: str, norm: Norm, eps: float) -> Layer:
    """Return the normalisation whose gain, and for "layer_norm" whose shift, have these names.

    Raises
    ------
    OptionError
        If `norm` is none of the two.

    Examples
    --------
    >>> import numpy as np
    >>> norm_layer({"g": np.ones(2)}, "g", "b", "rms_norm", 1e-6).forward(np.array([[1.0, 1.0]])).round(4)
    array([[1., 1.]])
    """
    if norm == "rms_norm":
        return Layer(
            lambda x: rms_norm(x, weights[gain], eps=eps),
            lambda x, dy: _by_name(rms_norm_vjp(x, weights[gain], dy, eps=eps), {"dgamma": gain}),
        )
    if norm != "layer_norm":
        raise OptionError(f'norm: expected "layer_norm" or "rms_norm", got {norm!r}')
    names = {"dgamma": gain, "dbeta": shift}
    return Layer(
        lambda x: layer_norm(x, weights[gain], weights[shift], eps=eps),
        lambda x, dy: _by_name(layer_norm_vjp(x, weights[gain], weights[shift], dy, eps=eps), names),
    )


def feed_forward_layer(weights: Weights, activation: Activation) -> Layer:
    """Return `gated_ffn` if there is a ``w_gate`` among the weights, and `ffn` otherwise.

    Examples
    --------
    >>> import numpy as np
    >>> feed_forward_layer({"w_1": np.eye(2), "w_2": np.eye(2)}, "relu").forward(np.array([[1.0, -1.0]]))
    array([[1., 0.]])
    """
    if "w_gate" in weights:
        gate, up, down = (weights[name] for name in ("w_gate", "w_up", "w_down"))
        return Layer(
            lambda x: gated_ffn(x, gate, up, down, activation=activation),
            lambda x, dy: _by_name(gated_ffn_vjp(x, gate, up, down, dy, activation=activation)),
        )
    w_1, w_2 = weights["w_1"], weights["w_2"]
    biases: dict[str, Any] = {name: weights[name] for name in ("b_1", "b_2") if name in weights}
    return Layer(
        lambda x: ffn(x, w_1, w_2, activation=activation, **biases),
        lambda x, dy: _by_name(ffn_vjp(x, w_1, w_2, dy, activation=activation, **biases)),
    )


def self_attention_layer(
    weights: Weights,
    *,
    num_heads: int,
    num_kv_heads: int,
    rope: Rope | None = None,
    past: LayerCache | None = None,
    present: list[LayerCache] | None = None,
    **options: Unpack[AttentionOptions],
) -> Layer:
    """Return `self_attention` with these weights; what the cache becomes is appended to `present`.

    Examples
    --------
    >>> import numpy as np
    >>> eye = {name: np.eye(4) for name in ("w_q", "w_k", "w_v", "w_o")}
    >>> self_attention_layer(eye, num_heads=2, num_kv_heads=2).forward(np.ones((1, 2, 4))).shape
    (1, 2, 4)
    """

    def forward(x: FloatArray) -> FloatArray:
        y, cache = self_attention(
            x, weights, num_heads=num_heads, num_kv_heads=num_kv_heads, rope=rope, past=past, **options
        )
        if present is not None:
            present.append(cache)
        return y

    def vjp(x: FloatArray, dy: FloatArray) -> tuple[FloatArray, Gradients]:
        return self_attention_vjp(
            x, weights, dy, num_heads=num_heads, num_kv_heads=num_kv_heads, rope=rope, **options
        )

    return Layer(forward, vjp)


def cross_attention_layer(
    weights: Weights,
    context: FloatArray,
    *,
    num_heads: int,
    num_kv_heads: int,
    context_mask: BoolArray | None = None,
) -> Layer:
    """Return multi-head attention whose keys and values come from `context`, its weights named ``cross_*``.

    The gradient of the context has the name ``context``.

    Examples
    --------
    >>> import numpy as np
    >>> eye = {f"cross_w_{name}": np.eye(4) for name in "qkvo"}
    >>> cross = cross_attention_layer(eye, np.ones((1, 3, 4)), num_heads=2, num_kv_heads=2)
    >>> cross.forward(np.ones((1, 2, 4)))[0, 0]
    array([1., 1., 1., 1.])
    """
    w_q, w_k, w_v, w_o = (weights[f"cross_w_{name}"] for name in "qkvo")
    options: dict[str, Any] = {
        f"b_{name}": weights[f"cross_b_{name}"] for name in "qkvo" if f"cross_b_{name}" in weights
    }
    options |= {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    options |= {"context": context, "attn_mask": context_mask}
    names = {f"d{kind}_{name}": f"cross_{kind}_{name}" for kind in "wb" for name in "qkvo"}

    def vjp(x: FloatArray, dy: FloatArray) -> tuple[FloatArray, Gradients]:
        found = multi_head_attention_vjp(x, w_q, w_k, w_v, w_o, dy, **options)
        return _by_name(found, {**names, "dcontext": "context"})

    return Layer(lambda x: multi_head_attention(x, w_q, w_k, w_v, w_o, **options), vjp)


def _by_name(gradients: Any, names: Mapping[str, str] | None = None) -> tuple[FloatArray, Gradients]:
    """Return ``dx``, and the other gradients that there are, under given names or without the d."""
    found = gradients._asdict()
    dx: FloatArray = found.pop("dx")
    return dx, {
        names[name] if names else name[1:]: gradient
        for name, gradient in found.items()
        if gradient is not None
    }
