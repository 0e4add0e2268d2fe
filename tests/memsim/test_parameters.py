"""Parameter counts: released models to the last parameter, transformers' own modules, errors and mutants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memsim.decoder import decoder_letters
from memsim.model import Part, dense, model, model_names, padded_vocabulary
from memsim.parameters import PARTS, non_embedding_parameters, parameters
from refimpl import registry
from refimpl.errors import LawViolation, OptionError, UnknownNameError
from refimpl.testing import draw

registry.load()
# Sums over the tensors of the released checkpoints.
RELEASED = {
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "minilm-l6": 22_713_216,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released(name: str) -> None:
    assert parameters(model=name).total == RELEASED[name]


@pytest.mark.parametrize(("L", "d"), [(12, 768), (24, 2048), (32, 2560), (32, 4096), (96, 12288)])
def test_opt_by_the_formula_of_its_table(L: int, d: int) -> None:
    name = {768: "opt-125m", 2048: "opt-1.3b", 2560: "opt-2.7b", 4096: "opt-6.7b", 12288: "opt-175b"}[d]
    assert parameters(model=name).total == L * (12 * d * d + 13 * d) + (50272 + 2050) * d + 2 * d


def _config(transformers: Any, name: str) -> Any:
    """A configuration of transformers, written out here and not read from the data files."""
    match name:
        case "gpt2":
            return transformers.GPT2Config()
        case "bert-base":
            return transformers.BertConfig()
        case "opt-350m":
            return transformers.OPTConfig(
                hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
                word_embed_proj_dim=512, do_layer_norm_before=False,
            )  # fmt: skip
        case "llama-3-8b":
            return transformers.LlamaConfig(
                vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
            )  # fmt: skip
    return transformers.OPTConfig()


@pytest.mark.parametrize("name", ["bert-base", "opt-350m", "llama-3-8b", "gpt2", "opt-125m"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_on_the_meta_device(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    auto = transformers.AutoModel if name == "bert-base" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        built = auto.from_config(_config(transformers, name))
    assert sum(p.numel() for p in built.parameters()) == parameters(model=name).total


def test_dense_describes_what_the_files_do() -> None:
    llama = dense(
        layers=32, width=4096, heads=32, key_heads=8, ffn=14336, vocabulary=128256, gated=True, bias=False,
        norm="rms", tied=False,
    )  # fmt: skip
    assert parameters(model=llama).total == RELEASED["llama-3-8b"]


def test_padding_is_megatrons() -> None:
    # 50257 rows are 50304 at multiples of 128: 47 rows of 768 more, in the tied table only once.
    assert parameters(model="gpt2", pad_vocabulary=128).total - RELEASED["gpt2"] == 47 * 768
    assert parameters(model="llama-7b", pad_vocabulary=64).total == parameters(model="llama-7b").total


@pytest.mark.parametrize("name", ["gpt2", "llama-3-8b", "opt-350m", "t5-base"])
def test_a_padded_description_is_a_padded_count(name: str) -> None:
    padded = parameters(model=padded_vocabulary(model(name), 4096)).total
    assert padded == parameters(model=name, pad_vocabulary=4096).total > parameters(model=name).total


def test_a_tied_head_is_held_again_by_the_last_stage() -> None:
    assert decoder_letters("gpt2")["P_e"] == 50257 * 768
    assert decoder_letters("gpt2", pad_vocabulary=128)["P_e"] == 50304 * 768
    assert decoder_letters("opt-350m")["P_e"] == 50272 * 512
    assert decoder_letters("llama-2-7b")["P_e"] == 0


def test_terms_add_up_and_name_their_tensors() -> None:
    for name in model_names():
        found = parameters(model=name)
        assert len({item.name for item in found.terms}) == len(found.terms)
        assert found.total == sum(item.value for item in found.terms)
        embedded = any(part.kind == "embedding" for stack in model(name).stacks for part in stack.parts)
        assert (non_embedding_parameters(model=name).total < found.total) is embedded
    assert parameters(model="opt-350m")["embeddings: projection in"] == 512 * 1024


def test_biases_of_queries_keys_and_values_alone() -> None:
    part = model("llama-3-8b").part("block", "attention")
    formula, values = PARTS["attention"](replace(part, choices={"bias": "qkv"}), 4096, 1)
    plain, _ = PARTS["attention"](part, 4096, 1)
    assert formula.removeprefix(plain) == " + k*(H + 2G)"
    assert values == {"d": 4096, "H": 32, "G": 8, "k": 128}


TINY: dict[str, Any] = {"layers": 1, "width": 6, "ffn": 1, "vocabulary": 1}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: parameters(model="gpt-2"), UnknownNameError, "did you mean .*gpt2"),
        (lambda: parameters(model=3), OptionError, "model: expected one of"),  # type: ignore[arg-type]
        (lambda: parameters(model="gpt2", pad_vocabulary=0), OptionError, "pad_vocabulary"),
        (lambda: model("gpt2").part("block", "moe"), UnknownNameError, "part of gpt2"),
        (lambda: parameters(model=dense(**TINY, heads=4)), OptionError, "divide the width"),
        (lambda: parameters(model=dense(**TINY, heads=3, key_heads=2)), OptionError, "key heads"),
        (lambda: dense(**TINY, heads=0), OptionError, "heads: expected a whole"),
        (lambda: dense(**TINY, heads=1, norm="l2"), OptionError, "norm: expected"),  # type: ignore[arg-type]
        (lambda: PARTS["norm"](Part("norm", "n", {}, {"style": "l2"}), 4, 1), OptionError, "style"),
        (lambda: PARTS["ffn"](Part("ffn", "n", {"width": 4}, {"bias": "some"}), 4, 1), OptionError, "bias"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


attention, ffn = PARTS["attention"], PARTS["ffn"]
Counted = tuple[str, Any]


def head_never_tied(part: Part, d: int, pad: int) -> Counted:
    return "V*d", {"V": part.sizes["rows"], "d": d}


def key_heads_ignored(part: Part, d: int, pad: int) -> Counted:
    sizes = {name: size for name, size in part.sizes.items() if name != "key_heads"}
    return attention(replace(part, sizes=sizes), d, pad)


def output_projection_forgotten(part: Part, d: int, pad: int) -> Counted:
    formula, values = attention(part, d, pad)
    return formula.replace(" + H*k*d", ""), values


def gate_forgotten(part: Part, d: int, pad: int) -> Counted:
    return ffn(replace(part, choices={**part.choices, "gated": False}), d, pad)


def norm_without_bias(part: Part, d: int, pad: int) -> Counted:
    return "d", {"d": d}


def vocabulary_rounded_down(part: Part, d: int, pad: int) -> Counted:
    return "V*d", {"V": part.sizes["rows"] // pad * pad, "d": d}


MUTATED = {
    "head": head_never_tied,
    "attention": key_heads_ignored,
    "attention ": output_projection_forgotten,
    "ffn": gate_forgotten,
    "norm": norm_without_bias,
    "embedding": vocabulary_rounded_down,
}


@pytest.mark.parametrize(("kind", "counter"), MUTATED.items())
def test_wrong_counts_are_caught_by_laws(
    kind: str, counter: Callable[..., Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, kind.strip(), counter)
    record = registry.get("cost.parameters")
    assert record.sample is not None
    broken = set()
    for seed in range(12):
        case = record.sample(np.random.default_rng(seed), **draw(record, seed))
        for law in registry.laws_of("cost.parameters"):
            try:
                law.function(parameters, case, None)
            except LawViolation:
                broken.add(law.name)
    assert broken, f"{counter.__name__} survived the laws"
