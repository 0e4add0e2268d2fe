"""The parts that the families of `memsim.huggingface` are made of, from the keys of a ``config.json``."""

from __future__ import annotations

from memsim.model import Part
from memsim.settings import Settings
from memsim.sparse_model import experts_block
from refimpl.errors import OptionError

__all__ = [
    "Layer",
    "attention",
    "deepseek_network",
    "embedding",
    "ffn",
    "head",
    "jamba_layer",
    "latent_attention",
    "mamba_layer",
    "mixtral_network",
    "norm",
    "plain_network",
    "qwen_network",
]

Layer = tuple[str, tuple[Part, ...]]  # its name and what it is made of


def embedding(settings: Settings, width: int | None = None) -> Part:
    """Return the table of tokens, of the width of the model unless it has its own."""
    return Part("embedding", "tokens", _rows(settings, width), {"vocabulary": True})


def head(settings: Settings, *, tied: bool, width: int | None = None) -> Part:
    """Return the output projection; `tied` is what the family does where the file is silent."""
    tied = settings.flag("tie_word_embeddings", default=tied)
    return Part("head", "head", _rows(settings, width), {"vocabulary": True, "tied": tied})


def _rows(settings: Settings, width: int | None) -> dict[str, int]:
    return {"rows": settings.whole("vocab_size")} | ({} if width is None else {"width": width})


def norm(name: str, style: str = "layer", width: int | None = None) -> Part:
    """Return a norm, of the width of the model unless it has its own."""
    choices: dict[str, str | bool] = {} if style == "layer" else {"style": style}
    return Part("norm", name, {} if width is None else {"width": width}, choices)


def ffn(width: int, *, gated: bool, bias: bool, name: str = "ffn", relu: bool = False) -> Part:
    """Return a feed-forward network; ReLU is told apart, as what it makes is all that it keeps."""
    choices: dict[str, str | bool] = ({"gated": True} if gated else {}) | ({"bias": "all"} if bias else {})
    if relu:
        choices["activation"] = "relu"
    return Part("ffn", name, {"width": width}, choices)


def attention(settings: Settings, width: int, *, bias: str) -> Part:
    """Return attention with as many key heads and as wide ones as the file says."""
    heads = settings.whole("num_attention_heads")
    keys = settings.whole("num_key_value_heads", default=heads)
    wide = settings.whole("head_dim", default=max(width // heads, 1))
    if settings.get("head_dim") is None and width % heads:
        raise OptionError(f"{settings.where}: {heads} heads do not divide a width of {width}")
    if heads % keys:
        raise OptionError(f"{settings.where}: {keys} key heads do not divide {heads} heads")
    sizes = {"heads": heads, "key_heads": keys, "head_width": wide}
    window = settings.whole("sliding_window", default=0, least=0)
    if window and settings.flag("use_sliding_window", default=True):
        sizes["window"] = window
    return Part("attention", "attention", sizes, {} if bias == "none" else {"bias": bias})


def latent_attention(settings: Settings, _width: int) -> Part:
    """Return the latent attention of DeepSeek-V2 and V3."""
    sizes = {
        "heads": settings.whole("num_attention_heads"),
        "key_rank": settings.whole("kv_lora_rank"),
        "plain": settings.whole("qk_nope_head_dim"),
        "rotary": settings.whole("qk_rope_head_dim"),
        "value_width": settings.whole("v_head_dim"),
    }
    if settings.get("q_lora_rank") is not None:
        sizes["query_rank"] = settings.whole("q_lora_rank")
    bias = settings.flag("attention_bias", default=False)
    return Part("latent_attention", "latent_attention", sizes, {"bias": "all"} if bias else {})


def plain_network(settings: Settings, _width: int, _index: int) -> Layer:
    """Return the gated network of a dense layer."""
    bias = settings.flag("mlp_bias", default=False)
    return "block", (ffn(settings.whole("intermediate_size"), gated=True, bias=bias),)


def mixtral_network(settings: Settings, _width: int, _index: int) -> Layer:
    """Return Mixtral's experts, which every layer has."""
    return "block", _experts(settings, "intermediate_size")


def _experts(settings: Settings, width: str) -> tuple[Part, ...]:
    experts = settings.whole("num_local_experts", "num_experts", "n_routed_experts")
    active = settings.whole("num_experts_per_tok", most=experts)
    return experts_block(experts=experts, active=active, width=settings.whole(width), gated=True)


def qwen_network(settings: Settings, _width: int, index: int) -> Layer:
    """Return the network of a layer of Qwen's mixtures; Qwen2's have a shared expert with a gate."""
    step = settings.whole("decoder_sparse_step", default=1)
    if index in settings.wholes("mlp_only_layers") or (index + 1) % step:
        return "dense block", plain_network(settings, 0, index)[1]
    experts = _experts(settings, "moe_intermediate_size")
    if settings.get("model_type") != "qwen2_moe":
        return "MoE block", experts
    shared = ffn(
        settings.whole("shared_expert_intermediate_size"), gated=True, bias=False, name="shared experts"
    )
    return "MoE block", (shared, Part("linear", "shared gate", {"outputs": 1}), *experts)


def deepseek_network(settings: Settings, _width: int, index: int) -> Layer:
    """Return the network of a layer of DeepSeek's mixtures: the first ones are dense."""
    routed = settings.whole("n_routed_experts", default=0, least=0)
    sparse = index >= settings.whole("first_k_dense_replace", default=0, least=0)
    if not routed or not sparse or index % settings.whole("moe_layer_freq", default=1):
        return "dense block", plain_network(settings, 0, index)[1]
    experts = _experts(settings, "moe_intermediate_size")
    count = settings.whole("n_shared_experts", default=0, least=0)
    wide = count * settings.whole("moe_intermediate_size")
    shared = (ffn(wide, gated=True, bias=False, name="shared experts"),) if count else ()
    return "MoE block", (*shared, *experts)


def mamba_layer(settings: Settings, width: int, prefix: str = "") -> Part:
    """Return a Mamba mixer; Jamba's keys have a prefix."""
    names = ("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank") if prefix else (
        "state_size", "conv_kernel", "expand", "time_step_rank")  # fmt: skip
    settings.refuse(
        f"{prefix}conv_bias" if prefix else "use_conv_bias",
        True,
        "a convolution without biases is not known here",
    )
    inner = settings.whole(names[2], default=2) * width
    if not prefix:
        inner = settings.whole("intermediate_size", default=inner)
    rank = -(-width // 16)
    if settings.get(names[3]) != "auto":
        rank = settings.whole(names[3], default=rank)
    sizes = {
        "inner": inner,
        "state": settings.whole(names[0], default=16),
        "kernel": settings.whole(names[1], default=4),
        "rank": rank,
    }
    bias = settings.flag(f"{prefix}proj_bias" if prefix else "use_bias", default=False)
    return Part("mamba", "mamba", sizes, {"bias": "all"} if bias else {})


def jamba_layer(settings: Settings, width: int, index: int) -> Layer:
    """Return a layer of Jamba: attention or Mamba, then a network or experts, each in its own rhythm."""
    place = (
        settings.whole("attn_layer_offset", default=4, least=0),
        settings.whole("attn_layer_period", default=8),
    )
    attends = index % place[1] == place[0]
    place = (
        settings.whole("expert_layer_offset", default=1, least=0),
        settings.whole("expert_layer_period", default=2),
    )
    sparse = (
        settings.whole("num_experts", "num_local_experts", default=16) > 1 and index % place[1] == place[0]
    )
    if attends:
        mixer: tuple[Part, ...] = (attention(settings, width, bias="none"),)
    else:
        mamba = mamba_layer(settings, width, "mamba_")
        widths = {"Δ": mamba.sizes["rank"], "B": mamba.sizes["state"], "C": mamba.sizes["state"]}
        mixer = (mamba, *(norm(f"{name} norm", "rms", size) for name, size in widths.items()))
    if sparse:
        network = _experts(settings, "intermediate_size")
    else:
        network = plain_network(settings, width, index)[1]
    name = f"{'attention' if attends else 'Mamba'} {'MoE ' if sparse else ''}block"
    return name, (norm("mixer norm", "rms"), *mixer, norm("ffn norm", "rms"), *network)
