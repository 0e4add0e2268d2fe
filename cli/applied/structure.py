"""Techniques that change how a block computes: int8 activations, fewer heads and neurons, windows, adapters.

Each is a `Layer` with one part replaced by a call of its reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cli.applied.model import MATRICES, Layer, Model, Stored, dense
from refimpl.attention.sliding_window import sliding_window_attention
from refimpl.compress.layer_sharing import shared_layers
from refimpl.numerics import BoolArray, FloatArray, IntArray
from refimpl.peft.lora import lora_linear
from refimpl.peft.merge import lora_init, lora_merge
from refimpl.prune.magnitude import magnitude
from refimpl.prune.structured import compacted_ffn
from refimpl.prune.structured_heads import compacted_heads
from refimpl.quant.absmax import Int8Columns, dequantize_columns, quantize_columns
from refimpl.quant.llm_int8 import llm_int8_linear

__all__ = [
    "RADIUS",
    "RANK",
    "adapted",
    "fewer_heads",
    "fewer_neurons",
    "inputs_of",
    "int8_products",
    "merged",
    "shared",
    "windowed",
]

KEPT = 0.75  # share of heads and of neurons that stay
RADIUS = 4  # tokens seen on each side
RANK, ALPHA, SEED, SPREAD = 8, 16.0, 0, 0.005  # an update of about a fifth of the weight
ADAPTED = ("w_q", "w_v")  # as in the paper of LoRA, section 4.2


@dataclass(frozen=True)
class Recorder(Layer):
    """A block that notes what each of its matrices is given."""

    seen: dict[str, list[FloatArray]] = field(default_factory=dict)

    def linear(self, x: FloatArray, name: str) -> FloatArray:
        """Return ``x @ w + b``, and note x."""
        self.seen.setdefault(name, []).append(x)
        return super().linear(x, name)


def inputs_of(layer: Layer, states: Sequence[FloatArray]) -> dict[str, FloatArray]:
    """Return the inputs [tokens, K] of each matrix of a block, from the states that the block is given."""
    recorder = Recorder(layer.vectors, layer.matrices, layer.config)
    for x in states:
        recorder(x)
    widths = {name: len(matrix.values) for name, matrix in layer.matrices.items()}
    return {name: np.concatenate(recorder.seen.get(name, [np.empty((0, widths[name]))])) for name in MATRICES}


# LLM.int8()


@dataclass(frozen=True)
class _Int8(Layer):
    codes: Mapping[str, Int8Columns]

    def linear(self, x: FloatArray, name: str) -> FloatArray:
        out = llm_int8_linear(x, self.codes[name], bias=self.vectors[f"b_{name[2:]}"])
        return np.asarray(out)


def int8_products(model: Model) -> Model:
    """Return the model with every product of tokens and weights in int8, outliers apart."""

    def changed(layer: Layer) -> Layer:
        codes = {name: quantize_columns(matrix.values) for name, matrix in layer.matrices.items()}
        matrices = {
            name: dense(dequantize_columns(found))._replace(nbytes=found.codes.nbytes + found.absmax.nbytes)
            for name, found in codes.items()
        }
        return _Int8(layer.vectors, matrices, layer.config, codes)

    return model.with_layers([changed(layer) for layer in model.layers])


# Heads and neurons


@dataclass(frozen=True)
class _FewerHeads(Layer):
    keep: BoolArray

    def attention(self, x: FloatArray) -> FloatArray:
        """Return it by the reference, which has no biases: they are the weights of a feature that is 1."""
        tokens = np.hstack([x, np.ones((len(x), 1), x.dtype)])[None]
        q, k, v = (np.vstack([self.matrices[f"w_{n}"].values, self.vectors[f"b_{n}"]]) for n in "qkv")
        out = compacted_heads(tokens, q, k, v, self.matrices["w_o"].values, self.keep)
        return np.asarray(out[0] + self.vectors["b_o"])

    @property
    def heads(self) -> int:
        return int(self.keep.sum())

    def kept_vectors(self) -> Mapping[str, FloatArray]:
        columns = np.repeat(self.keep, self.config.width // self.config.num_heads)
        return {**self.vectors, **{f"b_{name}": self.vectors[f"b_{name}"][columns] for name in "qkv"}}


def fewer_heads(model: Model, texts: Sequence[IntArray]) -> Model:
    """Return the model without the heads that add least to the attention of calibration texts."""
    states = [model.states(ids) for ids in texts]
    layers: list[Layer] = []
    for index, layer in enumerate(model.layers):
        joined = inputs_of(layer, [found[index] for found in states])["w_o"]
        w_o, H = layer.matrices["w_o"].values, model.config.num_heads
        parts = zip(np.split(joined, H, axis=1), np.split(w_o, H), strict=True)
        size = np.array([np.linalg.norm(part @ rows) for part, rows in parts])
        keep = magnitude(size, keep=_kept(H))
        matrices = {
            name: _share(matrix, int(keep.sum()), H) if name in MATRICES[:4] else matrix
            for name, matrix in layer.matrices.items()
        }
        layers.append(_FewerHeads(layer.vectors, matrices, layer.config, keep))
    return model.with_layers(layers)


@dataclass(frozen=True)
class _FewerNeurons(Layer):
    keep: BoolArray

    def feed_forward(self, y: FloatArray) -> FloatArray:
        w_1, w_2 = (self.matrices[name].values for name in ("w_1", "w_2"))
        biases = {name: self.vectors[name] for name in ("b_1", "b_2")}
        return compacted_ffn(y, w_1, w_2, self.keep, **biases, activation=self.config.activation)

    def kept_vectors(self) -> Mapping[str, FloatArray]:
        return {**self.vectors, "b_1": self.vectors["b_1"][self.keep]}

    def stored_weights(self) -> dict[str, FloatArray]:
        whole = super().stored_weights()
        small = {"w_1": whole["w_1"][:, self.keep], "b_1": whole["b_1"][self.keep]}
        return {**whole, **small, "w_2": whole["w_2"][self.keep]}


def fewer_neurons(model: Model, texts: Sequence[IntArray]) -> Model:
    """Return the model without the neurons that add least to the feed-forward layers of calibration texts."""
    states = [model.states(ids) for ids in texts]
    layers: list[Layer] = []
    for index, layer in enumerate(model.layers):
        units = inputs_of(layer, [found[index] for found in states])["w_2"]
        size = np.linalg.norm(units, axis=0) * np.linalg.norm(layer.matrices["w_2"].values, axis=1)
        keep = magnitude(size, keep=_kept(len(size)))
        matrices = {
            name: _share(matrix, int(keep.sum()), len(keep)) if name in MATRICES[4:] else matrix
            for name, matrix in layer.matrices.items()
        }
        layers.append(_FewerNeurons(layer.vectors, matrices, layer.config, keep))
    return model.with_layers(layers)


def _kept(count: int) -> int:
    return max(round(KEPT * count), 1)


def _share(matrix: Stored, kept: int, of: int) -> Stored:
    """Return a matrix of which only the rows or columns of some units are stored and multiplied."""
    return Stored(matrix.values, *(number * kept // of for number in matrix[1:]))


# One block for several layers, and windows


@dataclass(frozen=True)
class _Shared(Layer):
    def __call__(self, x: FloatArray) -> FloatArray:
        options: dict[str, Any] = {
            "num_heads": self.config.num_heads, "eps": self.config.eps, "activation": self.config.activation,
        }  # fmt: skip
        return np.asarray(shared_layers(x[None], num_layers=1, **self.stored_weights(), **options)[0])


def shared(model: Model) -> Model:
    """Return the model in which the first of the middle two blocks stands for both.

    Without training, sharing all of them leaves nothing of a model that was not trained so.
    """
    middle = len(model.layers) // 2
    if not middle:
        return model
    block = model.layers[middle - 1]
    once = _Shared(block.vectors, block.matrices, block.config)
    return model.with_layers([*model.layers[: middle - 1], once, once, *model.layers[middle + 1 :]])


@dataclass(frozen=True)
class _Windowed(Layer):
    def attend(self, q: FloatArray, k: FloatArray, v: FloatArray) -> FloatArray:
        return np.asarray(sliding_window_attention(q, k, v, radius=RADIUS))

    def pairs(self, T: int) -> int:
        from memsim.sparse_attention import window_pairs

        return int(window_pairs(N=T, radius=RADIUS).total)


def windowed(model: Model) -> Model:
    """Return the model whose tokens see their neighbours only."""
    return model.with_layers(
        [_Windowed(layer.vectors, layer.matrices, layer.config) for layer in model.layers]
    )


# LoRA


@dataclass(frozen=True)
class _Adapted(Layer):
    base: Mapping[str, FloatArray]
    adapters: Mapping[str, tuple[FloatArray, FloatArray]]

    def linear(self, x: FloatArray, name: str) -> FloatArray:
        if name not in self.adapters:
            return super().linear(x, name)
        y = lora_linear(x, *self.adapters[name], self.base[name], lora_alpha=ALPHA)
        return np.asarray(y + self.vectors[f"b_{name[2:]}"])


def adapted(model: Model) -> Model:
    """Return the model with a drawn adapter beside queries and values, its weights not merged."""
    rng = np.random.default_rng(SEED)

    def changed(layer: Layer) -> Layer:
        base = {name: layer.matrices[name].values for name in ADAPTED}
        adapters, matrices = {}, dict(layer.matrices)
        for name, w in base.items():
            K, N = w.shape
            a, _ = lora_init(K, N, RANK, start="paper", rng=rng)
            b = SPREAD * rng.standard_normal((RANK, N))  # as if it had been trained
            two = adapters[name] = a.astype(w.dtype), b.astype(w.dtype)
            more, once = sum(factor.size for factor in two), dense(lora_merge(*two, w, lora_alpha=ALPHA))
            matrices[name] = once._replace(
                nbytes=once.nbytes + more * w.itemsize,
                parameters=once.parameters + more,
                multiply_adds=once.multiply_adds + more,
            )
        return _Adapted(layer.vectors, matrices, layer.config, base, adapters)

    return model.with_layers([changed(layer) for layer in model.layers])


def merged(model: Model) -> Model:
    """Return the model of `adapted`, its adapters merged into the weights."""

    def changed(layer: Layer) -> Layer:
        matrices = {name: dense(matrix.values) for name, matrix in layer.matrices.items()}
        return Layer(layer.vectors, matrices, layer.config)

    return model.with_layers([changed(layer) for layer in adapted(model).layers])
