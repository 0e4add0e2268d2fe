"""The families after GPT-2: learned positions or ALiBi, LayerNorm, and names of settings of their own."""

from __future__ import annotations

from memsim.formats.huggingface_blocks import (
    Reader,
    attention,
    between_embedding_and_head,
    embedding,
    ffn,
    head,
    layers_of,
    norm,
    positions,
)
from memsim.formats.settings import Settings
from memsim.model import Part, Stack
from memsim.sparse_model import experts_block

__all__ = ["GPTS"]

_BARE = "layer without bias"


def _mixed(settings: Settings, *names: str, keys: int | None = None, bias: str = "all") -> Part:
    """Return attention whose heads are as wide as the model's width allows."""
    sizes = {"heads": settings.whole(*names)} | ({} if keys is None else {"key_heads": keys})
    return Part("attention", "attention", sizes, {} if bias == "none" else {"bias": bias})


def _block(mixed: Part, network: Part, style: str = "layer") -> tuple[Part, ...]:
    return norm("attention norm", style), mixed, norm("ffn norm", style), network


def _gpt2(settings: Settings, width: int) -> list[Stack]:
    settings.refuse("add_cross_attention", False, "expected a decoder without an encoder")
    network = ffn(settings.whole("n_inner", default=4 * width), gated=False, bias=True)
    keys = None
    if settings.get("model_type") == "gpt_bigcode" and settings.flag("multi_query", default=False):
        keys = 1
    block = _block(_mixed(settings, "n_head", "num_attention_heads", keys=keys), network)
    tables = (positions(settings, "n_positions", "n_ctx", "max_position_embeddings"),)
    blocks = [Stack("block", layers_of(settings), block)]
    return between_embedding_and_head(settings, blocks, norm("final norm"), tied=True, before=tables)


def _gpt_neo(settings: Settings, width: int) -> list[Stack]:
    network = ffn(settings.whole("intermediate_size", default=4 * width), gated=False, bias=True)
    block = _block(_mixed(settings, "num_heads", "num_attention_heads", bias="out"), network)
    blocks = [Stack("block", layers_of(settings, "num_layers", "num_hidden_layers"), block)]
    return between_embedding_and_head(
        settings, blocks, norm("final norm"), tied=True, before=(positions(settings),)
    )


def _gptj(settings: Settings, width: int) -> list[Stack]:
    network = ffn(settings.whole("n_inner", default=4 * width), gated=False, bias=True)
    block = norm("norm"), _mixed(settings, "n_head", bias="none"), network
    return [
        Stack("embeddings", 1, (embedding(settings),)),
        Stack("block", layers_of(settings), block),
        Stack("output", 1, (norm("final norm"), head(settings, tied=False, bias=True))),
    ]


def _bloom(settings: Settings, width: int) -> list[Stack]:
    block = _block(_mixed(settings, "n_head", "num_attention_heads"), ffn(4 * width, gated=False, bias=True))
    blocks = [Stack("block", layers_of(settings), block)]
    return between_embedding_and_head(
        settings, blocks, norm("final norm"), tied=True, before=(norm("embedding norm"),)
    )


def _mpt(settings: Settings, width: int) -> list[Stack]:
    inside = settings.section("attn_config")
    inside.refuse("alibi", True, "learned positions are not known here, as transformers has none")
    block = _block(
        _mixed(settings, "n_heads", "num_attention_heads", bias="none"),
        ffn(4 * width, gated=False, bias=False),
        _BARE,
    )
    blocks = [Stack("block", layers_of(settings, "n_layers", "num_hidden_layers"), block)]
    return between_embedding_and_head(settings, blocks, norm("final norm", _BARE), tied=True)


def _dbrx(settings: Settings, _width: int) -> list[Stack]:
    inside, network = settings.section("attn_config"), settings.section("ffn_config")
    mixed = _mixed(settings, "n_heads", keys=inside.whole("kv_n_heads", default=1), bias="none")
    count = network.whole("moe_num_experts", default=4)
    chosen = experts_block(
        experts=count,
        active=network.whole("moe_top_k", default=1, most=count),
        width=network.whole("ffn_hidden_size", default=3584),
        gated=True,
    )
    block = norm("attention norm", _BARE), mixed, norm("ffn norm", _BARE), *chosen
    blocks = [Stack("block", layers_of(settings, "n_layers"), block)]
    return between_embedding_and_head(settings, blocks, norm("final norm", _BARE), tied=False)


def _opt(settings: Settings, width: int) -> list[Stack]:
    settings.refuse("layer_norm_elementwise_affine", True, "norms without parameters are not known here")
    inner = settings.whole("word_embed_proj_dim", default=width)
    before = settings.flag("do_layer_norm_before", default=True)
    bias = settings.flag("enable_bias", default=True)
    # The released tables start at position 2.
    first, last = [embedding(settings, inner), positions(settings, more=2)], []
    if inner != width:
        first.append(Part("linear", "projection in", {"inputs": inner}))
        last.append(Part("linear", "projection out", {"outputs": inner}))
    mixed = _mixed(settings, "num_attention_heads", bias="all" if bias else "none")
    relu = settings.get("activation_function") in (None, "relu")
    network = ffn(settings.whole("ffn_dim"), gated=False, bias=bias, relu=relu)
    norms = norm("attention norm"), norm("ffn norm")
    block = (norms[0], mixed, norms[1], network) if before else (mixed, norms[0], network, norms[1])
    final = (
        [norm("final norm")]
        if before and not settings.flag("_remove_final_layer_norm", default=False)
        else []
    )
    return [
        Stack("embeddings", 1, tuple(first)),
        Stack("block", layers_of(settings), block),
        Stack("output", 1, (*final, *last, head(settings, tied=True, width=inner))),
    ]


def _gpt_neox(settings: Settings, width: int) -> list[Stack]:
    bias = "all" if settings.flag("attention_bias", default=True) else "none"
    network = ffn(settings.whole("intermediate_size"), gated=False, bias=True)
    block = _block(attention(settings, width, bias=bias), network)
    blocks = [Stack("block", layers_of(settings), block)]
    return between_embedding_and_head(settings, blocks, norm("final norm"), tied=False)


def _falcon(settings: Settings, width: int) -> list[Stack]:
    new = settings.flag("new_decoder_architecture", default=False)
    heads = settings.whole("num_attention_heads", "n_head")
    keys = 1 if settings.flag("multi_query", default=False) else heads
    if new:
        keys = settings.whole("num_kv_heads", "n_head_kv", default=heads)
    bias = settings.flag("bias", default=False)
    mixed = _mixed(settings, "num_attention_heads", "n_head", keys=keys, bias="all" if bias else "none")
    norms_in_parallel = settings.whole("num_ln_in_parallel_attn", default=2 if new else 1, most=2)
    two = norms_in_parallel == 2 or not settings.flag("parallel_attn", default=False)
    norms = [norm("attention norm"), norm("ffn norm")] if two else [norm("norm")]
    network = ffn(settings.whole("ffn_hidden_size", default=4 * width), gated=False, bias=bias)
    blocks = [Stack("block", layers_of(settings), (*norms[:1], mixed, *norms[1:], network))]
    return between_embedding_and_head(settings, blocks, norm("final norm"), tied=True)


GPTS: dict[str, Reader] = {
    "bloom": _bloom,
    "codegen": _gptj,
    "dbrx": _dbrx,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "mpt": _mpt,
    "opt": _opt,
}
