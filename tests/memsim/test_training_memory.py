"""Training memory: transformers' own Llama, ranks and stages that add up, and mutants that laws catch."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from memsim.formats.huggingface import model_of_config
from memsim.formula import evaluate
from memsim.memory import activations as activations_module
from memsim.memory import korthikanti, model_states
from memsim.memory.activations import activations
from memsim.memory.kept_tensors import Keeping, Kept, kept_by
from memsim.memory.rank_model import block_layers, rank_model, stage_model
from memsim.model import Model, Part, model, model_names
from memsim.parameters import parameters
from refimpl import registry
from refimpl.errors import LawViolation, OptionError, UnknownNameError
from refimpl.testing import draw

registry.load()


def _saved(run: Callable[[], Any], own: Any) -> list[Any]:
    """Return one tensor for each storage that autograd saves of a run, besides those of `own`."""
    torch = pytest.importorskip("torch")
    known = {p.untyped_storage()._cdata for p in own}
    kept: dict[int, Any] = {}

    def keep(x: Any) -> Any:
        if x.untyped_storage()._cdata not in known:
            kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return list(kept.values())


def _size(tensors: list[Any]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


TOKENS = 128
# What transformers keeps besides: the labels of the next tokens, and how many of them count.
SHIFTED = 8 * (TOKENS + 1) + 4


@pytest.mark.parametrize(
    ("layers", "width", "inner", "heads", "keys"), [(2, 64, 172, 4, 4), (1, 48, 60, 6, 2)]
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_llama_keeps_it_to_the_byte(
    layers: int, width: int, inner: int, heads: int, keys: int
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 320, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys,
    }  # fmt: skip
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=False, attn_implementation="sdpa")
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.zeros((1, TOKENS), dtype=torch.int64)
    saved = _saved(lambda: built(input_ids=ids, labels=ids, use_cache=False), built.parameters())
    described = model_of_config({"model_type": "llama", **sizes})
    ours = activations(model=described, batch=1, sequence=TOKENS, fused_norm=False).total
    tables = 2 * 2 * TOKENS * (width // heads)  # sines and cosines of positions, bfloat16
    assert _size(saved) == ours + tables + SHIFTED


@pytest.mark.parametrize(
    ("family", "more", "attention", "besides"),
    [
        # Norms of queries and keys keep each head's, and what they make is only rotated.
        ("Qwen3", {}, "flash", 0),
        ("Qwen2", {}, "flash", 0),
        # Gemma's norms multiply in fp32; its embeddings are scaled by a number of two bytes.
        ("Gemma", {}, "flash", 2),
        # Gemma 3's second norms add to the stream; it has tables of positions for two kinds of layers.
        ("Gemma3Text", {"layer_types": ["sliding_attention", "full_attention"]}, "flash", 2 + 8192),
        # Gemma 2 caps scores and logits; written out, attention keeps its softmax in fp32 as well.
        ("Gemma2", {}, "standard", 2 + 2 * 4 * 4 * TOKENS**2),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_families_keep_it_to_the_byte(
    family: str, more: dict[str, Any], attention: str, besides: int
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    how = "sdpa" if attention == "flash" else "eager"
    config = getattr(transformers, f"{family}Config")(**sizes, **more, attn_implementation=how)
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.zeros((1, TOKENS), dtype=torch.int64)
    saved = _saved(lambda: built(input_ids=ids, labels=ids, use_cache=False), built.parameters())
    described = model_of_config(config.to_dict())
    ours = activations(model=described, batch=1, sequence=TOKENS, fused_norm=False, attention=attention).total
    assert _size(saved) == ours + 2 * 2 * TOKENS * 16 + SHIFTED + besides


@pytest.mark.parametrize("query_rank", [40, None])
@pytest.mark.filterwarnings("ignore")
def test_transformers_latent_attention_keeps_it_to_the_byte(query_rank: int | None) -> None:
    """All but the attention itself, which PyTorch has no flash kernel for on a CPU."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 5, "num_key_value_heads": 5, "kv_lora_rank": 24, "q_lora_rank": query_rank,
        "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "first_k_dense_replace": 9,
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 7,
    }  # fmt: skip
    config = transformers.DeepseekV3Config(**sizes, attn_implementation="sdpa")
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    ids = torch.zeros((1, TOKENS), dtype=torch.int64)
    saved = _saved(lambda: built(input_ids=ids, labels=ids, use_cache=False), built.parameters())
    outside = [x for x in saved if not (x.ndim == 3 and x.shape[0] == 5 and x.dtype == torch.float32)]
    assert len(saved) - len(outside) == 4 * 2  # queries, keys, values and scores of each layer
    described = model_of_config({"model_type": "deepseek_v3", **sizes})
    ours = activations(model=described, batch=1, sequence=TOKENS, fused_norm=False).total
    inside = 2 * TOKENS * (2 * 2 * 5 * 20 + 2 * 5 * (12 + 10) + 4 * 5)
    tables = 2 * 2 * TOKENS * 8 // 2 * 2
    assert _size(outside) == ours - inside + tables + SHIFTED


@pytest.mark.parametrize("gated", [True, False])
def test_experts_keep_it_to_the_byte(gated: bool) -> None:
    """A mixture written out: router, copies sorted by experts, networks, weighted sums."""
    torch = pytest.importorskip("torch")
    width, inner, experts, active, tokens = 12, 7, 5, 2, 30
    weights: list[Any] = []

    def weight(*shape: int) -> Any:
        weights.append(torch.randn(shape, dtype=torch.bfloat16, requires_grad=True))
        return weights[-1]

    y = torch.randn((tokens, width), dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        probabilities = (y @ weight(width, experts)).float().softmax(-1)
        shares, chosen = probabilities.topk(active, -1)
        order = chosen.flatten().argsort()
        token = order // active
        copies = y[token]
        counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
        made = []
        for x in copies.split(counts):
            hidden = x @ weight(width, inner)
            if gated:
                hidden = torch.nn.functional.silu(hidden) * (x @ weight(width, inner))
            else:
                hidden = torch.nn.functional.gelu(hidden)
            made.append(hidden @ weight(inner, width))
        back = torch.cat(made)[order.argsort()].view(tokens, active, width)
        (back * shares.to(torch.bfloat16)[..., None]).sum(1)

    saved = _saved(run, [])
    saved = [
        x for x in saved if x.untyped_storage()._cdata not in {w.untyped_storage()._cdata for w in weights}
    ]
    stream = tokens * width * 2  # what the norm before has made, and counts
    choices: dict[str, str | bool] = {"gated": True} if gated else {}
    parts = [
        Part("linear", "router", {"outputs": experts}),
        Part("experts", "experts", {"experts": experts, "active": active, "width": inner}, choices),
    ]
    letters = {"T": tokens, "e": 2, "u": 1}
    ours = sum(
        int(evaluate(kept.formula, letters | dict(kept.sizes)))
        for part in parts
        for kept in kept_by(part, width, Keeping())
    )
    assert _size(saved) == ours + stream


def _mamba2() -> Model:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 9, "num_heads": 8, "head_dim": 8}
    return model_of_config({"model_type": "mamba2", **sizes})


def test_mamba_keeps_what_its_kernel_saves() -> None:
    """Tensors of mamba_inner_fn's save_for_backward, written out for 130m: B 2, L 3000, two chunks."""
    b, s, d, i, n, r, layers = 2, 3000, 768, 1536, 16, 48, 24
    xz, x_dbl, b_and_c, out = 2 * b * 2 * i * s, 2 * b * s * (r + 2 * n), 2 * 2 * b * n * s, 2 * b * i * s
    intermediates, a = 4 * b * i * 2 * (2 * n), 2 * 4 * i * n
    norms = 2 * b * s * d * 2 + 4 * b * s
    ends = 8 * b * s + norms + 4 * b * s * 50280
    ours = activations(model="mamba-130m", batch=b, sequence=s)
    assert ours.total == layers * (xz + x_dbl + b_and_c + out + intermediates + a + norms) + ends


def test_ranks_hold_what_megatron_gives_them() -> None:
    # GPT-3 on t ranks: column and row slices of matrices, biases of columns; the rest on every rank.
    d, layers, rows, t = 12288, 96, 50257, 8
    sliced = layers * (12 * d * d + 7 * d) // t
    replicated = layers * (4 * d + 2 * d) + 2 * d + 2048 * d
    held = parameters(model=rank_model(model("gpt3-175b"), tensor=t)).total
    assert held == sliced + replicated + -(-rows // t) * d


def test_key_heads_that_are_too_few_are_on_several_ranks() -> None:
    # Llama-3-8B has 8 key heads: on 16 ranks each holds one of them.
    held = rank_model(model("llama-3-8b"), tensor=16).part("block", "attention").sizes
    assert (held["heads"], held["key_heads"], held["head_width"]) == (2, 1, 128)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "qwen1.5-moe"])
def test_experts_are_divided_once(name: str) -> None:
    whole = parameters(model=name)
    held = parameters(model=rank_model(model(name), expert=4))
    experts = sum(item.value for item in whole.terms if item.name.endswith(": experts"))
    assert held.total == whole.total - experts + Fraction(experts, 4)


@pytest.mark.parametrize("name", [name for name in model_names() if block_layers(model(name)) > 4])
@pytest.mark.parametrize("pipeline", [1, 2, 5])
def test_stages_add_up(name: str, pipeline: int) -> None:
    described = model(name)
    stages = [stage_model(described, pipeline=pipeline, index=index) for index in range(pipeline)]
    assert sum(map(block_layers, stages)) == block_layers(described)
    assert max(map(block_layers, stages)) - min(map(block_layers, stages)) <= 1
    total = sum(int(parameters(model=stage).total) for stage in stages)
    tied = any(p.kind == "head" and p.choices.get("tied") for s in described.stacks for p in s.parts)
    embedding = next(
        (i.value for i in parameters(model=described).terms if i.name == "embeddings: tokens"), 0
    )
    assert total == parameters(model=described).total + (embedding if tied and pipeline > 1 else 0)


def test_limits() -> None:
    shape: dict[str, Any] = {"model": "llama-2-7b", "batch": 1, "sequence": 64}
    bare = activations(**shape, recompute="full").total
    assert bare < activations(**shape).total
    # Ranks without number leave what every rank keeps: the stream and its norms.
    many = korthikanti.korthikanti_activations(
        hidden=8, batch=1, sequence=4, layers=3, heads=2, tensor=10**12
    )
    assert 0 < many.total - 3 * 4 * 8 * 10 < 1
    # As ranks grow, stage 1 tends to the undivided states from above.
    left = model_states.model_states(parameters=10**9, ranks=10**9, stage=1).total
    assert left == 4 * 10**9 + 12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: model_states.model_states(parameters=1, convention="mine"), UnknownNameError, "convention"),
        (lambda: model_states.model_states(parameters=1, stage=4), OptionError, "stage"),  # type: ignore[arg-type]
        (lambda: model_states.model_states(parameters=1, ranks=1.5), OptionError, "ranks"),
        (lambda: model_states.model_states(parameters=1, offload="x"), OptionError, "offload"),  # type: ignore[arg-type]
        (lambda: activations(model="gpt2", batch=0, sequence=1), OptionError, "batch"),
        (lambda: activations(model="gpt2", batch=1, sequence=1, recompute="some"), OptionError, "recompute"),  # type: ignore[arg-type]
        (lambda: activations(model="gpt2", batch=1, sequence=1, attention="x"), OptionError, "attention"),
        (lambda: activations(model=_mamba2(), batch=1, sequence=1), OptionError, "mamba2 .* not known"),
        (lambda: rank_model(model("gpt2"), tensor=5), OptionError, "divisor of the 12 heads"),
        (lambda: rank_model(model("mixtral-8x7b"), expert=3), OptionError, "divisor of the 8 experts"),
        (lambda: rank_model(model("deepseek-67b"), tensor=12), OptionError, "divisor"),
        (lambda: stage_model(model("gpt2"), pipeline=13, index=0), OptionError, "1 to 12 stages"),
        (lambda: stage_model(model("gpt2"), pipeline=2, index=2), OptionError, "from 0 to 1"),
        (lambda: korthikanti.korthikanti_activations(
            hidden=1, batch=1, sequence=1, layers=1, heads=1, recompute="x"),  # type: ignore[arg-type]
         OptionError, "recompute"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def _without(name: str) -> Callable[..., list[Kept]]:
    return lambda part, width, how: [kept for kept in kept_by(part, width, how) if kept.name != name]


def _replaced(name: str, formula: str) -> Callable[..., list[Kept]]:
    def mutant(part: Part, width: int, how: Keeping) -> list[Kept]:
        return [
            kept._replace(formula=formula) if kept.name == name else kept
            for kept in kept_by(part, width, how)
        ]

    return mutant


MUTANTS = {
    "norms keep no input": _without("input"),
    "statistics are forgotten": _without("statistics"),
    "softmax is not kept": _without("softmax"),
    "a mask of two bytes": _replaced("mask", "2T*d/u"),
    "masks are not divided": _replaced("mask of scores", "T*s*H*2"),
    "keys alone are kept": _replaced("keys and values", "e*T*G*k"),
    "before the GELU nothing is kept": _without("before activation"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_forgotten_tensors_are_caught_by_laws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations_module, "kept_by", MUTANTS[name])
    assert _broken("cost.training_memory.activations"), f"{name}: survived the laws"


FORMULAS = {
    ("selective", False): "(12 + 24/t)",
    ("none", True): "(34/t + 5a*s/(h))",
    ("none", False): "(10 + 24/t + 4a*s/(h*t))",
    ("full", False): "20",
}


@pytest.mark.parametrize("mode", FORMULAS)
def test_wrong_formulas_are_caught(mode: tuple[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(korthikanti._LAYER, mode, FORMULAS[mode])
    name = "cost.training_memory.korthikanti"
    judged = _broken(name) or any(
        case.call(registry.get(name).function).total != judge(**case.kwargs).item()
        for judge in registry.ORACLES[name]
        for case in _cases(name)
    )
    assert judged, f"{FORMULAS[mode]} survived"


@pytest.mark.parametrize("kind", ["weights", "gradients", "optimizer"])
def test_states_divided_too_early_are_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_states._DIVIDED_FROM, kind, model_states._DIVIDED_FROM[kind] - 1)
    assert _broken("cost.training_memory.states")


def _cases(name: str) -> list[registry.Case]:
    record = registry.get(name)
    assert record.sample is not None
    return [record.sample(np.random.default_rng(seed), **draw(record, seed)) for seed in range(16)]


def _broken(name: str) -> set[str]:
    broken = set()
    for case in _cases(name):
        for law in registry.laws_of(name):
            try:
                law.function(registry.get(name).function, case, None)
            except LawViolation:
                broken.add(law.name)
    return broken


def test_sound_formulas_survive() -> None:
    assert not any(
        _broken(f"cost.training_memory.{name}") for name in ("states", "korthikanti", "activations")
    )
    assert math.isfinite(float(activations(model="deepseek-v3", batch=1, sequence=4096).total))
