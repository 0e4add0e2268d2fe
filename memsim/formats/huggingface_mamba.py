"""Mamba, Mamba-2, and the decoders that mix one of them with attention."""

from __future__ import annotations

from memsim.formats.huggingface_blocks import (
    Layer,
    Reader,
    attention,
    between_embedding_and_head,
    layers_of,
    norm,
    stacked,
)
from memsim.formats.huggingface_networks import experts, gated
from memsim.formats.settings import Settings
from memsim.model import Part, Stack
from refimpl.errors import OptionError

__all__ = ["HYBRIDS"]


def _mamba_part(settings: Settings, width: int, prefix: str = "") -> Part:
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
    choices: dict[str, str | bool] = {"bias": "all"} if bias else {}
    if prefix:  # norms of Δ, B and C
        choices["split"] = True
    return Part("mamba", "mamba", sizes, choices)


def _mamba2_part(settings: Settings, width: int, prefix: str = "") -> Part:
    """Return a Mamba-2 mixer; Bamba's keys have a prefix."""
    names = (
        ("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_n_groups", "mamba_n_heads", "mamba_d_head")
        if prefix
        else ("state_size", "conv_kernel", "expand", "n_groups", "num_heads", "head_dim")
    )
    inner = settings.whole(names[2], default=2) * width
    heads = settings.whole(names[4])
    if settings.get(names[5]) not in (None, "auto") and heads * settings.whole(names[5]) != inner:
        raise OptionError(
            f"{settings.where}: {names[5]}: expected {heads} heads to make up {inner}; "
            f"got {settings.whole(names[5])}"
        )
    sizes = {
        "inner": inner,
        "state": settings.whole(names[0]),
        "kernel": settings.whole(names[1]),
        "groups": settings.whole(names[3]),
        "heads": heads,
    }
    choices: dict[str, str | bool] = {}
    if settings.flag(f"{prefix}proj_bias" if prefix else "use_bias", default=False):
        choices["bias"] = "all"
    if not settings.flag(f"{prefix}conv_bias" if prefix else "use_conv_bias", default=False):
        choices["convolution_bias"] = False
    return Part("mamba2", "mamba", sizes, choices)


def _only(settings: Settings, mixer: Part, *, tied: bool) -> list[Stack]:
    blocks = [Stack("block", layers_of(settings), (norm("norm", "rms"), mixer))]
    return between_embedding_and_head(settings, blocks, norm("final norm", "rms"), tied=tied)


def _mamba(settings: Settings, width: int) -> list[Stack]:
    return _only(settings, _mamba_part(settings, width), tied=True)


def _mamba2(settings: Settings, width: int) -> list[Stack]:
    return _only(settings, _mamba2_part(settings, width), tied=False)


def _jamba_layer(settings: Settings, width: int, index: int) -> Layer:
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
        mamba = _mamba_part(settings, width, "mamba_")
        widths = {"Δ": mamba.sizes["rank"], "B": mamba.sizes["state"], "C": mamba.sizes["state"]}
        mixer = (mamba, *(norm(f"{name} norm", "rms", size) for name, size in widths.items()))
    network = experts(settings) if sparse else gated("")(settings, width, index)[1]
    name = f"{'attention' if attends else 'Mamba'} {'MoE ' if sparse else ''}block"
    return name, (norm("mixer norm", "rms"), *mixer, norm("ffn norm", "rms"), *network)


def _jamba(settings: Settings, width: int) -> list[Stack]:
    blocks = stacked(_jamba_layer(settings, width, index) for index in range(layers_of(settings)))
    return between_embedding_and_head(settings, blocks, norm("final norm", "rms"), tied=False)


def _bamba(settings: Settings, width: int) -> list[Stack]:
    """Return Bamba: Mamba-2 in all layers but those that are listed, and a network in each."""
    attends = set(settings.wholes("attn_layer_indices"))

    def layer(index: int) -> Layer:
        if index in attends:
            bias = "all" if settings.flag("attention_bias", default=False) else "none"
            name, mixer = "attention block", attention(settings, width, bias=bias)
        else:
            name, mixer = "Mamba block", _mamba2_part(settings, width, "mamba_")
        network = gated()(settings, width, index)[1]
        return name, (norm("mixer norm", "rms"), mixer, norm("ffn norm", "rms"), *network)

    blocks = stacked(map(layer, range(layers_of(settings))))
    return between_embedding_and_head(settings, blocks, norm("final norm", "rms"), tied=False)


HYBRIDS: dict[str, Reader] = {
    "bamba": _bamba,
    "falcon_mamba": _mamba,
    "jamba": _jamba,
    "mamba": _mamba,
    "mamba2": _mamba2,
}
