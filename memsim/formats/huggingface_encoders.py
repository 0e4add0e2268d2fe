"""Encoders, and encoders with a decoder: BERT and its like, T5, BART."""

from __future__ import annotations

from memsim.formats.huggingface_blocks import Reader, embedding, ffn, head, layers_of, norm, positions
from memsim.formats.settings import Settings
from memsim.model import Part, Stack

__all__ = ["ENCODERS"]

_T5_NETWORKS = tuple(
    f"{gate}{name}" for gate in ("", "gated-") for name in ("relu", "gelu", "gelu_new", "silu")
)


def _bert(settings: Settings, _width: int) -> list[Stack]:
    settings.refuse("is_decoder", False, "expected an encoder")
    tables = (
        embedding(settings),
        positions(settings),
        Part("embedding", "segments", {"rows": settings.whole("type_vocab_size")}),
        norm("norm"),
    )
    return [
        Stack("embeddings", 1, tables),
        Stack("block", layers_of(settings), _after(settings, "num_attention_heads", "intermediate_size")),
        Stack("output", 1, (Part("linear", "pooler", {}, {"bias": "all"}),)),
    ]


def _distilbert(settings: Settings, _width: int) -> list[Stack]:
    """Return DistilBERT, which has neither segments nor a pooler, and so no output of its own."""
    tables = embedding(settings), positions(settings), norm("norm")
    block = _after(settings, "n_heads", "hidden_dim")
    return [Stack("embeddings", 1, tables), Stack("block", layers_of(settings, "n_layers"), block)]


def _after(settings: Settings, heads: str, inner: str) -> tuple[Part, ...]:
    """Return a layer with its norms after attention and network, and all biases."""
    return (
        Part("attention", "attention", {"heads": settings.whole(heads)}, {"bias": "all"}),
        norm("attention norm"),
        ffn(settings.whole(inner), gated=False, bias=True),
        norm("ffn norm"),
    )


def _t5(settings: Settings, _width: int) -> list[Stack]:
    """Return T5: RMSNorm before all, no biases, and a table of relative positions in each half.

    Its heads may together be wider than the model; uMT5 has the table in every layer.
    """
    everywhere = settings.get("model_type") == "umt5"
    heads = settings.whole("num_heads")
    buckets = settings.whole("relative_attention_num_buckets")
    sizes = {"heads": heads, "head_width": settings.whole("d_kv")}
    kind = settings.choice("feed_forward_proj", _T5_NETWORKS, default="relu")
    network = ffn(settings.whole("d_ff"), gated=kind.startswith("gated-"), bias=False, relu=kind == "relu")
    table = Part("embedding", "relative positions", {"rows": buckets, "width": heads})

    def block(*more: str) -> tuple[Part, ...]:
        parts: list[Part] = []
        for name in ("attention", *more):
            parts += [norm(f"{name} norm", "rms"), Part("attention", name, sizes)]
        own = (table,) if everywhere else ()
        return *own, *parts, norm("ffn norm", "rms"), network

    encoder = layers_of(settings, "num_layers")
    decoder = layers_of(settings, "num_decoder_layers", "num_layers")
    tables = () if everywhere else tuple(
        Part("embedding", f"{half}'s relative positions", table.sizes) for half in ("encoder", "decoder")
    )  # fmt: skip
    ends = (norm("encoder's final norm", "rms"), norm("decoder's final norm", "rms"))
    return [
        Stack("embeddings", 1, (embedding(settings), *tables)),
        Stack("encoder block", encoder, block()),
        Stack("decoder block", decoder, block("cross-attention")),
        Stack("output", 1, (*ends, head(settings, tied=True))),
    ]


def _bart(settings: Settings, _width: int) -> list[Stack]:
    """Return BART, whose norms stand after attention and network, or mBART, whose norms stand before."""
    before = settings.get("model_type") == "mbart"
    settings.refuse("tie_word_embeddings", True, "halves with tables of their own are not known here")

    def block(half: str, *more: str) -> Stack:
        heads = {"heads": settings.whole(f"{half}_attention_heads")}
        parts: list[Part] = []
        for name in ("attention", *more):
            pair = norm(f"{name} norm"), Part("attention", name, heads, {"bias": "all"})
            parts += pair if before else reversed(pair)
        last = norm("ffn norm"), ffn(settings.whole(f"{half}_ffn_dim"), gated=False, bias=True)
        parts += last if before else reversed(last)
        return Stack(f"{half} block", layers_of(settings, f"{half}_layers"), tuple(parts))

    halves = ("encoder", "decoder")
    tables = [positions(settings, more=2, name=f"{half}'s positions") for half in halves]
    norms = [norm(f"{half}'s embedding norm") for half in halves]
    ends = [norm(f"{half}'s final norm") for half in halves] if before else []
    return [
        Stack("embeddings", 1, (embedding(settings), *tables, *norms)),
        block("encoder"),
        block("decoder", "cross-attention"),
        Stack("output", 1, (*ends, head(settings, tied=True))),
    ]


ENCODERS: dict[str, Reader] = {
    "bart": _bart,
    "bert": _bert,
    "distilbert": _distilbert,
    "mbart": _bart,
    "mt5": _t5,
    "roberta": _bert,
    "t5": _t5,
    "umt5": _t5,
    "xlm-roberta": _bert,
}
