"""The make of a decoder: its sizes and choices, the shapes of its parameters, and where training starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from refimpl.errors import OptionError
from refimpl.numerics import FloatArray
from refimpl.transformer.activations import Activation
from refimpl.transformer.block_weights import weight_names
from refimpl.transformer.layers import Norm, Order
from refimpl.transformer.rotary import Rope
from refimpl.validation import positive, whole

__all__ = ["DecoderConfig", "Positions", "decoder_shapes", "initial_decoder"]

Positions: TypeAlias = Rope | Literal["alibi", "learned", "sinusoidal"]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The make of a decoder; the defaults are those of LLaMA, in small, over bytes.

    Attributes
    ----------
    vocabulary, width, layers, hidden : int
        V (256: bytes), M, the number of blocks, and the width F of feed-forward layers.
    num_heads, num_kv_heads, head_width : int
        Hq, Hkv (default Hq) and D (default M / Hq).
    positions : Rope or {"alibi", "learned", "sinusoidal"}
        Where order comes from.
    max_length : int
        Rows of the table of learned positions.
    order, norm, eps, activation
        As for `refimpl.transformer.decoder`.
    gated, biases : bool
        Whether feed-forward layers have a gate, and linear maps biases (of a gated layer only attention has).
    tied : bool
        Whether the head is the embedding table.
    embedding_scale : float
        Factor on embeddings, √M in the original Transformer.

    Raises
    ------
    OptionError
        If a value is out of range.

    Examples
    --------
    >>> DecoderConfig(width=64, num_heads=4).head_size
    16
    """

    vocabulary: int = 256
    width: int = 64
    layers: int = 2
    num_heads: int = 4
    hidden: int = 192
    num_kv_heads: int | None = None
    head_width: int | None = None
    positions: Positions = Rope()  # noqa: RUF009 (it is frozen)
    max_length: int = 1024
    order: Order = "pre"
    norm: Norm = "rms_norm"
    eps: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    biases: bool = False
    tied: bool = True
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "num_heads", "hidden", "max_length"):
            whole(name, getattr(self, name))
        whole("layers", self.layers, 0)
        positive("eps", self.eps)
        if self.num_heads % whole("num_kv_heads", self.kv_heads):
            raise OptionError(
                f"num_kv_heads: must divide num_heads; got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.head_width is None and self.width % self.num_heads:
            raise OptionError(f"head_width: {self.width} features do not divide into {self.num_heads} heads")
        if not isinstance(self.positions, Rope) and self.positions not in ("alibi", "learned", "sinusoidal"):
            raise OptionError(
                f'positions: expected a Rope, "alibi", "learned" or "sinusoidal", got {self.positions!r}'
            )

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """D."""
        return self.width // self.num_heads if self.head_width is None else self.head_width


def decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, by name, in the order in which they are used.

    Names: ``embedding``, ``positions`` if they are learned, ``layers.0.w_q`` and so on as in
    `refimpl.transformer.block_weights.BlockOptions`, ``gamma`` and ``beta`` of the last normalisation of a
    "pre" model, and ``head`` if it is not tied.

    Examples
    --------
    >>> shapes = decoder_shapes(DecoderConfig(width=8, num_heads=2, layers=1, hidden=16))
    >>> list(shapes)[:3], shapes["layers.0.w_up"]
    (['embedding', 'layers.0.w_q', 'layers.0.w_k'], (8, 16))
    """
    M, F = config.width, config.hidden
    q, kv = config.num_heads * config.head_size, config.kv_heads * config.head_size
    block = {
        "w_q": (M, q), "w_k": (M, kv), "w_v": (M, kv), "w_o": (q, M), "w_1": (M, F), "w_2": (F, M),
        "w_gate": (M, F), "w_up": (M, F), "w_down": (F, M),
        "b_q": (q,), "b_k": (kv,), "b_v": (kv,), "b_1": (F,),
    }  # fmt: skip
    names = weight_names(norm=config.norm, gated=config.gated, biases=config.biases, cross=False)
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocabulary, M)}
    if config.positions == "learned":
        shapes["positions"] = (config.max_length, M)
    for layer in range(config.layers):
        shapes |= {f"layers.{layer}.{name}": block.get(name, (M,)) for name in names}
    if config.order == "pre":
        shapes |= {"gamma": (M,)} | ({"beta": (M,)} if config.norm == "layer_norm" else {})
    return shapes | ({} if config.tied else {"head": (config.vocabulary, M)})


def initial_decoder(
    config: DecoderConfig, rng: np.random.Generator, /, *, dtype: Any = np.float64
) -> dict[str, FloatArray]:
    """Return parameters to train from.

    Parameters
    ----------
    config : DecoderConfig
        The make.
    rng : numpy.random.Generator
        Source of randomness.
    dtype : dtype
        Of the arrays.

    Returns
    -------
    dict of str to ndarray
        Matrices normal with variance 1 / rows, those that write to the residual smaller by ``√(2 layers)`` as
        in GPT-2; embeddings with variance 1 / M, so that tied logits start with variance near 1; gains 1,
        shifts and biases 0.

    Examples
    --------
    >>> config = DecoderConfig(width=8, num_heads=2, layers=1, hidden=16)
    >>> sum(array.size for array in initial_decoder(config, np.random.default_rng(0)).values())
    2712
    """
    made: dict[str, FloatArray] = {}
    for name, shape in decoder_shapes(config).items():
        last = name.rpartition(".")[2]
        if last.startswith("gamma"):
            made[name] = np.ones(shape, dtype)
        elif len(shape) == 1:
            made[name] = np.zeros(shape, dtype)
        else:
            rows = config.width if last in ("embedding", "positions", "head") else shape[0]
            writes = last in ("w_o", "w_2", "w_down")
            spread = rows**-0.5 * ((2 * config.layers) ** -0.5 if writes else 1.0)
            made[name] = (spread * rng.standard_normal(shape)).astype(dtype)
    return made
