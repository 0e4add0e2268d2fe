"""The networks of a decoder's layers, dense ones and mixtures, from the keys of a ``config.json``."""

from __future__ import annotations

from dataclasses import replace

from memsim.formats.huggingface_blocks import Layer, Network, ffn
from memsim.formats.settings import Settings
from memsim.model import Part
from memsim.sparse_model import experts_block

__all__ = ["biased_experts", "deepseek", "experts", "gated", "llama4", "mixture", "qwen", "two_matrices"]


def gated(bias_key: str = "mlp_bias") -> Network:
    """Return the reader of a gated network in every layer, whose biases a setting switches, if one does."""

    def network(settings: Settings, _width: int, _index: int) -> Layer:
        bias = bool(bias_key) and settings.flag(bias_key, default=False)
        return "block", (ffn(settings.whole("intermediate_size"), gated=True, bias=bias),)

    return network


def two_matrices(bias_key: str = "", *, bias: bool = True, relu: bool = False) -> Network:
    """Return the reader of a network without a gate; `bias` is what holds where no setting says it."""

    def network(settings: Settings, _width: int, _index: int) -> Layer:
        on = settings.flag(bias_key, default=bias) if bias_key else bias
        return "block", (ffn(settings.whole("intermediate_size"), gated=False, bias=on, relu=relu),)

    return network


def experts(settings: Settings, width: str = "intermediate_size") -> tuple[Part, ...]:
    """Return a router and its gated experts."""
    count = settings.whole("num_local_experts", "num_experts", "n_routed_experts")
    active = settings.whole("num_experts_per_tok", "num_experts_per_token", most=count)
    return experts_block(experts=count, active=active, width=settings.whole(width), gated=True)


def mixture(settings: Settings, _width: int, _index: int) -> Layer:
    """Return the experts that every layer of Mixtral and its like has."""
    return "block", experts(settings)


def biased_experts(settings: Settings, _width: int, _index: int) -> Layer:
    """Return the experts of GPT-OSS: router and experts have biases."""
    return "block", tuple(
        replace(part, choices={**part.choices, "bias": "all"}) for part in experts(settings)
    )


def qwen(settings: Settings, _width: int, index: int) -> Layer:
    """Return the network of a layer of Qwen's mixtures; Qwen2's have a shared expert with a gate."""
    step = settings.whole("decoder_sparse_step", default=1)
    if index in settings.wholes("mlp_only_layers") or (index + 1) % step:
        return "dense block", gated()(settings, 0, index)[1]
    chosen = experts(settings, "moe_intermediate_size")
    if settings.get("model_type") != "qwen2_moe":
        return "MoE block", chosen
    shared = ffn(
        settings.whole("shared_expert_intermediate_size"), gated=True, bias=False, name="shared experts"
    )
    return "MoE block", (shared, Part("linear", "shared gate", {"outputs": 1}), *chosen)


def deepseek(settings: Settings, _width: int, index: int) -> Layer:
    """Return the network of a layer of DeepSeek's mixtures: the first ones are dense."""
    routed = settings.whole("n_routed_experts", default=0, least=0)
    sparse = index >= settings.whole("first_k_dense_replace", default=0, least=0)
    if not routed or not sparse or index % settings.whole("moe_layer_freq", default=1):
        return "dense block", gated()(settings, 0, index)[1]
    chosen = experts(settings, "moe_intermediate_size")
    count = settings.whole("n_shared_experts", default=0, least=0)
    wide = count * settings.whole("moe_intermediate_size")
    shared = (ffn(wide, gated=True, bias=False, name="shared experts"),) if count else ()
    return "MoE block", (*shared, *chosen)


def llama4(settings: Settings, _width: int, index: int) -> Layer:
    """Return the network of a layer of Llama 4: one shared expert beside the routed ones, or a wider one."""
    step = settings.whole("interleave_moe_layer_step", default=1)
    sparse = (index + 1) % step == 0
    if settings.get("moe_layers") is not None:
        sparse = index in settings.wholes("moe_layers")
    if not sparse:
        return "dense block", (ffn(settings.whole("intermediate_size_mlp"), gated=True, bias=False),)
    shared = ffn(settings.whole("intermediate_size"), gated=True, bias=False, name="shared experts")
    return "MoE block", (shared, *experts(settings))
