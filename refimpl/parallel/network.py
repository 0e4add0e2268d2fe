"""A small real network, cut into units, that the data-parallel references train.

A unit has flat parameters, a forward pass and a written-out gradient; ZeRO gathers, reduces and shards unit
by unit.  `attention_network` is a causal language model: embedding, residual attention blocks, head.

>>> network = attention_network(vocabulary=5, width=4, heads=2, head_width=3, blocks=1)
>>> [unit.size for unit in network]
[20, 96, 20]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from refimpl.attention.multi_head import multi_head_attention, multi_head_attention_vjp
from refimpl.errors import ShapeError
from refimpl.numerics import Array, BoolArray, FloatArray, IntArray, contract, round_to, wide_dtype, widen

__all__ = [
    "Batch",
    "Network",
    "Sized",
    "Unit",
    "attention_network",
    "cross_entropy",
    "initial_parameters",
    "loss_and_gradients",
    "parameter_count",
    "split_units",
]

Weights = list[FloatArray]


class Sized(Protocol):
    """Whatever has parameters: sharding asks no more of a unit."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        ...


class Unit(NamedTuple):
    """Part of a network: ``forward(weights, x)`` and ``vjp(weights, x, dy) -> (dweights, dx)``."""

    shapes: tuple[tuple[int, ...], ...]
    forward: Callable[[Weights, Array], FloatArray]
    vjp: Callable[[Weights, Array, FloatArray], tuple[Sequence[FloatArray], FloatArray]]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def weights(self, flat: FloatArray) -> Weights:
        """Return the weights that stand one behind the other in `flat`, as views."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), self.shapes, strict=True)]


Network = Sequence[Unit]


class Batch(NamedTuple):
    """Sequences to train on: tokens (B, T + 1), and which of the T predictions count, (B, T)."""

    tokens: IntArray
    mask: BoolArray


def attention_network(
    *, vocabulary: int, width: int, heads: int, head_width: int, blocks: int
) -> tuple[Unit, ...]:
    """Return a causal attention language model as units: embedding, ``x + attention(x)`` blocks, head.

    Parameters
    ----------
    vocabulary, width, heads, head_width, blocks : int
        V, M, H, D and the number of blocks.

    Returns
    -------
    tuple of Unit
        ``blocks + 2`` of them.
    """
    inner = heads * head_width

    def embed(weights: Weights, tokens: Array) -> FloatArray:
        return weights[0][tokens]

    def embed_vjp(weights: Weights, tokens: Array, dy: FloatArray) -> tuple[Sequence[FloatArray], FloatArray]:
        gradient = np.zeros(weights[0].shape, wide_dtype(dy.dtype))
        np.add.at(gradient, tokens, widen(dy))
        return [round_to(gradient, dy.dtype)], dy[:0]  # tokens have no gradient

    def block(weights: Weights, x: Array) -> FloatArray:
        return x + multi_head_attention(x, *weights, num_heads=heads, causal=True)

    def block_vjp(weights: Weights, x: Array, dy: FloatArray) -> tuple[Sequence[FloatArray], FloatArray]:
        w_q, w_k, w_v, w_o = weights
        gradients = multi_head_attention_vjp(x, w_q, w_k, w_v, w_o, dy, num_heads=heads, causal=True)
        return (gradients.dw_q, gradients.dw_k, gradients.dw_v, gradients.dw_o), dy + gradients.dx

    def head(weights: Weights, x: Array) -> FloatArray:
        return round_to(contract("btm,mv->btv", x, weights[0]), x.dtype)

    def head_vjp(weights: Weights, x: Array, dy: FloatArray) -> tuple[Sequence[FloatArray], FloatArray]:
        gradient = round_to(contract("btm,btv->mv", x, dy), x.dtype)
        return [gradient], round_to(contract("btv,mv->btm", dy, weights[0]), x.dtype)

    projections = (width, inner), (width, inner), (width, inner), (inner, width)
    return (
        Unit(((vocabulary, width),), embed, embed_vjp),
        *(Unit(projections, block, block_vjp) for _ in range(blocks)),
        Unit(((width, vocabulary),), head, head_vjp),
    )


def parameter_count(network: Sequence[Sized]) -> int:
    """Return how many parameters all units have together."""
    return sum(unit.size for unit in network)


def split_units(network: Sequence[Sized], flat: FloatArray) -> list[FloatArray]:
    """Return the part of `flat` that belongs to each unit, as views.

    Raises
    ------
    ShapeError
        If `flat` is not a vector with one entry for each parameter.
    """
    if flat.shape != (parameter_count(network),):
        raise ShapeError(f"parameters: expected shape ({parameter_count(network)},), got {flat.shape}")
    return np.split(flat, np.cumsum([unit.size for unit in network])[:-1])


def initial_parameters(network: Network, rng: np.random.Generator) -> FloatArray:
    """Return parameters drawn with variance 1 / rows of each weight, flat."""
    drawn: Iterator[FloatArray] = (
        rng.standard_normal(shape).ravel() / np.sqrt(shape[0]) for unit in network for shape in unit.shapes
    )
    return np.concatenate(list(drawn))


def cross_entropy(logits: FloatArray, targets: IntArray, mask: BoolArray) -> tuple[float, FloatArray]:
    """Return the sum over counted tokens of ``-log softmax(logits)[target]``, and its gradient.

    Parameters
    ----------
    logits : ndarray of float, shape (B, T, V)
        Scores.
    targets : ndarray of int, shape (B, T)
        Right answers.
    mask : ndarray of bool, shape (B, T)
        True: the token counts.

    Returns
    -------
    tuple of float and ndarray
        The sum, and its gradient in the wide dtype of `logits`.
    """
    wide = widen(logits).astype(wide_dtype(logits.dtype), copy=False)
    shifted = wide - np.max(wide, axis=-1, keepdims=True)
    lse = np.log(np.sum(np.exp(shifted), axis=-1))
    chosen = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]
    gradient = np.exp(shifted - lse[..., None])
    np.put_along_axis(
        gradient, targets[..., None], np.take_along_axis(gradient, targets[..., None], axis=-1) - 1, axis=-1
    )
    return float(np.sum(np.where(mask, lse - chosen, 0))), np.where(mask[..., None], gradient, 0)


class Keep(list[Any]):
    """Where a forward pass leaves the inputs of its units for the backward pass: here, whole."""

    def save(self, x: Array) -> None:
        """Keep the next unit's input."""
        self.append(x)

    def restore(self) -> Array:
        """Return the last input kept, and forget it."""
        kept: Array = self.pop()
        return kept


def loss_and_gradients(
    network: Network,
    parameters_of: Callable[[int], FloatArray],
    batch: Batch,
    factor: float,
    take: Callable[[int, FloatArray], None],
    inputs: Keep | None = None,
) -> float:
    """Run a batch forward and backward; return the loss summed over its counted tokens.

    Parameters
    ----------
    network : sequence of Unit
        The units, in order.
    parameters_of : callable
        ``parameters_of(index)`` returns a unit's flat parameters; asked once on the way forward and once on
        the way back, so that whoever shards parameters can gather them then and drop them after.
    batch : Batch
        What this rank trains on; it may be empty.
    factor : float
        Multiplies the gradient at the loss: the loss scale over the number of tokens of all ranks.
    take : callable
        ``take(index, gradient)`` is given each unit's flat gradient as soon as it is known, last unit first.
    inputs : Keep, optional
        Where the units' inputs are kept in between.

    Returns
    -------
    float
        Not multiplied by `factor`.
    """
    kept = Keep() if inputs is None else inputs
    x: Array = batch.tokens[:, :-1]
    for index, unit in enumerate(network):
        kept.save(x)
        x = unit.forward(unit.weights(parameters_of(index)), x)
    loss, gradient = cross_entropy(x, batch.tokens[:, 1:], batch.mask)
    dy: FloatArray = round_to(gradient * factor, x.dtype)
    for index in reversed(range(len(network))):
        unit = network[index]
        gradients, dy = unit.vjp(unit.weights(parameters_of(index)), kept.restore(), dy)
        take(index, np.concatenate([part.ravel() for part in gradients]))
    return loss
