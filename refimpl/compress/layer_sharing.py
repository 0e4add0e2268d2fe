"""Cross-layer sharing (ALBERT): one block's weights used again and again."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.numerics import FloatArray, round_to, widen
from refimpl.registry import Case, Source, technique
from refimpl.transformer.block_weights import BlockGradients
from refimpl.transformer.blocks import encoder, encoder_vjp
from refimpl.validation import bind_axes, floating, whole

__all__ = ["shared_layers", "shared_layers_vjp"]


def sample_shared(rng: np.random.Generator, *, B: int, T: int, D: int, H: int, F: int, layers: int) -> Case:
    """Return a call of `shared_layers`: the weights of one block by name.

    Examples
    --------
    >>> case = sample_shared(np.random.default_rng(0), B=1, T=2, D=3, H=2, F=4, layers=5)
    >>> case.args[0].shape, case.kwargs["num_layers"], case.kwargs["w_1"].shape
    ((1, 2, 6), 5, (6, 4))
    """
    M = D * H
    names = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (M, M)) | {"w_1": (M, F), "w_2": (F, M)}
    weights = {name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in names.items()}
    for place in ("1", "2"):
        weights[f"gamma_{place}"] = 1 + 0.1 * rng.standard_normal(M)
        weights[f"beta_{place}"] = 0.1 * rng.standard_normal(M)
    return Case((rng.standard_normal((B, T, M)),), {"num_layers": layers, "num_heads": H, **weights})


@technique(
    "compress.layer_sharing",
    entries=(88,),
    kind="function",
    source=Source("Lan et al. 2020", "arXiv:1909.11942", "section 3.1: cross-layer parameter sharing"),
    axes={"B": (1, 2), "T": (1, 3), "D": (2, 3), "H": (1, 2), "F": (1, 4), "layers": (0, 3)},
    edges=(
        {"B": 0, "layers": 2},
        {"T": 0, "layers": 2},
        {"layers": 0},
        {"B": 1, "T": 1, "D": 2, "H": 1, "F": 1, "layers": 1},
        {"B": 1, "T": 3, "layers": 3},
    ),
    sample=sample_shared,
    vjp="refimpl.compress.layer_sharing:shared_layers_vjp",
)
def shared_layers(x: FloatArray, /, *, num_layers: int, **block: Any) -> FloatArray:
    """Return an encoder of `num_layers` layers that all have the weights of one block.

    Parameters
    ----------
    x : ndarray of float, shape (B, T, M)
        Tokens.
    num_layers : int
        How often the block is applied; 0 gives x.
    **block
        Weights and options of the block, as for `refimpl.transformer.encoder`.

    Returns
    -------
    ndarray of float, shape (B, T, M)

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `refimpl.transformer.encoder`, and if `num_layers` is negative or no integer.

    Notes
    -----
    Parameters are those of one block, whatever the depth; operations and activations are those of all layers:
    compression of parameters does not make inference faster.  It equals an encoder whose layers hold copies,
    and iterates one function towards a fixed point.

    References
    ----------
    .. [1] Lan et al., 2020, arXiv:1909.11942, section 3.1.

    Examples
    --------
    >>> eye, one = np.eye(2), np.ones(2)
    >>> block = dict.fromkeys(("w_q", "w_k", "w_v", "w_o", "w_1", "w_2"), eye) | {"num_heads": 1}
    >>> block |= dict(gamma_1=one, gamma_2=one, beta_1=0 * one, beta_2=0 * one)
    >>> shared_layers(np.array([[[3.0, 1.0]]]), num_layers=12, **block).round(3)
    array([[[ 1., -1.]]])
    """
    (x,) = floating(x=x)
    for _ in range(whole("num_layers", num_layers, least=0)):
        x = encoder(x, **block)
    return x


def shared_layers_vjp(x: FloatArray, dy: FloatArray, /, *, num_layers: int, **block: Any) -> BlockGradients:
    """Return the gradients of `shared_layers`: that of a weight is the sum over its uses.

    Parameters
    ----------
    x, num_layers, **block
        As for `shared_layers`.
    dy : ndarray of float, shape (B, T, M)
        Gradient of the output.

    Returns
    -------
    BlockGradients
        Those of the weights that were given; without layers only that of x.

    Raises
    ------
    ShapeError, DTypeError, OptionError
        As `shared_layers`.

    Examples
    --------
    >>> x = np.ones((1, 1, 2))
    >>> shared_layers_vjp(x, x, num_layers=0, num_heads=1).dx
    array([[[1., 1.]]])
    """
    x, dy = floating(x=x, dy=dy)
    bind_axes({"x": (x, "B T M"), "dy": (dy, "B T M")})
    inputs = [x]
    for _ in range(whole("num_layers", num_layers, least=0) - 1):
        inputs.append(encoder(inputs[-1], **block))
    total: dict[str, FloatArray] = {}
    for before in reversed(inputs[:num_layers]):
        found = encoder_vjp(before, dy, **block)
        dy = found.dx
        for name, gradient in found._asdict().items():
            if name != "dx" and gradient is not None:
                total[name] = gradient if name not in total else widen(total[name]) + widen(gradient)
    return BlockGradients(dx=dy, **{name: round_to(gradient, x.dtype) for name, gradient in total.items()})
