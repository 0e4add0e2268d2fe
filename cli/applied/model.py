"""An encoder whose parts a technique can replace, one text at a time, and what its weights and work come to.

A `Layer` computes what `refimpl.transformer.blocks.encoder` computes for BERT (a test holds it to
`bert_encoder`), through methods that a technique overrides; a `Stored` matrix knows what it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from refimpl.attention.dense import scaled_dot_product_attention
from refimpl.checkpoint import Encoded, encode, load_tensors, load_tokenizer, read_config
from refimpl.numerics import Array, FloatArray, IntArray
from refimpl.transformer.activations import activate
from refimpl.transformer.bert import BertConfig, bert_config, bert_encoder, bert_params
from refimpl.transformer.linear import linear
from refimpl.transformer.norms import layer_norm

__all__ = ["MATRICES", "Checkpoint", "Cost", "Layer", "Model", "Stored", "dense", "load", "texts_of"]

MATRICES = ("w_q", "w_k", "w_v", "w_o", "w_1", "w_2")
LENGTH = 128  # longer texts are cut, as by `frugal verify --model`


class Cost(NamedTuple):
    """Numbers that weights hold, the bytes that store them, and operations, a multiply-add being two."""

    parameters: int
    nbytes: int
    flops: int


class Stored(NamedTuple):
    """A matrix: the values [K, N] that tokens meet, and what stores and multiplies them."""

    values: FloatArray
    nbytes: int
    parameters: int
    multiply_adds: int  # a token


def dense(values: FloatArray) -> Stored:
    """Return a matrix stored as it is.

    >>> dense(np.ones((2, 3), np.float32))[1:]
    (24, 6, 6)
    """
    return Stored(values, values.nbytes, values.size, values.size)


@dataclass(frozen=True)
class Layer:
    """One block of BERT, from its biases, gains and shifts by name and its six matrices."""

    vectors: Mapping[str, FloatArray]
    matrices: Mapping[str, Stored]
    config: BertConfig

    def __call__(self, x: FloatArray) -> FloatArray:
        """Return the states [T, M] of a text after the block."""
        y = self._norm("1", x + self.attention(x))
        return self._norm("2", y + self.feed_forward(y))

    def linear(self, x: FloatArray, name: str) -> FloatArray:
        """Return ``x @ w + b``."""
        return linear(x, self.matrices[name].values, self.vectors[f"b_{name[2:]}"])

    def attend(self, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        """Return the attention of heads [1, T, H, D]."""
        out: FloatArray = np.asarray(scaled_dot_product_attention(q, k, v))
        return out

    def attention(self, x: FloatArray) -> FloatArray:
        """Return the first sublayer."""
        T, H = len(x), self.config.num_heads
        q, k, v = (self.linear(x, name).reshape(1, T, H, -1) for name in ("w_q", "w_k", "w_v"))
        return self.linear(self.attend(q, k, v).reshape(T, -1), "w_o")

    def feed_forward(self, y: FloatArray) -> FloatArray:
        """Return the second sublayer."""
        return self.linear(activate(self.config.activation, self.linear(y, "w_1")), "w_2")

    def pairs(self, T: int) -> int:
        """Return how many scores each head computes."""
        from memsim.flops import attended_pairs

        return attended_pairs(T, T)

    @property
    def heads(self) -> int:
        """How many heads compute."""
        return self.config.num_heads

    def kept_vectors(self) -> Mapping[str, FloatArray]:
        """Return the biases, gains and shifts that are stored."""
        return self.vectors

    def stored_weights(self) -> dict[str, FloatArray]:
        """Return what a checkpoint holds of the block, matrices as tokens meet them."""
        return {**self.vectors, **{name: matrix.values for name, matrix in self.matrices.items()}}

    def cost(self, lengths: Sequence[int]) -> Cost:
        """Return what stores the block, and the operations of its matrix products on texts of `lengths`."""
        matrices, vectors = self.matrices.values(), self.kept_vectors().values()
        D = self.config.width // self.config.num_heads
        products = sum(matrix.multiply_adds for matrix in matrices)
        scores = sum(map(self.pairs, lengths)) * self.heads * 2 * D  # those with the keys, and the values
        return Cost(
            sum(matrix.parameters for matrix in matrices) + sum(vector.size for vector in vectors),
            sum(matrix.nbytes for matrix in matrices) + sum(vector.nbytes for vector in vectors),
            2 * (sum(lengths) * products + scores),
        )

    def _norm(self, place: str, x: FloatArray) -> FloatArray:
        gain, shift = self.vectors[f"gamma_{place}"], self.vectors[f"beta_{place}"]
        return layer_norm(x, gain, shift, eps=self.config.eps)


@dataclass(frozen=True)
class Model:
    """Tables of tokens, positions and types, and blocks; a block that stands twice is stored once."""

    tables: Mapping[str, FloatArray]
    config: BertConfig
    layers: tuple[Layer, ...]

    def states(self, ids: IntArray) -> list[FloatArray]:
        """Return the states [T, M] of a text before the first block and after each."""
        none = replace(self.config, layers=0)
        found = [bert_encoder(self.tables, ids[None], config=none)[0]]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found

    def with_layers(self, layers: Sequence[Layer]) -> Model:
        """Return the model with other blocks."""
        return replace(self, layers=tuple(layers))

    def cost(self, lengths: Sequence[int]) -> Cost:
        """Return what stores the model, and its operations on texts of `lengths`."""
        every = [layer.cost(lengths) for layer in self.layers]
        once = {id(layer): cost for layer, cost in zip(self.layers, every, strict=True)}.values()
        return Cost(
            sum(table.size for table in self.tables.values()) + sum(cost.parameters for cost in once),
            sum(table.nbytes for table in self.tables.values()) + sum(cost.nbytes for cost in once),
            sum(cost.flops for cost in every),
        )

    def block_cost(self, lengths: Sequence[int]) -> Cost:
        """Return `cost` without the tables, which no technique here touches."""
        return replace(self, tables={}).cost(lengths)


@dataclass(frozen=True)
class Checkpoint:
    """A directory that was read."""

    directory: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    model: Model
    tokenizer: Any


def load(directory: str) -> Checkpoint:
    """Return the checkpoint of a BERT.

    Raises
    ------
    CheckpointError
        If a file is damaged or missing.
    UnsupportedError
        If the model is no BERT.
    BackendUnavailableError
        If the package tokenizers is missing.
    """
    described = read_config(directory)
    config = bert_config(described)
    tensors = load_tensors(directory)
    params = bert_params(tensors, config)
    layers = []
    for index in range(config.layers):
        at = f"layers.{index}."
        own = {name.removeprefix(at): array for name, array in params.items() if name.startswith(at)}
        matrices = {name: dense(own.pop(name)) for name in MATRICES}
        layers.append(Layer(own, matrices, config))
    tables = {name: array for name, array in params.items() if not name.startswith("layers.")}
    return Checkpoint(
        directory, described, tensors, Model(tables, config, tuple(layers)), load_tokenizer(directory)
    )


def texts_of(checkpoint: Checkpoint, sentences: Sequence[str]) -> list[IntArray]:
    """Return the token ids of each sentence, without padding."""
    length = min(LENGTH, checkpoint.model.config.max_length)
    text: Encoded = encode(checkpoint.tokenizer, sentences, length=length)
    return [ids[kept] for ids, kept in zip(*text, strict=True)]
