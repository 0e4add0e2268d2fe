"""Tiny random models give with our attention what they give with PyTorch's: prefill, generation, training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuda_backend
from cuda_backend.attention import attend as attending
from cuda_backend.transformers_attention import frugal_attention, options_of, register
from refimpl import attention as reference
from refimpl.attention import (
    flexible_attention,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
)
from refimpl.errors import ShapeError, UnsupportedError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
CLOSE = 2e-5  # logits of size 1 in float32, after two layers

SIZES: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
# A window of fewer tokens than any prompt here; Gemma's softcap, which SDPA refuses, bends scores of size 1.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "sdpa"),
    "mistral": ("Mistral", {"sliding_window": 4}, "sdpa"),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 4, "attn_logit_softcapping": 0.5, "head_dim": 8, "query_pre_attn_scalar": 1},
        "eager",
    ),
}
NAMES = tuple(MODELS)


def model(name: str, implementation: str) -> Any:
    kind, further, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES, **further, attn_implementation=implementation, initializer_range=0.3
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    return {name: (model(name, MODELS[name][2]), model(name, register())) for name in MODELS}


def tokens(count: int, seed: int = 1) -> Any:
    return torch.randint(1, 67, (2, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_padding(models: Any, name: str) -> None:
    ids = tokens(13)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :5] = 0
    right[1, -4:] = 0
    for mask in (None, left, right):
        with torch.no_grad():
            expected, found = (each(ids, attention_mask=mask).logits for each in models[name])
        live = torch.ones_like(ids).bool() if mask is None else mask.bool()
        assert (found - expected)[live].abs().max() < CLOSE * expected[live].abs().max()
        assert expected[live].abs().max() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_windows_and_softcaps_count(models: Any, name: str) -> None:
    """Without them the logits are others: what agrees above is what the model asks for."""
    if name == "llama":
        return
    ids, plain = tokens(13), model(name, "frugal_attention")
    for layer in plain.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    plain.config.sliding_window = 64
    plain.config.layer_types = ["full_attention"] * 2
    with torch.no_grad():
        assert (plain(ids).logits - models[name][1](ids).logits).abs().max() > 100 * CLOSE


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache(models: Any, name: str, cache: str | None) -> None:
    ids = tokens(7, 2)
    padded = torch.ones_like(ids)
    padded[1, :3] = 0
    for mask in (torch.ones_like(ids), padded):
        settings: Any = {
            "max_new_tokens": 8, "do_sample": False, "output_logits": True, "attention_mask": mask,
            "return_dict_in_generate": True, "cache_implementation": cache, "disable_compile": True,
        }  # fmt: skip
        expected, found = (each.generate(ids, **settings) for each in models[name])
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            assert (ours - theirs).abs().max() < CLOSE * theirs.abs().max()


def test_a_long_cache_is_decoded_in_parts(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of each step after the prompt, where nothing is padding."""
    monkeypatch.setattr(attending, "LONG", 8)
    calls: list[Any] = []
    decode = reference.split_kv_attention

    def counted(*arrays: Any, **options: Any) -> Any:
        calls.append(arrays[1].shape[1])
        return decode(*arrays, **options)

    monkeypatch.setattr(reference, "split_kv_attention", counted)
    settings: Any = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found, expected = (each.generate(tokens(9), **settings) for each in reversed(models["llama"]))
    assert torch.equal(found, expected)
    assert calls == [10, 10, 11, 11, 12, 12]


@pytest.mark.parametrize("name", NAMES)
def test_training_has_the_same_gradients(models: Any, name: str) -> None:
    ids = tokens(11, 3)
    padded = torch.ones_like(ids)
    padded[0, :4] = 0
    labels = ids.masked_fill(padded == 0, -100)
    labels[
        0, 4
    ] = -100  # the token before it is padding and sees nothing: 0 here, an average where it is eager
    for each in models[name]:
        each.zero_grad()
        each(ids, attention_mask=padded, labels=labels).loss.backward()
    theirs, ours = (dict(each.named_parameters()) for each in models[name])
    for parameter, expected in theirs.items():
        error = (ours[parameter].grad - expected.grad).abs().max()
        assert error < 5 * CLOSE * max(1.0, float(expected.grad.abs().max())), parameter
    assert theirs["model.layers.0.self_attn.k_proj.weight"].grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_window_needs_no_mask_of_all_scores(
    models: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at prefill nor while the cache holds no more than the window; padding does."""
    import cuda_backend.torch_ops

    given: list[Any] = []
    run = cuda_backend.torch_ops.masked_attention

    def seen(*arrays: Any, **options: Any) -> Any:
        given.append((options.get("attn_mask") is not None, options.get("window")))
        return run(*arrays, **options)

    monkeypatch.setattr(cuda_backend.torch_ops, "masked_attention", seen)
    ids = tokens(13)
    with torch.no_grad():
        models[name][1](ids)
    assert given == [(False, 4), (False, 4 if name == "mistral" else None)]
    given.clear()
    models[name][1].generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [mask for mask, _ in given] == [False] * 6
    given.clear()
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    with torch.no_grad():
        models[name][1](ids, attention_mask=padded)
    assert [mask for mask, _ in given] == [True] * 2


def test_our_attention_was_the_one_that_ran(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arrays: Any, **options: Any) -> Any:
        calls.append(options)
        return scaled_dot_product_attention(*arrays, **options)

    monkeypatch.setattr(reference, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        models["llama"][1](torch.ones(1, 3, dtype=torch.long))
    assert len(calls) == 2
    assert all(options["causal"] == "top_left" for options in calls)


def draws(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


LAYER = SimpleNamespace(is_causal=True)


def test_dropout_is_drawn_from_pytorchs_generator() -> None:
    """The same seed drops the same; what is dropped is what the reference drops, and has its gradient."""
    q, k, v = (draws(1, 2, 5, 3).requires_grad_() for _ in range(3))

    def call(seed: int) -> Any:
        torch.manual_seed(seed)
        return frugal_attention(LAYER, q, k, v, dropout=0.4)[0]

    assert torch.equal(call(1), call(1))
    assert not torch.equal(call(1), call(2))
    torch.manual_seed(1)
    seed = int(torch.zeros((), dtype=torch.long).random_())
    arrays = [x.detach().transpose(1, 2).numpy() for x in (q, k, v)]
    expected = scaled_dot_product_attention(*arrays, causal=True, dropout_p=0.4, rng=seed)
    assert np.abs(call(1).detach().numpy() - expected).max() < 1e-12
    assert torch.autograd.gradcheck(_seeded, (q, k, v))


def _seeded(q: Any, k: Any, v: Any) -> Any:
    torch.manual_seed(1)
    return frugal_attention(LAYER, q, k, v, dropout=0.4)[0]


def test_a_bias_has_a_gradient_and_joins_masks() -> None:
    q, k, v, bias = (
        draws(*s).requires_grad_() for s in ((1, 2, 4, 3), (1, 1, 5, 3), (1, 1, 5, 2), (1, 2, 4, 5))
    )
    mask = torch.ones(1, 1, 4, 5, dtype=torch.bool).tril(1)
    for given in (None, mask, torch.zeros(1, 1, 4, 5, dtype=torch.float64).masked_fill(~mask, -1e9)):
        layer = SimpleNamespace(is_causal=False)

        def call(q: Any, k: Any, v: Any, bias: Any, given: Any = given, layer: Any = layer) -> Any:
            return frugal_attention(layer, q, k, v, given, position_bias=bias)[0]

        assert torch.autograd.gradcheck(call, (q, k, v, bias))
        whole = bias if given is None else torch.where(mask, bias, -1e9)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, whole, enable_gqa=True)
        assert (call(q, k, v, bias).transpose(1, 2) - expected).abs().max() < 1e-12


def test_options_as_functions_say_the_same() -> None:
    """On the host by the reference, and in the simulator by the kernels that the GPU runs."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, h, 4)) for n, h in ((6, 4), (6, 2), (6, 2)))
    for shape in ((1, 1), (2, 1), (1, 4), (2, 4)):
        mask = rng.random((*shape, 6, 6)) < 0.6
        for options in ({"attn_mask": mask}, {"attn_mask": mask, "softcap": 0.7, "scale": 0.3}):
            functions = attending.as_functions(options)
            assert functions is not None
            expected = scaled_dot_product_attention(q, k, v, **options)
            assert np.abs(flexible_attention(q, k, v, **functions) - expected).max() < 1e-12
    functions = attending.as_functions({"causal": "top_left", "softcap": 0.7})
    assert functions is not None
    single = [x.astype(np.float32) for x in (q, k, v)]
    found = cuda_backend.flexible_attention(*single, **functions)
    assert np.abs(found - scaled_dot_product_attention(q, k, v, causal=True, softcap=0.7)).max() < CLOSE
    for refused in ({"bias": 1}, {"attn_mask": mask, "causal": "top_left"}, {"causal": "top_left"}):
        assert attending.as_functions(refused) is None


@pytest.mark.cudasim
@pytest.mark.parametrize(
    ("wanted", "ran"),
    [
        ({"causal": "top_left"}, "flash_attention"),
        ({"causal": "top_left", "softcap": 0.7}, "flexible_attention"),
        ({"attn_mask": True}, "flexible_attention"),
        ({"causal": "top_left", "window": 3, "softcap": 0.7}, "flexible_attention"),
        ({"causal": "top_left", "window": 3, "dropout_p": 0.3, "rng": 5}, "flash_attention"),
        ({"attn_mask": True, "dropout_p": 0.3, "rng": 5}, "flash_attention"),
        ({"bias": True, "causal": "top_left"}, "flash_attention"),
    ],
)
def test_the_way_through_the_kernels(
    wanted: dict[str, Any], ran: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens to tensors of the GPU, with tensors of the host that the simulator takes as arrays."""
    calls: list[str] = []

    def simulated(name: str) -> Any:
        function = getattr(cuda_backend, name)

        def called(*tensors: Any, **options: Any) -> Any:
            calls.append(name)
            options = {key: x.numpy() if hasattr(x, "numpy") else x for key, x in options.items()}
            if "aux" in options:
                options["aux"] = tuple(x.numpy() for x in options["aux"])
            found = function(*(x.contiguous().numpy() for x in tensors), **options)
            return type(found)(*(None if x is None else torch.from_numpy(x) for x in found))

        return called

    for name in ("flash_attention", "flash_attention_vjp", "flexible_attention", "flexible_attention_vjp"):
        monkeypatch.setattr(cuda_backend, name, simulated(name), raising=False)
    q, k, v, do = (draws(1, 6, heads, 3).float() for heads in (2, 1, 1, 2))
    options = dict(wanted)
    if "attn_mask" in options:
        options["attn_mask"] = draws(1, 2, 6, 6) < 0.5
    if "bias" in options:
        options["bias"] = draws(1, 2, 6, 6).float()
    out, lse = attending.forward(q, k, v, options)
    found = attending.gradients((q, k, v, out, lse, do), options)
    arrays: Any = tuple(x.double().numpy() for x in (q, k, v, do))
    exact = {key: x.numpy() if hasattr(x, "numpy") else x for key, x in options.items()}
    if exact.pop("window", None):
        exact = {key: x for key, x in exact.items() if key != "causal"}
        i, j = np.ogrid[:6, :6]
        exact["attn_mask"] = (j <= i) & (j > i - 3)
    assert np.abs(out.numpy() - scaled_dot_product_attention(*arrays[:3], **exact)).max() < CLOSE
    truth = scaled_dot_product_attention_vjp(*arrays, **exact)
    for ours, expected in zip(found, truth, strict=True):
        assert (ours is None) == (expected is None)
        assert expected is None or np.abs(ours.numpy() - expected).max() < CLOSE
    assert calls == [ran, f"{ran}_vjp"]


def test_the_operator_is_sound() -> None:
    """Schema, shapes without data, autograd's registration, and all of it traced."""
    from cuda_backend.attention.autograd_masked import register as operator

    q, k, v, bias = (
        draws(*s).requires_grad_() for s in ((1, 4, 2, 3), (1, 5, 1, 3), (1, 5, 1, 2), (1, 1, 4, 5))
    )
    mask = torch.ones(1, 2, 4, 5, dtype=torch.bool).tril(1)
    for given in ((mask, None), (None, bias)):
        torch.library.opcheck(operator(torch), (q, k, v, *given, "", None, 0.7, 0.3, 0.0, 0))
    torch.library.opcheck(operator(torch), (q, k, v, None, None, "top_left", 2, None, None, 0.0, 0))


def test_a_compiled_model_has_one_graph() -> None:
    """Prefill with padding, in training: no break, and the gradients that it has uncompiled."""
    ids = tokens(7)
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    one, other = model("mistral", register()), model("mistral", register())
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for each in (one, compiled):
        each(ids, attention_mask=padded, use_cache=False).logits[:, -1].square().sum().backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < CLOSE * max(1.0, float(a.grad.abs().max()))


def test_masks_of_transformers_as_options() -> None:
    q, k, mask = draws(2, 2, 3, 4), draws(2, 2, 5, 4), torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert options_of(q, k, mask, None, True)["attn_mask"].shape == (1, 1, 3, 5)
    assert options_of(q, k, None, None, True) == {"causal": "top_left"}
    assert options_of(q[:, :, :1], k, None, None, True) == options_of(q, k, None, None, False) == {}
    with pytest.raises(ShapeError, match=r"attention_mask: expected shape \(B or 1, Hq or 1, 3, 5\)"):
        options_of(q, k, torch.ones(2, 5, dtype=torch.bool), None, True)


def test_what_is_refused() -> None:
    x = draws(1, 1, 2, 2)
    with pytest.raises(UnsupportedError, match="no s_aux"):
        frugal_attention(LAYER, x, x, x, s_aux=torch.zeros(1))
