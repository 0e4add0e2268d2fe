"""A decoder whose feed-forward layers are mixtures of experts: its make, its parameters, a layer on ranks.

Experts are spread over the ranks along the data dimension: a token travels to its experts and back, and what
a rank knows of an expert, gradient and optimizer states too, no other rank has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from refimpl.errors import OptionError, ShapeError
from refimpl.numerics import FloatArray
from refimpl.parallel.collectives import ring_all_reduce
from refimpl.parallel.comm import Comm
from refimpl.parallel.passes import Back, Part, Weights
from refimpl.transformer.config import DecoderConfig, decoder_shapes
from refimpl.transformer.layers import Gradients
from refimpl.validation import whole

if TYPE_CHECKING:
    from refimpl.moe.expert_ffn import ExpertOptions

__all__ = ["EXPERTS", "MixtureConfig", "experts_part", "model_shapes", "own_experts"]

EXPERTS = ("experts_in", "experts_gate", "experts_out")
_REPLACED = ("w_gate", "w_up", "w_down", "w_1", "w_2")


@dataclass(frozen=True, slots=True)
class MixtureConfig(DecoderConfig):
    """The make of a decoder in which each feed-forward layer is a mixture of experts of its kind.

    Attributes
    ----------
    experts, k : int
        E of a layer, and how many a token goes to, weighted by a softmax over those k.

    Raises
    ------
    OptionError
        If a value is out of range, or linear maps should have biases: experts have none.
    """

    experts: int = 4
    k: int = 2

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        whole("experts", self.experts)
        if not 1 <= self.k <= self.experts:
            raise OptionError(f"k: expected 1 to {self.experts} experts a token; got {self.k}")
        if self.biases:
            raise OptionError("biases: experts have none")


def model_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name; a mixture has a router and stacked experts in each layer.

    Examples
    --------
    >>> config = MixtureConfig(width=8, num_heads=2, layers=1, hidden=16)
    >>> [f"{name[9:]} {shape}" for name, shape in model_shapes(config).items() if len(shape) == 3]
    ['experts_in (4, 8, 16)', 'experts_gate (4, 8, 16)', 'experts_out (4, 16, 8)']
    """
    shapes = decoder_shapes(config)
    if not isinstance(config, MixtureConfig):
        return shapes
    E, M, F = config.experts, config.width, config.hidden
    mixture = {
        "w_router": (M, E),
        "experts_in": (E, M, F),
        "experts_gate": (E, M, F),
        "experts_out": (E, F, M),
    }
    if not config.gated:
        del mixture["experts_gate"]
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        prefix, _, last = name.rpartition(".")
        if last not in _REPLACED:
            found[name] = shape
        elif last in ("w_gate", "w_1"):
            found |= {f"{prefix}.{own}": size for own, size in mixture.items()}
    return found


def own_experts(weights: Weights, rank: int, ranks: int) -> dict[str, FloatArray]:
    """Return the weights with this rank's experts alone.

    Raises
    ------
    ShapeError
        If the experts do not divide by the ranks.

    Examples
    --------
    >>> own_experts({"experts_in": np.arange(4.0).reshape(4, 1, 1)}, 1, 2)["experts_in"].ravel()
    array([2., 3.])
    """
    own = dict(weights)
    for name, array in weights.items():
        if name.rpartition(".")[2] in EXPERTS:
            if len(array) % ranks:
                raise ShapeError(f"{name}: {len(array)} experts do not divide into {ranks} ranks")
            own[name] = np.split(array, ranks)[rank]
    return own


def experts_part(data: Comm, tensor: Comm, config: MixtureConfig) -> Part:
    """Return a mixture of experts as a part: tokens go to the ranks of their experts, and come back.

    Parameters
    ----------
    data : Comm
        This rank among those that have experts; each has tokens of its own, as many.
    tensor : Comm
        This rank among those that share each expert's hidden units, and have the same tokens.
    config : MixtureConfig
        The make.

    Returns
    -------
    Part
        Weights ``w_router``, and ``experts_in, experts_gate, experts_out`` of this rank's experts.  No token
        is dropped: an expert has a place for each.

    References
    ----------
    .. [1] Lepikhin et al., 2020, arXiv:2006.16668, section 3.2; Rajbhandari et al., 2022,
       arXiv:2201.05596, section 5 (experts along the data dimension).
    """
    # Not above: refimpl.moe itself runs on ranks, and imports refimpl.parallel.
    from refimpl.moe.buffers import (
        BufferGradients,
        through_router,
        to_buffers,
        to_buffers_vjp,
        weighted,
        weighted_vjp,
    )
    from refimpl.moe.expert_ffn import expert_ffn, expert_ffn_vjp
    from refimpl.moe.rank_layer import from_experts, to_experts
    from refimpl.moe.token_choice import token_choice

    def split(weights: Weights) -> tuple[FloatArray, FloatArray, ExpertOptions]:
        options: ExpertOptions = {"w_gate": weights.get("experts_gate"), "activation": config.activation}
        return weights["experts_in"], weights["experts_out"], options

    def part(weights: Weights, x: FloatArray) -> tuple[FloatArray, Back]:
        tokens = x.reshape(x.shape[0] * x.shape[1], x.shape[2])
        routing, logits = token_choice(
            tokens, weights["w_router"], k=config.k, convention="mixtral", capacity=len(tokens)
        )
        with data.phase("dispatch"):
            rows = to_experts(data, to_buffers(tokens, routing, config.experts))
        w_in, w_out, options = split(weights)
        made = expert_ffn(rows, w_in, w_out, **options)
        with data.phase("combine"):
            buffers = from_experts(data, made)

        def back(weights: Weights, dy: FloatArray) -> tuple[FloatArray, Gradients]:
            dbuffers, dweight = weighted_vjp(buffers, routing, dy.reshape(tokens.shape))
            with data.phase("dispatch gradients"):
                dmade = to_experts(data, dbuffers)
            w_in, w_out, options = split(weights)
            experts = expert_ffn_vjp(rows, w_in, w_out, dmade, **options)
            with data.phase("combine gradients"):
                dx = to_buffers_vjp(from_experts(data, experts.dx), routing)
            own = BufferGradients(dx, dweight, experts.dw_in, experts.dw_out, experts.dw_gate)
            found = through_router(own, tokens, weights["w_router"], logits, routing, convention="mixtral")
            with tensor.phase(
                "router gradient"
            ):  # each rank has weighed its hidden units' part of the output
                dw_router = ring_all_reduce(tensor, found.dw_router)
            gradients = {"w_router": dw_router, "experts_in": found.dw_in, "experts_out": found.dw_out}
            if found.dw_gate is not None:
                gradients["experts_gate"] = found.dw_gate
            return found.dx.reshape(x.shape), gradients

        return weighted(buffers, routing).reshape(x.shape), back

    return part
